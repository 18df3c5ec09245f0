"""Who looks at whom: the attention weights of every layer and head, for a picture or for a score.

Attention is linear in its values, so with unit vectors in their place it returns its own weights. Nothing of the
model is written a second time here, and what is shown is what runs.
Tests: tests/test_attention_maps.py.
"""

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.model import hidden_states
from minilm.tensor import Tensor, no_grad


def attention_weights(model, tokens, key_mask=None):
    """softmax(q k^T / sqrt(K)) of a Transformer: tokens (B,T) -> an array (L,H,B,T,T); row t: the weights of query t.

    key_mask and errors: as for Transformer.hidden.
    """
    c = model.config
    tokens = model.checked_tokens(tokens)
    B, T = tokens.shape
    weights = []
    values = c.kv_heads * c.head_width
    attend = model.attend_to_padded(T, np.ones((B, T)) if key_mask is None else key_mask)

    def watch(i, qkv):
        xp, columns = array_module(qkv.data), []
        for first in range(0, T, c.head_width):       # so many unit vectors fit into the values of a head
            unit = xp.tile(xp.eye(T, c.head_width, -first, dtype=qkv.dtype), c.kv_heads)
            probe = xp.concatenate([qkv.data[..., :-values], xp.broadcast_to(unit, (B, T, values))], axis=-1)
            columns.append(attend(i, Tensor(probe)).data.reshape(B, T, c.heads, c.head_width))
        weights.append(to_numpy(xp.concatenate(columns, axis=-1)[..., :T].transpose(2, 0, 1, 3)))
        return attend(i, qkv)

    with no_grad():
        hidden_states(model.parameters(), c, tokens, watch)
    return np.stack(weights)


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
