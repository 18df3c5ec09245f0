"""Log-probs of tokens on the GPU, from logits, or from hidden states without holding all logits at once.

The kernels are in log_probs.cu; this file has the checks, the sizes and the chunks. N rows, V vocabulary, D width.
Targets are int64, or int32 and converted. A target outside the vocabulary gives NaN: checking targets costs a round
trip to the GPU and is left to the caller (layers.token_log_probs does it).
"""

import functools

import numpy as np
from numpy.typing import DTypeLike

from minilm.backend import array_module
from minilm.kernels import gemm
from minilm.kernels.fused_bf16 import to_bf16
from minilm.kernels.launch import Array, Variants, check, function, launch, options, real

THREADS = 256                   # of a block, at most
EACH = 8                        # a row gets another warp for every 32 EACH tokens
# Logits that are held at a time by default, at least: 128 MiB in float32. With a vocabulary of 50,000 that is 671 rows:
# enough to fill a GPU with one product of matrices, and 1 % of the logits of 64 texts of 1,024 tokens.
LOGITS_HELD = 1 << 25
# A device with much memory holds more: with more than one chunk, backward computes every logit again.
SHARE_HELD = 1 / 32             # of the memory of the device


def forward(logits: Array, targets: Array, entropy: bool = False) -> tuple[Array, Array, Array | None]:
    """log softmax(logits)[target] of each row.  (N,V), integers (N,) -> log_probs (N,), lse (N,), entropies

    lse, the log-sum-exp of each row in float64, is for backward. entropies (N,), in nats; None unless entropy is True.
    """
    xp = array_module(logits, targets)
    N, V = _shape(logits)
    targets = _targets(targets, N)
    log_probs = xp.empty(N, logits.dtype)
    lse = xp.empty(N, np.float64)
    entropies = xp.empty(N if entropy else 0, logits.dtype)
    _forward(xp, logits, targets, log_probs, lse, entropies)
    return log_probs, lse, entropies if entropy else None


def _forward(xp, logits, targets, log_probs, lse, entropies):
    N, V = logits.shape
    kernel = function(xp, "log_probs", "log_probs_forward", logits.dtype, THREADS=THREADS)
    launch(kernel, (N,), (_threads(V),), logits, targets, log_probs, lse, entropies, V, int(len(entropies) > 0))


def backward(logits: Array, targets: Array, lse: Array, dy: Array, out: Array | None = None) -> Array:
    """dlogits (N,V) of the log-probs, given their gradient dy (N,): dy (onehot(target) - softmax(logits)).

    out: the array to write to; it may be the array of the logits.
    """
    xp = array_module(logits, targets, lse, dy)
    N, V = _shape(logits)
    targets = _targets(targets, N)
    check("lse", lse, np.float64, (N,))
    check("dy", dy, logits.dtype, (N,))
    if out is None:
        out = xp.empty_like(logits)
    check("out", out, logits.dtype, (N, V))
    kernel = function(xp, "log_probs", "log_probs_backward", logits.dtype, THREADS=THREADS)
    launch(kernel, (N,), (_threads(V),), logits, targets, lse, dy, out, V)
    return out


def linear_forward(hidden: Array, unembedding: Array, targets: Array, chunk: int | None = None,
                   entropy: bool = False, compute: str = "float32") -> tuple[Array, Array, Array | None, Array | None]:
    """forward(hidden unembedding^T, targets), with `chunk` rows of logits in memory at a time.

    hidden (N,D), unembedding (V,D). chunk: by default as many rows as fit SHARE_HELD or LOGITS_HELD. Returns
    log_probs, lse, entropies as forward, and the logits for linear_backward if there was only one chunk (else None).
    compute: "bfloat16" or "tensorfloat32": the product is of the matrices rounded so, with float32 sums and results.
    For bfloat16 the unembedding may be uint16, rounded already.
    """
    xp, N, V, targets, chunks = _linear(hidden, unembedding, targets, chunk, compute)
    log_probs = xp.empty(N, hidden.dtype)
    lse = xp.empty(N, np.float64)
    entropies = xp.empty(N if entropy else 0, hidden.dtype)
    held = xp.empty((min(N, chunks.step), V), hidden.dtype)
    product, rows, columns = _product(compute, hidden, unembedding)
    for i in chunks:
        s = slice(i, i + chunks.step)
        logits = product(rows[s], columns, held[:len(rows[s])], b_transposed=True)
        _forward(xp, logits, targets[s], log_probs[s], lse[s], entropies[s])
    return log_probs, lse, entropies if entropy else None, held if len(chunks) == 1 else None


