"""Attention of one new token to a cache of keys and values: the checks and the launches of decode.cu."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from minilm.backend import array_module
from minilm.kernels.bf16 import SUMS, to_bf16
from minilm.kernels.launch import Array, Variants, check, function, launch, options, real

WIDTHS = (16, 32, 64, 128)
GROUPS = range(1, 9)
THREADS = 128
CHUNK = 128             # keys of a block; fixed, so that the results of a row do not depend on the number of rows


def decode(q: Array, keys: Array, values: Array, length: int, first: Array | None = None,
           scale: float | None = None) -> Array:
    """softmax(scale q k^T) v over the first `length` positions of a cache.  q (B,H,K) -> (B,H,K)

    keys, values (B,G,capacity,K), G divides H. All are float32, float64 or bf16 (uint16, on a device of sm_80 or
    later), and so is the result; sums are float32 for bf16. first (B,), int32 on the device: the position of each row's
    first real key (None: 0). scale: 1/sqrt(K) by default. A row without keys gives zeros. Raises TypeError for an
    unsupported dtype, ValueError for an unsupported shape.
    """
    xp = array_module(q, keys, values)
    B, H, K = q.shape
    _, G, capacity, _ = keys.shape
    sums = np.dtype(SUMS.get(str(q.dtype), q.dtype))
    real(sums)
    if K not in WIDTHS or not G or H % G or H // G not in GROUPS:
        raise ValueError(f"decode: {H} query heads for {G} key/value heads, of width {K}; this kernel supports widths "
                         f"{', '.join(map(str, WIDTHS))} and up to {GROUPS[-1]} query heads for each key/value head")
    check("q", q, q.dtype, (B, H, K))
    for name, array in ("keys", keys), ("values", values):
        check(name, array, q.dtype, (B, G, capacity, K))
    if not 0 <= length <= capacity:
        raise ValueError(f"decode: {length} positions of a cache of {capacity}; length must be from 0 to the capacity")
    first = xp.zeros(B, np.int32) if first is None else first
    check("first", first, np.int32, (B,))
    splits = -(-length // CHUNK)
    if not splits or not q.size:
        return xp.zeros(q.shape, q.dtype)
    out = xp.empty(q.shape, q.dtype)
    # Of each split: o before the division, the largest score m, the sum of exp(score - m).
    o = xp.empty((splits, B, H, K), sums)
    m, total = (xp.empty((splits, B, H), sums) for _ in range(2))
    kernels = constants(K, H // G, q.dtype)
    launch(function(xp, "decode", "decode_split", sums, **kernels), (B, G, splits), (THREADS,),
           q, keys, values, first, o, m, total, length, capacity, CHUNK, float(K ** -0.5 if scale is None else scale))
    launch(function(xp, "decode", "decode_combine", sums, **kernels), (B * H,), (max(32, K),), o, m, total, out, splits)
    return out


def constants(width: int, group: int, dtype: DTypeLike) -> dict[str, int]:
    """The constants of decode.cu, for -D. dtype: of the cache."""
    bf16 = {"BF16": 1} if np.dtype(dtype) == np.uint16 else {}
    return {"HEAD": width, "GROUP": group, "THREADS": THREADS, **bf16}


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for dtype, width, group in itertools.product(SUMS, WIDTHS, (1, 4, 8)):
        yield "decode_split", options(SUMS[dtype], constants(width, group, dtype)), THREADS, 0
    for dtype, width in itertools.product(SUMS, WIDTHS):
        yield "decode_combine", options(SUMS[dtype], constants(width, 1, dtype)), max(32, width), 0


def decode_bytes(B: int, H: int, G: int, K: int, lengths: Sequence[int], longest: int,
                 dtype: DTypeLike) -> dict[str, dict[str, tuple[int, int]]]:
    """{kernel: {array: (bytes read, bytes written)}}: lengths (B,) real keys a row, in a cache filled to `longest`.

    The partial results are read by HEAD threads, so their m and l count once for each.
    """
    item = np.dtype(dtype).itemsize
    splits = -(-longest // CHUNK)
    keys = G * int(np.sum(lengths)) * K * item
    partial = splits * B * H * np.dtype(SUMS[str(np.dtype(dtype))]).itemsize
    readers = max(32, K)
    return {"decode_split": {"q": (splits * B * H * K * item * (THREADS // 32), 0), "keys": (keys, 0),
                             "values": (keys, 0), "o": (0, partial * K), "m": (0, partial), "l": (0, partial)},
            "decode_combine": {"o": (partial * K, 0), "m": (partial * (readers + K), 0), "l": (partial * K, 0),
                               "out": (0, B * H * K * item)}}


def example(xp, rng: np.random.Generator, B: int = 2, H: int = 4, G: int = 2, T: int = 200, K: int = 32,
            dtype: str = "float32") -> Array:
    """Attention of one token to a cache of T random keys and values. dtype: "bfloat16" too."""
    def normal(*shape):
        numbers = rng.normal(size=shape)
        return xp.asarray(to_bf16(numbers) if dtype == "bfloat16" else numbers.astype(dtype))
    return decode(normal(B, H, K), normal(B, G, T, K), normal(B, G, T, K), T)
