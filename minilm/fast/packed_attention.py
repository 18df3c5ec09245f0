"""Attention over the segments of one row of tokens (packing.py): no padding, a shared prompt's keys computed once.

Segments of similar size are attended to in one call: they are aligned on the right in a small rectangle, and only
there is padding. Rotations and key smearing happen in the same node of the graph. The numbers are those of
plain.attention on each dialogue alone. Measured gain: scripts/bench/tricks.py.
Tests: tests/test_packing.py, tests/test_plain.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from minilm.backend import array_module, is_cupy
from minilm.fast.tiled_attention import tiled_attention
from minilm.rotary import mix_keys, pair_slices, rope_tables
from minilm.segment_sum import segment_sum
from minilm.tensor import primitive

# Two segments share a call if the padding adds at most half of the smaller one's scores, plus this many: about the
# cost of one more call.
CALL = 1 << 14


@dataclasses.dataclass
class Segment:
    """Rows start to stop of a pack: one prompt, or one response with its prompt at prefix_start to prefix_stop."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0
    queries: int = dataclasses.field(init=False)
    keys: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.queries = self.stop - self.start
        self.keys = self.queries + self.prefix_stop - self.prefix_start


class Group:
    """Segments for one call of attention, in a rectangle: each aligned on the right of its own row.

    queries, keys  the sides of the rectangle: the largest numbers of a segment
    side_by_side   whether the segments have one length, follow each other and have no prefixes: a rectangle already
    real_keys      (b,S) True on keys, False on padding; None if there is no padding
    """

    def __init__(self, segments: list[Segment]):
        self.segments = segments
        first = segments[0]
        self.queries = max(s.queries for s in segments)
        self.keys = max(s.keys for s in segments)
        self.side_by_side = all(s.keys == first.queries == s.queries and s.start == first.start + i * s.queries
                                for i, s in enumerate(segments))
        keys = np.array([s.keys for s in segments])
        self.real_keys = None if (keys == self.keys).all() else np.arange(self.keys) >= self.keys - keys[:, None]


def attend_to_segments(config, parameters, segments: list[Segment], positions) -> Callable:
    """attend(layer, qkv) for model.hidden_states: causal attention within the segments of a row of N tokens.

    positions (N,): of each token in its own sequence, an array on the device of the parameters.
    qkv (..,(H+2G)K), with N tokens in all -> (..,H K).
    """
    shape = {"heads": config.heads, "kv_heads": config.kv_heads, "pairing": config.rope_pairing}
    cos, sin = rope_tables(positions, config.head_width, config.rope_base, parameters["embedding"].dtype)
    if is_cupy(positions):
        return _attend_on_gpu(config, parameters, segments, cos, sin, shape)
    rotation = cos + 1j * sin
    groups = group_segments(segments)

    def attend(layer, qkv):
        amount = parameters.get(f"blocks.{layer}.key_smear")
        return packed_attention(qkv, amount, rotation=rotation, groups=groups, **shape)
    return attend


@functools.cache
def _on_gpu(name):
    from minilm.kernels import layers as on_gpu
    return primitive(getattr(on_gpu, name))


@functools.lru_cache(maxsize=16)
def _tables_on_gpu(xp, segments, smeared):
    """tables_on_gpu of segments given as tuples. Batches of one shape have the same."""
    from minilm.kernels import layers as on_gpu
    from minilm.kernels.smear import Neighbours
    segments = [Segment(*places) for places in segments]
    return on_gpu.segment_plan(xp, segments), Neighbours(xp, segments) if smeared else None


def tables_on_gpu(like, segments: list[Segment], smeared: bool) -> tuple:
    """The plan of attention and, for smeared keys, the Neighbours of segments, on the device of the array `like`."""
    return _tables_on_gpu(array_module(like), tuple(
        (s.start, s.stop, s.prefix_start, s.prefix_stop) for s in segments), smeared)


def _attend_on_gpu(config, parameters, segments, cos, sin, shape):
    plan, neighbours = tables_on_gpu(cos, segments, config.key_smear)

    def attend(layer, qkv):
        if config.key_smear:
            amount = parameters[f"blocks.{layer}.key_smear"]
            qkv = _on_gpu("smear_keys")(qkv, amount, heads=config.heads, neighbours=neighbours)
        rows = qkv.reshape(-1, qkv.shape[-1])
        mixed = _on_gpu("segment_attention")(rows, cos, sin, plan=plan, **shape)
        return mixed.reshape(*qkv.shape[:-1], mixed.shape[-1])
    return attend


