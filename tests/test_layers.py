"""minilm.layers: values and gradients of the fused primitives equal the plain definitions (1e-10) and finite
differences (1e-6). Then identities of each layer."""
import inspect
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

import definitions
from helpers import assert_close, assert_same, gradients, normal, peak_memory, rngs
from minilm import Tensor, layers
from minilm.fast import chunked_log_probs, tiled_attention
from minilm.fast.cached_decoding import decode_attention
from minilm.gradcheck import gradcheck
from minilm.tensor import primitive

LENGTHS = [1, 7, 31, 32, 33, 65]        # around the tile of 32 tokens of the kernels


# A case: from hypothesis' draw, an rng and a length, a function of a module (layers, or definitions) and Tensors,
# and the Tensors.

def rms_norm(draw, rng, T):
    width, eps = draw(st.integers(3, 5)), draw(st.sampled_from([1e-6, 0.1]))
    return lambda m, x, weight: m.rms_norm(x, weight, eps=eps), [normal(rng, 2, T, width), normal(rng, width)]


def swiglu(draw, rng, T):
    return lambda m, x: m.swiglu(x), [normal(rng, T, 2 * draw(st.integers(1, 3)))]


def rope(draw, rng, T):
    pairing = draw(st.sampled_from(["half", "interleaved"]))
    width = 2 * draw(st.integers(1, 3))
    positions = draw(st.sampled_from([np.arange(T), rng.integers(100, size=(2, 1, T))]))
    cos, sin = layers.rope_tables(positions, width, dtype="float64")
    return lambda m, x: m.rope(x, cos, sin, pairing=pairing), [normal(rng, 2, 2, T, width)]


def smear(draw, rng, T):
    G, K = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    before = rng.normal(size=(2, G, K))
    return lambda m, k, amount: m.smear(k, amount, before), [normal(rng, 2, G, T, K), normal(rng, G, K)]


def attention(draw, rng, T):
    """B = 2; grouped heads; S = T or more keys than queries; keys padded on both sides, in the middle, or not."""
    groups, share, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    S = T + draw(st.sampled_from([0, 1, 5]))
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        mask = rng.random((2, S)) < 0.8
        mask[0, :draw(st.integers(0, S))] = 0
        mask[1, S - draw(st.integers(0, S)):] = 0
        options["key_mask"] = mask
    keys, values = (normal(rng, 2, groups, S, width) for _ in range(2))
    return lambda m, q, k, v: m.attention(q, k, v, **options), [normal(rng, 2, groups * share, T, width), keys, values]


def token_log_probs(draw, rng, T):
    V, D = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    targets = rng.integers(V, size=(2, T))
    options = {"chunk": draw(st.sampled_from([None, 1, 3, 2 * T]))}

    def function(m, hidden, unembedding):
        return m.token_log_probs(hidden, unembedding, targets, **options if m is layers else {})
    return function, [normal(rng, 2, T, D), normal(rng, V, D)]


def sequence_log_probs(draw, rng, T):
    mask = rng.random((3, T)) < 0.5
    return lambda m, x: m.sequence_log_probs(x, mask), [normal(rng, 3, T)]


CASES = {f.__name__: f for f in (rms_norm, swiglu, rope, smear, attention, token_log_probs, sequence_log_probs)}


def test_every_primitive_of_layers_has_a_case_and_a_formula():
    of_arrays = {"rope_tables"}
    derivations = {"attention_without_tiles", "token_log_probs_without_chunks"}     # tests below
    for module in (layers, definitions):
        public = {name for name, f in inspect.getmembers(module, inspect.isfunction)
                  if f.__module__ in (module.__name__, "minilm.plain", "minilm.rotary") and not name.startswith("_")}
        assert public - of_arrays - derivations == set(CASES)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", CASES)
@given(data=st.data(), rng=rngs)
def test_values_and_gradients_equal_the_formula(name, T, data, rng):
    function, tensors = CASES[name](data.draw, rng, T)
    assert_same(lambda *t: function(layers, *t), lambda *t: function(definitions, *t), *tensors)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data(), rng=rngs, T=st.integers(1, 4))
