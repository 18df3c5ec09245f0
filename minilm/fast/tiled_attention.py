"""Attention in tiles of queries: the numbers of layers.attention, without the masked half and without T x S scores.

A tile is QUERIES queries with the keys that the last of them may see, so causal attention computes little more than
the half of the scores that counts. Up to SCORES_KEPT scores are kept for the backward pass. If there are more, they
are computed again from the log-sum-exp of each row, as in FlashAttention-2 (Dao 2023, arXiv:2307.08691), and memory
is linear in T. The derivation is in layers.attention. The weights are computed in the memory of the scores. A query's
weights are its probabilities times one number, their sum, which is divided out of the smaller arrays.
Measured gain: scripts/bench/tricks.py. Equals layers.attention_without_tiles and plain.attention: tests/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minilm.backend import array_module

QUERIES = 64
SCORES_KEPT = 1 << 22           # 16 MB in float32


class Tiles:
    """The tiles of q (B,H,T,K) scaled, and of keys k (B,G,S,K). A tile is a slice of the T queries."""

    def __init__(self, q, k, causal, key_mask, scale):
        self.xp = array_module(q, k)
        B, H, T, K = q.shape
        G, S = k.shape[1:3]
        self.shape = B, G, H // G, T, K
        self.q = (q if scale == 1 else q * scale).reshape(self.shape)
        self.k = k
        self.causal = causal
        self.padding = None if key_mask is None else ~self.xp.asarray(key_mask).astype(bool)[:, None, :, None]
        self.slices = [slice(i, min(i + QUERIES, T)) for i in range(0, T, QUERIES)] if S else []
        self.keep_scores = B * H * T * S <= SCORES_KEPT

    def queries(self, x, tile):
        """(B,G,H/G,T,K) -> (B,G,(H/G) t,K), the queries of a tile: heads that share keys are rows of one product."""
        B, G, share, _, K = self.shape
        return x[..., tile, :].reshape(B, G, share * (tile.stop - tile.start), K)

    def keys(self, tile):
        """The slice of the keys that the tile's queries may see."""
        S = self.k.shape[2]
        return slice(0, S - self.shape[3] + tile.stop if self.causal else S)

    def scores(self, tile):
        """(B,G,S',(H/G) t), -inf where masked: one column per query, because reductions over columns are faster."""
        xp, t, keys = self.xp, tile.stop - tile.start, self.keys(tile)
        B, G, share, _, _ = self.shape
        scores = self.k[:, :, keys] @ self.queries(self.q, tile).swapaxes(-1, -2)
        if self.causal and t > 1:
            future = xp.tri(t, t, -1, bool)[:, None]
            xp.copyto(scores.reshape(B, G, scores.shape[2], share, t)[:, :, -t:], -xp.inf, where=future)
        if self.padding is not None:
            xp.copyto(scores, -xp.inf, where=self.padding[:, :, keys])
        return scores


def tiled_attention(q, k, v, causal: bool, key_mask, scale: float, out=None) -> tuple[np.ndarray, Callable]:
    """(output, vjp) of q (B,H,T,K), k and v (B,G,S,K); out: an array to write the output to.

    vjp(do, dq=None, dk=None, dv=None): arrays may be given; dq is written there, dk and dv are added to theirs.
    """
    tiles = Tiles(q, k, causal, key_mask, scale)
    xp = tiles.xp
    out = xp.empty(q.shape, q.dtype) if out is None else out
    o = out.reshape(tiles.shape)
    if not tiles.slices:
        out[...] = 0
    kept = {}                   # by the tile's first query: weights and their sums, or the log-sum-exp
    for tile in tiles.slices:
        scores = tiles.scores(tile)
        highest = scores.max(axis=-2, keepdims=True)
        if key_mask is not None:
            highest = xp.where(xp.isfinite(highest), highest, 0)
        scores -= highest
        weights = xp.exp(scores, out=scores)
        sums = xp.ones((1, weights.shape[2]), weights.dtype) @ weights
        sums = xp.where(sums > 0, sums, 1)
        mixed = weights.swapaxes(-1, -2) @ v[:, :, tiles.keys(tile)]
        mixed /= sums.swapaxes(-1, -2)
        o[..., tile, :] = mixed.reshape(o[..., tile, :].shape)
        kept[tile.start] = (weights, sums, None) if tiles.keep_scores else (None, None, highest + xp.log(sums))

    def vjp(dy, dq=None, dk=None, dv=None):
        dq, dk, dv = (xp.zeros(a.shape, a.dtype) if d is None else d for a, d in ((q, dq), (k, dk), (v, dv)))
        _backward(tiles, kept, v, o, dy.reshape(o.shape), dq.reshape(o.shape), dk, dv)
        if scale != 1:
            dq *= scale
        return dq, dk, dv
    return out, vjp


def _backward(tiles, kept, v, o, dy, dq, dk, dv):
    """dq is written, dk and dv are added to; dq lacks the scale. o, dy and dq are (B,G,H/G,T,K)."""
    for tile in tiles.slices:
        keys = tiles.keys(tile)
        do = tiles.queries(dy, tile)
        weights, sums, log_sum_exp = kept[tile.start]
        if weights is None:
            scores = tiles.scores(tile)
            scores -= log_sum_exp
            weights = tiles.xp.exp(scores, out=scores)          # their sum is 1
        else:
            do = do / sums.swapaxes(-1, -2)                     # instead of the weights
        dscores = v[:, :, keys] @ do.swapaxes(-1, -2)           # dP of layers.attention, turned into dE in place
        row_sums = do[..., None, :] @ tiles.queries(o, tile)[..., None]     # of do * o, which is never stored
        dscores -= row_sums[..., 0].swapaxes(-1, -2)
        dscores *= weights
        dq[..., tile, :] = (dscores.swapaxes(-1, -2) @ tiles.k[:, :, keys]).reshape(dq[..., tile, :].shape)
        dk[:, :, keys] += dscores @ tiles.queries(tiles.q, tile)
        dv[:, :, keys] += weights @ do
