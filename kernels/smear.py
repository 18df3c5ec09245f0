"""The launches of smear.cu: each key mixed with the key before it in its text (rotary.smear), over the rows of a pack.

N rows of a pack, G key heads of K numbers; the keys are heads of an array (N,X,K) of queries, keys and values.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from numpy.typing import DTypeLike

from minilm.backend import array_module
from minilm.kernels import fused
from minilm.kernels.bf16 import SUMS, to_bf16
from minilm.kernels.launch import Array, Variants, check, counts, function, launch, options, real

BLOCK = 32, 8                   # numbers of a row, rows
ROW_BLOCKS = 512                # blocks along the rows, at most; each gives a partial sum of the gradient of amount


class Neighbours:
    """Which row is before and which are after each row of a pack, in its own text: int32 on the device.

    previous   (N,) the row before, -1 for none: in a response's first row the last one of its prompt
    starts     (N+1,) the rows after row n are following[starts[n]:starts[n + 1]]
    following  (M,)
    """

    def __init__(self, xp, segments: Sequence, key_mask: np.ndarray | None = None):
        """segments: of packing.Pack. key_mask (N,): 0 on padding, which is before no row; None: no padding."""
        N = max((s.stop for s in segments), default=0)
        previous = np.arange(-1, N - 1)
        for s in segments:
            if s.stop > s.start:
                previous[s.start] = s.prefix_stop - 1
        if key_mask is not None:
            previous[(previous >= 0) & (key_mask[previous] == 0)] = -1
        order = np.argsort(previous, kind="stable")             # rows without one come first, and are left out
        starts = np.searchsorted(previous[order], np.arange(N + 1))
        following = order[starts[0]:]
        table = xp.asarray(counts("rows", np.concatenate([previous, starts - starts[0], following])))
        self.previous, self.starts, self.following = table[:N], table[N:2 * N + 1], table[2 * N + 1:]


def smear_forward(qkv: Array, heads: int, amount: Array, neighbours: Neighbours) -> Array:
    """Smears the keys of qkv (N,X,K) in place: heads `heads` to `heads` + G, with amount (G,K). Returns the keys as
    they were, (N,G,K), for smear_backward.

    qkv is float32, float64 or bf16 (uint16, on a device of sm_80 or later), and amount of the precision of the sums,
    float32 for bf16. Raises TypeError for another dtype, ValueError for another shape.
    """
    xp, N, G, K, sums = _checked(qkv, heads, amount)
    check("previous", neighbours.previous, np.int32, (N,))
    keys = qkv[:, heads:heads + G].copy()
    launch(_kernel(xp, "smear_forward", qkv.dtype, sums), _grid(N, G * K), BLOCK, keys, amount, neighbours.previous,
           _from_head(qkv, heads), N, G * K, qkv.shape[1] * K)
    return keys


def smear_backward(dqkv: Array, heads: int, amount: Array, neighbours: Neighbours, keys: Array) -> Array:
    """The vjp of smear_forward, in place: in dqkv (N,X,K) the gradient of the smeared keys is replaced by the gradient
    of the keys. keys (N,G,K): the result of smear_forward. Returns the gradient of amount (G,K)."""
    xp, N, G, K, sums = _checked(dqkv, heads, amount)
    for name, shape in (("previous", (N,)), ("starts", (N + 1,)), ("following", (None,))):
        check(name, getattr(neighbours, name), np.int32, shape)
    check("keys", keys, dqkv.dtype, (N, G, K))
    if not N:
        return xp.zeros((G, K), sums)
    dy = dqkv[:, heads:heads + G].copy()
    grid = _grid(N, G * K)
    partial = xp.empty((grid[0], G * K), sums)
    launch(_kernel(xp, "smear_backward", dqkv.dtype, sums), grid, BLOCK, dy, keys, amount, neighbours.previous,
           neighbours.starts, neighbours.following, _from_head(dqkv, heads), partial, N, G * K, dqkv.shape[1] * K)
    return fused.column_sums(partial).reshape(G, K)


def smear_next(qkv: Array, heads: int, amount: Array, last: Array) -> None:
    """smear_forward of one new token for each of B texts, qkv (B,X,K). last (B,G,K): the key before it, in the
    precision of the sums; it becomes the new key."""
    xp, B, G, K, sums = _checked(qkv, heads, amount)
    check("last", last, sums, (B, G, K))
    launch(_kernel(xp, "smear_next", qkv.dtype, sums), (-(-B // BLOCK[1]), -(-G * K // BLOCK[0])), BLOCK,
           _from_head(qkv, heads), last, amount, B, G * K, qkv.shape[1] * K)


def _from_head(array, head):
    """The flat array from the first number of this head on."""
    return array.reshape(-1)[head * array.shape[2]:]


def _grid(N, width):
    return min(ROW_BLOCKS, -(-N // BLOCK[1])), -(-width // BLOCK[0])


def _checked(qkv, heads, amount):
    xp = array_module(qkv, amount)
    sums = np.dtype(SUMS.get(str(qkv.dtype), qkv.dtype))
    real(sums)
    check("qkv", qkv, qkv.dtype, (None, None, None))
    N, X, K = qkv.shape
    check("amount", amount, sums, (None, K))
    G = len(amount)
    if not 0 <= heads <= X - G:
        raise ValueError(f"smear: {G} key heads from head {heads} on, of {X} heads")
    return xp, N, G, K, sums


def _kernel(xp, name, dtype, sums):
    return function(xp, "smear", name, sums, **constants(dtype))


def constants(dtype: DTypeLike) -> dict[str, int]:
    """The constants of smear.cu, for -D. dtype: of the keys."""
    return {"BF16": 1} if np.dtype(dtype) == np.uint16 else {}


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for dtype, sums in SUMS.items():
        for name in ("smear_forward", "smear_backward", "smear_next"):
            yield name, options(sums, constants(dtype)), BLOCK[0] * BLOCK[1], 0


def smear_bytes(N: int, width: int, followed: int, dtype: DTypeLike) -> dict[str, dict[str, tuple[int, int]]]:
    """{kernel: {argument: (bytes read, bytes written)}} for N rows with `width` numbers of keys, `followed` of them
    with a row before them, without the sum over the blocks. Every thread reads its row's neighbours; on a GPU those of
    a warp are one transaction."""
    size, real_size = np.dtype(dtype).itemsize, np.dtype(SUMS[str(np.dtype(dtype))]).itemsize
    blocks = _grid(N, width)[0]
    array, rows = N * width * size, N * width * 4
    pairs = array + followed * width * size
    amount = blocks * BLOCK[1] * width * real_size
    return {"smear_forward": {"keys": (pairs, 0), "amount": (amount, 0), "previous": (rows, 0), "y": (0, array)},
            "smear_backward": {"dy": (pairs, 0), "keys": (pairs, 0), "amount": (amount, 0), "previous": (rows, 0),
                               "starts": (2 * rows, 0), "following": (followed * width * 4, 0), "dk": (0, array),
                               "partial": (0, blocks * width * real_size)},
            "smear_next": {"y": (array, array), "last": (N * width * real_size, N * width * real_size),
                           "amount": (N * width * real_size, 0)}}


def example(xp, rng: np.random.Generator, N: int = 21, G: int = 3, K: int = 16,
            dtype: str = "float32") -> tuple[Array, ...]:
    """The kernels on random keys of a prompt with two responses and another text, among two query heads and the
    values: the array with the smeared keys, that with their gradient, and the gradient of amount; then a new token for
    each of N texts, and the keys before it. dtype: "bfloat16" too."""
    def normal(*shape):
        numbers = rng.normal(size=shape)
        return xp.asarray(to_bf16(numbers) if dtype == "bfloat16" else numbers.astype(dtype))
    third, half, two_thirds = N // 3, N // 2, 2 * N // 3
    neighbours = Neighbours(xp, [
        SimpleNamespace(start=start, stop=stop, prefix_stop=prefix_stop) for start, stop, prefix_stop in
        ((0, third, 0), (third, half, third), (half, two_thirds, third), (two_thirds, N, 0))])
    qkv, dqkv = normal(N, 2 + 2 * G, K), normal(N, 2 + 2 * G, K)
    amount = xp.asarray(rng.normal(size=(G, K)).astype("float32" if dtype == "bfloat16" else dtype))
    keys = smear_forward(qkv, 2, amount, neighbours)
    damount = smear_backward(dqkv, 2, amount, neighbours, keys)
    new, last = normal(N, 2 + 2 * G, K), xp.asarray(rng.normal(size=(N, G, K)).astype(amount.dtype))
    smear_next(new, 2, amount, last)
    return qkv, dqkv, damount, new, last
