"""Log-probs of tokens in chunks: the numbers of layers.token_log_probs, without N x V logits in memory.

A chunk is as many tokens as fit LOGITS_HELD logits. Within a chunk the softmax takes a few rows at a time, which stay
in the cache of one core. With more than one chunk, backward computes the softmax again. The derivation is in
layers.token_log_probs. Measured gain: scripts/bench/tricks.py.
Equals layers.token_log_probs_without_chunks and plain.log_probs: tests/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minilm import checks
from minilm.backend import array_module
from minilm.fast.deferred import DeferredMatmul

LOGITS_HELD = 1 << 25           # 128 MB in float32
IN_CACHE = 1 << 18              # numbers that stay in the cache of one core between operations


def chunked_log_probs(rows, unembedding, targets, chunk: int | None = None,
                      train_unembedding: bool = True) -> tuple[np.ndarray, Callable]:
    """(log-probs (N,), vjp) of rows (N,D), unembedding (V,D), targets (N,).

    chunk: tokens at a time; None: as many as fit LOGITS_HELD logits. train_unembedding False: vjp gives the gradient of
    the rows alone.
    """
    xp = array_module(rows, unembedding)
    N, V = len(rows), len(unembedding)
    chunk = max(1, LOGITS_HELD // V) if chunk is None else chunk
    checks.integer("chunked_log_probs", "chunk", chunk, at_least=1)         # none would leave log_probs unwritten
    chunks = [slice(i, i + chunk) for i in range(0, N, chunk)]
    def exponentials(s):
        """exp(logits - highest) of a chunk, their sums, and the log-probs of the targets."""
        E = rows[s] @ unembedding.T
        picked, total = xp.empty((2, len(E)), E.dtype)
        step = max(1, IN_CACHE // V)
        for i in range(0, len(E), step):
            b = E[i:i + step]
            b -= b.max(axis=-1, keepdims=True)
            picked[i:i + step] = b[xp.arange(len(b)), targets[s][i:i + step]]
            xp.exp(b, out=b)
            b.sum(axis=-1, out=total[i:i + step])
        return E, total, picked - xp.log(total)

    log_probs = xp.empty(N, rows.dtype)
    kept = []
    for s in chunks:
        E, total, log_probs[s] = exponentials(s)
        if len(chunks) == 1:
            kept.append((E, total))
    def vjp(dy):
        drows = xp.empty_like(rows)
        dunembedding = xp.zeros_like(unembedding) if len(chunks) > 1 and train_unembedding else None
        for s in chunks:
            E, total = kept.pop() if kept else exponentials(s)[:2]
            dlogits = xp.multiply(E, (-dy[s] / total)[:, None], out=E)      # dy (e - p), p = E / total
            dlogits[xp.arange(len(E)), targets[s]] += dy[s]
            xp.matmul(dlogits, unembedding, out=drows[s])
            if train_unembedding and len(chunks) == 1:
                dunembedding = DeferredMatmul(dlogits.T, rows[s])
            elif train_unembedding:
                dunembedding += dlogits.T @ rows[s]
        return (drows, dunembedding) if train_unembedding else (drows,)
    return log_probs, vjp
