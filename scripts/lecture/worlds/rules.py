"""Words labelled by a hidden rule: classification that a model can learn in its context, or in its weights.

    d A κ > 1   g H β > 2   b E θ > 0   ...

A document is lines of one rule, which is never named: the label says of which quarter of its alphabet one letter of
the word is, the letter at the same place in all lines; the rule is which place (above, the first). Whoever predicts
a label must find out from the lines before it which rule this document has. How well that can be done is computed
here, by listing the rules: the posterior is uniform over those that agree with all labels so far. A fifth of all
words are held out.
Tests: tests/test_rules.py.
"""

import itertools

import numpy as np

LETTERS, WORD, LABELS = 12, 3, 4        # of an alphabet; of a word, whose every place has an alphabet of its own
ARROW = LETTERS * WORD                  # the tokens below it are letters
LABEL, MASK = ARROW + 1, ARROW + 1 + LABELS                     # labels are tokens LABEL .. MASK - 1
VOCABULARY = MASK + 1
LINE = WORD + 2                                 # letters, arrow, label


def all_words(held_out):
    """The words (N,WORD) that are held out, or those that are not."""
    words = np.array(list(itertools.product(range(LETTERS), repeat=WORD)))
    return words[((words * (3, 7, 1)).sum(axis=1) % 5 == 0) == held_out]


def labels(words, rule):
    """0 .. LABELS - 1 for words (...,WORD) under a rule, a number or an array that goes with (...)."""
    rule = np.broadcast_to(rule, words.shape[:-1])
    return np.take_along_axis(words, rule[..., None], axis=-1)[..., 0] * LABELS // LETTERS


def draw(rng, count, lines, held_out=False):
    """words (count,lines,WORD) and labels (count,lines), a rule of its own for each row."""
    pool = all_words(held_out)
    words = pool[rng.integers(len(pool), size=(count, lines))]
    return words, labels(words, rng.integers(WORD, size=(count, 1)))


def document(words, labels):
    """Words (B,n,WORD) and their labels (B,n) as text: tokens (B, n LINE), and a mask that is 1 on labels."""
    tokens = np.full((*labels.shape, LINE), ARROW)
    tokens[..., :WORD], tokens[..., -1] = words + LETTERS * np.arange(WORD), LABEL + labels
    mask = np.zeros(tokens.shape)
    mask[..., -1] = 1
    return tokens.reshape(len(words), -1), mask.reshape(len(words), -1)


def best_accuracy(words, answers):
    """How often the best predictor is right about each label, given those before it: (n,), the mean over B rows.

    It names what more of the rules that are left say, and is right with their share: exact for these words.
    """
    said = np.array([labels(words, rule) for rule in range(WORD)])                  # (WORD,B,n)
    agree = np.cumprod(said == answers, axis=2)
    left = np.concatenate([np.ones_like(agree[..., :1]), agree[..., :-1]], axis=2)
    votes = [(left * (said == label)).sum(axis=0) for label in range(LABELS)]
    return (np.max(votes, axis=0) / left.sum(axis=0)).mean(axis=0)
