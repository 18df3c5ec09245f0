"""The fused layers of minilm/layers.py on a GPU. Each function returns (output, vjp), computed by the kernels.

Shapes are those of minilm/layers.py. Arrays that are not contiguous are copied first, because the kernels need
contiguous arrays.
"""

from collections.abc import Callable, Sequence

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.kernels import attention as attention_kernel, fused, log_probs, smear
from minilm.kernels.launch import Array


def _contiguous(x):
    return array_module(x).ascontiguousarray(x)


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Callable]:
    x = _contiguous(x)
    y, r = fused.rms_norm_forward(x, weight, eps)

    def vjp(dy):
        return fused.rms_norm_backward(_contiguous(dy), x, weight, r)
    return y, vjp


def swiglu(gate_up: Array) -> tuple[Array, Callable]:
    gate_up = _contiguous(gate_up)

    def vjp(dy):
        return fused.swiglu_backward(_contiguous(dy), gate_up)
    return fused.swiglu_forward(gate_up), vjp


def attention(q: Array, k: Array, v: Array, causal: bool, key_mask: Array | np.ndarray | None,
              scale: float) -> tuple[Array, Callable]:
    """The real keys of a row must be contiguous: padding can be on the left and on the right. Raises ValueError."""
    q, k, v = map(_contiguous, (q, k, v))
    first, stop = (None, None) if key_mask is None else real_keys(key_mask)
    plan = attention_kernel.batch_plan(array_module(q), q.shape, k.shape, causal, first, stop)
    o, lse = attention_kernel.batch_forward(q, k, v, plan, scale)

    def vjp(dy):
        return attention_kernel.batch_backward(q, k, v, o, _contiguous(dy), lse, plan, scale)
    return o, vjp


def real_keys(key_mask: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first real key of each row of key_mask (B,S), and the place after its last: two arrays (B,) of NumPy."""
    real = to_numpy(key_mask).astype(bool)
    first = real.argmax(axis=1) if real.shape[1] else np.zeros(len(real), int)
    stop = first + real.sum(axis=1)
    place = np.arange(real.shape[1])
    if (real != ((place >= first[:, None]) & (place < stop[:, None]))).any():
        raise ValueError("attention: a row of key_mask has a gap; the kernel supports padding on the left and on "
                         "the right only; pass kernel=False")
    return first, stop


def segment_plan(xp, segments: Sequence) -> attention_kernel.Plan:
    """The attention Plan of the segments of a packing.Pack; xp: cupy."""
    rows = [(s.start, s.queries, s.start, s.queries, 0, s.prefix_start, s.keys - s.queries) for s in segments]
    return attention_kernel.Plan(xp, rows)


def smear_keys(qkv: Array, amount: Array, heads: int, neighbours: smear.Neighbours) -> tuple[Array, Callable]:
    """qkv (..,(H+2G)K) of the N tokens of a packing.Pack with its keys smeared (rotary.smear). amount (G,K)"""
    G, K = amount.shape
    by_head = (-1, heads + 2 * G, K)
    out = qkv.copy()
    keys = smear.smear_forward(out.reshape(by_head), heads, amount, neighbours)

    def vjp(dy):
        dqkv = dy.copy()
        return dqkv, smear.smear_backward(dqkv.reshape(by_head), heads, amount, neighbours, keys)
    return out, vjp


def segment_attention(qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int, plan: attention_kernel.Plan,
                      pairing: str) -> tuple[Array, Callable]:
    """Rotary positions, then causal attention over a whole packing.Pack in one launch: (N,(H+2G)K) -> (N,H K)."""
    N, width = qkv.shape
    xp = array_module(qkv)
    H = heads
    G = kv_heads
    K = width // (H + 2 * G)
    qkv = _contiguous(qkv).reshape(N, H + 2 * G, K)
    rotated = fused.rope(qkv, cos, sin, H, G, pairing)                      # (N,H+G,K)
    o = xp.empty((N, H, K), qkv.dtype)
    lse = xp.empty((H, N), qkv.dtype)
    shape = {"plan": plan, "heads": H, "kv_heads": G, "width": K, "lse_head": N, "scale": K ** -0.5}

    def heads_from(array, first):
        return attention_kernel.Operand(array, first * K, array.shape[1] * K, K)
    operands = heads_from(rotated, 0), heads_from(rotated, H), heads_from(qkv, H + G), heads_from(o, 0)
    attention_kernel.forward(*operands, lse, **shape)

    def vjp(dy):
        dqkv = xp.empty(qkv.shape, qkv.dtype)
        attention_kernel.backward(*operands, heads_from(_contiguous(dy).reshape(N, H, K), 0), lse, heads_from(dqkv, 0),
                                  heads_from(dqkv, H), heads_from(dqkv, H + G), **shape)
        fused.rope(dqkv, cos, sin, H, G, pairing, backward=True, out=dqkv)
        return dqkv.reshape(N, width)
    return o.reshape(N, H * K), vjp


def token_log_probs(hidden: Array, unembedding: Array, targets: Array, chunk: int | None) -> tuple[Array, Callable]:
    """hidden (..,D); targets (N,), in the vocabulary -> log-probs (..)"""
    shape = hidden.shape
    rows = _contiguous(hidden).reshape(-1, shape[-1])
    found, lse, _, logits = log_probs.linear_forward(rows, unembedding, targets, chunk)

    def vjp(dy):
        dhidden, dunembedding = log_probs.linear_backward(rows, unembedding, targets, lse, _contiguous(dy).reshape(-1),
                                                          logits, chunk)
        return dhidden.reshape(shape), dunembedding
    return found.reshape(shape[:-1]), vjp
