"""Attention weights, read with unit vectors as values, against the formula in every layer; induction scores."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

import definitions
from common.attention_maps import attention_weights, induction_scores
from helpers import assert_close, rngs, small_transformer
from minilm import layers, ops
from minilm.tensor import Tensor, no_grad

CONFIGS = [{}, {"layers": 3, "heads": 4, "kv_heads": 2, "head_width": 2}, {"causal": False, "layers": 2},
           {"layers": 2, "key_smear": True, "kv_heads": 1}, {"rope_pairing": "interleaved", "head_width": 6}]


def by_formula(model, tokens, key_mask):
    """For every layer the values of every head and the mixed values, (B,H,T,K) each, from definitions.py alone."""
    c, p, (B, T) = model.config, model.parameters(), tokens.shape
    tables = layers.rope_tables(np.arange(T), c.head_width, c.rope_base, model.dtype)
    x, found = ops.embed(p["embedding"], tokens), []
    for i in range(c.layers):
        qkv = definitions.rms_norm(x, p[f"blocks.{i}.attention_norm"], c.norm_eps) @ p[f"blocks.{i}.qkv"]
        qkv = ops.transpose(qkv.reshape(B, T, c.heads + 2 * c.kv_heads, c.head_width), axes=(0, 2, 1, 3))
        q, k, v = qkv[:, :c.heads], qkv[:, c.heads:c.heads + c.kv_heads], qkv[:, c.heads + c.kv_heads:]
        if c.key_smear:
            k = ops.where(key_mask[:, None, :, None].astype(bool), k, 0.0)
            k = definitions.smear(k, p[f"blocks.{i}.key_smear"], Tensor(np.zeros((B, c.kv_heads, c.head_width))))
        q, k = definitions.rope(q, *tables, c.rope_pairing), definitions.rope(k, *tables, c.rope_pairing)
        mixed = definitions.attention(q, k, v, c.causal, key_mask)
        found.append((v.data[:, np.repeat(np.arange(c.kv_heads), c.heads // c.kv_heads)], mixed.data))
        x = x + ops.transpose(mixed, axes=(0, 2, 1, 3)).reshape(B, T, -1) @ p[f"blocks.{i}.attention_out"]
        h = definitions.rms_norm(x, p[f"blocks.{i}.ffn_norm"], c.norm_eps)
        x = x + definitions.swiglu(h @ p[f"blocks.{i}.gate_up"]) @ p[f"blocks.{i}.ffn_out"]
    return found


@given(rngs, st.sampled_from(CONFIGS), st.integers(1, 9), st.booleans())
def test_the_weights_times_the_values_equal_the_output_of_attention_in_every_layer(rng, config, T, padded):
    model = small_transformer(rng, **config)
    tokens, key_mask = rng.integers(7, size=(3, T)), np.ones((3, T))
    if padded:
        key_mask[0, :T // 2] = 0
    with no_grad():
        weights = attention_weights(model, tokens, key_mask if padded else None)
        expected = by_formula(model, tokens, key_mask)
    assert weights.shape == (model.config.layers, model.config.heads, 3, T, T) == (len(expected), *weights.shape[1:])
    for of_layer, (values, mixed) in zip(weights, expected):
        assert_close(of_layer.transpose(1, 0, 2, 3) @ values, mixed)
    sees = key_mask[:, None, :] * (np.tri(T) if model.config.causal else np.ones((T, T)))
    assert (weights[..., sees == 0] == 0).all() and (weights[..., sees == 1] > 0).all()
    assert_close(weights.sum(axis=-1), np.broadcast_to(sees.max(axis=-1), weights.shape[:-1]), 1e-12)


def test_reading_the_weights_changes_nothing_and_keeps_no_graph():
    rng = np.random.default_rng(0)
    model, tokens = small_transformer(rng, layers=2), rng.integers(7, size=(2, 5))
    before = model(tokens).data
    attributes = dict(vars(model))
    attention_weights(model, tokens)
    assert (model(tokens).data == before).all() and vars(model) == attributes
    assert all(p.grad is None for p in model.parameters().values())


def test_too_many_tokens_or_unknown_tokens_raise():
    model = small_transformer(np.random.default_rng(0), context=4)
    with pytest.raises(ValueError, match="context"):
        attention_weights(model, np.zeros((1, 5), int))
    with pytest.raises(IndexError, match="vocabulary"):
        attention_weights(model, np.full((1, 3), 7))


@given(rngs)
def test_induction_scores_equal_sums_computed_by_loops(rng):
    L, H, B, T = 2, 3, 2, 8
    weights, tokens = rng.random((L, H, B, T, T)) * np.tri(T), rng.integers(3, size=(B, T))
    queries = rng.random((B, T)) < 0.7
    queries[:, -1] = True                               # one of three tokens in eight places: one comes twice
    tokens[0, -1] = tokens[0, 0]
    for asked in queries, np.ones((B, T), bool):
        found = []
        for b in range(B):
            for t in range(T):
                after = [s + 1 for s in range(t) if tokens[b, s] == tokens[b, t]]
                if asked[b, t] and after:
                    found.append(sum(weights[:, :, b, t, s] for s in after))
        assert_close(induction_scores(weights, tokens, asked), np.mean(found, axis=0))
    assert_close(induction_scores(weights, tokens), np.mean(found, axis=0))


def test_a_perfect_induction_head_scores_one_and_a_head_on_the_token_itself_zero():
    tokens = np.array([[5, 2, 3, 5, 2]])
    weights = np.zeros((1, 2, 1, 5, 5))
    weights[0, 0, 0, 3, 1] = weights[0, 0, 0, 4, 2] = 1
    weights[0, 1, 0] = np.eye(5)
    assert induction_scores(weights, tokens).tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="no query token has occurred before"):
        induction_scores(weights, tokens, [[1, 1, 1, 0, 0]])
