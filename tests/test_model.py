"""minilm.model: the gradient of every parameter, which tokens see which, padding, weights, and errors."""
import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from common.masked_pretraining import masked_log_probs
from helpers import (
    assert_close,
    assert_same,
    gradients,
    padded,
    parameter_gradients,
    peak_memory,
    rngs,
    small_transformer,
)
from minilm import Tensor, no_grad, ops
from minilm.fast import tiled_attention
from minilm.fast.packed_attention import attend_to_segments, rectangle_segments
from minilm.gradcheck import gradcheck
from minilm.model import Config, RewardModel, Transformer, hidden_states
from minilm.packing import pack
from minilm.padded_attention import attend_to_padded
from minilm.tensor import arrays_only

KINDS = {
    "untied": {},
    "tied": {"tied": True},
    "grouped heads": {"heads": 4, "kv_heads": 2, "head_width": 2},
    "interleaved pairs": {"rope_pairing": "interleaved", "head_width": 4},
    "smeared keys": {"key_smear": True, "kv_heads": 1},
    "bidirectional": {"causal": False},
}


def reward_model(rng, **config):
    """A RewardModel with weights of order 1, its head included."""
    model = RewardModel(small_transformer(rng, **config), rng)
    model.head.data[...] = rng.normal(size=model.head.shape)
    return model


def learned(model, tokens):
    """The log-probs that a causal or bidirectional model is trained on."""
    return model.log_probs(tokens) if model.config.causal else masked_log_probs(model, tokens, tokens % 2 == 0, 6)


# Gradients.

@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_transformer_has_the_gradient_of_finite_differences(kind, rng):
    model, tokens = small_transformer(rng, **KINDS[kind]), rng.integers(7, size=(2, 4))
    gradcheck(lambda *_: learned(model, tokens), *model.parameters().values())


@pytest.mark.parametrize("kind", KINDS)
@given(rng=rngs)
def test_a_deeper_and_wider_model_has_the_right_gradient_in_random_directions(kind, rng):
    model = small_transformer(rng, **{"width": 12, "layers": 3, "ffn_width": 16, "vocab_size": 11, **KINDS[kind]})
    tokens, key_mask = rng.integers(11, size=(3, 9)), rng.random((3, 9)) < 0.8
    gradcheck(lambda *_: ops.logsumexp(model(tokens, key_mask)).mean(), *model.parameters().values(),
              directions=3, rng=rng)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_reward_model_has_the_gradient_of_finite_differences(kind, rng):
    model = reward_model(rng, **KINDS[kind])
    tokens, mask = rng.integers(7, size=(2, 4)), np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
    gradcheck(lambda *_: model.rewards(tokens, mask), *model.parameters().values())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_bits(kind, rng):
    model, tokens = small_transformer(rng, layers=3, **KINDS[kind]), rng.integers(7, size=(2, 4))
    value, expected = gradients(lambda *_: learned(model, tokens), *model.parameters().values())
    model.activation_checkpointing = True
    again, found = gradients(lambda *_: learned(model.over(model.parameters()), tokens), *model.parameters().values())
    assert np.array_equal(again, value)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_arrays_and_of_tensors_are_the_same_bits(kind, rng):
    """Within arrays_only, padded and in segments."""
    model = small_transformer(rng, layers=2, **KINDS[kind])
    on_arrays = model.over({name: p.data for name, p in model.parameters().items()})
    tokens, mask = rng.integers(7, size=(3, 5)), padded([[1] * 5, [1] * 2, [1] * 3], 0, 0)[1]
    for key_mask in (None, mask, mask[:, ::-1]):
        expected = model.hidden(tokens, key_mask)
        with arrays_only():
            hidden = on_arrays.hidden(tokens, key_mask)
        assert type(hidden) is np.ndarray and np.array_equal(hidden, expected.data)


