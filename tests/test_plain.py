"""minilm.plain is the definition: the fast path computes the same numbers, at weights of order 1 in float64."""
import inspect

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import (
    assert_close,
    assert_same,
    assert_same_gradients,
    normal,
    padded,
    parameter_gradients,
    rngs,
    small_transformer,
)
from minilm import generate, layers, optim, plain
from minilm.gradcheck import gradcheck
from minilm.model import RewardModel
from minilm.objectives import dpo, policy_gradient, reward, sft
from minilm.packing import pack
from minilm.tensor import Tensor

EOS = 0
KINDS = {"Llama": {"layers": 2},
         "interleaved pairs": {"rope_pairing": "interleaved", "head_width": 6, "rope_base": 50.0},
         "grouped queries, tied": {"heads": 6, "kv_heads": 2, "head_width": 4, "tied": True, "norm_eps": 0.1},
         "smeared keys": {"layers": 2, "kv_heads": 1, "key_smear": True}}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_encoders = pytest.mark.parametrize("kind", [*KINDS.values(), {"causal": False, "key_smear": True}],
                                        ids=[*KINDS, "encoder"])


# Drawn by hypothesis.

@st.composite
def dialogues(draw):
    """Prompts, some of them more than once, and different responses: two lists of token lists."""
    prompts = draw(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=2))
    rest = st.lists(st.integers(0, 6), max_size=3)
    drawn = draw(st.lists(st.tuples(st.sampled_from(prompts), rest), min_size=2, max_size=5))
    return [prompt for prompt, _ in drawn], [[i, *tokens] for i, (_, tokens) in enumerate(drawn)]


def rectangle(prompts, responses):
    """The dialogues padded on the right: tokens (B,T), their mask (B,T), and the mask of the responses (B,T-1)."""
    tokens, mask = padded([prompt + response for prompt, response in zip(prompts, responses)], left=0, right=0)
    targets = np.arange(1, tokens.shape[1])
    lengths = np.array([[len(prompt)] for prompt in prompts])
    return tokens, mask, mask[:, 1:] * (targets >= lengths)


def reward_model(rng, **kind):
    model = RewardModel(small_transformer(rng, **kind), rng)
    model.head.data[...] = rng.normal(size=model.head.shape)
    return model


def assert_same_models(model, fast, plainly):
    """Two functions without arguments, both Tensors: values, and the gradients of all the model's parameters."""
    output = fast()
    cotangent = np.random.default_rng(7).normal(size=output.shape)
    expected = plainly()
    assert_close(output, expected)
    assert_same_gradients(parameter_gradients(model, output, cotangent),
                          parameter_gradients(model, expected, cotangent))


# The transformer.

@with_encoders
@given(rng=rngs, T=st.integers(1, 9))
def test_logits_and_all_gradients_are_the_fast_ones(kind, rng, T):
    model = small_transformer(rng, **kind)
    tokens = rng.integers(7, size=(2, T))
    assert_same_models(model, lambda: model(tokens),
                       lambda: plain.transformer(model.parameters(), tokens, model.config))


@with_encoders
@given(rng=rngs, left=st.integers(0, 2), right=st.integers(0, 2))
def test_padding_on_either_side_has_the_fast_logits_and_gradients(kind, rng, left, right):
    model = small_transformer(rng, **kind)
    tokens, mask = padded([[1, 2, 3], [4], [5, 6]], left, right, fill=3)
    real = mask[:, :, None]
    assert_same_models(model, lambda: model(tokens, mask) * real,
                       lambda: plain.transformer(model.parameters(), tokens, model.config, mask) * real)


@with_encoders
@given(rng=rngs)
def test_padding_changes_no_real_token(kind, rng):
    model = small_transformer(rng, **kind)
    sequence = rng.integers(7, size=4).tolist()
    alone = plain.transformer(model.parameters(), np.array([sequence]), model.config).data[0]
    tokens, mask = padded([sequence, [1] * 6], left=2, right=1, fill=5)
    together = plain.transformer(model.parameters(), tokens, model.config, mask).data[0]
    assert_close(together[mask[0] == 1], alone)