def test_gradients_equal_finite_differences(name, data, rng, T):
    function, tensors = CASES[name](data.draw, rng, T)
    gradcheck(lambda *t: function(layers, *t), *tensors)


def everything(rng, dtype):
    """(function, tensors) of each layer, small, with an exponent of about 1000 where there is an exp."""
    tokens = rng.integers(5, size=(1, 3))
    cos, sin = layers.rope_tables(np.arange(3), 4, dtype=dtype)
    x, table, amount = (normal(rng, *shape, dtype=dtype) for shape in ((1, 2, 3, 4), (5, 4), (2, 4)))
    return {
        "rms_norm": (layers.rms_norm, [x, normal(rng, 4, dtype=dtype)]),
        "swiglu": (lambda x: layers.swiglu(x * 1000), [x]),
        "rope": (lambda x: layers.rope(x, cos, sin), [x]),
        "smear": (lambda x, amount: layers.smear(x, amount * 1000, x.data[:, :, 0]), [x, amount]),
        "attention": (lambda x: layers.attention(x * 1000, x, x), [x]),
        "token_log_probs": (lambda x, table: layers.token_log_probs(x[:, 0] * 1000, table, tokens), [x, table]),
        "sequence_log_probs": (lambda x: layers.sequence_log_probs(x[0, 0], np.ones((3, 4))), [x]),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_dtype_is_kept_and_large_inputs_stay_finite(name, dtype, rng):
    function, tensors = everything(rng, dtype)[name]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        value, grads = gradients(function, *tensors, cotangent=dtype(1))
    assert all(a.dtype == dtype and np.isfinite(a).all() for a in (value, *grads))


# Attention.

@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_equal_repeated_key_and_value_heads(rng, causal):
    q, k, v = normal(rng, 2, 6, 5, 4), normal(rng, 2, 3, 5, 4), normal(rng, 2, 3, 5, 4)
    shared = np.array([0, 0, 1, 1, 2, 2])
    assert_same(lambda q, k, v: layers.attention(q, k, v, causal=causal),
                lambda q, k, v: layers.attention(q, k[:, shared], v[:, shared], causal=causal), q, k, v)


@pytest.mark.parametrize("T", LENGTHS)
@given(rng=rngs)
def test_causal_attention_gives_later_keys_no_gradient_at_any_length(rng, T):
    """Query t gives keys after t no gradient. flash-attention-minimal and a tutorial of Triton have this bug."""
    q, k, v = normal(rng, 1, 2, T, 4), normal(rng, 1, 1, T, 4), normal(rng, 1, 1, T, 4)
    out = layers.attention(q, k, v)
    assert_close(out.data, definitions.attention(q, k, v).data, 1e-10, "attention")
    t = T // 2
    (out[:, :, t] * rng.normal(size=(1, 2, 4))).sum().backward()
    for gradient in (k.grad, v.grad):
        assert (gradient[:, :, t + 1:] == 0).all() and (t == 0 or gradient[:, :, :t + 1].any())


@given(rng=rngs, T=st.integers(1, 5), S=st.integers(5, 9))
@example(rng=np.random.default_rng(0), T=2, S=5)
def test_with_more_keys_than_queries_attention_equals_the_last_rows(rng, T, S):
    q, k, v = (normal(rng, 1, 2, S, 4) for _ in range(3))
    assert_same(lambda q, k, v: layers.attention(q[:, :, S - T:], k, v),
                lambda q, k, v: layers.attention(q, k, v)[:, :, S - T:], q, k, v)


@pytest.mark.parametrize("kept", [0, 1 << 22], ids=["scores computed again", "scores kept"])
@given(data=st.data(), rng=rngs, T=st.integers(1, 9), queries=st.integers(1, 4))
def test_tiled_attention_equals_the_formula_with_scores_kept_or_computed_again(kept, data, rng, T, queries):
    function, tensors = attention(data.draw, rng, T)
    with mock.patch.multiple(tiled_attention, QUERIES=queries, SCORES_KEPT=kept):
        assert_same(lambda *t: function(layers, *t), lambda *t: function(definitions, *t), *tensors)


@given(rng=rngs, T=st.integers(1, 9), S=st.integers(9, 12), causal=st.booleans(), queries=st.integers(1, 4))
def test_attention_equals_its_derivation_without_tiles(rng, T, S, causal, queries):
    q, k, v = normal(rng, 2, 4, T, 4), normal(rng, 2, 2, S, 4), normal(rng, 2, 2, S, 4)
    with mock.patch.object(tiled_attention, "QUERIES", queries):
        assert_same(lambda *t: layers.attention(*t, causal=causal),
                    lambda *t: layers.attention_without_tiles(*t, causal=causal), q, k, v)


def test_the_derivation_of_attention_has_the_gradients_of_finite_differences(rng):
    q, k, v = normal(rng, 2, 4, 3, 4), normal(rng, 2, 2, 5, 4), normal(rng, 2, 2, 5, 4)
    gradcheck(layers.attention_without_tiles, q, k, v)


def test_scores_above_the_limit_are_not_kept(rng, monkeypatch):
    T, (q, k, v) = 1024, (normal(rng, 1, 1, 1024, 2) for _ in range(3))
    monkeypatch.setattr(tiled_attention, "SCORES_KEPT", T * T - 1)
    assert peak_memory(lambda: layers.attention(q, k, v).sum().backward()) < T * T * 8 / 3


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_attention_uses_the_given_scale(rng, scale):
    q, k, v = (normal(rng, 2, 2, 5, 4) for _ in range(3))
    assert_same(lambda q, k, v: layers.attention(q, k, v, scale=scale),
                lambda q, k, v: definitions.attention(q * (scale * 4 ** 0.5), k, v), q, k, v)


@given(rng=rngs, scale=st.sampled_from([0.3, 1, 2]))
def test_tiled_attention_uses_the_given_scale_and_writes_to_the_given_array(rng, scale):
    q, k, v = (normal(rng, 2, 2, 5, 4) for _ in range(3))
    out = np.full(q.shape, np.nan)

    @primitive
    def in_tiles(q, k, v):                  # out is no argument: a primitive copies the arrays given by name
        return tiled_attention.tiled_attention(q, k, v, causal=True, key_mask=None, scale=scale, out=out)
    assert_same(in_tiles, lambda q, k, v: definitions.attention(q * (2 * scale), k, v), q, k, v)
    assert_close(out, definitions.attention(q * (2 * scale), k, v))


@given(rng=rngs, masked=st.booleans(), large=st.sampled_from([1, 1e3]))
@example(rng=np.random.default_rng(0), masked=True, large=1e3)
def test_decode_attention_equals_the_last_row_of_attention(rng, masked, large):
    q, k, v = normal(rng, 3, 6, 1, 4), normal(rng, 3, 2, 5, 4), normal(rng, 3, 2, 5, 4)
    first = rng.integers(5, size=3) if masked else None
    mask = np.arange(5) >= first[:, None] if masked else None
    cache = [np.concatenate([x.data, np.full((3, 2, 2, 4), np.nan)], axis=2) for x in (k, v)]
    with np.errstate(all="raise", under="ignore"):
        last = decode_attention(q.data[:, :, 0] * large, *cache, 5, first)
    assert_close(last, definitions.attention(q * large, k, v, key_mask=mask).data[:, :, 0])


@given(rng=rngs)
def test_bidirectional_attention_does_not_depend_on_the_order_of_the_keys(rng):
    q, k, v = normal(rng, 2, 2, 3, 4), normal(rng, 2, 2, 6, 4), normal(rng, 2, 2, 6, 4)
    mask, order = rng.random((2, 6)) < 0.7, rng.permutation(6)
    assert_same(lambda q, k, v: layers.attention(q, k, v, causal=False, key_mask=mask),
                lambda q, k, v: layers.attention(q, k[:, :, order], v[:, :, order], causal=False,
                                                 key_mask=mask[:, order]), q, k, v)


@pytest.mark.parametrize("queries", [1, 4])
@given(rng=rngs)
def test_masked_keys_have_no_influence_and_no_gradient(queries, rng):
    q, k, v = normal(rng, 1, 2, queries, 2), normal(rng, 1, 2, 4, 2), normal(rng, 1, 2, 4, 2)
    mask = np.array([[1, 0, 1, 0]])

    def function(q, k, v):
        return layers.attention(q, k, v, key_mask=mask)
    value, (dq, dk, dv) = gradients(function, q, k, v)
    assert not dk[:, :, 1::2].any() and not dv[:, :, 1::2].any()
    k.data[:, :, 1::2], v.data[:, :, 1::2] = 1e6, -1e6            # any finite numbers
    changed, (dq_changed, _, _) = gradients(function, q, k, v)
    assert np.array_equal(value, changed) and np.array_equal(dq, dq_changed)


def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(rng):
    q, k, v = (normal(rng, 1, 1, 3, 2) for _ in range(3))
    with np.errstate(all="raise", under="ignore"):
        value, (dq, _, _) = gradients(lambda *t: layers.attention(*t, key_mask=np.array([[0, 0, 1]])), q, k, v)
        _, hidden = gradients(lambda *t: layers.attention(*t, key_mask=np.zeros((1, 3))), q, k, v)
    assert not value[0, 0, :2].any() and not dq[0, 0, :2].any()
    assert_close(value[0, 0, 2], v.data[0, 0, 2])
    assert not any(d.any() for d in hidden)


def test_scores_of_a_thousand_pick_the_nearest_key(rng):
    k, v = Tensor(np.eye(3)[None, None]), normal(rng, 1, 1, 3, 3)
    assert_close(layers.attention(k * 2e3, k, v, causal=False), v.data)


@pytest.mark.parametrize("q, k, v", [
    ((1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4)),
    ((1, 2, 2, 4), (1, 2, 2, 4), (1, 2, 3, 4)),
    ((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4)),
], ids=["groups", "lengths", "fewer keys than queries"])
def test_shapes_that_do_not_fit_raise(rng, q, k, v):
    with pytest.raises(ValueError, match="G dividing H, and S >= T when causal"):
        layers.attention(normal(rng, *q), normal(rng, *k), normal(rng, *v))


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (2, 4), (3,), (2, 1, 3)], ids=str)
def test_a_key_mask_of_another_shape_raises(rng, shape):
    q, k, v = (normal(rng, 2, 2, 3, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"key_mask has shape .* it must be \(2, 3\); that is \(B,S\)"):
        layers.attention(q, k, v, key_mask=np.ones(shape))


# Rotary positions.

PAIRINGS = ["half", "interleaved"]


def rotated(x, positions, pairing):
    return layers.rope(x, *layers.rope_tables(positions, x.shape[-1], dtype="float64"), pairing=pairing).data


@pytest.mark.parametrize("pairing", PAIRINGS)
@given(rng=rngs, shift=st.integers(0, 5000))
def test_scores_depend_on_distance_alone(pairing, rng, shift):
    q, k = normal(rng, 1, 1, 5, 6), normal(rng, 1, 1, 5, 6)

    def scores(positions):
        return rotated(q, positions, pairing) @ rotated(k, positions, pairing).swapaxes(-1, -2)
    assert_close(scores(np.arange(5) + shift), scores(np.arange(5)))


@pytest.mark.parametrize("pairing", PAIRINGS)
@given(rng=rngs)
def test_a_rotation_keeps_the_norm_and_is_the_identity_at_position_0(pairing, rng):
    x = normal(rng, 1, 2, 4, 6)
    y = rotated(x, np.array([0, 1, 10, 1000]), pairing)
    assert_close(np.linalg.norm(y, axis=-1), np.linalg.norm(x.data, axis=-1))
    assert np.array_equal(y[:, :, 0], x.data[:, :, 0]) and not np.allclose(y[:, :, 1:], x.data[:, :, 1:])


def test_the_two_pairings_are_one_rotation_of_numbers_in_another_order(rng):
    x, positions = normal(rng, 1, 1, 4, 6), np.arange(4)
    interleaved = [0, 3, 1, 4, 2, 5]                # pair i is (i, i + K/2) on the left, (2i, 2i + 1) on the right
    half = rotated(x, positions, "half")
    assert_close(half[..., interleaved], rotated(x[..., interleaved], positions, "interleaved"))
    assert not np.allclose(half, rotated(x, positions, "interleaved"))


def test_the_first_pair_rotates_by_one_radian_per_position():
    cos, sin = layers.rope_tables(np.arange(3), 4, base=100.0, dtype="float64")
    assert_close(cos, np.cos([[0, 0], [1, 0.1], [2, 0.2]]))
    assert_close(sin, np.sin([[0, 0], [1, 0.1], [2, 0.2]]))


def test_float32_tables_equal_float64_tables_at_position_8192():
    position = np.array([8192])
    for narrow, wide in zip(layers.rope_tables(position, 64), layers.rope_tables(position, 64, dtype="float64")):
        assert narrow.dtype == np.float32 and np.abs(narrow - wide).max() < 1e-7


def test_odd_widths_and_unknown_pairings_raise(rng):
    with pytest.raises(ValueError, match="head width 3 must be even"):
        layers.rope_tables(np.arange(2), 3)
    with pytest.raises(ValueError, match="pairing is 'quarter'"):
        rotated(normal(rng, 1, 1, 2, 4), np.arange(2), "quarter")
    with pytest.raises(ValueError, match="length must be even"):
        layers.swiglu(normal(rng, 2, 3))


# Smeared keys.

@given(rng=rngs, cut=st.integers(1, 4))
def test_smearing_in_two_parts_equals_smearing_at_once(rng, cut):
    k, amount, before = normal(rng, 2, 2, 5, 3), normal(rng, 2, 3), rng.normal(size=(2, 2, 3))
    whole = layers.smear(k, amount, before).data
    first = layers.smear(k[:, :, :cut], amount, before).data
    rest = layers.smear(k[:, :, cut:], amount, k.data[:, :, cut - 1]).data
    assert_close(np.concatenate([first, rest], axis=2), whole)


# Log-probs of tokens.

@given(rng=rngs)
def test_a_constant_added_to_all_logits_changes_nothing(rng):
    hidden, unembedding, shift = normal(rng, 4, 3), normal(rng, 5, 3), rng.normal(size=3)
    targets = rng.integers(5, size=4)
    assert_same(lambda h, u: layers.token_log_probs(h, u + shift, targets),
                lambda h, u: layers.token_log_probs(h, u, targets), hidden, unembedding)


@given(rng=rngs)
def test_the_probabilities_of_all_targets_sum_to_one(rng):
    hidden, unembedding = np.repeat(rng.normal(size=(3, 1, 4)), 6, axis=1), rng.normal(size=(6, 4))
    log_probs = layers.token_log_probs(hidden, unembedding, np.tile(np.arange(6), (3, 1)))
    assert_close(np.exp(log_probs.data).sum(axis=1), np.ones(3))


@given(rng=rngs, rows=st.integers(1, 9), chunk=st.integers(1, 10))
def test_token_log_probs_equal_their_derivation_without_chunks(rng, rows, chunk):
    hidden, unembedding, targets = normal(rng, rows, 4), normal(rng, 9, 4), rng.integers(9, size=rows)
    assert_same(lambda h, u: layers.token_log_probs(h, u, targets, chunk=chunk),
                lambda h, u: layers.token_log_probs_without_chunks(h, u, targets), hidden, unembedding)
    gradcheck(lambda h, u: layers.token_log_probs_without_chunks(h, u, targets), hidden, unembedding)


def test_token_log_probs_without_chunks_are_finite_at_logits_of_1000(rng):
    hidden, targets = Tensor([[1000.0], [-1000.0]], requires_grad=True), np.array([0, 0])
    unembedding = Tensor([[1.0], [2.0], [-1.0]], requires_grad=True)
    with np.errstate(over="raise", invalid="raise"):
        value, (dhidden, _) = gradients(lambda h, u: layers.token_log_probs_without_chunks(h, u, targets),
                                        hidden, unembedding, cotangent=np.ones(2))
    assert value.tolist() == [-1000, -2000] and dhidden.tolist() == [[-1], [2]]


@given(rng=rngs, rows=st.integers(1, 20), chunk=st.integers(1, 25))
@example(rng=np.random.default_rng(0), rows=7, chunk=3)
def test_chunks_of_any_size_equal_one_chunk(rng, rows, chunk):
    hidden, unembedding, targets = normal(rng, rows, 4), normal(rng, 9, 4), rng.integers(9, size=rows)
    assert_same(lambda h, u: layers.token_log_probs(h, u, targets, chunk=chunk),
                lambda h, u: layers.token_log_probs(h, u, targets, chunk=rows), hidden, unembedding, tolerance=1e-12)


@given(rng=rngs, rows=st.integers(1, 20), at_a_time=st.integers(1, 5), chunk=st.integers(1, 25))
@example(rng=np.random.default_rng(0), rows=7, at_a_time=2, chunk=25)
def test_each_row_is_normalised_by_its_own_sum(rng, rows, at_a_time, chunk):
    hidden, unembedding, targets = normal(rng, rows, 4), normal(rng, 9, 4), rng.integers(9, size=rows)
    with mock.patch.object(chunked_log_probs, "IN_CACHE", 9 * at_a_time):
        assert_same(lambda h, u: layers.token_log_probs(h, u, targets, chunk=chunk),
                    lambda h, u: definitions.token_log_probs(h, u, targets), hidden, unembedding)


@pytest.mark.parametrize("chunk, held", [(25, 1 << 22), (None, 25 * 1000)], ids=["asked for", "by default"])
def test_the_logits_are_never_all_in_memory_at_once(rng, monkeypatch, chunk, held):
    monkeypatch.setattr(chunked_log_probs, "LOGITS_HELD", held)
    rows, vocabulary = 1000, 1000
    hidden, unembedding = normal(rng, rows, 4), normal(rng, vocabulary, 4)
    targets = rng.integers(vocabulary, size=rows)
    peak = peak_memory(lambda: layers.token_log_probs(hidden, unembedding, targets, chunk=chunk).sum().backward())
    assert peak < rows * vocabulary * 8 / 10


def test_a_chunk_below_1_raises(rng):
    with pytest.raises(ValueError, match="chunk"):
        layers.token_log_probs(normal(rng, 4, 2), normal(rng, 3, 2), np.zeros(4, int), chunk=-1)


@pytest.mark.parametrize("target", [-1, -100, 5])
def test_a_target_outside_the_vocabulary_raises(rng, target):
    with pytest.raises(IndexError, match=rf"targets holds {target}, .*vocabulary of 5"):
        layers.token_log_probs(normal(rng, 2, 3), normal(rng, 5, 3), np.array([2, target]))


def test_the_plain_sequence_log_prob_ignores_nan_outside_the_mask():
    assert definitions.sequence_log_probs(Tensor([[1.0, np.nan]]), np.array([[1.0, 0.0]])).data.tolist() == [1]


def test_the_sequence_log_prob_ignores_nan_outside_the_mask():
    log_probs = Tensor([[np.nan, -1.0, -2.0], [-3.0, np.nan, np.nan]], requires_grad=True)
    mask = np.array([[0, 1, 1], [1, 0, 0]])
    value, (grad,) = gradients(lambda x: layers.sequence_log_probs(x, mask), log_probs, cotangent=np.array([1.0, 10.0]))
    assert value.tolist() == [-3, -3] and grad.tolist() == [[0, 1, 1], [10, 0, 0]]


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_log_probs_with_a_frozen_unembedding_have_the_same_values_and_gradient_of_the_rows(rng, chunk):
    hidden, targets = normal(rng, 5, 3), rng.integers(4, size=5)
    U = rng.normal(size=(4, 3))
    results = []
    for frozen in (False, True):
        unembedding = Tensor(U, requires_grad=not frozen)
        results.append(gradients(lambda h, u=unembedding, frozen=frozen: layers.token_log_probs(
            h, u, targets, chunk=chunk, train_unembedding=not frozen), hidden))
        assert (unembedding.grad is None) == frozen
    (value, (grad,)), (frozen_value, (frozen_grad,)) = results
    assert (value == frozen_value).all() and (grad == frozen_grad).all()
