"""The log-prob of each token.

Row n of the logits scores one position of a text, and targets[n] is the token that stands there:

    log p[n] = log softmax(logits[n])[targets[n]]

    logits     (N, V), float64; they may be as large as 1000
    targets    (N,), integers from 0 to V - 1
    returns    log p, (N,), finite
"""

import numpy as np

from minilm import ops
from minilm.exercises.task import Mistake, Task


def token_log_probs(logits, targets) -> np.ndarray:
    """log softmax(logits)[target], for each row."""
    highest = logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
    return logits[np.arange(len(targets)), targets] - log_total


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"two tokens": (np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), np.array([1, 0])),
            "four tokens": (rng.normal(size=(4, 5)), np.array([3, 0, 0, 4])),
            "as many tokens as the vocabulary": (rng.normal(size=(3, 3)), np.array([1, 2, 1])),
            "logits of order 1000": (np.array([[1000.0, 990.0], [-1000.0, 1000.0]]), np.array([1, 0]))}


def expected(logits, targets) -> np.ndarray:
    return ops.gather(ops.log_softmax(logits), targets).data


TASK = Task(
    solution=token_log_probs, returns=("log p",), cases=cases, expected=expected,
    read="minilm/layers.py, token_log_probs_without_chunks",
    hints=("log softmax(z)_i = z_i - log sum_j exp(z_j): never divide, and never take the logarithm of a small "
           "probability.",
           "log sum_j exp(z_j) = m + log sum_j exp(z_j - m), with m the largest logit of the row. Select with two "
           "index arrays: logits[np.arange(N), targets]."),
    mistakes=(
        Mistake("exp overflows above 709. Take the largest logit of each row out of the sum first.",
                "logits.max(axis=-1, keepdims=True)", "np.zeros((len(logits), 1))"),
        Mistake("The largest logit is subtracted before exp and not added again after the logarithm.",
                " + highest[:, 0]", ""),
        Mistake("This is the loss, -log p.", "logits[np.arange(len(targets)), targets] - log_total",
                "log_total - logits[np.arange(len(targets)), targets]"),
        Mistake("logits[:, targets] selects every target in every row: (N, N). Each row has one target.",
                "logits[np.arange(len(targets)), targets] - log_total", "logits[:, targets] - log_total[:, None]"),
        Mistake("These are the logits of the targets, without the logarithm of the denominator.", " - log_total", ""),
        Mistake("These are probabilities, without the logarithm.",
                "logits[np.arange(len(targets)), targets] - log_total",
                "np.exp(logits[np.arange(len(targets)), targets] - log_total)"),
        Mistake("The denominator is summed over the whole array instead of one row.",
                "np.exp(logits - highest).sum(axis=-1)", "np.exp(logits - highest).sum()"),
        Mistake("The largest logit and the sum are taken over the first axis: one denominator for each token of the "
                "vocabulary. Each row has one, over the last axis.",
                "logits.max(axis=-1, keepdims=True)\n    log_total = np.log(np.exp(logits - highest).sum(axis=-1)) + "
                "highest[:, 0]",
                "logits.max(axis=0)\n    log_total = np.log(np.exp(logits - highest).sum(axis=0)) + highest"),
        Mistake("This is log softmax over the first axis. Each row is a distribution, over the last axis.",
                "logits[np.arange(len(targets)), targets] - log_total",
                "(logits - np.logaddexp.reduce(logits, axis=0))[np.arange(len(targets)), targets]"),
        Mistake("softmax first and log afterwards: a probability below 1e-323 rounds to 0, and its logarithm is -inf.",
                "return logits[np.arange(len(targets)), targets] - log_total",
                "return np.log(np.exp(logits[np.arange(len(targets)), targets] - log_total))")))
