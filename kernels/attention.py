"""FlashAttention over segments of tokens: the checks and the launches of attention.cu.

A segment is a row of seven integers:
    query, queries          the token of the first query, and the number of queries
    key, keys               the token of the first own key, and the number of own keys
    diagonal                query i sees own key j if j <= i + diagonal
    prefix, prefix_keys     the first token of a prefix that all its queries see, and its length (0: no prefix)
A prefix can be the own keys of another segment, and the prefix of several segments. Its dK and dV are then sums over
all of them, in the order of the segments.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from minilm.kernels.launch import Array, Variants, counts, function, launch, options, real, shared_memory

WIDTHS = (16, 32, 64, 128)
# {bytes of a number: {head width: (queries, keys) of a tile}}: as large as 64 KiB of shared memory and the registers
# allow.
FORWARD = {4: {16: (64, 32), 32: (64, 32), 64: (64, 32), 128: (32, 32)},
           8: {16: (32, 32), 32: (32, 32), 64: (32, 32), 128: (16, 16)}}
BACKWARD = {4: {16: (32, 32), 32: (32, 32), 64: (32, 32), 128: (16, 32)},
            8: {16: (32, 32), 32: (32, 32), 64: (16, 32), 128: (8, 16)}}
# Larger tiles, with more arithmetic for a number from shared memory, for devices with so many bytes of it for a block:
# two blocks then fit a multiprocessor.
ROOMY = 200 * 1024
ROOMY_FORWARD = {4: {**FORWARD[4], 64: (64, 64), 128: (64, 32)}, 8: FORWARD[8]}
ROOMY_BACKWARD = {4: {**BACKWARD[4], 64: (64, 64), 128: (32, 32)}, 8: BACKWARD[8]}
KERNELS = ("attention_forward", "attention_delta", "attention_dq", "attention_dk_dv")
OPERANDS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")         # in the order of the enum in segments.cuh


class Operand(NamedTuple):
    """A contiguous array of tokens and heads in any order. The numbers of token t, head h begin at offset + t token +
    h head."""

    array: Array
    offset: int
    token: int
    head: int


class Plan:
    """Which queries see which keys, on the device. xp: cupy; segments: integers (n,7), NumPy.

    Make one plan for a batch and use it in every layer. Raises ValueError if queries of two segments overlap, or if
    keys overlap in part; OverflowError if a token's number does not fit the 32 bits in which the kernels count tokens.
    """

    def __init__(self, xp, segments: ArrayLike):
        self.xp = xp
        self.roomy = shared_memory(xp) >= ROOMY
        self.segments = np.asarray(segments, np.int64).reshape(-1, 7)
        self.rows = self.segments.tolist()
        self.queries = _ranges("queries", self.segments[:, :2])         # the last token + 1
        self.runs = {}                  # {(first key, how many): [(segment, whether they are its own keys), ..]}
        for i, (_, _, key, keys, _, prefix, prefix_keys) in enumerate(self.rows):
            for own, run in ((0, (prefix, prefix_keys)), (1, (key, keys))):
                if run[1] > 0:
                    self.runs.setdefault(run, []).append((i, own))
        self.keys = _ranges("keys", list(self.runs))
        self.keys_in_all = sum(count for _, count in self.runs)         # tokens that are a key
        counts("attention: the number of the last token", [self.queries, self.keys])
        counts("attention: queries + diagonal of a segment", self.segments[:, 1] + self.segments[:, 4])
        self._known = {}

    def _once(self, key, make):
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def query_tiles(self, rows: int) -> list[tuple[int, int]]:
        """(segment, first query) of every tile; tiles with the most work come first."""
        def cut():
            tiles = [(i, i0) for i, s in enumerate(self.rows) for i0 in range(0, s[1], rows)]
            return sorted(tiles, key=lambda tile: -self.work(tile, rows))
        return self._once(("query tiles", rows), cut)

    def work(self, tile: tuple[int, int], rows: int) -> int:
        """The number of keys over which a tile of queries loops, prefix included."""
        i, i0 = tile
        _, queries, _, keys, diagonal, _, prefix_keys = self.rows[i]
        return prefix_keys + max(0, min(keys, i0 + min(rows, queries - i0) + diagonal))

    def key_tiles(self, cols: int) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]]:
        """([(first token, how many, j of the first, begin, end) of every tile of keys], users)

        users[begin:end] are the users of a tile; a user is (segment, whether the keys are its own). Tiles that most
        queries see come first.
        """
        def cut():
            users = []
            tiles = []
            for (key, keys), of_run in self.runs.items():
                begin = len(users)
                users.extend(of_run)
                tiles.extend((key + j0, min(cols, keys - j0), j0, begin, len(users)) for j0 in range(0, keys, cols))
            return sorted(tiles, key=lambda tile: -self.seers(tile, users)), users
        return self._once(("key tiles", cols), cut)

    def seers(self, key_tile: tuple[int, ...], users: list[tuple[int, int]]) -> int:
        """The number of queries, of one head, over which a tile of keys loops."""
        _, _, j0, begin, end = key_tile
        queries = 0
        for segment, own in users[begin:end]:
            _, count, _, _, diagonal, _, _ = self.rows[segment]
            queries += count - (min(count, max(0, j0 - diagonal)) if own else 0)
        return queries

    def device(self, name: object, rows: ArrayLike, width: int) -> Array:
        """A table of integers as int32 on the device, copied there once."""
        return self._once((name, "device"),
                          lambda: self.xp.asarray(counts("attention: a number in a table", rows).reshape(-1, width)))


def _ranges(what, rows):
    """The last token + 1 of ranges (first, how many). Raises ValueError if two overlap."""
    rows = sorted((int(first), int(count)) for first, count in rows if count > 0)
    for (first, count), (following, _) in itertools.pairwise(rows):
        if first + count > following:
            raise ValueError(f"segments overlap: {what} {first} to {first + count} and {what} from {following} on")
    if rows and rows[0][0] < 0:
        raise ValueError(f"segments begin before the first token: {what} at {rows[0][0]}")
    return rows[-1][0] + rows[-1][1] if rows else 0


def forward(q: Operand, k: Operand, v: Operand, o: Operand, lse: Array, plan: Plan, heads: int, kv_heads: int,
            width: int, lse_head: int, scale: float) -> None:
    """Write attention into o, and the log-sum-exp of every query's scores into lse (-inf for a query that sees no key).

    q, k, v, o: Operands, of `heads` or kv_heads heads of `width` numbers. lse: a contiguous array; head h of query
    token t is number h lse_head + t. Raises TypeError for an unsupported dtype, ValueError for an unsupported shape.
    """
    dtype = _check(plan, heads, kv_heads, width, {"q": q, "k": k, "v": v, "o": o}, lse, lse_head)
    rows, _ = tile("attention_forward", dtype, width, plan.roomy)
    tiles = plan.query_tiles(rows)
    launch(_kernel(plan, "attention_forward", dtype, width), (len(tiles), heads), (threads(rows),),
           q.array, k.array, v.array, o.array, lse, plan.device("segments", plan.segments, 7),
           plan.device(("tiles", rows), tiles, 2), places_of(plan, {"q": q, "k": k, "v": v, "o": o}),
           lse_head, heads // kv_heads, float(scale),
           shared=shared_bytes("attention_forward", dtype, width, plan.roomy))


def backward(q: Operand, k: Operand, v: Operand, o: Operand, do: Operand, lse: Array, dq: Operand, dk: Operand,
             dv: Operand, plan: Plan, heads: int, kv_heads: int, width: int, lse_head: int, scale: float) -> None:
    """Write the gradients into dq, dk, dv (Operands), for all tokens that are a query or a key of a segment."""
    operands = {"q": q, "k": k, "v": v, "o": o, "do": do, "dq": dq, "dk": dk, "dv": dv}
    dtype = _check(plan, heads, kv_heads, width, operands, lse, lse_head)
    xp = plan.xp
    group = heads // kv_heads
    rows, cols = tile("attention_dq", dtype, width, plan.roomy)
    places = places_of(plan, operands)
    segments = plan.device("segments", plan.segments, 7)
    tiles = plan.query_tiles(rows)
    key_tiles, users = plan.key_tiles(cols)
    on_device = plan.device(("tiles", rows), tiles, 2)
    block = (threads(rows),)
    delta = xp.empty(lse.shape, dtype)
    launch(_kernel(plan, "attention_delta", dtype, width), (len(tiles), heads), block, o.array, do.array, delta,
           segments, on_device, places, lse_head)
    launch(_kernel(plan, "attention_dq", dtype, width), (len(tiles), heads), block, q.array, k.array, v.array, do.array,
           lse, delta, dq.array, segments, on_device, places, lse_head, group, float(scale),
           shared=shared_bytes("attention_dq", dtype, width, plan.roomy))
    launch(_kernel(plan, "attention_dk_dv", dtype, width), (len(key_tiles), kv_heads), block, q.array, k.array, v.array,
           do.array, lse, delta, dk.array, dv.array, segments, plan.device(("keys", cols), key_tiles, 5),
           plan.device("users", users, 2), places, lse_head, group, float(scale),
           shared=shared_bytes("attention_dk_dv", dtype, width, plan.roomy))


# A batch (B,H,T,K), as in layers.attention.

def batch_plan(xp, q_shape: tuple[int, ...], kv_shape: tuple[int, ...], causal: bool, first: ArrayLike | None = None,
               stop: ArrayLike | None = None) -> Plan:
    """The Plan of q (B,H,T,K) and k, v (B,G,S,K). The real keys of row b are first[b] to stop[b] (None: all)."""
    B, H, T, _ = q_shape
    _, G, S, _ = kv_shape
    first = np.zeros(B, int) if first is None else np.asarray(first)
    stop = np.full(B, S) if stop is None else np.asarray(stop)
    segments = np.zeros((B, 7), np.int64)
    segments[:, 0] = np.arange(B) * H * T
    segments[:, 1] = T
    segments[:, 2] = np.arange(B) * G * S + first
    segments[:, 3] = stop - first
    segments[:, 4] = S - T - first if causal else S
    return Plan(xp, segments)


def batch_operands(**arrays: Array) -> dict[str, Operand]:
    """Operands of arrays (B,heads,T,K)."""
    return {name: Operand(a, 0, a.shape[3], a.shape[2] * a.shape[3]) for name, a in arrays.items()}


def batch_forward(q: Array, k: Array, v: Array, plan: Plan, scale: float, run: Callable = forward,
                  sums: DTypeLike = None) -> tuple[Array, Array]:
    """Attention of q (B,H,T,K) to k, v (B,G,S,K): the output (B,H,T,K) and the log-sum-exp (B,H,T).

    run: forward, or a function of the same arguments of another module. sums: dtype of the log-sum-exp; None is q's.
    """
    _, H, T, K = q.shape
    o = plan.xp.empty(q.shape, q.dtype)
    lse = plan.xp.empty(q.shape[:3], sums or q.dtype)
    run(**batch_operands(q=q, k=k, v=v, o=o), lse=lse, plan=plan, heads=H, kv_heads=k.shape[1], width=K, lse_head=T,
        scale=scale)
    return o, lse


def batch_backward(q: Array, k: Array, v: Array, o: Array, do: Array, lse: Array, plan: Plan, scale: float,
                   run: Callable = backward) -> tuple[Array, Array, Array]:
    """The gradients dq, dk, dv of batch_forward, for the gradient do (B,H,T,K) of its output. run: as there."""
    _, H, T, K = q.shape
    dq = plan.xp.empty(q.shape, q.dtype)
    dk, dv = (plan.xp.zeros(k.shape, k.dtype) for _ in range(2))        # the kernel does not write those of padding
    run(**batch_operands(q=q, k=k, v=v, o=o, do=do, dq=dq, dk=dk, dv=dv), lse=lse, plan=plan, heads=H,
        kv_heads=k.shape[1], width=K, lse_head=T, scale=scale)
    return dq, dk, dv


# Tiles, and the bytes that they move.

def tile(name: str, dtype: DTypeLike, width: int, roomy: bool) -> tuple[int, int]:
    """(queries, keys) of a tile of that kernel. roomy: for a device with ROOMY bytes of shared memory for a block."""
    forward, backward = (ROOMY_FORWARD, ROOMY_BACKWARD) if roomy else (FORWARD, BACKWARD)
    return (forward if name == "attention_forward" else backward)[np.dtype(dtype).itemsize][width]


def threads(rows: int) -> int:
    """Threads of a block: 8 for each of at most 16 rows."""
    return 8 * min(16, rows)


def shared_bytes(name: str, dtype: DTypeLike, width: int, roomy: bool) -> int:
    """Bytes of dynamic shared memory of a block."""
    rows, cols = tile(name, dtype, width, roomy)
    pitch = width + 1
    numbers = {"attention_forward": (rows + 2 * cols) * pitch + rows * (cols + 8),
               "attention_delta": 0,
               "attention_dq": 2 * (rows + cols) * pitch + rows * (cols + 8) + 2 * rows,
               "attention_dk_dv": 2 * (rows + cols) * pitch + 2 * rows * (cols + 8) + 2 * rows}
    return numbers[name] * np.dtype(dtype).itemsize


def constants(name: str, dtype: DTypeLike, width: int, roomy: bool) -> dict[str, int]:
    """The constants of attention.cu for that kernel, for -D."""
    rows, cols = tile(name, dtype, width, roomy)
    return {"HEAD": width, "ROWS": rows, "COLS": cols, "THREADS": threads(rows)}


def variants(most_shared: int = ROOMY) -> Variants:
    """(kernel, compiler options, threads of a block, bytes of dynamic shared memory) of every launch configuration, on
    a device with so many bytes of shared memory for a block."""
    roomy = most_shared >= ROOMY
    for dtype, width, name in itertools.product(("float32", "float64"), WIDTHS, KERNELS):
        yield (name, options(dtype, constants(name, dtype, width, roomy)), threads(tile(name, dtype, width, roomy)[0]),
               shared_bytes(name, dtype, width, roomy))


def forward_bytes(plan: Plan, heads: int, kv_heads: int, width: int, dtype: DTypeLike) -> dict[str, tuple[int, int]]:
    """{operand: (bytes read, bytes written)} of forward, without the tables of integers."""
    item = np.dtype(dtype).itemsize
    rows, _ = tile("attention_forward", dtype, width, plan.roomy)
    queries = heads * int(plan.segments[:, 1].sum())
    keys = heads * sum(plan.work(tile, rows) for tile in plan.query_tiles(rows))
    return {"q": (queries * width * item, 0), "k": (keys * width * item, 0), "v": (keys * width * item, 0),
            "o": (0, queries * width * item), "lse": (0, queries * item)}


def backward_bytes(plan: Plan, heads: int, kv_heads: int, width: int,
                   dtype: DTypeLike) -> dict[str, dict[str, tuple[int, int]]]:
    """{kernel: {operand: (bytes read, bytes written)}} of backward, without the tables of integers."""
    item = np.dtype(dtype).itemsize
    rows, cols = tile("attention_dq", dtype, width, plan.roomy)
    queries = heads * int(plan.segments[:, 1].sum())
    keys = heads * sum(plan.work(tile, rows) for tile in plan.query_tiles(rows))
    key_tiles, users = plan.key_tiles(cols)
    own_keys = kv_heads * sum(count for _, count, *_ in key_tiles)
    again = heads * sum(plan.seers(tile, users) for tile in key_tiles)
    row = width * item
    number = item
    return {"attention_delta": {"o": (queries * row, 0), "do": (queries * row, 0), "delta": (0, queries * number)},
            "attention_dq": {"q": (queries * row, 0), "k": (keys * row, 0), "v": (keys * row, 0),
                             "do": (queries * row, 0), "lse": (queries * number, 0),
                             "delta": (queries * number, 0), "dq": (0, queries * row)},
            "attention_dk_dv": {"q": (again * row, 0), "k": (own_keys * row, 0), "v": (own_keys * row, 0),
                                "do": (again * row, 0), "lse": (again * number, 0), "delta": (again * number, 0),
                                "dk": (0, own_keys * row), "dv": (0, own_keys * row)}}


def example(xp, rng: np.random.Generator, B: int = 2, H: int = 4, G: int = 2, T: int = 33, K: int = 32,
            dtype: str = "float32") -> tuple[Array, ...]:
    """Causal attention, forward and backward, on random numbers."""
    q, k, v, do = (xp.asarray(rng.normal(size=(B, heads, T, K)).astype(dtype)) for heads in (H, G, G, H))
    plan = batch_plan(xp, q.shape, k.shape, causal=True)
    o, lse = batch_forward(q, k, v, plan, K ** -0.5)
    return o, *batch_backward(q, k, v, o, do, lse, plan, K ** -0.5)


def _kernel(plan, name, dtype, width):
    return function(plan.xp, "attention", name, dtype, **constants(name, dtype, width, plan.roomy))


def places_of(plan: Plan, operands: dict[str, Operand]) -> Array:
    """The table of the kernels' function `at`: offset, token and head of each operand, on the device."""
    rows = [[getattr(operands[name], field) if name in operands else 0 for field in ("offset", "token", "head")]
            for name in OPERANDS]
    return plan.device(("places", *map(tuple, rows)), rows, 3)


