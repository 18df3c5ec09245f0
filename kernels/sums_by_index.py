"""The launch of sums_by_index.cu: sums of the rows of a matrix that have the same index.

Takes a contiguous array of float32 or float64, and raises before the launch for others.
"""

import numpy as np
from numpy.typing import DTypeLike

from minilm.backend import array_module
from minilm.kernels.launch import Array, Variants, check, counts, function, launch, options, real

BLOCK = 32, 8               # columns, threads that add up one column


def sums_by_index(x: Array, order: np.ndarray, starts: np.ndarray) -> Array:
    """Sums of rows of x (n,D) -> (S,D): row s is the sum of the rows order[starts[s]:starts[s + 1]] of x, the last one
    of order[starts[-1]:].

    order (n,), each integer below n once, and starts (S,), ascending from 0, are on the host, which has sorted.
    Raises TypeError for another dtype, ValueError for another shape, IndexError for other integers.
    """
    xp = array_module(x)
    real(x.dtype)
    check("x", x, x.dtype, (len(order), None))
    n, D = x.shape
    ends = np.concatenate([starts, [n]])
    if n and not 0 <= order.min() <= order.max() < n or ends[0] or (np.diff(ends) < 0).any():
        raise IndexError(f"sums_by_index: order holds integers below {n}, and starts ascend from 0 to at most {n}")
    y = xp.empty((len(starts), D), x.dtype)
    launch(function(xp, "sums_by_index", "sums_by_index", x.dtype), (len(starts), -(-D // BLOCK[0])), BLOCK, x,
           xp.asarray(counts("order", order)), xp.asarray(counts("starts", ends)), y, D)
    return y


def sums_by_index_bytes(n: int, S: int, D: int, dtype: DTypeLike) -> dict[str, dict[str, tuple[int, int]]]:
    """{kernel: {argument: (bytes read, bytes written)}} for n rows of D numbers, S sums. Each column reads the order of
    its rows, and each thread both ends; on a GPU those of a warp are one transaction."""
    size = np.dtype(dtype).itemsize
    return {"sums_by_index": {"x": (n * D * size, 0), "order": (n * D * 4, 0), "starts": (2 * S * D * BLOCK[1] * 4, 0),
                              "y": (0, S * D * size)}}


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for dtype in ("float32", "float64"):
        yield "sums_by_index", options(dtype, {}), BLOCK[0] * BLOCK[1], 0


def example(xp, rng: np.random.Generator, N: int = 50, D: int = 33, dtype: str = "float32") -> tuple[Array, ...]:
    """The kernel once, on random numbers: a segment with most of the rows, one without any, and one with a row."""
    x = xp.asarray(rng.normal(size=(N, D)).astype(dtype))
    return (sums_by_index(x, rng.permutation(N), np.array([0, N - 1, N - 1])),)
