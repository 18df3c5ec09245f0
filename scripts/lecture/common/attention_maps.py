"""Who looks at whom: the attention weights of every layer and head, for a picture or for a score.

Attention is linear in its values, so with unit vectors in their place it returns its own weights. Nothing of the
model is written a second time here, and what is shown is what runs.
Tests: tests/test_attention_maps.py.
"""

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.tensor import Tensor, no_grad


def attention_weights(model, tokens, key_mask=None):
    """softmax(q k^T / sqrt(K)) of a Transformer: tokens (B,T) -> an array (L,H,B,T,T); row t says where token t looks.

    key_mask and errors: as for Transformer.hidden.
    """
    c, (B, T), found = model.config, np.shape(tokens), []
    values, mix = c.kv_heads * c.head_width, model._padded_attention

    def watch(i, qkv, *rest):
        xp, weights = array_module(qkv.data), []
        for first in range(0, T, c.head_width):       # so many unit vectors fit into the values of a head
            unit = xp.tile(xp.eye(T, c.head_width, -first, dtype=qkv.dtype), c.kv_heads)
            probe = xp.concatenate([qkv.data[..., :-values], xp.broadcast_to(unit, (B, T, values))], axis=-1)
            weights.append(mix(i, Tensor(probe), *rest).data.reshape(B, T, c.heads, c.head_width))
        found.append(to_numpy(xp.concatenate(weights, axis=-1)[..., :T].transpose(2, 0, 1, 3)))
        return mix(i, qkv, *rest)

    watched = model.over(model.parameters())
    watched._padded_attention = watch
    with no_grad():
        watched.hidden(tokens, np.ones((B, T)) if key_mask is None else key_mask)
    return np.stack(found)


def induction_scores(weights, tokens, queries=None):
    """How much of a token's attention goes to what followed earlier copies of it: (L,H), means over the queries.

    weights (L,H,B,T,T) of attention_weights; queries (B,T): which tokens to ask, by default all. Tokens that have
    not occurred before have nothing to look for and are left out. Olsson et al. 2022, arXiv:2209.11895 (there:
    "prefix matching score"). Raises ValueError if no token is left.
    """
    T = tokens.shape[1]
    after_copy = np.zeros((*tokens.shape, T), bool)                              # (B, query, key)
    after_copy[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    after_copy &= np.tri(T, dtype=bool)
    asked = after_copy.any(axis=2) & (True if queries is None else np.asarray(queries, bool))
    if not asked.any():
        raise ValueError("no token that was asked has occurred before: nothing to be looked for")
    return (weights * after_copy).sum(axis=-1)[:, :, asked].mean(axis=-1)
