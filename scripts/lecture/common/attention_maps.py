"""The attention weights of every layer and head, for a figure or a score.

Attention is linear in its values. So with unit vectors as values it returns its weights, and the weights come from the
code that runs: padded_attention.attend_to_padded, called once more for each layer with other values.
Tests: tests/test_attention_maps.py.
"""

import numpy as np

from minilm import checks
from minilm.backend import array_module, to_numpy
from minilm.model import Transformer, hidden_states
from minilm.padded_attention import attend_to_padded
from minilm.tensor import Tensor, no_grad


def attention_weights(model: Transformer, tokens: np.ndarray, key_mask: np.ndarray | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(K)): tokens (B,T) -> an array (L,H,B,T,T); row t holds the weights of query t.

    key_mask and errors: as for Transformer.hidden.
    """
    c = model.config
    tokens = model.checked_tokens(tokens)
    B, T = tokens.shape
    weights = []
    values = c.kv_heads * c.head_width
    attend = attend_to_padded(model.config, model.parameters(), T, np.ones((B, T)) if key_mask is None else key_mask)

    def record(i, qkv):
        xp = array_module(qkv.data)
        columns = []
        for first in range(0, T, c.head_width):       # the values of a head hold head_width unit vectors at a time
            unit = xp.tile(xp.eye(T, c.head_width, -first, dtype=qkv.dtype), c.kv_heads)
            probe = xp.concatenate([qkv.data[..., :-values], xp.broadcast_to(unit, (B, T, values))], axis=-1)
            columns.append(attend(i, Tensor(probe)).data.reshape(B, T, c.heads, c.head_width))
        weights.append(to_numpy(xp.concatenate(columns, axis=-1)[..., :T].transpose(2, 0, 1, 3)))
        return attend(i, qkv)

    with no_grad():
        hidden_states(model.parameters(), c, tokens, record)
    return np.stack(weights)


def induction_scores(weights: np.ndarray, tokens: np.ndarray, queries: np.ndarray | None = None) -> np.ndarray:
    """The attention of a token to the tokens after its earlier copies: (L,H), means over the queries.

    weights (L,H,B,T,T) of attention_weights; queries (B,T): the tokens to use, by default all. Tokens without an
    earlier copy are left out. Olsson et al. 2022, arXiv:2209.11895 (there: "prefix matching score"). Raises ValueError
    if no token is left.
    """
    T = tokens.shape[1]
    after_copy = np.zeros((*tokens.shape, T), bool)                              # (B, query, key)
    after_copy[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    after_copy &= np.tri(T, dtype=bool)
    chosen = True if queries is None else checks.mask("induction_scores", queries, tokens.shape, "queries")
    used = after_copy.any(axis=2) & chosen
    if not used.any():
        raise ValueError("no query token has occurred before in its sequence; give queries with earlier copies")
    return (weights * after_copy).sum(axis=-1)[:, :, used].mean(axis=-1)
