"""FlashAttention on tensor cores: the launches of attention_bf16.cu. Plan, Operand and the segments are attention.py's.

Arrays of bf16 are uint16 (bf16.py); the log-sum-exp is float32. It needs a device of sm_80 or later.
Tests: tests/test_attention_bf16.py.
"""

import itertools

import numpy as np

from minilm.kernels import attention
from minilm.kernels.attention import Operand, Plan, batch_plan, check_operands, places_of
from minilm.kernels.bf16 import to_bf16
from minilm.kernels.launch import Array, Variants, function, launch, options

WIDTHS = (32, 64, 128)
THREADS = 128
ROWS = 64                       # of a tile of the backward kernels: queries, and keys for attention_bf16_dk_dv
# {head width: queries of a tile of the forward kernel}, {kernel: {head width: columns of a tile}}: as many as leave
# no spills on any architecture and two blocks for a multiprocessor of sm_80 or sm_90.
QUERIES = {32: 128, 64: 128, 128: 64}
COLS = {"attention_bf16_forward": {32: 64, 64: 64, 128: 64}, "attention_bf16_delta": {32: 64, 64: 64, 128: 64},
        "attention_bf16_dq": {32: 64, 64: 64, 128: 32}, "attention_bf16_dk_dv": {32: 64, 64: 64, 128: 32}}


def forward(q: Operand, k: Operand, v: Operand, o: Operand, lse: Array, plan: Plan, heads: int, kv_heads: int,
            width: int, lse_head: int, scale: float) -> None:
    """Write attention into o (bf16), and the log-sum-exp of every query's scores into lse (float32), as
    attention.forward does. scale > 0. Raises TypeError for another dtype, ValueError for an unsupported shape."""
    operands = {"q": q, "k": k, "v": v, "o": o}
    _check(plan, heads, kv_heads, width, operands, lse, lse_head, scale)
    rows = QUERIES[width]
    tiles = plan.query_tiles(rows)
    _launch("attention_bf16_forward", plan, width, (len(tiles), heads), q.array, k.array, v.array, o.array, lse,
            plan.device("segments", plan.segments, 7), plan.device(("tiles", rows), tiles, 2),
            places_of(plan, operands), lse_head, heads // kv_heads, float(scale))


def backward(q: Operand, k: Operand, v: Operand, o: Operand, do: Operand, lse: Array, dq: Operand, dk: Operand,
             dv: Operand, plan: Plan, heads: int, kv_heads: int, width: int, lse_head: int, scale: float) -> None:
    """Write the gradients into dq, dk, dv, as attention.backward does. The same bits every time."""
    operands = {"q": q, "k": k, "v": v, "o": o, "do": do, "dq": dq, "dk": dk, "dv": dv}
    _check(plan, heads, kv_heads, width, operands, lse, lse_head, scale)
    places = places_of(plan, operands)
    segments = plan.device("segments", plan.segments, 7)
    tiles = plan.query_tiles(ROWS)
    key_tiles, users = plan.key_tiles(ROWS)
    on_device = plan.device(("tiles", ROWS), tiles, 2)
    delta = plan.xp.empty(lse.shape, np.float32)
    _launch("attention_bf16_delta", plan, width, (len(tiles), heads), o.array, do.array, delta, segments, on_device,
            places, lse_head)
    _launch("attention_bf16_dq", plan, width, (len(tiles), heads), q.array, k.array, v.array, do.array, lse, delta,
            dq.array, segments, on_device, places, lse_head, heads // kv_heads, float(scale))
    _launch("attention_bf16_dk_dv", plan, width, (len(key_tiles), kv_heads), q.array, k.array, v.array, do.array, lse,
            delta, dk.array, dv.array, segments, plan.device(("keys", ROWS), key_tiles, 5),
            plan.device("users", users, 2), places, lse_head, heads // kv_heads, float(scale))


def batch_forward(q: Array, k: Array, v: Array, plan: Plan, scale: float) -> tuple[Array, Array]:
    """q (B,H,T,K); k, v (B,G,S,K), bf16 -> (B,H,T,K), bf16, and the log-sum-exp (B,H,T), float32."""
    return attention.batch_forward(q, k, v, plan, scale, forward, np.float32)


def batch_backward(q: Array, k: Array, v: Array, o: Array, do: Array, lse: Array, plan: Plan,
                   scale: float) -> tuple[Array, Array, Array]:
    """The gradients dq, dk, dv of batch_forward, bf16, for the gradient do (B,H,T,K) of its output."""
    return attention.batch_backward(q, k, v, o, do, lse, plan, scale, backward)


def shared_bytes(name: str, width: int) -> int:
    """Bytes of dynamic shared memory of a block."""
    cols = COLS[name][width]
    rows = {"attention_bf16_forward": QUERIES[width] + 4 * cols, "attention_bf16_delta": 0,
            "attention_bf16_dq": 2 * ROWS + 4 * cols, "attention_bf16_dk_dv": 2 * ROWS + 4 * cols}[name]
    return 2 * rows * width + (16 * cols if name == "attention_bf16_dk_dv" else 0)


def constants(name: str, width: int) -> dict[str, int]:
    """The constants of attention_bf16.cu for that kernel, for -D."""
    return {"HEAD": width, "QUERIES": QUERIES[width], "COLS": COLS[name][width]}


def variants() -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration."""
    for name, width in itertools.product(COLS, WIDTHS):
        yield name, options("float32", constants(name, width)), THREADS, shared_bytes(name, width)


def example(xp, rng: np.random.Generator, B: int = 1, H: int = 2, G: int = 1, T: int = 70,
            K: int = 32) -> tuple[Array, ...]:
    """Causal attention, forward and backward, on random numbers."""
    q, k, v, do = (xp.asarray(to_bf16(rng.normal(size=(B, heads, T, K)))) for heads in (H, G, G, H))
    plan = batch_plan(xp, q.shape, k.shape, causal=True)
    o, lse = batch_forward(q, k, v, plan, K ** -0.5)
    return o, lse, *batch_backward(q, k, v, o, do, lse, plan, K ** -0.5)


def _launch(name, plan, width, grid, *arguments):
    kernel = function(plan.xp, "attention_bf16", name, np.float32, **constants(name, width))
    launch(kernel, grid, (THREADS,), *arguments, shared=shared_bytes(name, width))


def _check(plan, heads, kv_heads, width, operands, lse, lse_head, scale):
    """Raises TypeError and ValueError: the kernel itself checks nothing."""
    check_operands("attention_bf16", plan, heads, kv_heads, width, WIDTHS, operands, lse, lse_head)
    for name, x in operands.items():
        if x.array.dtype != np.uint16:
            raise TypeError(f"attention_bf16: {name} is {x.array.dtype}; it takes bf16 as uint16 (bf16.to_bf16)")
        if any(number % 8 for number in x[1:]):
            raise ValueError(f"attention_bf16: {name} begins at {x.offset}, with steps of {x.token} and {x.head}; each "
                             "must be a multiple of 8 numbers, because the kernel copies 16 bytes at a time")
        if x.array.data.ptr % 16:
            raise ValueError(f"attention_bf16: the memory of {name} begins at no multiple of 16 bytes; pass a copy")
    if lse.dtype != np.float32:
        raise TypeError(f"attention_bf16: lse is {lse.dtype}; it takes float32")
    if not 0 < np.float32(scale) < np.inf:
        raise ValueError(f"attention_bf16: scale is {scale}; it must be above 0, and finite, in float32")
