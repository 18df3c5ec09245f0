"""Words labelled by a hidden rule: classification that a model can learn in its context or in its weights.

    d A κ > 1   g H β > 2   b E θ > 0   ...

A document is several lines under one rule, and the rule is never stated. The label of a word is the quarter of the
alphabet that one of its letters is in. That letter is at the same position in all lines; the rule is the position
(above, the first). To predict a label, a model must infer the rule from the lines before it. best_accuracy computes
the best possible accuracy by listing the rules: the posterior is uniform over the rules that agree with all labels so
far. A fifth of all words are held out.
Tests: tests/test_rules.py.
"""

import itertools

import numpy as np

from minilm import checks

LETTERS, WORD, LABELS = 12, 3, 4        # letters of an alphabet; positions of a word, each with its own alphabet
ARROW = LETTERS * WORD                  # the tokens below it are letters
LABEL = ARROW + 1                       # labels are tokens LABEL .. MASK - 1
MASK = LABEL + LABELS
VOCABULARY = MASK + 1
LINE = WORD + 2                                 # letters, arrow, label


def all_words(held_out: bool) -> np.ndarray:
    """The held-out words or the training words, (N,WORD)."""
    words = np.array(list(itertools.product(range(LETTERS), repeat=WORD)))
    return words[((words * (3, 7, 1)).sum(axis=1) % 5 == 0) == held_out]


def labels(words: np.ndarray, rule) -> np.ndarray:
    """0 .. LABELS - 1 for words (...,WORD); rule: an integer, or an array that broadcasts to (...)."""
    rule = np.broadcast_to(checks.indices("labels", "rule", rule, WORD), words.shape[:-1])
    return np.take_along_axis(words, rule[..., None], axis=-1)[..., 0] * LABELS // LETTERS


def draw(rng: np.random.Generator, count: int, lines: int, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """words (count,lines,WORD) and labels (count,lines), with one rule per row."""
    pool = all_words(held_out)
    words = pool[rng.integers(len(pool), size=(count, lines))]
    return words, labels(words, rng.integers(WORD, size=(count, 1)))


def document(words: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words (B,n,WORD) and labels (B,n) as text: tokens (B, n LINE), and a mask of that shape, 1 on labels."""
    tokens = np.full((*labels.shape, LINE), ARROW)
    tokens[..., :WORD] = words + LETTERS * np.arange(WORD)
    tokens[..., -1] = LABEL + labels
    mask = np.zeros(tokens.shape)
    mask[..., -1] = 1
    return tokens.reshape(len(words), -1), mask.reshape(len(words), -1)


def best_accuracy(words: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The accuracy of the best predictor of each label, given the lines before it: (n,), the mean over B rows.

    Of the rules that agree with the lines so far, the best predictor gives the label of the largest group; its
    probability of being correct is the share of that group. Exact for these words.
    """
    predicted = np.array([labels(words, rule) for rule in range(WORD)])             # (WORD,B,n)
    agree = np.cumprod(predicted == answers, axis=2)
    possible = np.concatenate([np.ones_like(agree[..., :1]), agree[..., :-1]], axis=2)
    votes = [(possible * (predicted == label)).sum(axis=0) for label in range(LABELS)]
    return (np.max(votes, axis=0) / possible.sum(axis=0)).mean(axis=0)
