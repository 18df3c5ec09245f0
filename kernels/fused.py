"""The launches of fused.cu: RMSNorm, SwiGLU, rotary positions, AdamW, and the norm of a gradient.

All functions take contiguous arrays of float32 or float64, of one dtype in a call, and raise TypeError or ValueError
for other arrays before a launch. Grids depend only on shapes, so the same arrays give the same bits.
"""

import math

import numpy as np
from numpy.typing import DTypeLike

from minilm.backend import array_module
from minilm.kernels import launch as launching
from minilm.kernels.launch import Array, Variants, check, function, launch, options, real

ROW_BYTES = 16 * 1024           # the longest row that rms_norm holds in registers: 512 threads, 32 bytes each
BLOCK = 256                     # threads of a block, unless a row needs more
ROW_BLOCKS = 512                # blocks of rms_norm, at most; each loops over rows and gives a partial sum of dweight
FLAT_BLOCKS = 1024              # blocks for a flat array, at most
PER_BLOCK = 4 * BLOCK           # a flat array gets another block for every PER_BLOCK numbers
ROPE_BLOCK = 128


def rms_norm_forward(x: Array, weight: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """x / sqrt(mean(x^2) + eps) * weight, and the reciprocal root.  (..,D), (D,) -> (..,D), (N,) for N rows"""
    xp, N, D = _rms_norm(x, weight)
    y = xp.empty(x.shape, x.dtype)
    r = xp.empty(N, x.dtype)
    launch(_kernel(xp, "rms_norm_forward", x.dtype), *_grid_of_rows(N, D, x.dtype), x, weight, y, r, N, D, float(eps))
    return y, r


def rms_norm_backward(dy: Array, x: Array, weight: Array, r: Array) -> tuple[Array, Array]:
    """dx (..,D) and dweight (D,) from dy (..,D), the inputs of forward, and its r."""
    xp, N, D = _rms_norm(x, weight)
    check("dy", dy, x.dtype, x.shape)
    check("r", r, x.dtype, (N,))
    if not N:
        return xp.empty(x.shape, x.dtype), xp.zeros(D, x.dtype)
    grid, block = _grid_of_rows(N, D, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    partial = xp.empty((grid[0], D), x.dtype)                   # of each block
    launch(_kernel(xp, "rms_norm_backward", x.dtype), grid, block, dy, x, weight, r, dx, partial, N, D,
           shared=block[1] * D * x.dtype.itemsize)
    return dx, column_sums(partial)


def column_sums(x: Array) -> Array:
    """The sum of each column, in a fixed order.  (N,D) -> (D,)"""
    real(x.dtype)
    check("x", x, x.dtype, (None, None))
    y = array_module(x).empty(x.shape[1], x.dtype)
    launch(_kernel(array_module(x), "column_sums", x.dtype), (-(-len(y) // 32),), (32, 8), x, y, len(x), len(y))
    return y


def swiglu_forward(gate_up: Array) -> Array:
    """silu(gate) * up; gate and up are the two halves of the last axis.  (..,2F) -> (..,F)"""
    xp, N, F = _swiglu(gate_up)
    y = xp.empty((*gate_up.shape[:-1], F), gate_up.dtype)
    launch(_kernel(xp, "swiglu_forward", gate_up.dtype), *_grid_of_vectors(N, F, gate_up.dtype), gate_up, y, N, F)
    return y


def swiglu_backward(dy: Array, gate_up: Array) -> Array:
    """The gradient of gate_up (..,2F), from dy (..,F)."""
    xp, N, F = _swiglu(gate_up)
    check("dy", dy, gate_up.dtype, (*gate_up.shape[:-1], F))
    dgate_up = xp.empty(gate_up.shape, gate_up.dtype)
    launch(_kernel(xp, "swiglu_backward", dy.dtype), *_grid_of_vectors(N, F, dy.dtype), dy, gate_up, dgate_up, N, F)
    return dgate_up


def rope(qkv: Array, cos: Array, sin: Array, heads: int, kv_heads: int, pairing: str = "half", scale: float = 1.0,
         backward: bool = False, out: Array | None = None) -> Array:
    """Rotate the queries and keys, the first H+G heads, by the angles of their tokens.  (N,H+2G,K) -> (N,H+G,K)

    cos, sin (N,K/2) from rotary.rope_tables; pairing as in rotary.rope; scale multiplies the H query heads. qkv can
    also have H+G heads. out: an array to write to, of N tokens and H+G or H+2G heads (the last G are not written); it
    may be qkv. backward: rotate by the negative angles, which gives the gradient of the input from that of the output.
    """
    xp = array_module(qkv, cos, sin)
    H = heads
    G = kv_heads
    real(qkv.dtype)
    if H < 0 or G < 0 or len(qkv.shape) != 3 or qkv.shape[1] not in (H + G, H + 2 * G) or qkv.shape[2] % 2:
        raise ValueError(f"qkv has shape {qkv.shape}; this kernel takes (N,H+2G,K) or (N,H+G,K), K even, "
                         f"with H = {H} and G = {G}")
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"pairing is {pairing!r}; it must be 'half' or 'interleaved'")
    N, x_heads, K = qkv.shape
    out = xp.empty((N, H + G, K), qkv.dtype) if out is None else out
    y_heads = x_heads if out.shape == qkv.shape else H + 2 * G if out.shape == (N, H + 2 * G, K) else H + G
    for name, array, shape in (("qkv", qkv, qkv.shape), ("cos", cos, (N, K // 2)), ("sin", sin, (N, K // 2)),
                               ("out", out, (N, y_heads, K))):
        check(name, array, qkv.dtype, shape)
    blocks = -(-N * (K // 2) // (ROPE_BLOCK * _vector(qkv.dtype)))
    launch(_kernel(xp, "rope", qkv.dtype), (blocks,), (ROPE_BLOCK,), qkv, cos, sin, out, N, H, G, x_heads, y_heads, K,
           int(pairing == "interleaved"), -1.0 if backward else 1.0, float(scale))
    return out


def adamw_step(p: Array, g: Array, m: Array, v: Array, decayed: int, learning_rate: float, betas: tuple[float, float],
               eps: float, weight_decay: float, steps: int, only_if: Array | None = None) -> Array:
    """One step of AdamW on flat arrays, in place in p, m and v: the same as minilm.optim.AdamW.step.

    steps: the number of this step, from 1. The first `decayed` parameters decay. only_if: an array of one number;
    unless it is finite, nothing is changed. Returns the squared norm of p after the step, as an array without axes.
    Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    xp = array_module(p, g, m, v)
    real(p.dtype)
    for name, array in (("p", p), ("g", g), ("m", m), ("v", v)):
        check(name, array, p.dtype, (p.size,))
    only_if = xp.zeros((), p.dtype) if only_if is None else only_if
    check("only_if", only_if, p.dtype, ())
    if not 0 <= decayed <= p.size or steps < 1:
        raise ValueError(f"decayed is {decayed} and steps is {steps}; decayed must be from 0 to {p.size}, the number "
                         "of parameters, and steps at least 1")
    b1, b2 = betas
    second = math.sqrt(1 - b2 ** steps)         # the bias corrections of both moments are moved into rate and eps
    return _sum_of_blocks(xp, "adamw", p.size, p.dtype, p, g, m, v, only_if, after=(
        np.int64(p.size), np.int64(decayed), 1.0 - b1, 1.0 - b2, 1.0 - learning_rate * weight_decay,
        float(learning_rate * second / (1 - b1 ** steps)), float(eps * second)))


def clip(g: Array, norm: Array, max_norm: float) -> None:
    """g times max_norm / norm, in place, if norm is larger than max_norm: a flat array (P,), an array without axes."""
    check("g", g, g.dtype, (g.size,))
    check("norm", norm, g.dtype, ())
    launch(_kernel(array_module(g, norm), "clip", g.dtype), (_flat_blocks(g.size),), (BLOCK,), g, norm,
           float(max_norm), np.int64(g.size))


def squared_norm(g: Array) -> Array:
    """The sum of the squares of a flat array (P,), as an array without axes."""
    real(g.dtype)
    check("g", g, g.dtype, (g.size,))
    return _sum_of_blocks(array_module(g), "squares", g.size, g.dtype, g, after=(np.int64(g.size),))


def _sum_of_blocks(xp, name, n, dtype, *arrays, after):
    """Launch a kernel on flat arrays of n numbers that writes a sum for each block. Returns the sum over all blocks."""
    blocks = _flat_blocks(n)
    if not blocks:
        return xp.zeros((), dtype)
    partial = xp.empty(blocks, dtype)
    sum_of_all = xp.empty(1, dtype)
    launch(_kernel(xp, name, dtype), (blocks,), (BLOCK,), *arrays, partial, *after)
    launch(_kernel(xp, "total", dtype), (1,), (BLOCK,), partial, sum_of_all, blocks)
    return sum_of_all.reshape(())


# Grids.

def _grid_of_rows(N, D, dtype):
    """(grid, block): along a row one thread for 32 bytes; as many rows as make a block of about BLOCK threads."""
    along = 32 * -(-D * dtype.itemsize // 1024)
    rows = max(1, BLOCK // along)
    return (min(ROW_BLOCKS, -(-N // rows)),), (along, rows)


def _grid_of_vectors(N, F, dtype):
    """(grid, block): a warp along a row with a vector in each thread; eight rows. A warp of a very long row loops."""
    return (-(-N // 8), min(-(-F // (32 * _vector(dtype))), launching.MOST_BLOCKS[1])), (32, 8)


def _vector(dtype):
    """Numbers in 16 bytes."""
    return 16 // dtype.itemsize


def _flat_blocks(n):
    return min(FLAT_BLOCKS, -(-n // PER_BLOCK))


def _kernel(xp, name, dtype):
    return function(xp, "fused", name, dtype)


def _rms_norm(x, weight):
    """Checks for both directions. Returns xp, the number of rows N, their length D."""
    xp = array_module(x, weight)
    most = ROW_BYTES // np.dtype(x.dtype).itemsize
    real(x.dtype)
    D = x.shape[-1] if x.shape else 0
    if not 1 <= D <= most:
        raise ValueError(f"x has shape {x.shape}; this kernel takes (..,D) with D from 1 to {most} in {x.dtype}")
    check("x", x, x.dtype, x.shape)
    check("weight", weight, x.dtype, (D,))
    return xp, x.size // D, D


def _swiglu(gate_up):
    real(gate_up.dtype)
    if not gate_up.shape or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; this kernel takes (..,2F), gate and up side by side")
    check("gate_up", gate_up, gate_up.dtype, gate_up.shape)
    F = gate_up.shape[-1] // 2
    return array_module(gate_up), math.prod(gate_up.shape[:-1]), F


# {kernel: {argument: (bytes read, bytes written)}} of each function.

Bytes = dict[str, dict[str, tuple[int, int]]]


def rms_norm_forward_bytes(N: int, D: int, dtype: DTypeLike) -> Bytes:
    """Each row of threads of a block reads the weight once and keeps it."""
    size = np.dtype(dtype).itemsize
    grid, block = _grid_of_rows(N, D, np.dtype(dtype))
    return {"rms_norm_forward": {"x": (N * D * size, 0), "weight": (grid[0] * block[1] * D * size, 0),
                                 "y": (0, N * D * size), "r": (0, N * size)}}


def rms_norm_backward_bytes(N: int, D: int, dtype: DTypeLike) -> Bytes:
    """Each thread of a row reads r; on a GPU that is one transaction for a warp."""
    size = np.dtype(dtype).itemsize
    grid, block = _grid_of_rows(N, D, np.dtype(dtype))
    partial = grid[0] * D * size
    return {"rms_norm_backward": {"dy": (N * D * size, 0), "x": (N * D * size, 0), "weight": (block[1] * partial, 0),
                                  "r": (N * block[0] * size, 0), "dx": (0, N * D * size), "partial": (0, partial)},
            "column_sums": {"x": (partial, 0), "y": (0, D * size)}}


def swiglu_forward_bytes(N: int, F: int, dtype: DTypeLike) -> Bytes:
    size = np.dtype(dtype).itemsize
    return {"swiglu_forward": {"gate_up": (2 * N * F * size, 0), "y": (0, N * F * size)}}


def swiglu_backward_bytes(N: int, F: int, dtype: DTypeLike) -> Bytes:
    size = np.dtype(dtype).itemsize
    return {"swiglu_backward": {"dy": (N * F * size, 0), "gate_up": (2 * N * F * size, 0),
                                "dgate_up": (0, 2 * N * F * size)}}


def rope_bytes(N: int, heads: int, kv_heads: int, K: int, dtype: DTypeLike) -> Bytes:
    """Only the query and key heads are read and written."""
    size = np.dtype(dtype).itemsize
    moved = N * (heads + kv_heads) * K * size
    table = N * (K // 2) * size, 0
    return {"rope": {"x": (moved, 0), "cos": table, "sin": table, "y": (0, moved)}}


def adamw_step_bytes(P: int, dtype: DTypeLike) -> Bytes:
    """Each thread reads only_if; on a GPU that is one transaction for a warp."""
    size = np.dtype(dtype).itemsize
    partial = _flat_blocks(P) * size
    both = P * size, P * size
    return {"adamw": {"p": both, "g": (P * size, 0), "m": both, "v": both,
                      "only_if": (partial * BLOCK, 0), "partial": (0, partial)},
            "total": {"x": (partial, 0), "y": (0, size)}}


def clip_bytes(P: int, dtype: DTypeLike, clips: bool = True) -> Bytes:
    """Each thread reads the norm; on a GPU that is one transaction for a warp. Nothing else if it is small enough."""
    size = np.dtype(dtype).itemsize
    moved = P * size * clips
    return {"clip": {"g": (moved, moved), "norm": (_flat_blocks(P) * BLOCK * size, 0)}}


def squared_norm_bytes(P: int, dtype: DTypeLike) -> Bytes:
    size = np.dtype(dtype).itemsize
    partial = _flat_blocks(P) * size
    return {"squares": {"g": (P * size, 0), "partial": (0, partial)}, "total": {"x": (partial, 0), "y": (0, size)}}


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration; for
    rms_norm those of the shortest and of the longest rows."""
    for dtype in ("float32", "float64"):
        for D in (1024 // np.dtype(dtype).itemsize, ROW_BYTES // np.dtype(dtype).itemsize):
            along, rows = _grid_of_rows(1, D, np.dtype(dtype))[1]
            yield "rms_norm_forward", options(dtype, {}), along * rows, 0
            yield "rms_norm_backward", options(dtype, {}), along * rows, rows * D * np.dtype(dtype).itemsize
        for name in ("column_sums", "swiglu_forward", "swiglu_backward", "squares", "clip", "adamw", "total"):
            yield name, options(dtype, {}), BLOCK, 0
        yield "rope", options(dtype, {}), ROPE_BLOCK, 0


def example(xp, rng: np.random.Generator, N: int = 3, D: int = 33, F: int = 5, H: int = 2, G: int = 1, K: int = 8,
            P: int = 1100, dtype: str = "float32") -> tuple[Array, ...]:
    """Every kernel of this module once, on random numbers."""
    def normal(shape):
        return xp.asarray(rng.normal(size=shape).astype(dtype))
    x, weight, gate_up, qkv, angles = map(normal, [(N, D), D, (N, 2 * F), (N, H + 2 * G, K), (N, K // 2)])
    y, r = rms_norm_forward(x, weight)
    p = normal(P)
    g = normal(P)
    m = normal(P)
    v = xp.zeros(P, dtype)
    clip(g, xp.sqrt(squared_norm(g)), 1.0)
    return (y, *rms_norm_backward(y, x, weight, r), swiglu_forward(gate_up), swiglu_backward(normal((N, F)), gate_up),
            rope(qkv, xp.cos(angles), xp.sin(angles), H, G, scale=K ** -0.5), squared_norm(g),
            adamw_step(p, g, m, v, P // 2, 0.1, (0.9, 0.95), 1e-8, 0.01, 1), p, m, v)
