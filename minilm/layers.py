"""The layers of a transformer, forward and backward derived by hand.

Each layer is one record (tensor.Node), so that a training step consists of a few large operations. plain.py has the
same layers as compositions of elementary operations: that is their definition, and the tests compare values and
gradients.
Two layers are computed in pieces that fit the cache. This file has their derivation, and the version without pieces:
attention (fast/tiled_attention.py) and token_log_probs (fast/chunked_log_probs.py). rope and smear are in rotary.py.

Shapes: B batch, T tokens, S keys, V vocabulary, D width, H query heads, G key/value heads (G divides H), K head
width (dh in plain.py), F width of the feed-forward layer. In attention, E are the scores, P = softmax(E).
On a GPU the layers run CUDA kernels (the folder kernels/, installed as minilm.kernels), which raise on shapes and
dtypes that they do not support; kernel=False runs the code below instead.
Tests: tests/test_layers.py.
"""

from __future__ import annotations

import math

from minilm import checks, ops
from minilm.backend import array_module, is_cupy
from minilm.fast.chunked_log_probs import chunked_log_probs
from minilm.fast.tiled_attention import tiled_attention
from minilm.rotary import rope, rope_tables, smear
from minilm.tensor import Tensor, primitive

__all__ = ["attention", "attention_without_tiles", "rms_norm", "rope", "rope_tables", "sequence_log_probs", "smear",
           "swiglu", "token_log_probs", "token_log_probs_without_chunks"]


@primitive
def rms_norm(x, weight, eps: float = 1e-6, kernel: bool = True):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis.  (..,D), (D,) -> (..,D)

    With r = 1 / sqrt(mean(x^2) + eps), n = x r and dn = dy * weight (* elementwise):

        dx = r (dn - n mean(dn * n)),     dweight = sum of dy * n over all rows

    The second term of dx is (sum_j dn_j x_j) dr/dx, with dr/dx = -r^3 x / D and sum_j dn_j x_j = (D / r) mean(dn * n).
    Raises ValueError for another weight, and for eps below 0. Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if weight.shape != x.shape[-1:] or not 0 <= eps < math.inf:
        raise ValueError(f"expected x (..,D), weight (D,), eps at least 0; got {x.shape}, {weight.shape}, {eps}")
    if kernel and is_cupy(x):
        from minilm.kernels import layers as on_gpu
        return on_gpu.rms_norm(x, weight, eps)
    xp = array_module(x)
    D = x.shape[-1]
    r = 1 / xp.sqrt(_dot_rows(x, x) / D + eps)
    n = x * r
    def vjp(dy):
        dn = dy * weight
        dweight = xp.einsum("nd,nd->d", dy.reshape(-1, D), n.reshape(-1, D))
        dx = n * (_dot_rows(dn, n) / -D)
        dx += dn
        dx *= r
        return dx, dweight
    return n * weight, vjp


def _dot_rows(a, b):
    """sum(a * b) over the last axis, which is kept. The elementwise product is never stored."""
    return (a[..., None, :] @ b[..., :, None])[..., 0]


@primitive
def swiglu(gate_up, kernel: bool = True):
    """silu(gate) * up, where gate and up are the two halves of the last axis.  (..,2F) -> (..,F)

    silu(g) = g s with s = sigmoid(g), and silu'(g) = s + silu(g) (1 - s):

        dup = dy silu(gate),     dgate = dy up silu'(gate)

    The sigmoid is computed as 1/2 + tanh(g/2) / 2. Its absolute error in float32 is 1e-7, so below g = -17
    no digit of it is correct. Shazeer 2020, arXiv:2002.05202.
    """
    if kernel and is_cupy(gate_up):
        from minilm.kernels import layers as on_gpu
        return on_gpu.swiglu(gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last axis has {gate_up.shape[-1]} columns; it holds gate and up side by side, so "
                         "its length must be even")
    xp = array_module(gate_up)
    F = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :F], gate_up[..., F:]
    s = xp.multiply(gate, 0.5)                 # sigmoid(gate) = 1/2 + tanh(gate/2) / 2, in place
    xp.tanh(s, out=s)
    s *= 0.5
    s += 0.5
    def vjp(dy):
        dx = xp.empty_like(gate_up)
        dgate, dup = dx[..., :F], dx[..., F:]
        ds = dy * s
        xp.multiply(ds, gate, out=dup)         # dy silu(gate)
        xp.subtract(1, s, out=dgate)           # dy up (s + silu(gate) (1 - s)), in place
        dgate *= dup
        dgate += ds
        dgate *= up
        return dx
    y = gate * s
    y *= up
    return y, vjp