@each_kind
@given(rng=rngs, temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_log_probs_and_all_gradients_are_the_fast_ones(kind, rng, temperature):
    model = small_transformer(rng, **kind)
    tokens = rng.integers(7, size=(3, 6))
    assert_same_models(model, lambda: model.log_probs(tokens, temperature),
                       lambda: plain.log_probs(model.parameters(), tokens, model.config, temperature))


@with_encoders
@given(rng=rngs, left=st.integers(0, 2), right=st.integers(0, 2))
def test_rewards_and_all_gradients_are_the_fast_ones(kind, rng, left, right):
    model = reward_model(rng, **kind)
    tokens, mask = padded([[1, 2, 3], [4], [5, 6, 1, 2]], left, right, fill=3)
    parameters, config = model.parameters(), model.transformer.config
    assert_same_models(model, lambda: model.rewards(tokens, mask),
                       lambda: plain.reward(parameters, tokens, config, mask))
    assert_same_models(model, lambda: model.rewards(tokens, np.ones(tokens.shape)),
                       lambda: plain.reward(parameters, tokens, config))


@each_kind
@given(rng=rngs, dialogues=dialogues(), temperature=st.sampled_from([1.0, 0.5]))
def test_packed_log_probs_and_all_gradients_are_those_of_the_padded_batch(kind, rng, dialogues, temperature):
    model = small_transformer(rng, **kind)
    tokens, _, mask = rectangle(*dialogues)
    packed = pack(*dialogues)
    weights = rng.normal(size=packed.mask.shape) * packed.mask
    weights_of_rows = np.zeros(mask.shape)
    weights_of_rows[mask == 1] = weights[packed.mask]
    assert_same_models(
        model, lambda: (model.response_log_probs(packed, temperature) * weights).sum(axis=1),
        lambda: (plain.log_probs(model.parameters(), tokens, model.config, temperature) * weights_of_rows).sum(axis=1))


@each_kind
@given(rng=rngs, dialogues=dialogues())
def test_packed_rewards_and_all_gradients_are_those_of_the_padded_batch(kind, rng, dialogues):
    model = reward_model(rng, **kind)
    tokens, mask, _ = rectangle(*dialogues)
    assert_same_models(model, lambda: model.packed_rewards(pack(*dialogues, last=True)),
                       lambda: plain.reward(model.parameters(), tokens, model.transformer.config, mask))


def test_the_tables_of_angles_are_the_fast_ones():
    positions = np.array([0, 1, 7, 1000])
    for dtype in ("float32", "float64"):
        tables = zip(plain.rope_tables(positions, 6, 50.0, dtype), layers.rope_tables(positions, 6, 50.0, dtype))
        for ours, theirs in tables:
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@given(rng=rngs, T=st.integers(1, 6), half_width=st.integers(1, 4), pairing=st.sampled_from(["half", "interleaved"]))
def test_rotations_are_the_fast_ones(rng, T, half_width, pairing):
    tables = plain.rope_tables(np.arange(T), 2 * half_width, dtype="float64")
    assert_same(lambda x: plain.rope(x, *tables, pairing), lambda x: layers.rope(x, *tables, pairing),
                normal(rng, 2, 3, T, 2 * half_width))


def test_the_plain_transformer_has_the_gradients_of_finite_differences(rng):
    model = small_transformer(rng, layers=2, heads=4, kv_heads=2, head_width=4, key_smear=True)
    tokens, mask = padded([[1, 2, 3], [4]], left=1, right=1)
    gradcheck(lambda *_: plain.transformer(model.parameters(), tokens, model.config, mask)[:, 1:3],
              *model.parameters().values(), directions=8)


def test_float32_parameters_give_float32(rng):
    model = small_transformer(rng, np.float32, key_smear=True)
    tokens = rng.integers(7, size=(2, 5))
    output = plain.log_probs(model.parameters(), tokens, model.config, temperature=0.5)
    output.sum().backward()
    assert output.dtype == np.float32 and {p.grad.dtype for p in model.parameters().values()} == {np.dtype("float32")}


# The losses.

PAIRS = {"sft_loss": sft.sft_loss, "reward_loss": reward.reward_loss, "dpo_loss": dpo.dpo_loss,
         "advantages": policy_gradient.advantages, "policy_gradient_loss": policy_gradient.policy_gradient_loss}


@pytest.mark.parametrize("name", PAIRS)
def test_a_plain_objective_takes_the_same_arguments_as_the_fast_one(name):
    ours, theirs = (inspect.signature(f).parameters.values() for f in (getattr(plain, name), PAIRS[name]))
    assert [(a.name, a.default) for a in ours] == [(a.name, a.default) for a in theirs]


def with_nan_outside(log_probs, mask):
    log_probs.data[mask == 0] = np.nan
    return log_probs


@given(rng=rngs, total=st.sampled_from([None, 40.0]))
def test_sft_loss_is_the_fast_one_with_nan_outside_the_mask(rng, total):
    mask = rng.integers(2, size=(3, 5))
    mask[0, 0] = 1
    log_probs = with_nan_outside(normal(rng, 3, 5), mask)
    assert_same(lambda x: plain.sft_loss(x, mask, total), lambda x: sft.sft_loss(x, mask, total), log_probs)


@given(rng=rngs, margin=st.sampled_from([0.0, 0.7, np.array([0.5, -1.0, 0.0, 2.0])]),
       centering=st.sampled_from([0.0, 0.3]), scale=st.sampled_from([1.0, 1000.0]))
def test_reward_loss_is_the_fast_one(rng, margin, centering, scale):
    chosen, rejected = normal(rng, 4, scale=scale), normal(rng, 4, scale=scale)
    assert_same(lambda *pair: plain.reward_loss(*pair, margin, centering),
                lambda *pair: reward.reward_loss(*pair, margin, centering), chosen, rejected)


@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out", "group"])
@given(rng=rngs)
def test_advantages_are_the_fast_ones(baseline, rng):
    rewards, kl = rng.normal(size=(2, 3, 4))
    assert_close(plain.advantages(rewards, kl, 0.3, baseline), policy_gradient.advantages(rewards, kl, 0.3, baseline))


@given(shape=st.lists(st.integers(1, 4), max_size=3).map(tuple).filter(lambda shape: shape != (3, 4)))
@example(shape=(4,))
@example(shape=(1, 4))
@example(shape=(3, 1))
def test_a_mask_of_plain_has_an_entry_for_each_log_prob(shape):
    log_probs = Tensor(np.zeros((3, 4)))
    for use in (plain.sequence_log_probs, plain.sft_loss,
                lambda log_probs, mask: plain.policy_gradient_loss(log_probs, np.ones(3), mask)):
        with pytest.raises(ValueError, match=r"mask has shape .*; it must be \(3, 4\)"):
            use(log_probs, np.ones(shape))


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)
       .filter(lambda shape: shape not in ((3,), (3, 4))))
