"""FlashAttention over segments of tokens: what attention.cu needs to know, checked, and its launches.

A segment is a row of seven integers: the token of its first query, how many queries; the token of its first own key,
how many own keys; the diagonal (query i sees own key j if j <= i + diagonal); the first token of a prefix
that all its queries see, how many (0 for none). A prefix may be the own keys of another segment, and the prefix of
many: then dK and dV are the sums over all of them, in the order of the segments.
"""

import itertools
from typing import NamedTuple

import numpy as np

from minilm.kernels.launch import function, launch, options, real

WIDTHS = (16, 32, 64, 128)
# (queries, keys) of a tile by head width: as large as 64 KiB of shared memory and the registers allow.
FORWARD = {"float32": {16: (64, 32), 32: (64, 32), 64: (64, 32), 128: (32, 32)},
           "float64": {16: (32, 32), 32: (32, 32), 64: (32, 32), 128: (16, 16)}}
BACKWARD = {"float32": {16: (32, 32), 32: (32, 32), 64: (32, 32), 128: (16, 32)},
            "float64": {16: (32, 32), 32: (32, 32), 64: (16, 32), 128: (8, 16)}}
KERNELS = ("attention_forward", "attention_delta", "attention_dq", "attention_dk_dv")
OPERANDS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")         # in the order of the enum of attention.cu


class Operand(NamedTuple):
    """A contiguous array of tokens and heads in any order: token t, head h has its numbers from offset + t token + h head."""

    array: object
    offset: int
    token: int
    head: int


class Plan:
    """Which queries see which keys, on the device. xp: cupy; segments: integers (n,7), NumPy.

    Make one for a batch and use it in every layer. Raises ValueError for segments whose queries overlap, or
    whose keys do without being the same.
    """

    def __init__(self, xp, segments):
        self.xp, self.segments = xp, np.asarray(segments, np.int64).reshape(-1, 7)
        self.rows, self.queries, self.runs = self.segments.tolist(), _ranges("queries", self.segments[:, :2]), {}
        for i, (_, _, key, keys, _, prefix, prefix_keys) in enumerate(self.rows):
            for own, run in ((0, (prefix, prefix_keys)), (1, (key, keys))):
                if run[1] > 0:
                    self.runs.setdefault(run, []).append((i, own))
        self.keys = _ranges("keys", list(self.runs))
        self._known = {}

    def _once(self, key, make):
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def query_tiles(self, rows):
        """(segment, first query) of every tile, those with most to do first."""
        def cut():
            tiles = [(i, i0) for i, s in enumerate(self.rows) for i0 in range(0, s[1], rows)]
            return sorted(tiles, key=lambda tile: -self.work(tile, rows))
        return self._once(("query tiles", rows), cut)

    def work(self, tile, rows):
        """The keys that a tile of queries goes through, prefix included."""
        i, i0 = tile
        _, queries, _, keys, diagonal, _, prefix_keys = self.rows[i]
        return prefix_keys + max(0, min(keys, i0 + min(rows, queries - i0) + diagonal))

    def key_tiles(self, cols):
        """(first token, how many, the first one's j, begin, end) of every tile of keys, and all their users from begin to end.

        A user is (segment, whether the keys are its own). Tiles that most queries see come first.
        """
        def cut():
            users, tiles = [], []
            for (key, keys), of_run in self.runs.items():
                begin = len(users)
                users.extend(of_run)
                tiles.extend((key + j0, min(cols, keys - j0), j0, begin, len(users)) for j0 in range(0, keys, cols))
            return sorted(tiles, key=lambda tile: -self.seers(tile, users)), users
        return self._once(("key tiles", cols), cut)

    def seers(self, key_tile, users):
        """The queries, of one head, that a tile of keys goes through."""
        _, _, j0, begin, end = key_tile
        queries = 0
        for segment, own in users[begin:end]:
            _, count, _, _, diagonal, _, _ = self.rows[segment]
            queries += count - (min(count, max(0, j0 - diagonal)) if own else 0)
        return queries

    def device(self, name, rows, width):
        """A table of integers as int32 on the device, sent there once."""
        return self._once((name, "device"), lambda: self.xp.asarray(np.asarray(rows, np.int32).reshape(-1, width)))


