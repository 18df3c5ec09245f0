"""The launches of fused_bf16.cu: RMSNorm, SwiGLU and rotary positions with activations in bf16.

Arrays of bf16 are uint16 (bf16.py). All arrays are contiguous, begin at a multiple of 16 bytes, and have rows of a
multiple of 8 numbers; others raise TypeError or ValueError before a launch. It needs a device of sm_80 or later.
"""

import numpy as np

from minilm.backend import array_module
from minilm.kernels import launch as launching
from minilm.kernels.bf16 import to_bf16 as rounded
from minilm.kernels.launch import Array, Variants, check, function, launch, options

BLOCK = 256
ROPE_BLOCK = 128
FLAT_BLOCKS = 4096              # blocks of to_bf16, at most
ROW_BLOCKS = 512                # of rms_norm_bf16, at most
WIDEST = 8 * 512                # numbers of a row of rms_norm_bf16
Bytes = dict[str, dict[str, tuple[int, int]]]


def to_bf16(x: Array) -> Array:
    """float32 of any shape, rounded to bf16: to the nearest, ties to even; every NaN becomes 0x7fff."""
    xp = array_module(x)
    _check("x", x, np.float32, x.shape, 8)
    y = xp.empty(x.shape, np.uint16)
    _launch(xp, "to_bf16", (_flat_blocks(x.size),), (BLOCK,), x, y, np.int64(x.size))
    return y


def to_float32(x: Array) -> Array:
    """bf16 of any shape to float32. Exact."""
    return (array_module(x).ascontiguousarray(x).astype(np.uint32) * 65536).view(np.float32)


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """x / sqrt(mean(x^2) + eps) * weight in bf16, and the reciprocal root in float32, for fused.rms_norm_backward.
    (N,D), (D,) in float32 -> (N,D) in bf16, (N,)"""
    xp = array_module(x, weight)
    N, D = x.shape
    if D > WIDEST:
        raise ValueError(f"rms_norm: rows of {D} numbers; this kernel takes at most {WIDEST}")
    _check("x", x, np.float32, (N, D), D)
    _check("weight", weight, np.float32, (D,), D)
    y = xp.empty((N, D), np.uint16)
    r = xp.empty(N, np.float32)
    _launch(xp, "rms_norm_bf16", *_grid_of_rows(N, D), x, weight, y, r, N, D, float(eps))
    return y, r


def swiglu_forward(gate_up: Array) -> Array:
    """silu(gate) * up; gate and up are the two halves of the last axis.  (N,2F) -> (N,F), bf16"""
    xp, N, F = _swiglu(gate_up)
    y = xp.empty((N, F), np.uint16)
    _launch(xp, "swiglu_bf16_forward", *_grid_of_warps(N, F), gate_up, y, N, F)
    return y


def swiglu_backward(dy: Array, gate_up: Array) -> Array:
    """The gradient of gate_up (N,2F), from dy (N,F), bf16."""
    xp, N, F = _swiglu(gate_up)
    _check("dy", dy, np.uint16, (N, F), F)
    dgate_up = xp.empty(gate_up.shape, np.uint16)
    _launch(xp, "swiglu_bf16_backward", *_grid_of_warps(N, F), dy, gate_up, dgate_up, N, F)
    return dgate_up