def rectangle_segments(B: int, T: int) -> list[Segment]:
    """B sequences of T tokens, one after the other in a row."""
    return [Segment(start, start + T) for start in range(0, B * T, T)]


def group_segments(segments: list[Segment]) -> list[Group]:
    """The segments in groups of similar sizes."""
    groups: list[list[Segment]] = []
    longest = 0
    for segment in sorted(segments, key=lambda s: (s.keys, s.queries), reverse=True):
        if groups:
            group = groups[-1]
            before, longest = longest, max(longest, segment.queries)
            added = (len(group) + 1) * longest - len(group) * before
            if added * group[0].keys <= 1.5 * segment.queries * segment.keys + CALL:
                group.append(segment)
                continue
        groups.append([segment])
        longest = segment.queries
    return [Group(group) for group in groups]


@primitive
def packed_attention(qkv, amount, rotation, heads: int, kv_heads: int, groups, pairing: str = "half"):
    """Smeared keys, rotations and causal attention of one layer: (..,(H+2G)K) with N tokens in all -> (..,H K).

    qkv       for each token H queries, G keys and G values of K numbers each
    amount    (G,K) of rotary.smear, or None
    rotation  (N,K/2), exp(i angle) of each pair: cos + i sin of rotary.rope_tables
    groups    of group_segments
    """
    xp = array_module(qkv)
    shape, dtype = qkv.shape, qkv.dtype                         # the vjp needs no more of qkv
    H, G, N = heads, kv_heads, len(rotation)
    K = qkv.shape[-1] // (H + 2 * G)
    by_head = qkv.reshape(N, H + 2 * G, K).swapaxes(0, 1)       # (H+2G,N,K)
    queries, keys, prepared_vjp = _smeared_and_rotated(by_head[:H + G], H, amount, rotation, groups, pairing)
    values = by_head[H + G:].copy()                             # a view would keep all of qkv alive
    o = xp.empty((N, H, K), dtype)
    vjps = []
    for group in groups:
        q = _aligned(queries, group, with_prefix=False)
        k = _aligned(keys, group, with_prefix=True)
        v = _aligned(values, group, with_prefix=True)
        out = _aligned(o.swapaxes(0, 1), group, with_prefix=False) if group.side_by_side else None
        mixed, group_vjp = tiled_attention(q, k, v, causal=True, key_mask=group.real_keys, scale=1, out=out)
        if out is None:
            _put_back(o.swapaxes(0, 1), mixed, group)
        vjps.append(group_vjp)

    def vjp(dy):
        dq = xp.empty((H, N, K), dtype)
        dkv = xp.zeros((2, G, N, K), dtype)
        do = dy.reshape(N, H, K).swapaxes(0, 1)
        for group, group_vjp in zip(groups, vjps):
            do_rows = _aligned(do, group, with_prefix=False)
            if group.side_by_side:                              # the gradients are views: written and added in place
                group_vjp(do_rows, *(_aligned(flat, group, with_prefix=False) for flat in (dq, *dkv)))
                continue
            dq_rows, dk, dv = group_vjp(do_rows)
            _put_back(dq, dq_rows, group)
            _add_back(dkv[0], dk, group)
            _add_back(dkv[1], dv, group)
        dqkv = xp.empty((N, H + 2 * G, K), dtype)
        by_head = dqkv.swapaxes(0, 1)
        damount = prepared_vjp(dq, dkv[0], by_head[:H + G])
        by_head[H + G:] = dkv[1]
        return dqkv.reshape(shape), damount
    return o.reshape(*shape[:-1], H * K), vjp


