"""Dialogues in one row of tokens, without padding, and each prompt once however many responses it has.

    prompt 0 | response 0 | response 1 | prompt 1 | response 2 ...

Every token goes through the model once: P + R_1 + R_2 instead of 2 (P + max(R_1, R_2)) for a prompt and
two responses to it. A response attends to its prompt and to itself, and its positions go on from the
prompt's, so what is computed is what it would be alone, up to rounding. The last token of a response
is only a target: unless a reward is to be read there, it is left out.
Tests: tests/test_packing.py.
"""

import dataclasses

import numpy as np

from minilm import layers
from minilm.backend import array_module
from minilm.ops import segment_sum
from minilm.tensor import primitive

# Segments are attended to in groups of like sizes: padding a smaller one to the size of its group may cost
# half of its own scores, and this many more, which is about what another call would.
CALL = 1 << 14


@dataclasses.dataclass
class Segment:
    """Rows start to stop of a pack, which continue rows prefix_start to prefix_stop (none if equal)."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def queries(self):
        return self.stop - self.start

    @property
    def keys(self):
        return self.queries + self.prefix_stop - self.prefix_start


@dataclasses.dataclass
class Pack:
    """What pack() returns, of B dialogues with responses of at most R tokens, M in all.

    tokens, positions  (N,) the row, and where each of its tokens stands in its own dialogue
    segments           of the row, in order
    rows, targets      (M,) response token by response token: the row that predicts it, and what it is
    last               (B,) the row of the last token of each response (only with last=True)
    mask               (B,R) True on response tokens
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: list
    rows: np.ndarray
    targets: np.ndarray
    last: np.ndarray
    mask: np.ndarray

    def groups(self):
        """The segments in groups of like sizes, each for one call of attention."""
        found, longest = [], 0
        for segment in sorted(self.segments, key=lambda s: (s.keys, s.queries), reverse=True):
            if found:
                before, longest = longest, max(longest, segment.queries)
                more = (len(found[-1]) + 1) * longest - len(found[-1]) * before
                if more * found[-1][0].keys <= 1.5 * segment.queries * segment.keys + CALL:
                    found[-1].append(segment)
                    continue
            found.append([segment])
            longest = segment.queries
        return found


