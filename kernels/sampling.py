"""Draws tokens on the GPU, with their log-probs and the entropies of the distributions, in one launch of sampling.cu.

It draws the same tokens as the functions of minilm/generate.py from the same logits and uniforms, on the device of the
logits. B rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from minilm import checks
from minilm.backend import array_module
from minilm.kernels.launch import Array, Variants, check, function, launch, options, real

THREADS = 512                   # of a block, at most
EACH = 8                        # a row gets another warp for every 32 EACH tokens
DIGIT_BITS = 4                  # bits that one pass of a search finds


def sample(logits: Array, uniforms: Array, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> tuple[Array, Array, Array]:
    """A token for each row.  (B,V), float64 (B,) in [0,1) -> tokens (B,) int64, log_probs (B,), entropies (B,)

    The logits are divided by the temperature. Then only the top_k most likely tokens are kept, and of these the most
    likely ones whose probabilities reach top_p; log_probs and entropies are of that distribution. Of equally likely
    tokens those with the smallest ids are kept, as many as needed. Temperature 0 takes the most likely token (of equals
    the first), with the log-probs and entropies of all tokens at temperature 1. top_p is rounded to the precision of
    the logits. Log-prob NaN: a row with NaN or +inf, or only -inf, or a uniform outside [0,1).
    Raises TypeError and ValueError for unsupported arrays and settings (checks.sampling).
    """
    xp = array_module(logits, uniforms)
    real(logits.dtype)
    check("logits", logits, logits.dtype, (None, None))
    B, V = logits.shape
    check("uniforms", uniforms, np.float64, (B,))
    if not V:
        raise ValueError("logits (B,V) has V = 0; V must be at least 1")
    checks.sampling("sample", temperature, top_k, top_p)
    tokens = xp.empty(B, np.int64)
    log_probs, entropies = (xp.empty(B, logits.dtype) for _ in range(2))
    launch(function(xp, "sampling", "sample", logits.dtype, THREADS=THREADS), (B,), (_threads(V),),
           logits, uniforms, tokens, log_probs, entropies, V, float(temperature),
           0 if top_k is None or top_k >= V else int(top_k), 1.0 if top_p is None else float(top_p),
           2.0 ** (63 - V.bit_length()))
    return tokens, log_probs, entropies


def sample_bytes(V: int, dtype: DTypeLike, tokens: Sequence[int], temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None) -> tuple[int, int]:
    """Bytes that the kernel (reads, writes) when it draws these tokens (B,).

    Each pass reads the row; the walk reads the segment of its warp up to the token. Exact unless several tokens have
    the logit at which top_k or top_p cuts: then there is another walk, up to the last kept one of them, and for top_k
    another pass.
    """
    size = np.dtype(dtype).itemsize
    warps = _threads(V) // 32
    search = 8 * size // DIGIT_BITS
    greedy = temperature == 0
    passes = 3 if greedy else 2 + (search if top_k is not None and top_k < V else 0)
    if not greedy and top_p is not None and np.dtype(dtype).type(top_p) < 1:
        passes += search + 2
    steps = -(-V // 32)
    segment = -(-steps // warps) * 32
    walked = sum(min(V, token // 32 * 32 + 32) - token // segment * segment for token in tokens)
    B = len(tokens)
    return (passes * B * V + walked + B) * size + 8 * B, B * (8 + 2 * size)


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for dtype in ("float32", "float64"):
        yield "sample", options(dtype, {"THREADS": THREADS}), THREADS, 0


def example(xp, rng: np.random.Generator, B: int = 2, V: int = 65, dtype: str = "float32", temperature: float = 0.8,
            top_k: int = 20, top_p: float = 0.9) -> tuple[Array, ...]:
    """One launch on random logits: tokens, log_probs, entropies."""
    logits = xp.asarray(rng.normal(size=(B, V)).astype(dtype))
    return sample(logits, xp.asarray(rng.random(B)), temperature, top_k, top_p)


def _threads(V):
    """Threads of a block: one warp for every 32 EACH tokens, at most THREADS."""
    return min(THREADS, 32 * -(-V // (32 * EACH)))