@primitive
def attention(q, k, v, causal: bool = True, key_mask=None, scale: float | None = None, *,
              kernel: bool = True):
    """softmax(q k^T / sqrt(K)) v.  q (B,H,T,K); k, v (B,G,S,K) -> (B,H,T,K)

    causal    query t sees the keys up to its own position; with S > T the queries are the last T positions (as with
              a cache of keys)
    key_mask  (B,S), 0 on keys that no query may see (padding). A query that sees no key gives zeros
    scale     instead of 1/sqrt(K)
    Query head h reads key/value head h // (H/G): grouped-query attention.

    For one query head, with scores E = scale q k^T, P = softmax(E), o = P v, and * elementwise:

        dv = P^T do,        dP = do v^T,        dE = P * (dP - rowsum(dP * P)),
        dq = scale dE k,    dk = scale dE^T q

    The third follows from dP_s/dE_j = P_s (1[s = j] - P_j). And rowsum(dP * P) = do . (P v) = rowsum(do * o), a sum
    over K numbers instead of S. dk and dv of a key/value head are the sums over the H/G query heads that read it.
    attention_without_tiles is this derivation in code; fast/tiled_attention.py computes the same numbers tile by tile.
    Raises ValueError for shapes that do not fit.
    Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    H, T, K = q.shape[1:]
    B, G, S, _ = k.shape
    if q.shape != (B, H, T, K) or k.shape[3] != K or v.shape != k.shape or H % G or (causal and S < T):
        at_least_T = ", and S >= T when causal" if causal else ""
        raise ValueError(f"expected q (B,H,T,K), k and v (B,G,S,K), G dividing H{at_least_T}; "
                         f"got {q.shape}, {k.shape}, {v.shape}")
    if key_mask is not None:
        key_mask = checks.mask("attention", key_mask, (B, S), "key_mask", hint="that is (B,S)")
    scale = K ** -0.5 if scale is None else checks.number("attention", "scale", scale, above=0)
    if kernel and is_cupy(q):
        from minilm.kernels import layers as on_gpu
        return on_gpu.attention(q, k, v, causal, key_mask, scale)
    return tiled_attention(q, k, v, causal, key_mask, scale)


@primitive
def attention_without_tiles(q, k, v, causal: bool = True):
    """The derivation of attention in code: all scores at once.  q (B,H,T,K); k, v (B,G,S,K) -> (B,H,T,K)"""
    xp = array_module(q)
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    q = q.reshape(B, G, H // G, T, K)                               # the query heads of a group share keys and values
    k, v = k[:, :, None], v[:, :, None]                             # (B,G,1,S,K)
    E = q @ k.swapaxes(-1, -2) * K ** -0.5                          # (B,G,H/G,T,S)
    if causal:
        E = xp.where(xp.tri(T, S, S - T, dtype=bool), E, -xp.inf)
    P = xp.exp(E - E.max(axis=-1, keepdims=True))
    P /= P.sum(axis=-1, keepdims=True)
    o = P @ v                                                       # (B,G,H/G,T,K)

    def vjp(do):
        do = do.reshape(o.shape)
        dv = P.swapaxes(-1, -2) @ do                                # (B,G,H/G,S,K)
        dP = do @ v.swapaxes(-1, -2)                                # (B,G,H/G,T,S)
        dE = P * (dP - (do * o).sum(axis=-1, keepdims=True))
        dq = dE @ k * K ** -0.5
        dk = dE.swapaxes(-1, -2) @ q * K ** -0.5
        return dq.reshape(B, H, T, K), dk.sum(axis=2), dv.sum(axis=2)
    return o.reshape(B, H, T, K), vjp


@primitive
def token_log_probs(hidden, unembedding, targets, chunk: int | None = None, kernel: bool = True,
                    train_unembedding: bool = True):
    """log softmax(hidden unembedding^T)[target].  (..,D), (V,D), integers (..) -> (..)

    It does not shift: for next-token log-probs pass hidden[:, :-1] and tokens[:, 1:].
    With p = softmax(logits) and the one-hot target e:

        dlogits = dy (e - p),     dhidden = dlogits unembedding,     dunembedding = dlogits^T hidden

    The sum of -log p over tokens is the cross-entropy, so its gradient with respect to the logits is p - e.
    token_log_probs_without_chunks is this derivation in code; fast/chunked_log_probs.py computes the same numbers
    for `chunk` tokens at a time, so that the logits (..,V) are never in memory at once. train_unembedding False leaves
    out its gradient, a third of backward.
    Raises IndexError for a target outside the vocabulary, ValueError for shapes that do not fit.
    """
    xp = array_module(hidden, unembedding)
    V, D = unembedding.shape
    targets = checks.token_ids("token_log_probs", "targets", targets, V)
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != D:
        raise ValueError(f"expected hidden (..,D), unembedding (V,D), targets (..); got {hidden.shape}, "
                         f"{unembedding.shape}, {targets.shape}")
    chunk = None if chunk is None else checks.integer("token_log_probs", "chunk", chunk, at_least=1)
    rows = hidden.reshape(-1, D)
    flat_targets = xp.asarray(targets).reshape(-1)
    if kernel and is_cupy(hidden):
        from minilm.kernels import layers as on_gpu
        return on_gpu.token_log_probs(hidden, unembedding, flat_targets, chunk)
    log_probs, rows_vjp = chunked_log_probs(rows, unembedding, flat_targets, chunk, train_unembedding)

    def vjp(dy):
        drows, *dunembedding = rows_vjp(dy.reshape(-1))
        return drows.reshape(hidden.shape), *dunembedding
    return log_probs.reshape(targets.shape), vjp


@primitive
def token_log_probs_without_chunks(hidden, unembedding, targets):
    """The derivation of token_log_probs in code.  (N,D), (V,D), integers (N,) -> (N,)"""
    xp = array_module(hidden)
    targets = checks.token_ids("token_log_probs_without_chunks", "targets", targets, len(unembedding))
    rows = xp.arange(len(hidden))
    logits = hidden @ unembedding.T                                 # (N,V)
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_p = logits - xp.log(xp.exp(logits).sum(axis=-1, keepdims=True))

    def vjp(dy):
        dlogits = -dy[:, None] * xp.exp(log_p)                      # dy (e - p)
        dlogits[rows, targets] += dy
        return dlogits @ unembedding, dlogits.T @ hidden
    return log_p[rows, targets], vjp


def sequence_log_probs(log_probs, mask) -> Tensor:
    """Sum of the log-probs (B,T) where mask (B,T) is 1: one number per sequence, (B,).

    Log-probs outside the mask may be NaN. Raises ValueError for a mask of another shape, or of other values.
    """
    return ops.sum(ops.where(checks.mask("sequence_log_probs", mask, log_probs.shape), log_probs, 0.0), axis=-1)