@example(shape=(1,))
@example(shape=(3, 1))
def test_advantages_are_one_for_each_response_or_one_for_each_token(shape):
    with pytest.raises(ValueError, match="they must have one shape"):
        plain.policy_gradient_loss(Tensor(np.zeros((3, 4))), np.ones(shape), np.ones((3, 4)))


def test_a_mask_that_selects_no_token_has_no_mean():
    with pytest.raises(ValueError, match="total is 0"):
        plain.sft_loss(Tensor(np.zeros((3, 4))), np.zeros((3, 4)))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
@given(value=st.floats(-1e15, 1e15), K=st.integers(2, 7))
@example(value=1e12 + 0.3, K=3)
def test_equal_rewards_have_no_advantage_however_large(baseline, value, K):
    assert (plain.advantages(np.full((2, K), value), np.zeros((2, K)), 0.1, baseline) == 0).all()


@pytest.mark.parametrize("wrong", [-100, 0.5, 2, np.nan])
def test_masks_of_plain_hold_0_and_1(wrong):
    mask = np.ones((2, 3))
    mask[1, 2] = wrong
    log_probs = Tensor(np.zeros((2, 3)))
    model = small_transformer(np.random.default_rng(0))
    tokens = np.ones((2, 3), int)
    for use in (lambda: plain.sequence_log_probs(log_probs, mask), lambda: plain.sft_loss(log_probs, mask),
                lambda: plain.policy_gradient_loss(log_probs, np.ones(2), mask),
                lambda: plain.transformer(model.parameters(), tokens, model.config, mask),
                lambda: plain.reward(model.parameters(), tokens, model.config, mask)):
        with pytest.raises(ValueError, match="it must hold 0 and 1 alone"):
            use()


def test_log_probs_of_plain_refuse_a_token_that_would_count_from_the_end():
    model = small_transformer(np.random.default_rng(0))
    for wrong in (-1, -100, 7):
        with pytest.raises(IndexError, match=f"indices holds {wrong}; it must hold integers from 0 to 6"):
            plain.log_probs(model.parameters(), np.array([[1, 2, wrong]]), model.config)