def _ranges(what, rows):
    """The last token + 1 of ranges (first, how many), none of which may overlap another."""
    rows = sorted((int(first), int(count)) for first, count in rows if count > 0)
    for (first, count), (following, _) in itertools.pairwise(rows):
        if first + count > following:
            raise ValueError(f"segments overlap: {what} {first} to {first + count} and those from {following}")
    if rows and rows[0][0] < 0:
        raise ValueError(f"segments begin before the first token: {what} {rows[0][0]}")
    return rows[-1][0] + rows[-1][1] if rows else 0


def forward(q, k, v, o, lse, plan, heads, kv_heads, width, lse_head, scale):
    """Writes attention into o, and into lse the log-sum-exp of every query's scores, -inf where it sees no key.

    q, k, v, o: Operands, of `heads` or kv_heads heads of `width` numbers. lse: a contiguous array, in which head h
    of query token t is number h lse_head + t. Raises TypeError and ValueError for what is not served.
    """
    dtype = _check(plan, heads, kv_heads, width, {"q": q, "k": k, "v": v, "o": o}, lse, lse_head)
    xp, (rows, _) = plan.xp, FORWARD[dtype.name][width]
    tiles = plan.query_tiles(rows)
    launch(_kernel(xp, "attention_forward", dtype, width), (len(tiles), heads), (threads(rows),),
           q.array, k.array, v.array, o.array, lse, plan.device("segments", plan.segments, 7),
           plan.device(("tiles", rows), tiles, 2), _places(plan, {"q": q, "k": k, "v": v, "o": o}),
           lse_head, heads // kv_heads, float(scale), shared=shared_bytes("attention_forward", dtype, width))


def backward(q, k, v, o, do, lse, dq, dk, dv, plan, heads, kv_heads, width, lse_head, scale):
    """Writes the gradients into dq, dk, dv (Operands): those of all tokens that are a query, or a key, of some segment."""
    operands = {"q": q, "k": k, "v": v, "o": o, "do": do, "dq": dq, "dk": dk, "dv": dv}
    dtype = _check(plan, heads, kv_heads, width, operands, lse, lse_head)
    xp, (rows, cols), group = plan.xp, BACKWARD[dtype.name][width], heads // kv_heads
    places, segments = _places(plan, operands), plan.device("segments", plan.segments, 7)
    tiles, (key_tiles, users) = plan.query_tiles(rows), plan.key_tiles(cols)
    on_device, block = plan.device(("tiles", rows), tiles, 2), (threads(rows),)
    delta = xp.empty(lse.shape, dtype)
    launch(_kernel(xp, "attention_delta", dtype, width), (len(tiles), heads), block, o.array, do.array, delta,
           segments, on_device, places, lse_head)
    launch(_kernel(xp, "attention_dq", dtype, width), (len(tiles), heads), block, q.array, k.array, v.array, do.array,
           lse, delta, dq.array, segments, on_device, places, lse_head, group, float(scale),
           shared=shared_bytes("attention_dq", dtype, width))
    launch(_kernel(xp, "attention_dk_dv", dtype, width), (len(key_tiles), kv_heads), block, q.array, k.array, v.array,
           do.array, lse, delta, dk.array, dv.array, segments, plan.device(("keys", cols), key_tiles, 5),
           plan.device("users", users, 2), places, lse_head, group, float(scale),
           shared=shared_bytes("attention_dk_dv", dtype, width))


# A batch (B,H,T,K): what layers.attention has.

def batch_plan(xp, q_shape, kv_shape, causal, first=None, stop=None):
    """The Plan of q (B,H,T,K) and k, v (B,G,S,K), of which row b has its real keys from first[b] to stop[b]."""
    (B, H, T, _), (_, G, S, _) = q_shape, kv_shape
    first = np.zeros(B, int) if first is None else np.asarray(first)
    stop = np.full(B, S) if stop is None else np.asarray(stop)
    segments = np.zeros((B, 7), np.int64)
    segments[:, 0], segments[:, 1] = np.arange(B) * H * T, T
    segments[:, 2], segments[:, 3] = np.arange(B) * G * S + first, stop - first
    segments[:, 4] = S - T - first if causal else S
    return Plan(xp, segments)


def batch_operands(**arrays):
    """Operands of arrays (B,heads,T,K)."""
    return {name: Operand(a, 0, a.shape[3], a.shape[2] * a.shape[3]) for name, a in arrays.items()}


def batch_forward(q, k, v, plan, scale):
    """q (B,H,T,K); k, v (B,G,S,K) -> (B,H,T,K) and the log-sum-exp."""
    _, H, T, K = q.shape
    o, lse = plan.xp.empty(q.shape, q.dtype), plan.xp.empty(q.shape[:3], q.dtype)
    forward(**batch_operands(q=q, k=k, v=v, o=o), lse=lse, plan=plan, heads=H, kv_heads=k.shape[1], width=K, lse_head=T,
            scale=scale)
    return o, lse


def batch_backward(q, k, v, o, do, lse, plan, scale):
    """The gradients dq, dk, dv of batch_forward, for the gradient do (B,H,T,K) of its output."""
    _, H, T, K = q.shape
    dq, dk, dv = plan.xp.empty(q.shape, q.dtype), *(plan.xp.zeros(k.shape, k.dtype) for _ in range(2))   # of padding
    backward(**batch_operands(q=q, k=k, v=v, o=o, do=do, dq=dq, dk=dk, dv=dv), lse=lse, plan=plan, heads=H,
             kv_heads=k.shape[1], width=K, lse_head=T, scale=scale)
    return dq, dk, dv


# How it is cut up, and what that costs.

def tile(name, dtype, width):
    """(queries, keys) of a tile of that kernel."""
    return (FORWARD if name == "attention_forward" else BACKWARD)[np.dtype(dtype).name][width]


def threads(rows):
    """Of a block: 8 for each of at most 16 rows."""
    return 8 * min(16, rows)


def shared_bytes(name, dtype, width):
    """Of dynamic shared memory a block."""
    (rows, cols), pitch = tile(name, dtype, width), width + 1
    numbers = {"attention_forward": (rows + 2 * cols) * pitch + rows * (cols + 8),
               "attention_delta": 0,
               "attention_dq": 2 * (rows + cols) * pitch + rows * (cols + 8) + 2 * rows,
               "attention_dk_dv": 2 * (rows + cols) * pitch + 2 * rows * (cols + 8) + 2 * rows}
    return numbers[name] * np.dtype(dtype).itemsize


def constants(name, dtype, width):
    """The -D of attention.cu for that kernel."""
    rows, cols = tile(name, dtype, width)
    return {"HEAD": width, "ROWS": rows, "COLS": cols, "THREADS": threads(rows)}


def variants():
    """(name, compiler's options, threads, dynamic shared bytes) of everything that can be launched."""
    for dtype, width, name in itertools.product(("float32", "float64"), WIDTHS, KERNELS):
        yield (name, options(dtype, constants(name, dtype, width)), threads(tile(name, dtype, width)[0]),
               shared_bytes(name, dtype, width))


def forward_bytes(plan, heads, kv_heads, width, dtype):
    """{operand: (bytes read, bytes written)} of forward, tables of integers apart."""
    item, (rows, _) = np.dtype(dtype).itemsize, tile("attention_forward", dtype, width)
    queries = heads * int(plan.segments[:, 1].sum())
    keys = heads * sum(plan.work(tile, rows) for tile in plan.query_tiles(rows))
    return {"q": (queries * width * item, 0), "k": (keys * width * item, 0), "v": (keys * width * item, 0),
            "o": (0, queries * width * item), "lse": (0, queries * item)}


def backward_bytes(plan, heads, kv_heads, width, dtype):
    """{kernel: {operand: (bytes read, bytes written)}} of backward, tables of integers apart."""
    item, (rows, cols) = np.dtype(dtype).itemsize, tile("attention_dq", dtype, width)
    queries = heads * int(plan.segments[:, 1].sum())
    keys = heads * sum(plan.work(tile, rows) for tile in plan.query_tiles(rows))
    key_tiles, users = plan.key_tiles(cols)
    own_keys = kv_heads * sum(count for _, count, *_ in key_tiles)
    again = heads * sum(plan.seers(tile, users) for tile in key_tiles)
    row, number = width * item, item
    return {"attention_delta": {"o": (queries * row, 0), "do": (queries * row, 0), "delta": (0, queries * number)},
            "attention_dq": {"q": (queries * row, 0), "k": (keys * row, 0), "v": (keys * row, 0), "do": (queries * row, 0),
                             "lse": (queries * number, 0), "delta": (queries * number, 0), "dq": (0, queries * row)},
            "attention_dk_dv": {"q": (again * row, 0), "k": (own_keys * row, 0), "v": (own_keys * row, 0),
                                "do": (again * row, 0), "lse": (again * number, 0), "delta": (again * number, 0),
                                "dk": (0, own_keys * row), "dv": (0, own_keys * row)}}


def example(xp, rng, B=2, H=4, G=2, T=33, K=32, dtype="float32"):
    """Forward and backward on random numbers; what python -m minilm.kernels.emulator attention runs."""
    q, k, v, do = (xp.asarray(rng.normal(size=(B, heads, T, K)).astype(dtype)) for heads in (H, G, G, H))
    plan = batch_plan(xp, q.shape, k.shape, causal=True)
    o, lse = batch_forward(q, k, v, plan, K ** -0.5)
    return o, *batch_backward(q, k, v, o, do, lse, plan, K ** -0.5)


def _kernel(xp, name, dtype, width):
    return function(xp, "attention", name, dtype, **constants(name, dtype, width))


def _places(plan, operands):
    rows = [[getattr(operands[name], field) if name in operands else 0 for field in ("offset", "token", "head")]
            for name in OPERANDS]
    return plan.device(("places", *map(tuple, rows)), rows, 3)


def _check(plan, heads, kv_heads, width, operands, lse, lse_head):
    """The dtype of the operands. Everything that the kernel would take on trust is looked at here."""
    if width not in WIDTHS:
        raise ValueError(f"attention: head width {width}; this kernel serves {', '.join(map(str, WIDTHS))}")
    if heads % kv_heads:
        raise ValueError(f"attention: {kv_heads} key/value heads do not divide {heads} query heads")
    dtype = np.dtype(operands["q"].array.dtype)
    real(dtype)
    operands = {**operands, "lse": Operand(lse, 0, 1, lse_head)}
    for name, x in operands.items():
        if x.array.dtype != dtype:
            raise TypeError(f"attention: {name} is {x.array.dtype} and q is {dtype}")
        if not x.array.flags.c_contiguous:
            raise ValueError(f"attention: {name} is not contiguous; pass a contiguous copy")
        of_keys = name in ("k", "v", "dk", "dv")
        last = x.offset + ((plan.keys if of_keys else plan.queries) - 1) * x.token
        last += ((kv_heads if of_keys else heads) - 1) * x.head + (1 if name == "lse" else width)
        if len(plan.segments) and last > x.array.size:
            raise ValueError(f"attention: the segments reach to number {last} of {name}, which has {x.array.size}")
    return dtype
