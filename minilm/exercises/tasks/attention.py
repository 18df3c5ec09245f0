"""Causal attention of one head.

    o = softmax(q k^T / sqrt(K)) v,      query t sees the keys up to its own position

With S > T the queries are the last T of the S positions, as with a cache of keys: query t then stands at position
t + S - T, and sees the keys 0, ..., t + S - T.

    q          (T, K)
    k          (S, K), S at least T
    v          (S, K)
    returns    o, (T, K)

Vaswani et al. 2017, arXiv:1706.03762.
"""

import numpy as np

from minilm import layers
from minilm.exercises.task import Mistake, Task


def softmax(x) -> np.ndarray:
    """Over the last axis; an entry of -inf gets probability 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v) -> np.ndarray:
    """softmax(q k^T / sqrt(K)) v, causal."""
    T, K = q.shape
    S = len(k)
    visible = np.tri(T, S, S - T, dtype=bool)
    scores = np.where(visible, q @ k.T / np.sqrt(K), -np.inf)
    return softmax(scores) @ v


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"one position": (rng.normal(size=(1, 2)), rng.normal(size=(1, 2)), rng.normal(size=(1, 2))),
            "four positions": (rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))),
            "T = K": (rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rng.normal(size=(3, 3))),
            "two queries, five keys": (rng.normal(size=(2, 3)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3)))}


def expected(q, k, v) -> np.ndarray:
    return layers.attention(q[None, None], k[None, None], v[None, None]).data[0, 0]


TASK = Task(
    solution=attention, returns=("o",), cases=cases, expected=expected, read="minilm/plain.py, attention",
    given=(softmax,),
    hints=("First all T x S scores, then -inf where a key may not be seen, then softmax over the keys.",
           "np.tri(T, S, S - T) is 1 where key s <= t + S - T. Set the other scores to -inf before the softmax."),
    mistakes=(
        Mistake("The scores are divided by K instead of sqrt(K).", "np.sqrt(K)", "K"),
        Mistake("The scores are not divided by sqrt(K).", " / np.sqrt(K)", ""),
        Mistake("The scores are multiplied by sqrt(K); they must be divided.", "/ np.sqrt(K)", "* np.sqrt(K)"),
        Mistake("A query sees the next token.", "np.tri(T, S, S - T, dtype=bool)",
                "np.tri(T, S, S - T + 1, dtype=bool)"),
        Mistake("A query does not see its own token. The first one then sees nothing, and its result is NaN.",
                "np.tri(T, S, S - T, dtype=bool)", "np.tri(T, S, S - T - 1, dtype=bool)"),
        Mistake("Every query sees every key: the mask is missing.", "np.tri(T, S, S - T, dtype=bool)",
                "np.ones((T, S), bool)"),
        Mistake("The mask is transposed: a query sees its own token and the later ones.",
                "np.tri(T, S, S - T, dtype=bool)", "~np.tri(T, S, S - T - 1, dtype=bool)"),
        Mistake("Scores of hidden keys are set to 0, and exp(0) is 1: they keep a weight. Set them to -inf.",
                "-np.inf)", "0.0)"),
        Mistake("The weights are masked after the softmax, so the rest does not add up to 1.",
                "return softmax(scores) @ v", "return (softmax(q @ k.T / np.sqrt(K)) * visible) @ v"),
        Mistake("With S > T the queries are the last positions, not the first: the mask must be shifted by S - T.",
                "np.tri(T, S, S - T, dtype=bool)", "np.tri(T, S, dtype=bool)"),
        Mistake("The weights are applied to the keys instead of the values.", "softmax(scores) @ v",
                "softmax(scores) @ k"),
        Mistake("The softmax runs over the queries instead of the keys.", "softmax(scores) @ v",
                "softmax(scores.T).T @ v")))
