"""Attention in tiles of queries: the numbers of layers.attention, without the masked half and without T x S scores.

A tile is QUERIES queries with the keys that the last of them may see, so causal attention computes little more than
the half of the scores that counts. Scores are kept for the backward pass up to SCORES_KEPT of them; beyond that they
are computed again from the log-sum-exp of each row, as in FlashAttention-2 (Dao 2023, arXiv:2307.08691), and memory
is linear in T. The derivation stands in layers.attention; here E is exp(scores - highest) in place.
Measured on two cores (scripts/bench/train.py, scripts/bench/scaling.py): tiles of 32 to 128 queries are equally fast;
the in-place form brings a step at S from 1.5 to 1.3 of PyTorch's time.
Equals layers.attention_without_tiles and plain.attention: tests/test_layers.py.
"""

from minilm.backend import array_module

QUERIES = 64
SCORES_KEPT = 1 << 22           # 16 MB in float32


def tiled_attention(q, k, v, causal, key_mask, scale, out=None):
    """(output, vjp) of q (B,H,T,K), k and v (B,G,S,K); out: an array to write the output to.

    vjp(dO, dq=None, dk=None, dv=None): arrays may be given; dq is written there, dk and dv are added to theirs.
    """
    xp = array_module(q, k, v)
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    padding = None if key_mask is None else ~xp.asarray(key_mask).astype(bool)[:, None, :, None]
    scaled_q = (q if scale == 1 else q * scale).reshape(B, G, H // G, T, K)
    out = xp.empty(q.shape, q.dtype) if out is None else out
    O = out.reshape(scaled_q.shape)
    if not S:
        out[...] = 0
    tiles = [slice(i, min(i + QUERIES, T)) for i in range(0, T, QUERIES)] if S else []
    kept = {}                   # by the tile's first query: exp(scores - highest), or the log-sum-exp
    keep_scores = B * H * T * S <= SCORES_KEPT

    def queries(x, tile):
        """(B,G,H/G,T,K) -> (B,G,(H/G) t,K), the queries of a tile: heads that share keys are rows of one product."""
        return x[..., tile, :].reshape(B, G, H // G * (tile.stop - tile.start), K)

    def scores(tile):
        """(B,G,S',(H/G) t), one column per query, because reductions over columns are faster; and the slice of keys."""
        t = tile.stop - tile.start
        keys = slice(0, S - T + tile.stop if causal else S)
        E = k[:, :, keys] @ queries(scaled_q, tile).swapaxes(-1, -2)
        if causal and t > 1:
            xp.copyto(E.reshape(B, G, E.shape[2], H // G, t)[:, :, -t:], -xp.inf, where=xp.tri(t, t, -1, bool)[:, None])
        if padding is not None:
            xp.copyto(E, -xp.inf, where=padding[:, :, keys])
        return E, keys

    for tile in tiles:
        E, keys = scores(tile)
        highest = E.max(axis=-2, keepdims=True)
        if padding is not None:
            highest = xp.where(xp.isfinite(highest), highest, 0)
        E -= highest
        xp.exp(E, out=E)
        total = xp.ones((1, E.shape[2]), E.dtype) @ E
        total = xp.where(total > 0, total, 1)
        mixed = E.swapaxes(-1, -2) @ v[:, :, keys]
        mixed /= total.swapaxes(-1, -2)
        O[..., tile, :] = mixed.reshape(B, G, H // G, tile.stop - tile.start, K)
        kept[tile.start] = (E, total) if keep_scores else (None, highest + xp.log(total))

    def vjp(dy, dq=None, dk=None, dv=None):
        dq, dk, dv = (xp.zeros(a.shape, a.dtype) if d is None else d for a, d in ((q, dq), (k, dk), (v, dv)))
        dy = dy.reshape(O.shape)
        dq_by_group = dq.reshape(O.shape)
        for tile in tiles:
            E, total = kept[tile.start]
            dO = queries(dy, tile)
            if E is None:
                E, keys = scores(tile)
                E -= total
                xp.exp(E, out=E)                                # P
            else:
                keys = slice(0, E.shape[2])
                dO = dO / total.swapaxes(-1, -2)                # P = E / total, which is never formed
            dE = v[:, :, keys] @ dO.swapaxes(-1, -2)            # dP, and turned into dE in place
            dE -= _dot_rows(dO, queries(O, tile)).swapaxes(-1, -2)
            dE *= E
            dq_by_group[..., tile, :] = (dE.swapaxes(-1, -2) @ k[:, :, keys]).reshape(dq_by_group[..., tile, :].shape)
            dk[:, :, keys] += dE @ queries(scaled_q, tile)
            dv[:, :, keys] += E @ dO
        if scale != 1:
            dq *= scale
        return dq, dk, dv
    return out, vjp


def _dot_rows(a, b):
    """sum(a * b) over the last axis, which is kept."""
    return (a[..., None, :] @ b[..., :, None])[..., 0]
