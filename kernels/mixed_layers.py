"""The two branches of a transformer block with bf16 activations, between float32 residuals and parameters; log-probs.

Each function returns (output, vjp), for minilm/mixed_precision.py. float32 goes in and float32 comes out, and the bf16
arrays between are its own. The formulas are those of model.block. Weights are rounded where they are used: they may
change in any way between two steps, and no rounded copy can be stale. Of a frozen weight (lora.py) bf16 may be all that
is kept. tf32_product is the product of a model in float32 whose factors are rounded to TF32.
Tests: tests/test_mixed_precision.py, tests/test_mixed_lora.py, tests/test_tf32.py.
"""

from collections.abc import Callable

import numpy as np

from minilm.backend import array_module, to_device
from minilm.kernels import attention_bf16, fused, fused_bf16, gemm, log_probs, smear
from minilm.kernels.attention import Operand, Plan
from minilm.kernels.fused_bf16 import to_bf16
from minilm.kernels.launch import Array
from minilm.kernels.layers import real_keys

MATRICES = ("qkv", "attention_out", "gate_up", "ffn_out")        # of a block: the weights that are rounded to bf16


class Rounded:
    """A weight of which bf16 is all that is kept: bits (in,out), uint16. It has no gradient."""

    __slots__ = ("bits",)

    def __init__(self, bits):
        self.bits = bits

    shape = property(lambda self: self.bits.shape)

    def __len__(self):
        return len(self.bits)


class DeferredProduct:
    """The gradient x^T y of a weight in float32, computed where it is to be stored. x (N,in) and y (N,out) are bf16, or
    float32 that is rounded to TF32."""

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


def product(a, b, dtype, a_transposed: bool = False, b_transposed: bool = False, out=None, add: bool = False):
    """gemm.product to a new array of uint16 (bf16) or float32, unless out is given."""
    if out is None:
        shape = a.shape[int(a_transposed)], b.shape[1 - int(b_transposed)]
        out = array_module(a).empty(shape, dtype)
    return gemm.product(a, b, out, a_transposed, b_transposed, add)


class Linear:
    """y = x W + (x A) B, of bf16 x (N,in), and its gradients. A (in,R) and B (R,out) are an adapter (lora.py), or None.

        dx = dy W^T + du A^T,    dW = x^T dy,    dA = x^T du,    dB = u^T dy,    with u = x A and du = dy B^T

    The term of the adapter comes first and x W is added to it: a sum in bf16 is rounded twice, and so the first of the
    two roundings is of the smaller term.
    """

    def __init__(self, W, A=None, B=None):
        self.W, self.A, self.B = (None if matrix is None else rounded(matrix) for matrix in (W, A, B))

    def forward(self, x, dtype):
        """y in uint16 (bf16) or float32."""
        if self.A is None:
            return product(x, self.W, dtype)
        self.u = product(x, self.A, np.uint16)
        return product(x, self.W, dtype, out=product(self.u, self.B, dtype), add=True)

    def backward(self, x, dy, dtype):
        """dx in dtype, then dW, dA and dB for tensor.backward."""
        if self.A is None:
            return product(dy, self.W, dtype, b_transposed=True), DeferredProduct(x, dy), None, None
        du = product(dy, self.B, np.uint16, b_transposed=True)
        dx = product(du, self.A, dtype, b_transposed=True)
        dx = product(dy, self.W, dtype, b_transposed=True, out=dx, add=True)
        return dx, DeferredProduct(x, dy), DeferredProduct(x, du), DeferredProduct(self.u, dy)


def rounded(matrix: Array | Rounded) -> Array:
    """A matrix of float32, or a Rounded, as bf16."""
    return matrix.bits if isinstance(matrix, Rounded) else to_bf16(aligned(matrix))


def frozen(weights: dict, tied: bool) -> dict:
    """{name: a Rounded copy on the GPU} of the matrices among the weights of a model {name: array}, on any device, and
    of the unembedding."""
    weights = {**weights, "unembedding": weights["embedding"]} if tied else weights
    return {name: Rounded(rounded(to_device(w, "gpu"))) for name, w in weights.items()
            if name.endswith((*MATRICES, "unembedding"))}


