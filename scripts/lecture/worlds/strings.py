"""Tasks on words of three letters, put as demonstrations: what is to be done is never said.

    jab>ija;ijc>hib;die>chd;..          (each letter becomes the one before it)

A document is one task throughout. The eight TASKS are what a model is pretrained on, so a prompt lets it recognise
one of them and no more; NEW_TASKS are in no document. One word in five is held out: never an input in training.
Pair k has k demonstrations before it.
Tests: tests/test_strings.py.
"""

import numpy as np

from minilm.tensor import no_grad

ALPHABET, LENGTH = "abcdefghij", 3
ARROW, END = len(ALPHABET), len(ALPHABET) + 1
CHARACTERS = ALPHABET + ">;"
VOCABULARY = len(CHARACTERS)
PAIR = 2 * LENGTH + 2               # tokens
PAIRS = 9                           # of a training document


def _shift(by):
    return lambda w: (w + by) % len(ALPHABET)


def _order(*places):
    return lambda w: w[..., list(places)]


# Functions of words (..,LENGTH), letters counted from 0.
TASKS = {"copy": _order(0, 1, 2), "next letter": _shift(1), "reverse": _order(2, 1, 0), "repeat last": _order(2, 2, 2),
         "rotate": _order(1, 2, 0), "previous letter": _shift(-1), "swap first two": _order(1, 0, 2),
         "repeat first": _order(0, 0, 0)}
NEW_TASKS = {"swap last two": _order(0, 2, 1), "repeat middle": _order(1, 1, 1), "three letters on": _shift(3)}


def every_word(held_out):
    """(N,LENGTH): all words of one side."""
    everything = np.array(list(np.ndindex((len(ALPHABET),) * LENGTH)))
    return everything[is_held_out(everything) == held_out]


def is_held_out(words):
    """Whether words (..,LENGTH) are kept for tests."""
    return words @ np.array([3, 7, 1]) % 5 == 0


def words(rng, *shape, held_out=False):
    """Random words (*shape,LENGTH), all of those held out, or all of the others."""
    drawn = rng.integers(len(ALPHABET), size=(*shape, LENGTH))
    while (wrong := is_held_out(drawn) != held_out).any():
        drawn[wrong] = rng.integers(len(ALPHABET), size=(int(wrong.sum()), LENGTH))
    return drawn


def document(inputs, answers):
    """Words (B,K,LENGTH) and what becomes of them: tokens (B,K*PAIR), and a mask of the same shape, 1 on answers."""
    B, K, _ = inputs.shape
    arrow, end = np.full((B, K, 1), ARROW), np.full((B, K, 1), END)
    tokens = np.concatenate([inputs, arrow, answers, end], axis=2).reshape(B, -1)
    return tokens, np.tile([0.0] * (LENGTH + 1) + [1.0] * LENGTH + [0.0], (B, K))


def draw(rng, count, tasks=tuple(TASKS.values()), pairs=PAIRS, held_out=False):
    """Documents of random words, each of one task: tokens, mask."""
    inputs, task = words(rng, count, pairs, held_out=held_out), rng.integers(len(tasks), size=count)
    answers = np.stack([f(inputs) for f in tasks])[task, np.arange(count)]
    return document(inputs, answers)


def parts(tokens):
    """tokens (B,K*PAIR) back to inputs and answers, (B,K,LENGTH) each."""
    pairs = tokens.reshape(len(tokens), -1, PAIR)
    return pairs[..., :LENGTH], pairs[..., LENGTH + 1:-1]


def text(tokens):
    """One row of tokens as it is read."""
    return "".join(CHARACTERS[token] for token in tokens)


def right(model, tokens):
    """(B,K): would greedy decoding give each answer, after the pairs before it? (Teacher forcing says the same, for
    an answer that is right is what it forces.)"""
    with no_grad():
        guesses = model(tokens[:, :-1]).data.argmax(axis=-1)
    guesses = np.concatenate([tokens[:, :1], guesses], axis=1)          # guesses[:, t] is of tokens[:, t]
    return (parts(guesses)[1] == parts(tokens)[1]).all(axis=-1)


def bayes_bound(tokens, tasks=tuple(TASKS.values())):
    """(B,K), for documents of one of the tasks each: how likely the best guess at each answer is right.

    Before the first demonstration all tasks are equally likely, afterwards those that agree with every one; the best
    guess is what most of these say.
    """
    inputs, answers = parts(tokens)
    said = np.stack([f(inputs) for f in tasks])                                         # (N,B,K,LENGTH)
    wrong = (said != answers).any(axis=-1)
    possible = (np.cumsum(wrong, axis=2) - wrong) == 0                                  # before pair k: (N,B,K)
    agree = (said[:, None] == said[None]).all(axis=-1)                                  # (N,N,B,K)
    votes = (agree & possible).sum(axis=1)                 # of the possible tasks, how many say what task n says
    return votes.max(axis=0) / possible.sum(axis=0)


class Curriculum:
    """Two tasks at first, one more whenever the reader knows them: that is much sooner than all eight from the start.

    draw is for pretrain_on_documents.
    """

    def __init__(self, in_use=2, enough=0.7):
        self.in_use, self.enough = in_use, enough

    def draw(self, rng, count):
        return draw(rng, count, tuple(TASKS.values())[:self.in_use])

    def examine(self, model, rng, count=32):
        """Accuracy on the tasks so far after two demonstrations or more; above `enough`, one task more from now on."""
        known = right(model, self.draw(rng, count)[0])[:, 2:].mean()
        self.in_use = min(len(TASKS), self.in_use + int(known > self.enough))
        return float(known)

    def follow(self, stage, model, rng):
        """Run a stage that draws here to its end, and examine every 10 steps.

        Returns what was reached, every 50 steps, on all tasks and held-out words: [step, accuracy of pair 0, 1, ..].
        """
        exam, history = draw(rng, 200, held_out=True)[0], []
        for step, _ in enumerate(stage, 1):
            if step % 10 == 0:
                self.examine(model, rng)
            if step % 50 == 0:
                history.append([step, *right(model, exam).mean(axis=0).tolist()])
        return history
