"""Log-probs of tokens on the GPU: from logits, or from hidden states without ever holding all logits.

The kernels are in log_probs.cu; here are the checks, the sizes and the chunks. N rows, V vocabulary,
D width. Targets are int64, or int32, which are converted. Whether they lie in the vocabulary is for
the caller to check before (it costs a round trip to the GPU; layers.token_log_probs does): here a
target outside gives NaN.
"""

import numpy as np

from minilm.backend import array_module
from minilm.kernels.launch import check, function, launch, options, real

THREADS = 256                   # of a block, at most
EACH = 8                        # tokens that a thread should find, before a row is given more threads
# Logits that are held at a time by default: 2^25 are 128 MiB in float32, what layers.py allows itself. With a
# vocabulary of 50,000 that is 671 rows, enough to fill a GPU with one product of matrices, and a hundredth of
# the logits of a batch of 64 texts of 1,024 tokens.
LOGITS_HELD = 1 << 25


def forward(logits, targets, entropy=False):
    """log softmax(logits)[target] of each row.  (N,V), integers (N,) -> log_probs (N,), lse (N,), entropies

    lse, the log-sum-exp of each row, is float64 and what backward needs; entropies (N,), in nats, or None if
    not asked for.
    """
    xp, (N, V) = array_module(logits, targets), _shape(logits)
    targets = _targets(targets, N)
    log_probs, lse = xp.empty(N, logits.dtype), xp.empty(N, np.float64)
    entropies = xp.empty(N if entropy else 0, logits.dtype)
    _forward(xp, logits, targets, log_probs, lse, entropies)
    return log_probs, lse, entropies if entropy else None


def _forward(xp, logits, targets, log_probs, lse, entropies):
    N, V = logits.shape
    kernel = function(xp, "log_probs", "log_probs_forward", logits.dtype, THREADS=THREADS)
    launch(kernel, (N,), (_threads(V),), logits, targets, log_probs, lse, entropies, V, int(len(entropies) > 0))


def backward(logits, targets, lse, dy, out=None):
    """dlogits (N,V) of the log-probs, given their gradient dy (N,): dy (onehot(target) - softmax(logits)).

    out: where to write it; it may be the array of the logits itself.
    """
    xp, (N, V) = array_module(logits, targets, lse, dy), _shape(logits)
    targets = _targets(targets, N)
    check("lse", lse, np.float64, (N,))
    check("dy", dy, logits.dtype, (N,))
    if out is None:
        out = xp.empty_like(logits)
    check("out", out, logits.dtype, (N, V))
    kernel = function(xp, "log_probs", "log_probs_backward", logits.dtype, THREADS=THREADS)
    launch(kernel, (N,), (_threads(V),), logits, targets, lse, dy, out, V)
    return out


def linear_forward(hidden, unembedding, targets, chunk=None, entropy=False):
    """forward(hidden unembedding^T, targets), with `chunk` rows of logits in memory at a time.

    hidden (N,D), unembedding (V,D). chunk: by default as many rows as fit LOGITS_HELD. Returns log_probs, lse,
    entropies as forward does, and the logits if there was one chunk only (else None), for linear_backward.
    """
    xp, N, V, targets, chunks = _linear(hidden, unembedding, targets, chunk)
    log_probs, lse = xp.empty(N, hidden.dtype), xp.empty(N, np.float64)
    entropies = xp.empty(N if entropy else 0, hidden.dtype)
    held = xp.empty((min(N, chunks.step), V), hidden.dtype)
    for i in chunks:
        s = slice(i, i + chunks.step)
        logits = xp.matmul(hidden[s], unembedding.T, out=held[:len(hidden[s])])
        _forward(xp, logits, targets[s], log_probs[s], lse[s], entropies[s])
    return log_probs, lse, entropies if entropy else None, held if len(chunks) == 1 else None


