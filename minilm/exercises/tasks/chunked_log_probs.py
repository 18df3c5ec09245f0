"""Log-probs of tokens in chunks: without the logits of all tokens in memory.

    log p[n] = log softmax(hidden[n] unembedding^T)[targets[n]]

N tokens and a vocabulary of V have N x V logits. For 8192 tokens and V = 49152 these are 1.6 GB in float32, and the
result has only N numbers. Compute the logits of `chunk` tokens at a time.

    hidden         (N, D), float64
    unembedding    (V, D)
    targets        (N,), integers
    chunk          how many rows of logits may exist at once; N need not be a multiple of it
    returns        log p, (N,)
"""

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

from minilm import layers
from minilm.exercises.task import Mistake, Property, Task


def chunked_log_probs(hidden, unembedding, targets, chunk) -> np.ndarray:
    """log p of each token, from `chunk` rows of logits at a time."""
    N = len(hidden)
    log_probs = np.zeros(N)
    for start in range(0, N, chunk):
        rows = slice(start, start + chunk)
        logits = hidden[rows] @ unembedding.T
        logits -= logits.max(axis=-1, keepdims=True)
        picked = logits[np.arange(len(logits)), targets[rows]]
        log_probs[rows] = picked - np.log(np.exp(logits).sum(axis=-1))
    return log_probs


def _case(rng, N, V, chunk, scale=1.0):
    return scale * rng.normal(size=(N, 3)), rng.normal(size=(V, 3)), rng.integers(V, size=N), chunk


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"two whole chunks": _case(rng, 4, 5, 2), "the last chunk is short": _case(rng, 5, 4, 2),
            "one chunk holds all": _case(rng, 3, 3, 10), "logits of order 1000": _case(rng, 4, 4, 3, 500.0)}


def expected(hidden, unembedding, targets, chunk) -> np.ndarray:
    return layers.token_log_probs_without_chunks(hidden, unembedding, targets).data


def properties(function: Callable) -> Iterator[Property]:
    arguments = _case(np.random.default_rng(0), 2000, 1000, 20)
    function(*_case(np.random.default_rng(0), 4, 5, 2))         # what the first call imports is not counted
    tracemalloc.start()
    function(*arguments)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    yield Property("for 2000 tokens, a vocabulary of 1000 and chunk 20 the memory is at most a fifth of all logits",
                   round(most / (8 * 2000 * 1000), 3), 0.2, at_most=True,
                   quantity="memory / memory of all logits")


TASK = Task(
    solution=chunked_log_probs, returns=("log p",), cases=cases, expected=expected, properties=properties,
    read="minilm/fast/chunked_log_probs.py",
    hints=("A loop over range(0, N, chunk), and token_log_probs within it. The last slice may be shorter than chunk.",
           "rows = slice(start, start + chunk); logits = hidden[rows] @ unembedding.T; write the result to "
           "log_probs[rows]. targets must be sliced, too."),
    mistakes=(
        Mistake("The last, short chunk is never computed.", "range(0, N, chunk)", "range(0, N - chunk + 1, chunk)"),
        Mistake("Every chunk takes the targets of the first one: slice targets as hidden is sliced.", "targets[rows]",
                "targets[:len(logits)]"),
        Mistake("exp overflows. Subtract the largest logit of each row.",
                "logits -= logits.max(axis=-1, keepdims=True)",
                "pass"),
        Mistake("The largest logit of the whole chunk is subtracted: a row far below it underflows to log 0.",
                "logits.max(axis=-1, keepdims=True)", "logits.max()"),
        Mistake("The sum of exponentials runs over the chunk instead of each row.", "np.exp(logits).sum(axis=-1)",
                "np.exp(logits).sum()"),
        Mistake("The softmax runs over the tokens of the chunk. Each token has its own, over the vocabulary.",
                "logits -= logits.max(axis=-1, keepdims=True)\n        picked = logits[np.arange(len(logits)), "
                "targets[rows]]\n        log_probs[rows] = picked - np.log(np.exp(logits).sum(axis=-1))",
                "logits -= np.logaddexp.reduce(logits, axis=0)\n        "
                "log_probs[rows] = logits[np.arange(len(logits)), targets[rows]]"),
        Mistake("The chunks after the first are not computed: return after the loop, not within it.",
                "    return log_probs", "        return log_probs"),
        Mistake("The target's logit is the one before the largest logit was subtracted; the denominator is not.",
                "picked - np.log", "(hidden[rows] * unembedding[targets[rows]]).sum(axis=-1) - np.log"),
        Mistake("This is the loss, -log p.", "return log_probs", "return -log_probs"),
        Mistake("These are the logits of the targets, without the logarithm of the denominator.",
                "picked - np.log(np.exp(logits).sum(axis=-1))",
                "(hidden[rows] * unembedding[targets[rows]]).sum(axis=-1)"),
        Mistake("These are probabilities, without the logarithm.", "return log_probs", "return np.exp(log_probs)"),
        Mistake("Each chunk starts one row late: the first row of every chunk is left out.",
                "slice(start, start + chunk)", "slice(start + 1, start + chunk)")))