def pack(prompts, responses, context=None, last=False):
    """Token lists to a Pack. Equal prompts are kept once. last: keep the last token of each response.

    Raises ValueError for an empty prompt or response, lists of unequal number, or a dialogue longer
    than `context`.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: expected as many, at least one")
    tokens, positions, segments, rows, ends, known = [], [], [], [], [], {}
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        P, R = len(prompt), len(response)
        if not P or not R:
            raise ValueError(f"dialogue {i} has a prompt of {P} and a response of {R} tokens; both need at least one")
        if context is not None and P + R > context:
            raise ValueError(f"dialogue {i} has {P} + {R} tokens and the context is {context}; "
                             "shorten it, or use a model with a longer context")
        key = tuple(prompt)
        if key not in known:
            known[key] = segment = Segment(len(tokens), len(tokens) + P)
            segments.append(segment)
            tokens.extend(prompt)
            positions += range(P)
        prefix, fed = known[key], R if last else R - 1
        start = len(tokens)
        if fed:
            segments.append(Segment(start, start + fed, prefix.start, prefix.stop))
            tokens.extend(response[:fed])
            positions += range(P, P + fed)
        rows += [prefix.stop - 1, *range(start, start + R - 1)]
        ends.append(len(tokens) - 1)
    lengths = np.array([len(response) for response in responses])
    return Pack(np.array(tokens), np.array(positions), segments, np.array(rows), np.concatenate(responses),
                np.array(ends), np.arange(lengths.max()) < lengths[:, None])


def packs(prompts, responses, batch_size, context=None, last=False):
    """All the dialogues in order, as Packs of at most batch_size."""
    for i in range(0, len(prompts), batch_size):
        yield pack(prompts[i:i + batch_size], responses[i:i + batch_size], context, last)


def rectangle(tokens):
    """A batch (B,T) of whole sequences as a Pack, of which nothing is scored."""
    B, T = tokens.shape
    none = np.zeros(0, int)
    return Pack(tokens.reshape(-1), np.tile(np.arange(T), B), [Segment(i * T, i * T + T) for i in range(B)], none, none,
                none, np.zeros((0, 0), bool))


@primitive
def packed_attention(qkv, amount, turn, heads, kv_heads, groups, pairing="half"):
    """Smeared keys, rotations and causal attention of one layer over a packing.Pack: (N,(H+2G)K) -> (N,H K).

    qkv holds, for each token, H queries, G keys, G values, of K numbers each; amount (G,K) is that of
    smear, or None for none; turn (N,K/2) is exp(i angle) of each pair, cos + i sin of rope_tables.
    groups: the pack's segments, those of a group attended to in one call. Padding exists inside of it
    alone, where they are aligned on the right.
    """
    (N, width), dtype, H, G = qkv.shape, qkv.dtype, heads, kv_heads
    xp, K = array_module(qkv), width // (H + 2 * G)
    by_head = qkv.reshape(N, H + 2 * G, K).swapaxes(0, 1)       # (H+2G,N,K)
    q_and_k, prepared_vjp = _smeared_and_rotated(by_head[:H + G], H, amount, turn, groups, pairing)
    values = by_head[H + G:].copy()                             # or all of qkv would be kept for them
    O, vjps = xp.empty((N, H, K), dtype), []
    for group in groups:
        q = _aligned(q_and_k[:H], group, with_prefix=False)
        k, v = (_aligned(flat, group, with_prefix=True) for flat in (q_and_k[H:], values))
        place = _aligned(O.swapaxes(0, 1), group, with_prefix=False) if _side_by_side(group) else None
        mixed, vjp = layers.attention.__wrapped__(q, k, v, True, _real_keys(group, k.shape[2]), 1, place)
        if place is None:
            _put_back(O.swapaxes(0, 1), mixed, group)
        vjps.append(vjp)

    def vjp(dy):
        dq, dkv = xp.empty((H, N, K), dtype), xp.zeros((2, G, N, K), dtype)
        dO = dy.reshape(N, H, K).swapaxes(0, 1)
        for group, group_vjp in zip(groups, vjps):
            dO_rows = _aligned(dO, group, with_prefix=False)
            if _side_by_side(group):                            # written and added where they belong
                group_vjp(dO_rows, *(_aligned(flat, group, with_prefix=False) for flat in (dq, *dkv)))
                continue
            dq_rows, dk, dv = group_vjp(dO_rows)
            _put_back(dq, dq_rows, group)
            _add_back(dkv[0], dk, group)
            _add_back(dkv[1], dv, group)
        dqkv = xp.empty((N, H + 2 * G, K), dtype)
        by_head = dqkv.swapaxes(0, 1)
        damount = prepared_vjp(dq, dkv[0], by_head[:H + G])
        by_head[H + G:] = dkv[1]
        return dqkv.reshape(N, width), damount
    return O.reshape(N, H * K), vjp


def _aligned(flat, group, with_prefix):
    """Rows (heads,N,K) of a group's segments, each on the right of a row of its own: (b,heads,T,K)."""
    T = max(s.keys if with_prefix else s.queries for s in group)
    if _side_by_side(group):                                    # a view
        return flat[:, group[0].start:group[-1].stop].reshape(len(flat), len(group), T, -1).swapaxes(0, 1)
    rows = array_module(flat).zeros((len(group), len(flat), T, flat.shape[2]), flat.dtype)
    for row, s in zip(rows, group):
        row[:, T - s.queries:] = flat[:, s.start:s.stop]
        if with_prefix and s.keys > s.queries:
            row[:, T - s.keys:T - s.queries] = flat[:, s.prefix_start:s.prefix_stop]
    return rows


def _put_back(flat, rows, group):
    """The other way, for queries: written to their segments."""
    for row, s in zip(rows, group):
        flat[:, s.start:s.stop] = row[:, -s.queries:]


def _add_back(flat, rows, group):
    """The other way, for keys: added, for a prefix is that of several segments."""
    T = rows.shape[2]
    for row, s in zip(rows, group):
        flat[:, s.start:s.stop] += row[:, T - s.queries:]
        flat[:, s.prefix_start:s.prefix_stop] += row[:, T - s.keys:T - s.queries]