def linear_backward(hidden, unembedding, targets, lse, dy, logits=None, chunk=None):
    """dhidden (N,D) and dunembedding (V,D) of linear_forward's log-probs, given their gradient dy (N,).

    logits: those that linear_forward returned; they are overwritten. Without them they are computed again, chunk by
    chunk. dhidden = dlogits unembedding, dunembedding = dlogits^T hidden, both products of cuBLAS.
    """
    xp, N, V, targets, chunks = _linear(hidden, unembedding, targets, chunk)
    check("lse", lse, np.float64, (N,))
    check("dy", dy, hidden.dtype, (N,))
    if logits is not None:
        check("logits", logits, hidden.dtype, (N, V))
        chunks = range(0, N, max(N, 1))
    held = xp.empty((min(N, chunks.step), V), hidden.dtype) if logits is None else logits
    dhidden, dunembedding = xp.empty_like(hidden), None if len(chunks) == 1 else xp.zeros_like(unembedding)
    for i in chunks:
        s = slice(i, i + chunks.step)
        rows = held[:len(hidden[s])]
        if logits is None:
            xp.matmul(hidden[s], unembedding.T, out=rows)
        dlogits = backward(rows, targets[s], lse[s], dy[s], out=rows)
        xp.matmul(dlogits, unembedding, out=dhidden[s])
        product = xp.matmul(dlogits.T, hidden[s])
        dunembedding = product if dunembedding is None else xp.add(dunembedding, product, out=dunembedding)
    return dhidden, dunembedding


def forward_bytes(N, V, dtype, entropy=False):
    """Bytes that forward's kernel (reads, writes): each logit once, and what is one a row."""
    size = np.dtype(dtype).itemsize
    return N * V * size + 8 * N, (8 + (2 if entropy else 1) * size) * N


def backward_bytes(N, V, dtype):
    """Bytes that backward's kernel (reads, writes): each logit once, each gradient once, and what is one a row."""
    size = np.dtype(dtype).itemsize
    return N * V * size + (16 + size) * N, N * V * size


def variants():
    """(name, compiler's options, threads, dynamic shared bytes) of everything that can be launched."""
    for dtype in ("float32", "float64"):
        for name in ("log_probs_forward", "log_probs_backward"):
            yield name, options(dtype, {"THREADS": THREADS}), THREADS, 0


def example(xp, rng, N=3, V=65, dtype=np.float32):
    """Both kernels on random logits, as the emulator's command line runs them: log_probs, lse, entropies, dlogits."""
    logits, targets = xp.asarray(rng.normal(size=(N, V)).astype(dtype)), xp.asarray(rng.integers(0, V, N))
    log_probs, lse, entropies = forward(logits, targets, entropy=True)
    return log_probs, lse, entropies, backward(logits, targets, lse, xp.ones(N, dtype))


def _shape(logits):
    real(logits.dtype)
    check("logits", logits, logits.dtype, (None, None))
    if not logits.shape[1]:
        raise ValueError("logits (N,V) over a vocabulary of no tokens; V must be at least 1")
    return logits.shape


def _targets(targets, N):
    if targets.dtype == np.int32:
        targets = targets.astype(np.int64)
    check("targets", targets, np.int64, (N,))
    return targets


def _linear(hidden, unembedding, targets, chunk):
    """What both directions check; the chunks, as the range of their first rows."""
    xp = array_module(hidden, unembedding, targets)
    real(hidden.dtype)
    check("hidden", hidden, hidden.dtype, (None, None))
    N, D = hidden.shape
    check("unembedding", unembedding, hidden.dtype, (None, D))
    V = len(unembedding)
    if not V:
        raise ValueError("unembedding (V,D) of a vocabulary of no tokens; V must be at least 1")
    chunk = max(1, LOGITS_HELD // V) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    return xp, N, V, _targets(targets, N), range(0, N, chunk)


def _threads(V):
    """Threads of a block: whole warps, EACH tokens a thread or more."""
    return min(THREADS, 32 * -(-V // (32 * EACH)))