def rope(x: Array, cos: Array, sin: Array, heads: int, pairing: str = "half", backward: bool = False) -> None:
    """Rotate the first `heads` heads of x (N,X,K), bf16, in place, by the angles of their tokens.

    cos, sin (N,K/2), float32, from rotary.rope_tables; pairing as in rotary.rope. backward: by the negative angles.
    """
    N, X, K = x.shape
    if K % 16 or not 0 <= heads <= X or pairing not in ("half", "interleaved"):
        raise ValueError(f"rope: x {x.shape}, {heads} heads, pairing {pairing!r}; this kernel takes (N,X,K) with K a "
                         "multiple of 16, at most X heads, and pairing 'half' or 'interleaved'")
    _check("x", x, np.uint16, (N, X, K), K)
    for name, table in (("cos", cos), ("sin", sin)):
        _check(name, table, np.float32, (N, K // 2), K // 2)
    _launch(array_module(x, cos, sin), "rope_bf16", (-(-N * (K // 16) // ROPE_BLOCK),), (ROPE_BLOCK,), x, cos, sin, N,
            heads, X, K, int(pairing == "interleaved"), -1.0 if backward else 1.0)


# Grids and checks.

def _grid_of_rows(N, D):
    """(grid, block): a thread for 8 numbers of a row; as many rows as make a block of about BLOCK threads."""
    along = 32 * -(-D // 256)
    rows = max(1, BLOCK // along)
    return (min(ROW_BLOCKS, -(-N // rows)),), (along, rows)


def _grid_of_warps(N, F):
    """(grid, block): a warp along a row with 8 numbers in each thread; eight rows. A warp of a very long row loops."""
    return (-(-N // 8), min(-(-F // 256), launching.MOST_BLOCKS[1])), (32, 8)


def _flat_blocks(n):
    return min(FLAT_BLOCKS, -(-n // (8 * BLOCK)))


def _launch(xp, name, grid, block, *arguments):
    launch(function(xp, "fused_bf16", name, np.float32), grid, block, *arguments)


def _swiglu(gate_up):
    if len(gate_up.shape) != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; this kernel takes (N,2F)")
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    _check("gate_up", gate_up, np.uint16, (N, 2 * F), F)
    return array_module(gate_up), N, F


def _check(name, array, dtype, shape, row):
    check(name, array, dtype, shape)
    if row % 8:
        raise ValueError(f"{name} has rows of {row} numbers; this kernel takes multiples of 8")
    if array.size and array.data.ptr % 16:
        raise ValueError(f"the memory of {name} begins at no multiple of 16 bytes; pass a copy")


# Bytes that the kernels move.

def to_bf16_bytes(n: int) -> Bytes:
    return {"to_bf16": {"x": (4 * n, 0), "y": (0, 2 * n)}}


def rms_norm_bytes(N: int, D: int) -> Bytes:
    """{kernel: {parameter: (bytes read, bytes written)}}"""
    grid, block = _grid_of_rows(N, D)
    return {"rms_norm_bf16": {"x": (4 * N * D, 0), "weight": (grid[0] * block[1] * 4 * D, 0), "y": (0, 2 * N * D),
                              "r": (0, 4 * N)}}


def swiglu_forward_bytes(N: int, F: int) -> Bytes:
    return {"swiglu_bf16_forward": {"gate_up": (4 * N * F, 0), "y": (0, 2 * N * F)}}


def swiglu_backward_bytes(N: int, F: int) -> Bytes:
    return {"swiglu_bf16_backward": {"dy": (2 * N * F, 0), "gate_up": (4 * N * F, 0), "dgate_up": (0, 4 * N * F)}}


def rope_bytes(N: int, heads: int, K: int) -> Bytes:
    moved = 2 * N * heads * K
    return {"rope_bf16": {"x": (moved, moved), "cos": (2 * N * K, 0), "sin": (2 * N * K, 0)}}


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for name, threads in (("to_bf16", BLOCK), ("rms_norm_bf16", 512), ("swiglu_bf16_forward", BLOCK),
                          ("swiglu_bf16_backward", BLOCK), ("rope_bf16", ROPE_BLOCK)):
        yield name, options("float32", {}), threads, 0


def example(xp, rng: np.random.Generator, N: int = 3, D: int = 40, F: int = 16, H: int = 2, G: int = 1,
            K: int = 32) -> tuple[Array, ...]:
    """Every kernel of this module once, on random numbers."""
    def normal(*shape):
        return xp.asarray(rng.normal(size=shape).astype(np.float32))
    y, r = rms_norm(normal(N, D), normal(D), 1e-6)
    gate_up, dy = to_bf16(normal(N, 2 * F)), to_bf16(normal(N, F))
    qkv = xp.asarray(rounded(rng.normal(size=(N, H + 2 * G, K)).astype(np.float32)))
    angles = normal(N, K // 2)
    rope(qkv, xp.cos(angles), xp.sin(angles), H + G)
    return y, r, swiglu_forward(gate_up), swiglu_backward(dy, gate_up), qkv