def _side_by_side(group):
    """Segments of one length, one after the other, that continue nothing: a rectangle already."""
    return all(s.keys == group[0].queries == s.queries and s.start == group[0].start + i * s.queries
               for i, s in enumerate(group))


def _real_keys(group, S):
    """(b,S) True on keys, False on padding; None without any."""
    keys = np.array([s.keys for s in group])
    return None if (keys == S).all() else np.arange(S) >= S - keys[:, None]


def _smeared_and_rotated(x, H, amount, turn, groups, pairing):
    """Queries and keys (H+G,N,K) as attention takes them with scale 1, and the vjp; amount may be None.

    Rotation is multiplication by exp(i angle). They stay in the order of the pairs, real and imaginary
    parts side by side: a product of the two does not depend on the order of their axes.
    """
    xp, K, k = array_module(x), x.shape[-1], x[H:]
    first, second = layers.pair_slices(K, pairing)
    if amount is not None:
        k, smeared_vjp = _smeared(k, amount, *first_tokens([s for group in groups for s in group], x))
    scaled = turn * K ** -0.5
    z = xp.empty((*x.shape[:2], K // 2), turn.dtype)
    for to, part, by in ((z[:H], x[:H], scaled), (z[H:], k, turn)):
        to.real, to.imag = part[..., first], part[..., second]
        to *= by

    def vjp(dq, dk, dx):
        """The gradients dq and dk, which are spoilt, to that of x, written into dx; returns that of amount."""
        damount = None
        for to, part, by in ((dx[:H], dq, scaled), (dx[H:], dk, turn)):
            dz = part.view(turn.dtype)
            dz *= by.conj()
            to[..., first], to[..., second] = dz.real, dz.imag
        if amount is not None:
            dx[H:], damount = smeared_vjp(dx[H:])
        return damount
    return z.view(x.dtype), vjp


def first_tokens(segments, like):
    """Of each segment: its first row, and the row of the token before that, -1 for none; on the device of `like`."""
    xp = array_module(like)
    return xp.array([s.start for s in segments], int), xp.array([s.prefix_stop - 1 for s in segments], int)


def _smeared(k, amount, starts, before):
    """layers.smear of keys (G,N,K) in segments, as first_tokens has them; and the vjp, for k and amount."""
    xp, follows = array_module(k), before >= 0
    previous = xp.empty(k.shape, k.dtype)
    previous[:, 1:] = k[:, :-1]
    previous[:, starts] = xp.where(follows[:, None], k[:, before], 0)
    mixed, blend_vjp = layers.blend(k, previous, amount)

    def vjp(dy):
        dk, dprevious, damount = blend_vjp(dy)
        at_starts = dprevious[:, starts]
        dprevious[:, starts] = 0
        dk[:, :-1] += dprevious[:, 1:]
        ends, of_responses = segment_sum(before[follows], at_starts[:, follows].swapaxes(0, 1))
        dk[:, ends] += of_responses.swapaxes(0, 1)
        return dk, damount
    return mixed, vjp


@primitive
def smeared_keys(qkv, amount, starts, before, heads, kv_heads):
    """qkv (N,(H+2G)K) of packed_attention with its keys smeared, and nothing else changed."""
    N, by_head, keys = len(qkv), qkv.reshape(len(qkv), heads + 2 * kv_heads, -1), slice(heads, heads + kv_heads)
    mixed, smeared_vjp = _smeared(by_head[:, keys].swapaxes(0, 1), amount, starts, before)
    out = by_head.copy()
    out[:, keys] = mixed.swapaxes(0, 1)

    def vjp(dy):
        dqkv = dy.reshape(by_head.shape).copy()
        dk, damount = smeared_vjp(dqkv[:, keys].swapaxes(0, 1))
        dqkv[:, keys] = dk.swapaxes(0, 1)
        return dqkv.reshape(qkv.shape), damount
    return out.reshape(N, -1), vjp


@primitive
def scatter(values, mask):
    """M values put where mask (B,R) is True, row by row, zeros elsewhere: (B,R)."""
    xp = array_module(values)
    mask = xp.asarray(mask)
    out = xp.zeros(mask.shape, values.dtype)
    out[mask] = values
    def vjp(dy):
        return dy[mask]
    return out, vjp