def linear_backward(hidden: Array, unembedding: Array, targets: Array, lse: Array, dy: Array,
                    logits: Array | None = None, chunk: int | None = None,
                    compute: str = "float32") -> tuple[Array, Array | None]:
    """dhidden (N,D) and dunembedding (V,D) of linear_forward's log-probs, given their gradient dy (N,).

    dunembedding is None for an unembedding of uint16, which has no gradient.

    dhidden = dlogits unembedding, dunembedding = dlogits^T hidden. logits: from linear_forward; they are overwritten.
    If None, they are computed again, chunk by chunk.
    """
    xp, N, V, targets, chunks = _linear(hidden, unembedding, targets, chunk, compute)
    check("lse", lse, np.float64, (N,))
    check("dy", dy, hidden.dtype, (N,))
    if logits is not None:
        check("logits", logits, hidden.dtype, (N, V))
        chunks = range(0, N, max(N, 1))
    held = xp.empty((min(N, chunks.step), V), hidden.dtype) if logits is None else logits
    dhidden = xp.empty_like(hidden)
    frozen = unembedding.dtype == np.uint16
    dunembedding = None if frozen else (xp.empty_like if len(chunks) else xp.zeros_like)(unembedding)
    product, rows, columns = _product(compute, hidden, unembedding)
    for i in chunks:
        s = slice(i, i + chunks.step)
        of_chunk = held[:len(hidden[s])]
        if logits is None:
            product(rows[s], columns, of_chunk, b_transposed=True)
        dlogits = backward(of_chunk, targets[s], lse[s], dy[s], out=of_chunk)
        dlogits = to_bf16(dlogits) if compute == "bfloat16" else dlogits
        product(dlogits, columns, dhidden[s])
        if dunembedding is not None:
            product(dlogits, rows[s], dunembedding, a_transposed=True, add=i > 0)
    return dhidden, dunembedding


def _product(compute, hidden, unembedding):
    """(a function like gemm.product, hidden, unembedding): of bfloat16, or of their own precision or TF32."""
    if compute != "bfloat16":
        return gemm.product if compute == "tensorfloat32" else _own_product, hidden, unembedding
    return gemm.product, to_bf16(hidden), unembedding if unembedding.dtype == np.uint16 else to_bf16(unembedding)


def _own_product(a, b, out, a_transposed=False, b_transposed=False, add=False):
    xp = array_module(a, b, out)
    a, b = a.T if a_transposed else a, b.T if b_transposed else b
    return xp.add(out, xp.matmul(a, b), out=out) if add else xp.matmul(a, b, out=out)


def forward_bytes(N: int, V: int, dtype: DTypeLike, entropy: bool = False) -> tuple[int, int]:
    """Bytes that the kernel of forward (reads, writes): each logit once, and a few numbers for each row."""
    size = np.dtype(dtype).itemsize
    return N * V * size + 8 * N, (8 + (2 if entropy else 1) * size) * N


def backward_bytes(N: int, V: int, dtype: DTypeLike) -> tuple[int, int]:
    """Bytes that the kernel of backward (reads, writes): each logit and gradient once, a few numbers for each row."""
    size = np.dtype(dtype).itemsize
    return N * V * size + (16 + size) * N, N * V * size


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for dtype in ("float32", "float64"):
        for name in ("log_probs_forward", "log_probs_backward"):
            yield name, options(dtype, {"THREADS": THREADS}), THREADS, 0


def example(xp, rng: np.random.Generator, N: int = 3, V: int = 65, dtype: str = "float32") -> tuple[Array, ...]:
    """Both kernels on random logits: log_probs, lse, entropies, dlogits."""
    logits = xp.asarray(rng.normal(size=(N, V)).astype(dtype))
    targets = xp.asarray(rng.integers(0, V, N))
    log_probs, lse, entropies = forward(logits, targets, entropy=True)
    return log_probs, lse, entropies, backward(logits, targets, lse, xp.ones(N, dtype))


def _shape(logits):
    real(logits.dtype)
    check("logits", logits, logits.dtype, (None, None))
    if not logits.shape[1]:
        raise ValueError("logits (N,V) has V = 0; V must be at least 1")
    return logits.shape


def _targets(targets, N):
    if targets.dtype == np.int32:
        targets = targets.astype(np.int64)
    check("targets", targets, np.int64, (N,))
    return targets


def _linear(hidden, unembedding, targets, chunk, compute):
    """Checks for both directions. Returns xp, N, V, the targets, and the chunks as the range of their first rows."""
    xp = array_module(hidden, unembedding, targets)
    real(hidden.dtype)
    check("hidden", hidden, hidden.dtype, (None, None))
    N, D = hidden.shape
    rounded = compute == "bfloat16" and unembedding.dtype == np.uint16
    check("unembedding", unembedding, np.uint16 if rounded else hidden.dtype, (None, D))
    V = len(unembedding)
    if not V:
        raise ValueError("unembedding (V,D) has V = 0; V must be at least 1")
    if chunk is None:
        chunk = max(1, LOGITS_HELD // V, int(SHARE_HELD * _memory(xp) / (hidden.dtype.itemsize * V)))
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    return xp, N, V, _targets(targets, N), range(0, N, chunk)


@functools.lru_cache(maxsize=None)
def _memory(xp):
    """Bytes of memory of the device of xp; 0 for NumPy, whose arrays the launch refuses."""
    return xp.cuda.Device().mem_info[1] if hasattr(xp, "cuda") else 0


def _threads(V):
    """Threads of a block: one warp for every 32 EACH tokens, at most THREADS."""
    return min(THREADS, 32 * -(-V // (32 * EACH)))
