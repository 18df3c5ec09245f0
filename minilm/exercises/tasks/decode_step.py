"""One step of decoding with a cache of keys and values (KV cache), for one head.

The cache holds the keys and values of the t tokens so far. A new token with the hidden state x needs one new query,
key and value; its key and value join the cache, and its query attends to all t + 1 positions, its own included. The
result is the last row of causal attention over all tokens, for the work of one row.

    q = x wq,   k = x wk,   v = x wv,       o = softmax(keys q / sqrt(K)) values

    x                (D,), the hidden state of the new token
    wq, wk, wv       (D, K) each
    keys, values     (t, K) each, t at least 0; they belong to the caller and must not change
    returns          o (K,), the new keys (t+1, K), the new values (t+1, K)
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm import layers
from minilm.exercises.task import Mistake, Property, Task


def softmax(x) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def decode_step(x, wq, wk, wv, keys, values) -> tuple:
    """o, keys and values after the new token."""
    q, k, v = x @ wq, x @ wk, x @ wv
    keys = np.concatenate([keys, k[None]])
    values = np.concatenate([values, v[None]])
    weights = softmax(keys @ q / np.sqrt(len(q)))
    return weights @ values, keys, values


def _case(rng, t, D, K):
    return rng.normal(size=D), *rng.normal(size=(3, D, K)), *rng.normal(size=(2, t, K))


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"three tokens in the cache": _case(rng, 3, 4, 2), "an empty cache": _case(rng, 0, 3, 2),
            "D = K": _case(rng, 2, 3, 3)}


def expected(x, wq, wk, wv, keys, values) -> tuple:
    keys = np.vstack([keys, x @ wk])
    values = np.vstack([values, x @ wv])
    q = np.vstack([np.zeros((len(keys) - 1, len(keys[0]))), x @ wq])
    return layers.attention(q[None, None], keys[None, None], values[None, None]).data[0, 0, -1], keys, values


def properties(function: Callable) -> Iterator[Property]:
    rng = np.random.default_rng(0)
    hidden, weights = rng.normal(size=(5, 4)), rng.normal(size=(3, 4, 2))
    keys, values = np.zeros((0, 2)), np.zeros((0, 2))
    rows = []
    for x in hidden:
        o, keys, values = function(x, *weights, keys, values)
        rows.append(o)
    q, k, v = ((hidden @ w)[None, None] for w in weights)
    yield Property("token by token, five steps give the five rows of causal attention", rows,
                   layers.attention(q, k, v).data[0, 0])


TASK = Task(
    solution=decode_step, returns=("o", "keys", "values"), cases=cases, expected=expected, properties=properties,
    read="minilm/fast/cached_decoding.py", given=(softmax,),
    hints=("The new key and value go into the cache before the query attends: a token sees itself.",
           "keys = np.concatenate([keys, k[None]]), values likewise; o = softmax(keys @ q / sqrt(K)) @ values."),
    mistakes=(
        Mistake("The query attends to the old cache: the new token does not see itself.",
                "weights = softmax(keys @ q / np.sqrt(len(q)))\n    return weights @ values",
                "weights = softmax(keys[:-1] @ q / np.sqrt(len(q)))\n    return weights @ values[:-1]"),
        Mistake("The new key and value are put in front. The order of the cache is that of the tokens.",
                "keys = np.concatenate([keys, k[None]])\n    values = np.concatenate([values, v[None]])",
                "keys = np.concatenate([k[None], keys])\n    values = np.concatenate([v[None], values])"),
        Mistake("The scores are not divided by sqrt(K).", " / np.sqrt(len(q))", ""),
        Mistake("The scores are divided by K instead of sqrt(K).", "np.sqrt(len(q))", "len(q)"),
        Mistake("The scores are multiplied by sqrt(K); they must be divided.", "/ np.sqrt(len(q))",
                "* np.sqrt(len(q))"),
        Mistake("The scores are divided by sqrt(D), the width of the hidden state, instead of sqrt(K).",
                "np.sqrt(len(q))", "np.sqrt(len(x))"),
        Mistake("The query is computed with wk, so it equals the key.", "x @ wq, x @ wk", "x @ wk, x @ wk"),
        Mistake("The new key replaces the last one of the cache, instead of joining it.",
                "np.concatenate([keys, k[None]])\n    values = np.concatenate([values, v[None]])",
                "np.concatenate([keys[:-1], k[None]])\n    values = np.concatenate([values[:-1], v[None]])"),
        Mistake("The value is appended to the keys, and the key to the values.",
                "[keys, k[None]])\n    values = np.concatenate([values, v[None]])",
                "[keys, v[None]])\n    values = np.concatenate([values, k[None]])"),
        Mistake("The weights are applied to the keys instead of the values.", "weights @ values, keys, values",
                "weights @ keys, keys, values"),
        Mistake("The old cache is returned: the next token would not see this one.",
                "return weights @ values, keys, values", "return weights @ values, keys[:-1], values[:-1]")))
