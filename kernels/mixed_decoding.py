"""The blocks of a transformer for new tokens and a cache, in bf16: the forward of mixed_layers.py without its gradient.

The numbers are rounded at the same places as in training, so that the log-probs of sampled tokens are those that
training computes, but for two differences: kernels/decode.cu does not round the weights P of the values, and sums have
another order. The cache is bf16: training multiplies keys and values of bf16 too. Adapters (lora.py) are not merged:
the sum would be rounded once more than in training, and would be a copy of every weight.
Tests: tests/test_mixed_decoding.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilm.backend import array_module
from minilm.kernels import attention_bf16, fused_bf16
from minilm.kernels.attention import Operand, Plan
from minilm.kernels.decode import decode
from minilm.kernels.fused_bf16 import to_bf16, to_float32
from minilm.kernels.launch import Array
from minilm.kernels.mixed_layers import MATRICES, Linear, Rounded, aligned, rounded
from minilm.kernels.smear import Neighbours, smear_forward, smear_next


def rounded_weights(matrices: dict, unembedding: Any) -> dict:
    """{name: (W, A, B)} of Tensors, Rounded or None: a Linear for each matrix of a block and a Rounded for the
    unembedding, rounded now; the array of any other parameter."""
    def array(x):
        return x if x is None or isinstance(x, Rounded) else x.data
    weights: dict = {name: Linear(*map(array, three)) if name.endswith(MATRICES) else aligned(array(three[0]))
                     for name, three in matrices.items() if name != "unembedding"}
    return weights | {"unembedding": Rounded(rounded(array(unembedding)))}


def layers_of_new_tokens(config: Any, weights: dict, T: int, first: Any, cache: Any) -> Callable:
    """layer(i, x) for model.after_blocks, on arrays: x (B T,D), T new tokens of each sequence of a Cache of bf16.

    weights: of rounded_weights. first: as in cached_decoding.forward_cached.
    """
    _, B, G, capacity, _ = cache.keys.shape
    xp = array_module(cache.keys)
    start = cache.length
    rotation = cache.rotation(T)
    plan = None if T == 1 else cache_plan(xp, first, B, T, start, G * capacity)
    neighbours = key_neighbours(xp, first, B, T, start) if config.key_smear and T > 1 else None
    shape = {"heads": config.heads, "kv_heads": G, "pairing": config.rope_pairing, "eps": config.norm_eps,
             "cos": xp.tile(rotation.real, (B, 1)), "sin": xp.tile(rotation.imag, (B, 1)), "cache": cache,
             "start": start, "plan": plan, "first": first if T == 1 else None}

    def layer(i, x):
        p = f"blocks.{i}."

        def smear(z):
            amount = weights[p + "key_smear"]
            if neighbours is None:
                smear_next(z, config.heads, amount, cache.last_keys[i])
            else:
                smear_several(z, config.heads, amount, neighbours, cache.last_keys[i])
        x = x + attention_branch(x, weights[p + "attention_norm"], weights[p + "qkv"], weights[p + "attention_out"],
                                 layer=i, smear=smear if config.key_smear else None, **shape)
        h, _ = fused_bf16.rms_norm(x, weights[p + "ffn_norm"], config.norm_eps)
        a = fused_bf16.swiglu_forward(weights[p + "gate_up"].forward(h, np.uint16))
        return x + weights[p + "ffn_out"].forward(a, np.float32)
    return layer


def key_neighbours(xp, first: np.ndarray | None, B: int, T: int, start: int) -> Neighbours:
    """For smear_several: of each sequence, the token before the T new ones, and these. Arguments as in cache_plan."""
    texts = [SimpleNamespace(start=b * (1 + T), stop=(b + 1) * (1 + T), prefix_stop=0) for b in range(B)]
    real = None if first is None else (np.arange(start - 1, start + T) >= first[:, None]).reshape(-1)
    return Neighbours(xp, texts, real)


def smear_several(z: Array, heads: int, amount: Array, neighbours: Neighbours, last: Array) -> None:
    """Smears the keys of z (B T,X,K), T new tokens of each of B sequences, in place. last (B,G,K) in float32: the keys
    before them, zeros at the start; it becomes the last of the new ones. Padding is before no token."""
    B, G, K = last.shape
    keys = z.reshape(B, -1, z.shape[1], K)[:, :, heads:heads + G]                       # (B,T,G,K)
    text = array_module(z).concatenate([to_bf16(last)[:, None], keys], axis=1)
    last[...] = to_float32(keys[:, -1])
    smear_forward(text.reshape(-1, G, K), 0, amount, neighbours)
    keys[...] = text[:, 1:]


def cache_plan(xp, first: np.ndarray | None, B: int, T: int, start: int, row: int) -> Plan:
    """The attention Plan of T new tokens of each of B sequences; xp: cupy. The cache holds `start` positions before
    them, of which the first real one is first (B,) (None: 0). row: numbers of keys from one sequence to the next."""
    first = np.zeros(B, int) if first is None else first
    return Plan(xp, [(b * T, T, b * row + first[b], start + T - first[b], start - first[b], 0, 0) for b in range(B)])


def attention_branch(x: Array, norm: Array, qkv: Linear, attention_out: Linear, *, cache: Any, layer: int, start: int,
                     plan: Plan | None, first: Array | None, smear: Callable | None, cos: Array, sin: Array,
                     heads: int, kv_heads: int, pairing: str, eps: float) -> Array:
    """attention(rms_norm(x)) of the new tokens x (B T,D) of the B sequences of a Cache of bf16, which it extends.

    start: positions that were filled. plan: of cache_plan; None for one token, whose sequences begin at first (B,).
    smear(z (B T,H+2G,K)) smears the keys of z in place; None: they are not. cos, sin (B T,K/2).
    """
    H, HG = heads, heads + kv_heads
    N, X = len(x), HG + kv_heads
    _, B, G, capacity, K = cache.keys.shape
    xp = array_module(x)
    h, _ = fused_bf16.rms_norm(x, norm, eps)
    z = qkv.forward(h, np.uint16).reshape(N, X, K)
    by_head = z.reshape(B, -1, X, K).swapaxes(1, 2)                             # (B,H+2G,T,K)
    if smear is not None:
        smear(z)
    fused_bf16.rope(z, cos, sin, HG, pairing)
    cache.extend(layer, by_head[:, H:HG], by_head[:, HG:])
    keys, values = cache.keys[layer], cache.values[layer]
    if plan is None:
        o = decode(xp.ascontiguousarray(z[:, :H]), keys, values, start + 1, first)
    else:
        o = xp.empty((N, H, K), np.uint16)
        k, v = (Operand(array, 0, K, capacity * K) for array in (keys, values))
        attention_bf16.forward(Operand(z, 0, X * K, K), k, v, Operand(o, 0, H * K, K), xp.empty((H, N), np.float32),
                               plan, H, G, K, N, K ** -0.5)
    return attention_out.forward(o.reshape(N, H * K), np.float32)
