"""layers.smear over the segments of a pack: the key before a response's first key is the last key of its prompt.

Tests: tests/test_packing.py.
"""

from __future__ import annotations

from minilm.backend import array_module
from minilm.layers import mix_keys
from minilm.ops import segment_sum
from minilm.packing import Segment
from minilm.tensor import primitive


def segment_starts(segments: list[Segment], like):
    """For each segment its first row, and the row of the token before it (-1: none), on the device of `like`."""
    xp = array_module(like)
    return xp.array([s.start for s in segments], int), xp.array([s.prefix_stop - 1 for s in segments], int)


def smear_segments(k, amount, starts, before):
    """layers.smear of keys (G,N,K), and the vjp for k and amount; starts and before as segment_starts gives them."""
    xp, follows = array_module(k), before >= 0
    previous = xp.empty(k.shape, k.dtype)
    previous[:, 1:] = k[:, :-1]
    previous[:, starts] = xp.where(follows[:, None], k[:, before], 0)
    mixed, mix_vjp = mix_keys(k, previous, amount)

    def vjp(dy):
        dk, dprevious, damount = mix_vjp(dy)
        at_starts = dprevious[:, starts]
        dprevious[:, starts] = 0
        dk[:, :-1] += dprevious[:, 1:]
        # A prompt's last key is the previous key of each of its responses: their gradients add up.
        ends, of_responses = segment_sum(before[follows], at_starts[:, follows].swapaxes(0, 1))
        dk[:, ends] += of_responses.swapaxes(0, 1)
        return dk, damount
    return mixed, vjp


@primitive
def smear_keys(qkv, amount, starts, before, heads: int, kv_heads: int):
    """qkv (..,(H+2G)K) with its keys smeared and nothing else changed (on a GPU, before the attention kernel)."""
    by_head = qkv.reshape(-1, heads + 2 * kv_heads, qkv.shape[-1] // (heads + 2 * kv_heads))
    keys = slice(heads, heads + kv_heads)
    mixed, smeared_vjp = smear_segments(by_head[:, keys].swapaxes(0, 1), amount, starts, before)
    out = by_head.copy()
    out[:, keys] = mixed.swapaxes(0, 1)

    def vjp(dy):
        dqkv = dy.reshape(by_head.shape).copy()
        dk, damount = smeared_vjp(dqkv[:, keys].swapaxes(0, 1))
        dqkv[:, keys] = dk.swapaxes(0, 1)
        return dqkv.reshape(qkv.shape), damount
    return out.reshape(qkv.shape), vjp
