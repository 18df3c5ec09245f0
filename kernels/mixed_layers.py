"""The two branches of a transformer block with bf16 activations, between float32 residuals and parameters; log-probs.

Each function returns (output, vjp), for minilm/mixed_precision.py. float32 goes in and float32 comes out, and the bf16
arrays between are its own. The formulas are those of model.block. Weights are rounded where they are used: they may
change in any way between two steps, and no rounded copy can be stale.
Tests: tests/test_mixed_precision.py.
"""

from collections.abc import Callable

import numpy as np

from minilm.backend import array_module
from minilm.kernels import attention_bf16, fused, fused_bf16, gemm, log_probs
from minilm.kernels.attention import Operand, Plan
from minilm.kernels.fused_bf16 import to_bf16, to_float32
from minilm.kernels.launch import Array


class DeferredProduct:
    """The gradient x^T y of a weight in float32, from bf16 x (N,in), y (N,out): computed where it is to be stored."""

    __slots__ = ("x", "y")
    dtype = np.dtype(np.float32)

    def __init__(self, x, y):
        self.x = x
        self.y = y

    shape = property(lambda self: (self.x.shape[1], self.y.shape[1]))

    def write(self, out=None):
        """The product, in the array `out` if one is given."""
        return product(self.x, self.y, self.dtype, a_transposed=True, out=out)

    def add_to(self, out) -> None:
        """Adds the product to `out`."""
        gemm.product(self.x, self.y, out, a_transposed=True, add=True)


def product(a, b, dtype, a_transposed: bool = False, b_transposed: bool = False, out=None):
    """gemm.product to a new array of uint16 (bf16) or float32, unless out is given."""
    if out is None:
        shape = a.shape[int(a_transposed)], b.shape[1 - int(b_transposed)]
        out = array_module(a).empty(shape, dtype)
    return gemm.product(a, b, out, a_transposed, b_transposed)


def attention_branch(x: Array, norm: Array, qkv: Array, attention_out: Array, amount: Array | None, *, plan: Plan,
                     smear: Callable, cos: Array, sin: Array, heads: int, kv_heads: int, pairing: str,
                     eps: float) -> tuple[Array, Callable]:
    """attention(rms_norm(x)) of model.block.  x (N,D), tokens of a pack or of a rectangle of sequences -> (N,D)

    norm (D,), qkv (D,(H+2G)K), attention_out (H K,D), cos and sin (N,K/2) of each token. amount (G,K) of rotary.smear,
    or None; smear(keys (G,N,K), amount) -> smeared keys, vjp.
    """
    H, G, N = heads, kv_heads, len(x)
    K = qkv.shape[1] // (H + 2 * G)
    norm = _aligned(norm)
    h, r = fused_bf16.rms_norm(x, norm, eps)
    qkv16, out16 = to_bf16(_aligned(qkv)), to_bf16(_aligned(attention_out))
    z = product(h, qkv16, np.uint16).reshape(N, H + 2 * G, K)
    smear_vjp = _smear(z, H, G, amount, smear)
    fused_bf16.rope(z, cos, sin, H + G, pairing)
    o = array_module(x).empty((N, H, K), np.uint16)
    lse = array_module(x).empty((H, N), np.float32)
    shape = {"plan": plan, "heads": H, "kv_heads": G, "width": K, "lse_head": N, "scale": K ** -0.5}
    attention_bf16.forward(*_heads_of(z, H, G), _operand(o, 0), lse, **shape)
    rows = o.reshape(N, H * K)

    def vjp(dy):
        d = to_bf16(array_module(dy).ascontiguousarray(dy))
        do = product(d, out16, np.uint16, b_transposed=True).reshape(N, H, K)
        dz = array_module(x).empty(z.shape, np.uint16)
        attention_bf16.backward(*_heads_of(z, H, G), _operand(o, 0), _operand(do, 0), lse, *_heads_of(dz, H, G),
                                **shape)
        fused_bf16.rope(dz, cos, sin, H + G, pairing, backward=True)
        damount = smear_vjp(dz)
        dz = dz.reshape(N, -1)
        dh = product(dz, qkv16, np.float32, b_transposed=True)
        dx, dnorm = fused.rms_norm_backward(dh, x, norm, r)
        return dx, dnorm, DeferredProduct(h, dz), DeferredProduct(rows, d), damount
    return product(rows, out16, np.float32), vjp


def _heads_of(z, H, G):
    """The operands q, k, v of z (N,H+2G,K)."""
    return _operand(z, 0), _operand(z, H), _operand(z, H + G)


def _operand(array, first):
    _, heads, K = array.shape
    return Operand(array, first * K, heads * K, K)


def _aligned(array):
    """The array, or a copy that begins at a multiple of 16 bytes: a parameter in a flat array may begin anywhere."""
    return array if array.data.ptr % 16 == 0 else array.copy()


def _smear(z, H, G, amount, smear):
    """Smears the keys of z (N,H+2G,K) in place, in float32. Returns a function that changes the gradient of z in place
    likewise, and returns the gradient of amount."""
    if amount is None:
        return lambda dz: None
    keys = slice(H, H + G)
    mixed, vjp = smear(to_float32(z[:, keys]).swapaxes(0, 1), amount)
    z[:, keys] = to_bf16(array_module(z).ascontiguousarray(mixed.swapaxes(0, 1)))

    def smear_vjp(dz):
        dk, damount = vjp(array_module(dz).ascontiguousarray(to_float32(dz[:, keys]).swapaxes(0, 1)))
        dz[:, keys] = to_bf16(array_module(dz).ascontiguousarray(dk.swapaxes(0, 1)))
        return damount
    return smear_vjp


def ffn_branch(x: Array, norm: Array, gate_up: Array, ffn_out: Array, *, eps: float) -> tuple[Array, Callable]:
    """swiglu(rms_norm(x)) of model.block.  x (N,D), norm (D,), gate_up (D,2F), ffn_out (F,D) -> (N,D)"""
    norm = _aligned(norm)
    h, r = fused_bf16.rms_norm(x, norm, eps)
    up16, out16 = to_bf16(_aligned(gate_up)), to_bf16(_aligned(ffn_out))
    g = product(h, up16, np.uint16)
    a = fused_bf16.swiglu_forward(g)

    def vjp(dy):
        d = to_bf16(array_module(dy).ascontiguousarray(dy))
        dg = fused_bf16.swiglu_backward(product(d, out16, np.uint16, b_transposed=True), g)
        dh = product(dg, up16, np.float32, b_transposed=True)
        dx, dnorm = fused.rms_norm_backward(dh, x, norm, r)
        return dx, dnorm, DeferredProduct(h, dg), DeferredProduct(a, d)
    return product(a, out16, np.float32), vjp


def token_log_probs(hidden: Array, unembedding: Array, targets: np.ndarray) -> tuple[Array, Callable]:
    """layers.token_log_probs.  hidden (..,D), unembedding (V,D), targets (..) in the vocabulary -> (..)"""
    xp = array_module(hidden, unembedding)
    rows = xp.ascontiguousarray(hidden).reshape(-1, hidden.shape[-1])
    targets = xp.asarray(targets).reshape(-1)
    rows, unembedding = _aligned(rows), _aligned(unembedding)
    found, lse, _, logits = log_probs.linear_forward(rows, unembedding, targets, bf16=True)

    def vjp(dy):
        dhidden, dunembedding = log_probs.linear_backward(
            rows, unembedding, targets, lse, xp.ascontiguousarray(dy).reshape(-1), logits, bf16=True)
        return dhidden.reshape(hidden.shape), dunembedding
    return found.reshape(hidden.shape[:-1]), vjp