def padded_plan(xp, key_mask: np.ndarray, causal: bool) -> Plan:
    """The attention Plan of B sequences of T tokens, one after the other in a row, with key_mask (B,T); xp: cupy."""
    first, stop = real_keys(key_mask)
    B, T = key_mask.shape
    return Plan(xp, [(b * T, T, b * T + first[b], stop[b] - first[b], -first[b] if causal else T, 0, 0)
                     for b in range(B)])


def layers_of(attention: Callable, ffn: Callable, parameters: dict, matrices: Callable, **shape) -> Callable:
    """layer(i, x) for model.after_blocks: model.block of layer i, x (..,D) -> (..,D), N tokens in all, on Tensors.

    attention, ffn: attention_branch and ffn_branch as primitives. matrices: from a weight to W, A and B.
    """
    def layer(i, x):
        p = f"blocks.{i}."
        rows = x.reshape(-1, x.shape[-1])
        rows = rows + attention(rows, parameters[p + "attention_norm"], *matrices(parameters[p + "qkv"]),
                                *matrices(parameters[p + "attention_out"]), parameters.get(p + "key_smear"), **shape)
        rows = rows + ffn(rows, parameters[p + "ffn_norm"], *matrices(parameters[p + "gate_up"]),
                          *matrices(parameters[p + "ffn_out"]), eps=shape["eps"])
        return rows.reshape(x.shape)
    return layer


def attention_branch(x: Array, norm: Array, qkv: Array, qkv_a: Array | None, qkv_b: Array | None, attention_out: Array,
                     out_a: Array | None, out_b: Array | None, amount: Array | None, *, plan: Plan,
                     neighbours: smear.Neighbours | None, cos: Array, sin: Array, heads: int, kv_heads: int,
                     pairing: str, eps: float) -> tuple[Array, Callable]:
    """attention(rms_norm(x)) of model.block.  x (N,D), tokens of a pack or of a rectangle of sequences -> (N,D)

    norm (D,), qkv (D,(H+2G)K), attention_out (H K,D), each followed by the A and B of its adapter; cos and sin (N,K/2)
    of each token. amount (G,K) of rotary.smear, with the neighbours of each token; or None and None.
    """
    H, G, N = heads, kv_heads, len(x)
    K = qkv.shape[1] // (H + 2 * G)
    xp = array_module(x)
    norm = aligned(norm)
    h, r = fused_bf16.rms_norm(x, norm, eps)
    into, back = Linear(qkv, qkv_a, qkv_b), Linear(attention_out, out_a, out_b)
    z = into.forward(h, np.uint16).reshape(N, H + 2 * G, K)
    smear_vjp = _smeared(z, H, amount, neighbours)
    fused_bf16.rope(z, cos, sin, H + G, pairing)
    o = xp.empty((N, H, K), np.uint16)
    lse = xp.empty((H, N), np.float32)
    shape = {"plan": plan, "heads": H, "kv_heads": G, "width": K, "lse_head": N, "scale": K ** -0.5}
    attention_bf16.forward(*_heads_of(z, H, G), _operand(o, 0), lse, **shape)
    rows = o.reshape(N, H * K)

    def vjp(dy):
        d = to_bf16(xp.ascontiguousarray(dy))
        do, *of_out = back.backward(rows, d, np.uint16)
        do = do.reshape(N, H, K)
        dz = (xp.empty if plan.keys_in_all == N else xp.zeros)(z.shape, np.uint16)  # of padding no key is written
        attention_bf16.backward(*_heads_of(z, H, G), _operand(o, 0), _operand(do, 0), lse, *_heads_of(dz, H, G),
                                **shape)
        fused_bf16.rope(dz, cos, sin, H + G, pairing, backward=True)
        damount = smear_vjp(dz)
        dh, *of_qkv = into.backward(h, dz.reshape(N, -1), np.float32)
        dx, dnorm = fused.rms_norm_backward(dh, x, norm, r)
        return dx, dnorm, *of_qkv, *of_out, damount
    return back.forward(rows, np.float32), vjp


def _heads_of(z, H, G):
    """The operands q, k, v of z (N,H+2G,K)."""
    return _operand(z, 0), _operand(z, H), _operand(z, H + G)


def _operand(array, first):
    _, heads, K = array.shape
    return Operand(array, first * K, heads * K, K)