def test_arrays_that_belong_together_are_not_broadcast_in_plain():
    a, b = np.zeros(3), np.zeros((3, 1))
    for use in (lambda: plain.dpo_loss(Tensor(a), Tensor(a), a, b), lambda: plain.reward_loss(Tensor(a), Tensor(b)),
                lambda: plain.dpo_loss(Tensor(b), Tensor(b), b, b), lambda: plain.reward_loss(Tensor(b), Tensor(b)),
                lambda: plain.reward_loss(Tensor(a), Tensor(a), margin=b),
                lambda: plain.advantages(np.zeros((2, 3)), np.zeros((2, 1)), 0.1)):
        with pytest.raises(ValueError, match="they must have one shape"):
            use()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
def test_a_baseline_of_other_samples_needs_two(baseline):
    with pytest.raises(ValueError, match="got K = 1"):
        plain.advantages(np.ones((2, 1)), np.ones((2, 1)), 0.1, baseline)


def test_an_unknown_baseline_raises():
    with pytest.raises(ValueError, match="baseline is 'median'"):
        plain.advantages(np.ones((2, 3)), np.ones((2, 3)), 0.1, "median")


@given(rng=rngs, by_token=st.booleans(), token_mean=st.sampled_from([None, "response", "batch", 2.5]))
def test_policy_gradient_loss_is_the_fast_one_with_nan_outside_the_mask(rng, by_token, token_mean):
    mask = rng.integers(2, size=(3, 5))
    log_probs = with_nan_outside(normal(rng, 3, 5), mask)
    advantages = rng.normal(size=(3, 5) if by_token else 3)
    assert_same(lambda x: plain.policy_gradient_loss(x, advantages, mask, token_mean),
                lambda x: policy_gradient.policy_gradient_loss(x, advantages, mask, token_mean), log_probs)


@given(rng=rngs, beta=st.sampled_from([0.1, 2.0]), smoothing=st.sampled_from([0.0, 0.2]),
       scale=st.sampled_from([1.0, 1000.0]))
def test_dpo_loss_is_the_fast_one(rng, beta, smoothing, scale):
    chosen, rejected = normal(rng, 4, scale=scale), normal(rng, 4, scale=scale)
    references = rng.normal(size=(2, 4)) * scale
    assert_same(lambda *pair: plain.dpo_loss(*pair, *references, beta, smoothing),
                lambda *pair: dpo.dpo_loss(*pair, *references, beta, smoothing), chosen, rejected)


# Every parameter's gradient, from tokens to loss, under all four objectives: packed and fast, or padded and plain.

def sft_losses(model, rng, dialogues):
    tokens, _, mask = rectangle(*dialogues)
    packed = pack(*dialogues)
    return (lambda: sft.sft_loss(model.response_log_probs(packed), packed.mask),
            lambda: plain.sft_loss(plain.log_probs(model.parameters(), tokens, model.config), mask))


def policy_gradient_losses(model, rng, dialogues):
    tokens, _, mask = rectangle(*dialogues)
    packed = pack(*dialogues)
    A = rng.normal(size=len(tokens))
    return (lambda: policy_gradient.policy_gradient_loss(model.response_log_probs(packed), A, packed.mask),
            lambda: plain.policy_gradient_loss(plain.log_probs(model.parameters(), tokens, model.config), A, mask))


def dpo_losses(model, rng, dialogues):
    """The even responses are chosen, the odd ones rejected."""
    tokens, _, mask = rectangle(*dialogues)
    packed = pack(*dialogues)
    B = len(tokens) // 2
    references = rng.normal(size=(2, B))

    def halves(log_probs):
        return log_probs[0:2 * B:2], log_probs[1:2 * B:2]

    def fast():
        sums = layers.sequence_log_probs(model.response_log_probs(packed), packed.mask)
        return dpo.dpo_loss(*halves(sums), *references, beta=0.3)

    def plainly():
        sums = plain.sequence_log_probs(plain.log_probs(model.parameters(), tokens, model.config), mask)
        return plain.dpo_loss(*halves(sums), *references, beta=0.3)
    return fast, plainly


@pytest.mark.parametrize("losses", [sft_losses, policy_gradient_losses, dpo_losses])
@each_kind
@given(rng=rngs, dialogues=dialogues())
def test_a_loss_of_the_policy_has_the_fast_value_and_gradients(kind, losses, rng, dialogues):
    model = small_transformer(rng, **kind)
    assert_same_models(model, *losses(model, rng, dialogues))