@pytest.mark.parametrize("form", ["padded", "segments"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bidirectional"])
def test_hidden_states_with_checkpointing_give_the_same_bits_and_gradients(kind, form, rng):
    model = small_transformer(rng, layers=3, **KINDS[kind])
    tokens, mask = rng.integers(7, size=(2, 5)), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    attend = (attend_to_padded(model.config, model.parameters(), 5, mask) if form == "padded" else
              attend_to_segments(model.config, model.parameters(), rectangle_segments(2, 5), np.tile(np.arange(5), 2)))
    results = []
    for checkpointing in (False, True):
        hidden = hidden_states(model.parameters(), model.config, tokens, attend, checkpointing)
        value, grads = gradients(lambda *_: hidden, *model.parameters().values())
        results.append([value, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) > 10
    for kept, recomputed in zip(*results, strict=True):
        assert np.array_equal(kept, recomputed)


def test_padded_attention_with_a_mask_of_ones_is_packed_attention(rng):
    for kind in ("grouped heads", "interleaved pairs", "smeared keys"):
        model = small_transformer(rng, layers=2, rope_base=100.0, norm_eps=0.1, **KINDS[kind])
        tokens = rng.integers(7, size=(2, 6))
        assert_same(lambda *_: model.hidden(tokens), lambda *_: model.hidden(tokens, np.ones((2, 6))),
                    *(p for name, p in model.parameters().items() if name != "unembedding"))


def test_memory_is_linear_in_the_number_of_tokens(rng, monkeypatch):
    monkeypatch.setattr(tiled_attention, "SCORES_KEPT", 0)
    model = small_transformer(rng, heads=2, context=4096)

    def peak(T):
        tokens = rng.integers(7, size=(1, T))
        return peak_memory(lambda: model.log_probs(tokens).sum().backward())
    assert peak(4096) < 2.2 * peak(2048), (peak(4096), peak(2048))


def test_with_activation_checkpointing_only_the_input_of_each_block_is_kept(rng):
    model, tokens = small_transformer(rng, layers=16, width=16, ffn_width=64, context=64), rng.integers(7, size=(4, 64))

    def held():
        kept, twin = [], model.over(model.parameters())
        return peak_memory(lambda: kept.append(twin.hidden(tokens)))
    every_result = held()
    model.activation_checkpointing = True
    assert held() < every_result / 8, (held(), every_result)


def test_tied_embeddings_get_the_gradients_of_both_uses(rng):
    tied, untied = small_transformer(rng, tied=True), small_transformer(rng)
    for name, p in untied.parameters().items():
        p.data[...] = tied.parameters()["embedding" if name == "unembedding" else name].data
    tokens = rng.integers(7, size=(2, 4))
    embedding, separate = tied.parameters()["embedding"], untied.parameters()
    value, (both,) = gradients(lambda _: tied(tokens), embedding)
    expected, uses = gradients(lambda *_: untied(tokens), separate["embedding"], separate["unembedding"])
    assert "unembedding" not in tied.parameters() and tied.unembedding is embedding
    assert_close(value, expected)
    assert_close(both, uses[0] + uses[1])


# The architecture.

def plain_logits(model, tokens):
    """Logits (T,V) of one sequence (T,): Llama's formulas in NumPy, one head and one pair at a time."""
    c, p, T = model.config, {name: t.data for name, t in model.parameters().items()}, len(tokens)
    K, half = c.head_width, c.head_width // 2

    def norm(x, weight):
        return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + c.norm_eps) * weight

    def rotated(x):
        out = np.empty_like(x)
        for i in range(half):
            first, second = (i, i + half) if c.rope_pairing == "half" else (2 * i, 2 * i + 1)
            angles = np.arange(T) * c.rope_base ** (-2 * i / K)
            turned = (x[:, first] + 1j * x[:, second]) * np.exp(1j * angles)
            out[:, first], out[:, second] = turned.real, turned.imag
        return out

    x = p["embedding"][tokens]
    for i in range(c.layers):
        q, k, v = np.split(norm(x, p[f"blocks.{i}.attention_norm"]) @ p[f"blocks.{i}.qkv"],
                           [c.heads * K, (c.heads + c.kv_heads) * K], axis=1)
        if c.key_smear:
            a = 1 / (1 + np.exp(-p[f"blocks.{i}.key_smear"].ravel()))
            k = (1 - a) * k + a * np.concatenate([np.zeros_like(k[:1]), k[:-1]])
        heads = []
        for h in range(c.heads):
            own, g = slice(h * K, h * K + K), h // (c.heads // c.kv_heads)
            shared = slice(g * K, g * K + K)
            weights = np.exp(rotated(q[:, own]) @ rotated(k[:, shared]).T / K ** 0.5) * (np.tri(T) if c.causal else 1)
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ p[f"blocks.{i}.attention_out"]
        gate, up = np.split(norm(x, p[f"blocks.{i}.ffn_norm"]) @ p[f"blocks.{i}.gate_up"], 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p[f"blocks.{i}.ffn_out"]
    return norm(x, p["final_norm"]) @ p["embedding" if c.tied else "unembedding"].T


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_equal_the_architecture_in_plain_numpy(kind, rng):
    """Residuals, the order of q, k, v in their matrix, and every number of Config."""
    model = small_transformer(rng, **{"layers": 2, "rope_base": 50.0, "norm_eps": 0.1, **KINDS[kind]})
    tokens = rng.integers(7, size=9)
    for key_mask in (None, np.ones((1, 9))):                            # segments, and padded
        assert_close(model(tokens[None], key_mask).data[0], plain_logits(model, tokens))


# Which tokens see which.

@pytest.mark.parametrize("kind", KINDS)
@given(rng=rngs, t=st.integers(0, 5))
def test_a_causal_model_sees_no_later_token_and_a_bidirectional_one_sees_all(kind, rng, t):
    model, tokens = small_transformer(rng, **{"layers": 2, **KINDS[kind]}), rng.integers(7, size=(1, 6))
    changed = tokens.copy()
    changed[0, t] = (tokens[0, t] + 1) % 7
    differs = (model(tokens).data != model(changed).data).any(axis=-1)[0]
    first = t if model.config.causal else 0
    assert not differs[:first].any() and differs[first:].all()          # bitwise the same before it


@given(rng=rngs, t=st.integers(0, 4))
def test_the_log_prob_of_token_t_plus_1_depends_on_tokens_0_to_t(rng, t):
    """log pi(token t+1) has a gradient for the embeddings of tokens 0..t, and gradient 0 for the others."""
    model, tokens = small_transformer(rng), rng.permutation(7)[None, :6]        # every token once
    embedding, unembedding = (model.parameters()[name] for name in ("embedding", "unembedding"))
    value, (grad, _) = gradients(lambda *_: model.log_probs(tokens)[0, t], embedding, unembedding)
    reached = grad[tokens[0]].any(axis=-1)
    assert reached.tolist() == [i <= t for i in range(6)]
    logits = model(tokens).data[0, t]
    assert_close(value, logits[tokens[0, t + 1]] - np.log(np.exp(logits).sum()))


# Padding.

@pytest.mark.parametrize("kind", KINDS)
@given(rng=rngs, left=st.integers(0, 4), right=st.integers(0, 4), fill=st.integers(0, 6))
@example(rng=np.random.default_rng(0), left=2, right=1, fill=3)
def test_padding_changes_neither_logits_nor_gradients(kind, rng, left, right, fill):
    model, length = small_transformer(rng, **{"layers": 2, **KINDS[kind]}), 5
    sequence = rng.integers(7, size=length)
    tokens, mask = padded([sequence], left, right, fill)
    assert_same(lambda *_: model(tokens, key_mask=mask)[:, left:left + length],
                lambda *_: model(sequence[None]), *model.parameters().values())


@given(rng=rngs, right=st.integers(1, 4))
def test_a_causal_model_needs_no_mask_for_padding_on_the_right(rng, right):
    model, sequence = small_transformer(rng), rng.integers(7, size=5)
    tokens, _ = padded([sequence], 0, right)
    assert_close(model(tokens)[:, :5], model(sequence[None]))


@pytest.mark.parametrize("kind", KINDS)
@given(rng=rngs, left=st.integers(0, 3), right=st.integers(0, 3), fill=st.integers(0, 6))
@example(rng=np.random.default_rng(0), left=2, right=1, fill=3)
def test_padding_on_either_side_does_not_change_the_reward(kind, rng, left, right, fill):
    model = reward_model(rng, **KINDS[kind])
    sequences = [rng.integers(7, size=n) for n in (4, 1, 6)]
    alone = np.array([model.rewards(s[None], np.ones((1, len(s)))).item() for s in sequences])
    assert_close(model.rewards(*padded(sequences, left, right, fill)), alone)


def test_the_reward_is_read_at_the_eos_before_the_padding(rng):
    model, eos, pad = reward_model(rng), 5, 6
    tokens, mask = np.array([[1, 2, eos, pad]]), np.array([[1, 1, 1, 0]])
    embedding = model.parameters()["embedding"]
    value, (grad,) = gradients(lambda _: model.rewards(tokens, mask), embedding)
    scores = (model.transformer.hidden(tokens, key_mask=mask).data @ model.head.data)[0, :, 0]
    assert_close(value[0], scores[2])
    assert abs(scores[3] - scores[2]) > 1e-3
    assert grad.any(axis=1).tolist() == [token in (1, 2, eos) for token in range(7)]


def test_a_row_of_padding_alone_raises(rng):
    with pytest.raises(ValueError, match="row 1 is all padding"):
        reward_model(rng).rewards(np.zeros((2, 3), int), np.array([[1, 0, 0], [0, 0, 0]]))


def test_a_mask_of_another_shape_than_the_tokens_raises(rng):
    with pytest.raises(ValueError, match="mask"):
        reward_model(rng).rewards(np.zeros((2, 3), int), np.ones((1, 3)))


# Temperature.

@given(rng=rngs, temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_log_probs_at_a_temperature_equal_log_softmax_of_the_divided_logits(rng, temperature):
    model, tokens = small_transformer(rng), rng.integers(7, size=(2, 5))

    def plainly(*_):
        return ops.gather(ops.log_softmax(model(tokens[:, :-1]) / temperature), tokens[:, 1:])
    assert_same(lambda *_: model.log_probs(tokens, temperature=temperature), plainly, *model.parameters().values())


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, np.nan])
def test_log_probs_at_a_temperature_that_is_not_above_0_raise(rng, temperature):
    model = small_transformer(rng)
    for log_probs in (lambda: model.log_probs(np.array([[1, 2]]), temperature),
                      lambda: model.response_log_probs(pack([[1]], [[2]]), temperature)):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            log_probs()


def test_log_probs_of_a_bidirectional_model_raise(rng):
    with pytest.raises(ValueError, match="has seen the token that it would predict"):
        small_transformer(rng, causal=False).log_probs(np.array([[1, 2, 3]]))


@pytest.mark.parametrize("config", [{}, {"key_smear": True}, {"causal": False}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_of_no_sequences_has_no_logits_no_rewards_and_a_gradient_of_zeros(rng, config, masked):
    model, tokens = small_transformer(rng, layers=2, **config), np.zeros((0, 3), int)
    mask = np.ones((0, 3)) if masked else None
    logits = model(tokens, mask)
    assert logits.shape == (0, 3, 7)
    assert all(not g.any() for g in parameter_gradients(model, ops.sum(logits)).values())
    assert RewardModel(model, rng).rewards(tokens, np.ones((0, 3))).shape == (0,)


def test_a_sequence_of_one_token_has_no_log_probs(rng):
    assert small_transformer(rng).log_probs(np.zeros((2, 1), int)).shape == (2, 0)


# Weights.

def test_a_copy_has_equal_weights_in_arrays_of_its_own(rng):
    model, tokens = small_transformer(rng), rng.integers(7, size=(1, 4))
    copy, before = model.copy(), model(tokens).data
    assert copy.config == model.config and np.array_equal(copy(tokens).data, before)
    for p in model.parameters().values():
        p.data[...] = 0
    assert np.array_equal(copy(tokens).data, before)
    assert all(p.requires_grad and p.grad is None for p in copy.parameters().values())


def test_a_model_over_other_tensors_uses_them_and_gives_them_the_gradients(rng):
    model, others, tokens = reward_model(rng), reward_model(rng).parameters(), rng.integers(7, size=(2, 4))
    twin = model.over(others)
    expected = gradients(lambda *_: twin.rewards(tokens, np.ones((2, 4))), *others.values())
    for name, p in model.parameters().items():
        p.data[...] = others[name].data
    value, grads = gradients(lambda *_: model.rewards(tokens, np.ones((2, 4))), *model.parameters().values())
    assert twin.parameters() == others and np.array_equal(value, expected[0])
    assert all(np.array_equal(a, b) for a, b in zip(grads, expected[1]))


def test_the_first_predictions_are_near_uniform(rng):
    model = Transformer(Config(vocab_size=50, width=32, layers=2, heads=4), rng)
    with no_grad():
        log_probs = ops.log_softmax(model(rng.integers(50, size=(4, 16)))).data
    assert log_probs.dtype == np.float32 and np.abs(log_probs + np.log(50)).max() < 1


def test_one_seed_gives_the_same_weights_and_another_gives_others():
    def weights(seed):
        model = Transformer(Config(), np.random.default_rng(seed))
        return np.concatenate([p.data.ravel() for p in model.parameters().values()])
    assert np.array_equal(weights(0), weights(0)) and not np.array_equal(weights(0), weights(1))


def test_the_reward_model_trains_its_head_and_not_the_unembedding(rng):
    body = small_transformer(rng)
    assert set(RewardModel(body, rng).parameters()) == set(body.parameters()) - {"unembedding"} | {"reward_head"}


def test_weights_that_write_into_the_residual_stream_start_smaller_in_a_deeper_model(rng):
    """Weights are N(0, 1/fan_in). The 2 L matrices that write into the stream are divided by sqrt(2 L)."""
    for depth in (1, 8):
        model = Transformer(Config(vocab_size=8, width=64, layers=depth, heads=4), rng)
        for name, p in model.parameters().items():
            if name.startswith("blocks.0.") and p.ndim == 2:
                writes = name.endswith(("attention_out", "ffn_out"))
                assert_close(p.data.std(), (p.shape[0] * (2 * depth if writes else 1)) ** -0.5, 0.05, name)


# Errors.

@pytest.mark.parametrize("tokens, error, message", [
    (np.zeros((1, 17), int), ValueError, "17 tokens do not fit the context of 16"),
    (np.array([[0, 7]]), IndexError, "tokens holds 7, which is not in the vocabulary of 7"),
    (np.array([[0, -1]]), IndexError, "tokens holds -1, which is not in the vocabulary of 7"),
    (np.zeros((1, 3)), ValueError, r"integers of shape \(B,T\); got float64 \(1, 3\)"),
    (np.zeros(3, int), ValueError, r"integers of shape \(B,T\); got int64 \(3,\)"),
], ids=["context", "vocabulary", "negative", "float", "no batch"])
def test_tokens_of_another_shape_dtype_length_or_vocabulary_raise(rng, tokens, error, message):
    with pytest.raises(error, match=message):
        small_transformer(rng)(tokens)


@pytest.mark.parametrize("settings, message", [
    ({"layers": 0}, "layers is 0"), ({"vocab_size": -1}, "vocab_size is -1"), ({"context": 0}, "context is 0"),
    ({"heads": 0}, "heads is 0"), ({"kv_heads": 0}, "kv_heads is 0"), ({"width": 0}, "width is 0"),
    ({"width": 10, "heads": 4}, "width 10 is not a multiple of heads 4"),
    ({"heads": 4, "kv_heads": 3}, "kv_heads 3 does not divide heads 4"),
    ({"width": 12, "heads": 4}, "head_width 3 is odd"), ({"rope_pairing": "quarter"}, "rope_pairing is 'quarter'"),
    ({"head_width": 0}, "head_width is 0"), ({"head_width": -2}, "head_width is -2"),
    ({"ffn_width": 0}, "ffn_width is 0"),
], ids=str)
def test_a_config_whose_sizes_do_not_fit_together_raises(settings, message):
    with pytest.raises(ValueError, match=f"Config: {message}"):
        Config(**settings)


def test_a_config_fills_in_omitted_sizes():
    config = Config(width=24, heads=4)
    assert (config.kv_heads, config.head_width, config.ffn_width) == (4, 6, 64)
    assert Config(width=10, heads=4, head_width=4).head_width == 4


@pytest.mark.parametrize("change", [lambda p: p.update(more=p["embedding"]),
                                    lambda p: p.update(unembedding=Tensor(np.ones((9, 4)))),
                                    lambda p: p.update(embedding=Tensor(np.ones((12, 4))))])
def test_parameters_of_another_architecture_are_refused(change, rng):
    """A larger unembedding, for example, would divide the probability among tokens outside the vocabulary."""
    model = small_transformer(rng)
    parameters = model.parameters()
    change(parameters)
    with pytest.raises(ValueError, match="over: the parameter '.*' is unknown here, or of another shape"):
        model.over(parameters)