def _check(plan, heads, kv_heads, width, operands, lse, lse_head):
    """The dtype of the operands. Raises TypeError and ValueError: the kernel itself checks nothing."""
    check_operands("attention", plan, heads, kv_heads, width, WIDTHS, operands, lse, lse_head)
    dtype = np.dtype(operands["q"].array.dtype)
    real(dtype)
    for name, array in {**{name: x.array for name, x in operands.items()}, "lse": lse}.items():
        if array.dtype != dtype:
            raise TypeError(f"attention: {name} is {array.dtype} but q is {dtype}")
    return dtype


def check_operands(kernel: str, plan: Plan, heads: int, kv_heads: int, width: int, widths: tuple[int, ...],
                   operands: dict[str, Operand], lse: Array, lse_head: int) -> None:
    """Raise ValueError for a head width not among `widths`, for heads that form no groups, for an array that is not
    contiguous or has too few numbers."""
    if width not in widths:
        raise ValueError(f"{kernel}: head width {width}; this kernel supports {', '.join(map(str, widths))}")
    if heads % kv_heads:
        raise ValueError(f"{kernel}: {kv_heads} key/value heads do not divide {heads} query heads")
    for name, x in {**operands, "lse": Operand(lse, 0, 1, lse_head)}.items():
        if not x.array.flags.c_contiguous:
            raise ValueError(f"{kernel}: {name} is not contiguous; pass a contiguous copy")
        of_keys = name in ("k", "v", "dk", "dv")
        last = x.offset + ((plan.keys if of_keys else plan.queries) - 1) * x.token
        last += ((kv_heads if of_keys else heads) - 1) * x.head + (1 if name == "lse" else width)
        if len(plan.segments) and last > x.array.size:
            raise ValueError(f"{kernel}: the segments reach to number {last} of {name}, which has {x.array.size} "
                             "numbers")