def _smeared_and_rotated(x, H, amount, rotation, groups, pairing):
    """Queries (H,N,K) and keys (G,N,K) ready for attention with scale 1, and the vjp; amount may be None."""
    k = x[H:]
    if amount is not None:
        edges = Edges([s for group in groups for s in group.segments])
        k, smeared_vjp = smear_segments(k, amount, edges)
    scaled = rotation * x.shape[-1] ** -0.5

    def vjp(dq, dk, dx):
        """Writes the gradient of x into dx, from dq and dk, which it overwrites. Returns the gradient of amount."""
        _rotate_back(dq, scaled, pairing, out=dx[:H])
        _rotate_back(dk, rotation, pairing, out=dx[H:])
        if amount is None:
            return None
        dx[H:], damount = smeared_vjp(dx[H:])
        return damount
    return _rotated(x[:H], scaled, pairing), _rotated(k, rotation, pairing), vjp


def _rotated(x, rotation, pairing):
    """rotary.rotate, but the two numbers of a pair are side by side: the product q k does not depend on their order."""
    first, second = pair_slices(x.shape[-1], pairing)
    z = array_module(x).empty((*x.shape[:-1], x.shape[-1] // 2), rotation.dtype)
    z.real = x[..., first]
    z.imag = x[..., second]
    z *= rotation
    return z.view(x.dtype)


def _rotate_back(dy, rotation, pairing, out):
    """The vjp of _rotated, written to out. dy is overwritten."""
    first, second = pair_slices(dy.shape[-1], pairing)
    dz = dy.view(rotation.dtype)
    dz *= rotation.conj()
    out[..., first] = dz.real
    out[..., second] = dz.imag


# Between the row of tokens and the small rectangle of a group.

def _aligned(flat, group, with_prefix):
    """(heads,N,K) -> (b,heads,T,K): the segments of a group, each aligned on the right of its own row."""
    T = group.keys if with_prefix else group.queries
    if group.side_by_side:                                      # a view
        rows = flat[:, group.segments[0].start:group.segments[-1].stop]
        return rows.reshape(len(flat), len(group.segments), T, -1).swapaxes(0, 1)
    rows = array_module(flat).zeros((len(group.segments), len(flat), T, flat.shape[2]), flat.dtype)
    for row, s in zip(rows, group.segments):
        row[:, T - s.queries:] = flat[:, s.start:s.stop]
        if with_prefix and s.keys > s.queries:
            row[:, T - s.keys:T - s.queries] = flat[:, s.prefix_start:s.prefix_stop]
    return rows


def _put_back(flat, rows, group):
    """The inverse of _aligned for queries: written to their segments."""
    for row, s in zip(rows, group.segments):
        flat[:, s.start:s.stop] = row[:, -s.queries:]


def _add_back(flat, rows, group):
    """The transpose of _aligned for keys: added, because several segments share a prefix."""
    T = rows.shape[2]
    for row, s in zip(rows, group.segments):
        flat[:, s.start:s.stop] += row[:, T - s.queries:]
        flat[:, s.prefix_start:s.prefix_stop] += row[:, T - s.keys:T - s.queries]


# Key smearing: the key before a response's first key is the last key of its prompt.

class Edges:
    """Where segments begin, for smearing. Rows of a pack:

    first     the first row of each segment
    after     those of them that follow another token: the first rows of responses
    before    the rows that they follow, the last of their prompts
    """

    def __init__(self, segments: list[Segment]):
        follow = [s for s in segments if s.prefix_stop]
        self.first = np.array([s.start for s in segments], int)
        self.after = np.array([s.start for s in follow], int)
        self.before = np.array([s.prefix_stop - 1 for s in follow], int)


def smear_segments(k, amount, edges: Edges) -> tuple[np.ndarray, Callable]:
    """rotary.smear of keys (G,N,K), and the vjp for k and amount. On a GPU: kernels/smear.cu."""
    previous = np.empty(k.shape, k.dtype)
    previous[:, 1:] = k[:, :-1]
    previous[:, edges.first] = 0
    previous[:, edges.after] = k[:, edges.before]
    mixed, mix_vjp = mix_keys(k, previous, amount)

    def vjp(dy):
        dk, dprevious, damount = mix_vjp(dy)
        of_responses = dprevious[:, edges.after].swapaxes(0, 1)
        dprevious[:, edges.first] = 0
        dk[:, :-1] += dprevious[:, 1:]
        # A prompt's last key is the previous key of each of its responses: their gradients add up.
        ends, sums = segment_sum(edges.before, of_responses)
        dk[:, ends] += sums.swapaxes(0, 1)
        return dk, damount
    return mixed, vjp