def aligned(array: Array) -> Array:
    """The array, or a copy that begins at a multiple of 16 bytes: a parameter in a flat array may begin anywhere."""
    return array if array.data.ptr % 16 == 0 else array.copy()


def _smeared(z, H, amount, neighbours):
    """Smears the keys of z (N,H+2G,K) in place. Returns a function that changes the gradient of z in place likewise,
    and returns the gradient of amount."""
    if amount is None:
        return lambda dz: None
    keys = smear.smear_forward(z, H, amount, neighbours)
    return lambda dz: smear.smear_backward(dz, H, amount, neighbours, keys)


def ffn_branch(x: Array, norm: Array, gate_up: Array, up_a: Array | None, up_b: Array | None, ffn_out: Array,
               out_a: Array | None, out_b: Array | None, *, eps: float) -> tuple[Array, Callable]:
    """swiglu(rms_norm(x)) of model.block.  x (N,D) -> (N,D)

    norm (D,), gate_up (D,2F), ffn_out (F,D), each followed by the A and B of its adapter.
    """
    norm = aligned(norm)
    h, r = fused_bf16.rms_norm(x, norm, eps)
    into, back = Linear(gate_up, up_a, up_b), Linear(ffn_out, out_a, out_b)
    g = into.forward(h, np.uint16)
    a = fused_bf16.swiglu_forward(g)

    def vjp(dy):
        d = to_bf16(array_module(dy).ascontiguousarray(dy))
        da, *of_out = back.backward(a, d, np.uint16)
        dh, *of_up = into.backward(h, fused_bf16.swiglu_backward(da, g), np.float32)
        dx, dnorm = fused.rms_norm_backward(dh, x, norm, r)
        return dx, dnorm, *of_up, *of_out
    return back.forward(a, np.float32), vjp


def token_log_probs(hidden: Array, unembedding: Array | Rounded, targets: np.ndarray,
                    compute: str) -> tuple[Array, Callable]:
    """layers.token_log_probs.  hidden (..,D), unembedding (V,D), targets (..) in the vocabulary -> (..)

    compute: "bfloat16" or "tensorfloat32", to which the factors of the products are rounded.
    """
    xp = array_module(hidden)
    rows = aligned(xp.ascontiguousarray(hidden).reshape(-1, hidden.shape[-1]))
    targets = xp.asarray(targets).reshape(-1)
    unembedding = unembedding.bits if isinstance(unembedding, Rounded) else aligned(unembedding)
    found, lse, _, logits = log_probs.linear_forward(rows, unembedding, targets, compute=compute)

    def vjp(dy):
        dhidden, dunembedding = log_probs.linear_backward(
            rows, unembedding, targets, lse, xp.ascontiguousarray(dy).reshape(-1), logits, compute=compute)
        return dhidden.reshape(hidden.shape), dunembedding
    return found.reshape(hidden.shape[:-1]), vjp


def logits(hidden: Array, unembedding: Array | Rounded, compute: str) -> tuple[Array, Callable]:
    """hidden unembedding^T in float32.  hidden (..,D), unembedding (V,D) -> (..,V).  compute: as in token_log_probs"""
    xp = array_module(hidden)
    factor = rounded if compute == "bfloat16" else xp.ascontiguousarray
    h, U = factor(xp.ascontiguousarray(hidden).reshape(-1, hidden.shape[-1])), factor(unembedding)

    def vjp(dy):
        d = factor(xp.ascontiguousarray(dy).reshape(-1, len(U)))
        return product(d, U, np.float32).reshape(hidden.shape), DeferredProduct(d, h)
    return product(h, U, np.float32, b_transposed=True).reshape(*hidden.shape[:-1], len(U)), vjp


def tf32_product(x: Array, weight: Array) -> tuple[Array, Callable]:
    """x W of float32, with factors that are rounded to TF32.  x (..,in), weight (in,out) -> (..,out)"""
    xp = array_module(x)
    rows, W = xp.ascontiguousarray(x).reshape(-1, x.shape[-1]), xp.ascontiguousarray(weight)

    def vjp(dy):
        d = xp.ascontiguousarray(dy).reshape(-1, dy.shape[-1])
        return product(d, W, np.float32, b_transposed=True).reshape(x.shape), DeferredProduct(rows, d)
    return product(rows, W, np.float32).reshape(*x.shape[:-1], W.shape[1]), vjp
