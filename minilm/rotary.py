"""Queries and keys before attention: rotary positions, and smeared keys.

layers.py has these functions too. plain.rope and plain.smear are their definitions: tests/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minilm import checks, ops
from minilm.backend import array_module
from minilm.tensor import primitive


def rope_tables(positions, head_width: int, base: float = 10000.0, dtype="float32") -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles position * base^(-2i/K), for the pairs i = 0 .. K/2 - 1.

    positions: integers of any shape (..), an array; returns two arrays (..,K/2).
    The angles are computed in float64; cos and sin are rounded to dtype. With angles in float32, cos would be off by up
    to 7e-4 at positions up to 8192 (K = 64).
    Raises ValueError for an odd head width, and for a base that is not above 0.
    """
    checks.number("rope_tables", "base", base, above=0)
    if checks.integer("rope_tables", "head_width", head_width, at_least=2) % 2:
        raise ValueError(f"rope_tables: rotary positions rotate pairs: the head width {head_width} must be even")
    xp = array_module(positions)
    frequencies = base ** (-xp.arange(0, head_width, 2, dtype="float64") / head_width)
    angles = positions[..., None] * frequencies
    return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)


@primitive
def rope(x, cos, sin, pairing: str = "half"):
    """Rotary positions: rotate pair i of each head by the angle of its position.  x (B,H,T,K); cos, sin (T,K/2)

    A rotation is orthogonal, so the vjp rotates back.
    Two pairings are in use, and weights trained with one are wrong with the other: "half" pairs the numbers
    (i, i + K/2) (GPT-NeoX; Llama in Hugging Face's files), "interleaved" pairs (2i, 2i + 1) (the paper; Llama in
    Meta's files; GGUF). The tables may also be (B,1,T,K/2).
    Su et al. 2021, arXiv:2104.09864.
    """
    array_module(x, cos, sin)               # raises if they are on two devices
    if cos.dtype != x.dtype:
        raise TypeError(f"mixed dtypes: x is {x.dtype} and its tables are {cos.dtype}; make them with dtype={x.dtype}")
    if cos.shape != sin.shape or cos.shape[-2:] != (x.shape[-2], x.shape[-1] // 2):
        raise ValueError(f"expected x (B,H,T,K), cos and sin (T,K/2); got {x.shape}, {cos.shape}, {sin.shape}")
    rotation = cos + 1j * sin               # exp(i angle)
    def vjp(dy):
        return rotate(dy, rotation.conj(), pairing)
    return rotate(x, rotation, pairing), vjp


def rotate(x, rotation, pairing: str = "half") -> np.ndarray:
    """The pairs of x (..,K) as complex numbers, times rotation (..,K/2): an array like x."""
    xp = array_module(x)
    first, second = pair_slices(x.shape[-1], pairing)
    z = xp.empty((*x.shape[:-1], x.shape[-1] // 2), rotation.dtype)
    z.real = x[..., first]
    z.imag = x[..., second]
    z *= rotation
    y = xp.empty(x.shape, x.dtype)
    y[..., first] = z.real
    y[..., second] = z.imag
    return y


def pair_slices(width: int, pairing: str) -> tuple[slice, slice]:
    """The positions, in a head of that width, of the first and of the second numbers of all pairs."""
    if pairing == "half":
        return slice(0, width // 2), slice(width // 2, None)
    if pairing == "interleaved":
        return slice(0, None, 2), slice(1, None, 2)
    raise ValueError(f"pairing is {pairing!r}; it must be 'half' or 'interleaved'")


@primitive
def smear(k, amount, previous_key):
    """Key smearing: (1 - a) k_t + a k_{t-1}, with a = sigmoid(amount).  k (B,G,T,K), amount (G,K) -> (B,G,T,K)

    previous_key (B,G,K): the key before the first, an array without a gradient.
    Olsson et al. 2022, arXiv:2209.11895, "smeared keys". Two differences: their sigmoid(alpha) weighs the current
    key, so alpha = -amount; and they have one number per head, here there is one per head and channel.
    The option Config.key_smear gives every layer what a "previous token" head would have to learn. Llama has none.
    """
    if amount.shape != (k.shape[1], k.shape[3]):
        raise ValueError(f"expected k (B,G,T,K), amount (G,K); got {k.shape}, {amount.shape}")
    xp = array_module(k, amount)
    mixed, mix_vjp = mix_keys(k, xp.concatenate([previous_key[:, :, None], k[:, :, :-1]], axis=2), amount)
    def vjp(dy):
        dk, dprevious, damount = mix_vjp(dy)
        dk[:, :, :-1] += dprevious[:, :, 1:]
        return dk, damount
    return mixed, vjp


def mix_keys(k, previous, amount) -> tuple[np.ndarray, Callable]:
    """(1 - a) k + a previous, with a = sigmoid(amount) (G,K) and keys (..,G,T,K); and the vjp for all three."""
    a = ops.stable_sigmoid(amount)[:, None]
    difference = previous - k
    def vjp(dy):
        dprevious = a * dy
        da = ops.unbroadcast(dy * difference, a.shape)
        return dy - dprevious, dprevious, (da * a * (1 - a))[:, 0]
    return k + a * difference, vjp
