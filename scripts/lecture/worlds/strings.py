"""Tasks on words of three letters, given as demonstrations. The task is never named.

    jab>ija;ijc>hib;die>chd;..          (each letter becomes the one before it)

Each document has one task. A model is pretrained on the eight TASKS, so a prompt lets it recognise one of them.
NEW_TASKS occur in no training document. One word in five is held out: it is never an input in training. Pair k has k
demonstrations before it.
Tests: tests/test_strings.py.
"""

from collections.abc import Iterable

import numpy as np

from minilm import checks
from minilm.model import Transformer
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


def every_word(held_out: bool) -> np.ndarray:
    """All held-out words or all training words, (N,LENGTH)."""
    everything = np.array(list(np.ndindex((len(ALPHABET),) * LENGTH)))
    return everything[is_held_out(everything) == held_out]


def is_held_out(words: np.ndarray) -> np.ndarray:
    """Whether words (..,LENGTH) are kept for tests: (..)."""
    return words @ np.array([3, 7, 1]) % 5 == 0


def words(rng: np.random.Generator, *shape: int, held_out: bool = False) -> np.ndarray:
    """Random words (*shape,LENGTH), all held out or all for training."""
    checks.flag("words", "held_out", held_out)
    drawn = rng.integers(len(ALPHABET), size=(*shape, LENGTH))
    while (wrong := is_held_out(drawn) != held_out).any():
        drawn[wrong] = rng.integers(len(ALPHABET), size=(int(wrong.sum()), LENGTH))
    return drawn


def document(inputs: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words (B,K,LENGTH) and the answers of a task: tokens (B,K*PAIR), and a mask of that shape, 1 on answers."""
    B, K, _ = inputs.shape
    arrow = np.full((B, K, 1), ARROW)
    end = np.full((B, K, 1), END)
    tokens = np.concatenate([inputs, arrow, answers, end], axis=2).reshape(B, -1)
    return tokens, np.tile([0.0] * (LENGTH + 1) + [1.0] * LENGTH + [0.0], (B, K))


def draw(rng: np.random.Generator, count: int, tasks: Iterable = tuple(TASKS.values()), pairs: int = PAIRS,
         held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Documents of random words, one task each: tokens, mask (count, pairs*PAIR)."""
    inputs = words(rng, count, pairs, held_out=held_out)
    task = rng.integers(len(tasks), size=count)
    answers = np.stack([f(inputs) for f in tasks])[task, np.arange(count)]
    return document(inputs, answers)


def parts(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of document: tokens (B,K*PAIR) to inputs and answers, (B,K,LENGTH) each."""
    pairs = tokens.reshape(len(tokens), -1, PAIR)
    return pairs[..., :LENGTH], pairs[..., LENGTH + 1:-1]


def text(tokens: Iterable[int]) -> str:
    """One row of tokens as readable text."""
    return "".join(CHARACTERS[token] for token in tokens)


def right(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """(B,K): whether greedy decoding gives each answer, after the pairs before it.

    Teacher forcing gives the same result: an answer is correct only if greedy decoding produces the forced tokens.
    """
    with no_grad():
        guesses = model(tokens[:, :-1]).data.argmax(axis=-1)
    guesses = np.concatenate([tokens[:, :1], guesses], axis=1)          # guesses[:, t] predicts tokens[:, t]
    return (parts(guesses)[1] == parts(tokens)[1]).all(axis=-1)


def bayes_bound(tokens: np.ndarray, tasks: Iterable = tuple(TASKS.values())) -> np.ndarray:
    """(B,K): the probability that the best guess of each answer is correct, for documents of one of the tasks.

    Before the first demonstration all tasks are equally likely; afterwards, the tasks that agree with every
    demonstration are. The best guess is the answer that most of these tasks give.
    """
    inputs, answers = parts(tokens)
    given = np.stack([f(inputs) for f in tasks])                                        # (N,B,K,LENGTH)
    wrong = (given != answers).any(axis=-1)
    possible = (np.cumsum(wrong, axis=2) - wrong) == 0                                  # before pair k: (N,B,K)
    agree = (given[:, None] == given[None]).all(axis=-1)                                # (N,N,B,K)
    votes = (agree & possible).sum(axis=1)      # for task n: the number of possible tasks that give the same answer
    return votes.max(axis=0) / possible.sum(axis=0)


class Curriculum:
    """Two tasks at first, one more each time the model knows them: much faster than all eight from the start.

    draw is for pretrain_on_documents.
    """

    def __init__(self, in_use: int = 2, enough: float = 0.7):
        self.in_use = in_use
        self.enough = enough

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Training documents of the tasks in use: tokens, mask."""
        return draw(rng, count, tuple(TASKS.values())[:self.in_use])

    def examine(self, model: Transformer, rng: np.random.Generator, count: int = 32) -> float:
        """The accuracy on the tasks in use after at least two demonstrations.

        If it exceeds `enough`, one more task is used from now on.
        """
        known = right(model, self.draw(rng, count)[0])[:, 2:].mean()
        self.in_use = min(len(TASKS), self.in_use + int(known > self.enough))
        return float(known)

    def follow(self, stage: Iterable, model: Transformer, rng: np.random.Generator) -> list[list[float]]:
        """Run a stage that draws from this curriculum to its end; examine the model every 10 steps.

        Returns the accuracy on all tasks and held-out words, every 50 steps: [step, accuracy of pair 0, 1, ..].
        """
        exam = draw(rng, 200, held_out=True)[0]
        history = []
        for step, _ in enumerate(stage, 1):
            if step % 10 == 0:
                self.examine(model, rng)
            if step % 50 == 0:
                history.append([step, *right(model, exam).mean(axis=0).tolist()])
        return history