@each_kind
@given(rng=rngs, dialogues=dialogues())
@example(rng=np.random.default_rng(239579), dialogues=([[0], [0]], [[0], [1, 5]]))
def test_the_loss_of_the_reward_model_has_the_fast_value_and_gradients(kind, rng, dialogues):
    model = reward_model(rng, **kind)
    tokens, mask, _ = rectangle(*dialogues)
    B = len(tokens) // 2

    def halves(rewards):
        return rewards[0:2 * B:2], rewards[1:2 * B:2]
    # The centring term has a gradient also where the difference of the rewards is large.
    assert_same_models(
        model, lambda: reward.reward_loss(*halves(model.packed_rewards(pack(*dialogues, last=True))), centering=0.1),
        lambda: plain.reward_loss(*halves(plain.reward(model.parameters(), tokens, model.transformer.config, mask)),
                                  centering=0.1))


# Sampling.

PROMPTS = [[1], [2, 3, 4], [5, 6], [2, 3, 4]]


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 2.5])
@each_kind
@given(rng=rngs, eos=st.sampled_from([EOS, None, [EOS, 5], (1, 2, 3), {4, 6}]))
def test_tokens_are_those_of_cached_generation(kind, temperature, rng, eos):
    model = small_transformer(rng, **kind)
    uniforms = rng.random((4, 8))
    tokens, mask = plain.generate(model.parameters(), PROMPTS, model.config, 8, uniforms, eos, temperature)
    fast = generate.generate(model, PROMPTS, 8, uniforms, eos, temperature)
    assert np.array_equal(tokens, fast.tokens) and np.array_equal(mask, fast.mask)


def test_a_generator_gives_the_uniform_numbers(rng):
    model = small_transformer(rng)
    tokens, _ = plain.generate(model.parameters(), PROMPTS, model.config, 8, np.random.default_rng(3))
    assert np.array_equal(tokens, generate.generate(model, PROMPTS, 8, np.random.default_rng(3), None).tokens)


@given(rng=rngs, temperature=st.sampled_from([0.3, 1.0, 2.0]))
def test_a_token_is_drawn_where_the_uniform_number_falls(rng, temperature):
    logits = rng.normal(size=(1, 5))
    p = np.exp(logits[0] / temperature)
    ends = np.cumsum(p / p.sum())
    for token, end in enumerate(ends):
        assert plain.sample(logits, np.array([end - 1e-9]), temperature) == [token]


# The optimiser.

@given(rng=rngs, weight_decay=st.sampled_from([0.0, 0.3]))
def test_adamw_is_the_fast_one_step_for_step_also_for_frozen_parameters(rng, weight_decay):
    """One parameter never has a gradient; another has none at the second step, and counts its own steps."""
    shapes = {"norm": (4,), "matrix": (3, 4), "unused": (2, 2), "cube": (2, 2, 3)}
    ours = {name: normal(rng, *shape) for name, shape in shapes.items()}
    theirs = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in ours.items()}
    optimizer = optim.AdamW(theirs, betas=(0.8, 0.97), eps=1e-3, weight_decay=weight_decay)
    state = {}
    for step, rate in enumerate((0.1, 0.02, 0.3)):
        optimizer.zero_grad()
        ours["cube"].grad = None
        for name in ("norm", "matrix", "cube") if step != 1 else ("norm", "matrix"):
            ours[name].grad = rng.normal(size=shapes[name])
            theirs[name].grad = ours[name].grad.copy()
        optimizer.step(rate)
        plain.adamw(ours, state, rate, (0.8, 0.97), 1e-3, weight_decay)
        for name, p in ours.items():
            assert_close(p.data, theirs[name].data, 1e-12, name)


def test_adamw_has_the_fast_defaults():
    ours, theirs = (inspect.signature(f).parameters for f in (plain.adamw, optim.AdamW))
    names = ("learning_rate", "betas", "eps", "weight_decay")
    assert [ours[name].default for name in names] == [theirs[name].default for name in names]


def test_training_steps_are_those_of_the_fast_path(rng):
    model = small_transformer(rng, layers=2)
    copy = model.copy()
    optimizer = optim.AdamW(copy.parameters())
    state = {}
    for _ in range(4):
        tokens = rng.integers(7, size=(3, 5))
        mask = np.ones((3, 4))
        parameters = model.parameters()
        loss = plain.sft_loss(plain.log_probs(parameters, tokens, model.config), mask)
        value = plain.train_step(loss, parameters, state, 0.01)
        optimizer.zero_grad()
        fast_loss = sft.sft_loss(copy.log_probs(tokens), mask)
        fast_loss.backward()
        optimizer.step(0.01)
        assert_close(value, fast_loss)
    for name, p in model.parameters().items():
        assert_close(p.data, copy.parameters()[name].data, name=name)
