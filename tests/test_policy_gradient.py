"""The KL-regularised policy gradient against its formulas. Its expectations: test_exact_policy_gradient.py."""

import functools

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import assert_close, normal, rngs, small_transformer
from minilm import Tensor, ops
from minilm.generate import generate
from minilm.gradcheck import gradcheck
from minilm.layers import sequence_log_probs
from minilm.objectives.kl import k2
from minilm.objectives.policy_gradient import (
    advantages,
    policy_gradient_loss,
    policy_gradient_metrics,
    ppo_clip_loss,
    reward_to_go,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))
betas = st.floats(0, 2)
levels = pytest.mark.parametrize("level", ["token", "sequence", "geometric_mean"])
MEANS = [None, "response", "batch", 2.5]
means = pytest.mark.parametrize("token_mean", MEANS)


def sample(rng, shape, per_token=False):
    """Log-probs (N,T) as a leaf, advantages and a mask whose rows may be empty, but not all."""
    mask = rng.random(shape) < 0.6
    mask[0, 0] = True
    return normal(rng, *shape), rng.normal(size=shape if per_token else shape[0]), mask


def gradient(loss, log_probs, *arguments, **options):
    """(value, gradient) of one loss at a fresh leaf."""
    leaf = Tensor(np.array(log_probs.data if isinstance(log_probs, Tensor) else log_probs), requires_grad=True)
    value = loss(leaf, *arguments, **options)
    value.backward()
    return value.item(), leaf.grad


# Advantages.

def by_definition(R, baseline):
    """One prompt's K numbers at a time, one response at a time."""
    A = np.empty_like(R)
    for p, k in np.ndindex(R.shape):
        others = [R[p, i] for i in range(R.shape[1]) if i != k]
        A[p, k] = {"none": lambda: R[p, k],
                   "mean": lambda: R[p, k] - np.mean(R[p]),
                   "leave_one_out": lambda: R[p, k] - np.mean(others),
                   "group": lambda: (R[p, k] - np.mean(R[p])) / (np.std(R[p], ddof=1) + 1e-4)}[baseline]()
    return A


@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out", "group"])
@given(rng=rngs, P=st.integers(1, 3), K=st.integers(2, 5), beta=betas)
def test_each_baseline_is_its_definition(baseline, rng, P, K, beta):
    rewards, kl = rng.normal(size=(2, P, K))
    assert_close(advantages(rewards, kl, beta, baseline), by_definition(rewards - beta * kl, baseline))


def test_leave_one_out_is_the_default():
    rewards, kl = np.array([[1.0, 0.0, 5.0]]), np.zeros((1, 3))
    assert advantages(rewards, kl, 0.1).tolist() == [[1 - 2.5, 0 - 3, 5 - 0.5]]


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
@given(value=st.floats(-1e15, 1e15), K=st.integers(2, 7))
@example(value=1e12 + 0.3, K=3)
def test_equal_rewards_have_no_advantage_however_large(baseline, value, K):
    rewards = np.full((2, K), value)
    assert (advantages(rewards, np.zeros((2, K)), 0.1, baseline) == 0).all()
    if baseline != "group":
        assert (reward_to_go(rewards, np.zeros((2, K, 3)), np.ones((2, K, 3)), 0.1, baseline) == 0).all()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
@given(value=st.floats(-1e15, 1e15), beta=st.floats(0, 10), K=st.integers(2, 7))
@example(value=1.1e12 + 0.3, beta=0.3, K=7)
@example(value=0.7, beta=0.3, K=3)
def test_equal_rewards_and_an_equal_kl_have_no_advantage_however_large_the_kl(baseline, value, beta, K):
    assert (advantages(np.full((2, K), 0.1), np.full((2, K), value), beta, baseline) == 0).all()


def test_prompts_with_equal_rewards_are_counted_however_large_the_rewards():
    rewards = np.array([[1e12 + 0.3] * 3, [0.1, 0.2, 0.3]])
    metrics = policy_gradient_metrics(rewards, np.zeros((2, 3)), np.ones((6, 4)))
    assert metrics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_ppo_refuses_an_old_log_prob_that_is_not_finite_within_the_mask(wrong):
    old, mask = np.full((2, 3), -1.0), np.ones((2, 3))
    old[1, 2] = wrong
    with pytest.raises(ValueError, match=r"old_log_probs, token \(1, 2\), is"):
        ppo_clip_loss(Tensor(np.full((2, 3), -1.0)), old, np.ones(2), mask)
    mask[1, 2] = 0
    assert np.isfinite(ppo_clip_loss(Tensor(np.full((2, 3), -1.0)), old, np.ones(2), mask).item())


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_reward_to_go_refuses_a_kl_that_is_not_finite_within_the_mask(wrong):
    kl, mask = np.zeros((2, 2, 3)), np.ones((2, 2, 3))
    kl[1, 0, 2] = wrong
    with pytest.raises(ValueError, match=r"token_kl, token \(1, 0, 2\), is"):
        reward_to_go(np.zeros((2, 2)), kl, mask, 0.1)
    mask[1, 0, 2] = 0
    assert np.isfinite(reward_to_go(np.zeros((2, 2)), kl, mask, 0.1)).all()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
def test_a_baseline_that_compares_needs_two_samples(baseline):
    with pytest.raises(ValueError, match="at least 2 samples"):
        advantages(np.ones((3, 1)), np.zeros((3, 1)), 0.1, baseline)


@pytest.mark.parametrize("rewards, kl, baseline", [
    ((4,), (4,), "none"), ((2, 3), (3, 2), "none"), ((2, 3), (2, 1), "none"), ((2, 3), (2, 3, 4), "none"),
    ((2, 3), (2, 3), "rloo")])
def test_advantages_of_other_shapes_or_baselines_raise(rewards, kl, baseline):
    with pytest.raises(ValueError, match="advantages"):
        advantages(np.ones(rewards), np.zeros(kl), 0.1, baseline)


@given(rngs, st.floats(-1e6, 1e6), st.sampled_from(["mean", "leave_one_out", "group"]))
def test_a_constant_added_to_the_rewards_of_a_prompt_changes_no_advantage(rng, constant, baseline):
    rewards, kl = rng.normal(size=(2, 2, 4))
    before = advantages(rewards, kl, 0.3, baseline)
    rewards[1] += constant
    after = advantages(rewards, kl, 0.3, baseline)
    assert_close(after, before, 1e-6)                       # a constant of 1e6 costs six digits
    np.testing.assert_array_equal(after[0], before[0])


@given(rngs, st.floats(0.01, 2))
def test_kl_penalises_drift(rng, beta):
    """Of two responses with the same reward, the one with the larger KL has the smaller advantage."""
    kl = np.sort(rng.normal(size=(1, 5)))
    for baseline in ("none", "mean", "leave_one_out", "group"):
        A = advantages(np.ones((1, 5)), kl, beta, baseline)
        assert (np.diff(A) < 0).all()
    assert_close(np.diff(advantages(np.ones((1, 5)), kl, beta, "none")), -beta * np.diff(kl))
    token_kl = kl[..., None] * np.ones(3)
    assert (np.diff(reward_to_go(np.ones((1, 5)), token_kl, np.ones((1, 5, 3)), beta), axis=1) < 0).all()


@pytest.mark.parametrize("x", [1e-12, 0.1, 1.0, 1e6])
def test_group_advantages_are_0_for_equal_rewards_and_finite_at_every_scale(x):
    """If all rewards are equal, all advantages are 0. If all but one are equal, they are finite at every scale x."""
    zeros = np.zeros((1, 4))
    assert np.abs(advantages(np.full((1, 4), x), zeros, 0.1, "group")).max() < 1e-5
    A = advantages(np.array([[0, x, x, x]]), zeros, 0.1, "group")
    assert_close(A, np.array([[-3, 1, 1, 1]]) * (x / 4) / (x / 2 + 1e-4))      # their std is x/2, ddof 1
    assert np.abs(A).max() < 1.5


def test_group_normalisation_lets_prompts_with_little_spread_weigh_more():
    """Two prompts whose rewards differ only in scale have the same advantages, up to eps."""
    rewards = np.array([[0.0, 1, 2], [0, 0.01, 0.02]])
    group = advantages(rewards, np.zeros((2, 3)), 0.0, "group")
    assert_close(group[0], group[1], 0.02)
    true = advantages(rewards, np.zeros((2, 3)), 0.0, "leave_one_out")
    assert_close(true[0], 100 * true[1])


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
def test_differences_of_large_float32_rewards_keep_their_digits(baseline):
    """Reward models compute in float32, and the advantages can be small next to the rewards."""
    rewards = np.array([[1e4, 1e4 + 1, 1e4 + 3], [1e8, 1, 2]], np.float32)
    kl = np.array([[0.1, 0.2, 0.3]] * 2, np.float32)
    expected = advantages(rewards.astype(np.float64), kl.astype(np.float64), 0.1, baseline)
    assert_close(advantages(rewards, kl, 0.1, baseline), expected, 1e-14)


# Reward to go.

@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out"])
@given(rng=rngs, beta=betas)
@example(rng=np.random.default_rng(0), beta=0.3)
def test_reward_to_go_is_its_definition(baseline, rng, beta):
    P, K, T = 2, 3, 4
    rewards, token_kl, mask = rng.normal(size=(P, K)), rng.normal(size=(P, K, T)), rng.random((P, K, T)) < 0.7
    whole = np.array([[sum(token_kl[p, k][mask[p, k]]) for k in range(K)] for p in range(P)])
    R = rewards - beta * whole
    b = R - by_definition(R, baseline)
    expected = np.empty((P, K, T))
    for p, k, t in np.ndindex(P, K, T):
        remaining = sum(token_kl[p, k, s] for s in range(t, T) if mask[p, k, s])
        expected[p, k, t] = rewards[p, k] - beta * remaining - b[p, k]
    assert_close(reward_to_go(rewards, np.where(mask, token_kl, np.nan), mask, beta, baseline), expected)
    assert_close(reward_to_go(rewards, token_kl, mask, 0.0, baseline)[..., 0],
                 advantages(rewards, whole, 0.0, baseline))


def test_reward_to_go_keeps_the_digits_of_large_float32_rewards():
    rewards, token_kl = np.array([[1e4, 1e4 + 1]], np.float32), np.full((1, 2, 3), 0.1, np.float32)
    expected = reward_to_go(rewards.astype(np.float64), token_kl.astype(np.float64), np.ones((1, 2, 3)), 0.1)
    assert_close(reward_to_go(rewards, token_kl, np.ones((1, 2, 3)), 0.1), expected, 1e-14)


@pytest.mark.parametrize("kl, mask", [((2, 3), (2, 3)), ((2, 3, 4), (2, 3, 1)), ((6, 4), (6, 4)),
                                      ((2, 1, 4), (2, 1, 4))])
def test_reward_to_go_of_other_shapes_raises(kl, mask):
    with pytest.raises(ValueError, match=r"reward_to_go: .*\(P,K(,T)?\)"):
        reward_to_go(np.ones((2, 3)), np.zeros(kl), np.ones(mask), 0.1)


def test_reward_to_go_with_group_or_with_a_single_sample_raises():
    for baseline, K in (("group", 2), ("leave_one_out", 1), ("rloo", 2)):
        with pytest.raises(ValueError):
            reward_to_go(np.ones((1, K)), np.zeros((1, K, 3)), np.ones((1, K, 3)), 0.1, baseline)


def test_reward_to_go_does_not_depend_on_the_kl_of_padding(rng):
    """Padding may contain any number: the log-probs of padding tokens are finite too."""
    rewards, token_kl, mask = rng.normal(size=(2, 3)), rng.normal(size=(2, 3, 4)), rng.random((2, 3, 4)) < 0.5
    expected = reward_to_go(rewards, np.where(mask, token_kl, 0), mask, 0.5)
    np.testing.assert_array_equal(reward_to_go(rewards, token_kl, mask, 0.5), expected)


# The loss of one batch.

@given(rngs, shapes, st.booleans())
def test_the_loss_and_its_gradient_are_the_closed_form(rng, shape, per_token):
    log_probs, A, mask = sample(rng, shape, per_token)
    value, d = gradient(policy_gradient_loss, log_probs, A, mask)
    expected, N = np.zeros(shape), shape[0]
    for n, t in np.ndindex(shape):
        if mask[n, t]:
            expected[n, t] = -(A[n, t] if per_token else A[n]) / N
    assert_close(value, (expected * log_probs.data).sum())
    assert_close(d, expected)
    gradcheck(lambda x: policy_gradient_loss(x, A, mask), log_probs)


@given(rngs, shapes)
def test_one_advantage_per_response_is_the_same_one_for_each_of_its_tokens(rng, shape):
    log_probs, A, mask = sample(rng, shape)
    every = gradient(policy_gradient_loss, log_probs, np.repeat(A[:, None], shape[1], axis=1), mask)
    once = gradient(policy_gradient_loss, log_probs, A, mask)
    assert every[0] == once[0]
    np.testing.assert_array_equal(every[1], once[1])


@given(rngs, st.integers(1, 6), st.integers(1, 6))
def test_the_weight_of_a_token_does_not_depend_on_the_length_of_its_response(rng, short, long):
    """The gradient of each token is -A / N."""
    T = max(short, long)
    mask = np.arange(T) < np.array([[short], [long]])
    for loss in (lambda x: policy_gradient_loss(x, np.ones(2), mask),
                 lambda x: ppo_clip_loss(x, x.data, np.ones(2), mask)):
        _, d = gradient(loss, normal(rng, 2, T))
        np.testing.assert_array_equal(d, np.where(mask, -1 / 2, 0))


@given(rngs, shapes)
def test_log_probs_are_summed_and_not_averaged(rng, shape):
    """Every token duplicated: twice the loss, the same gradient for each token."""
    log_probs, A, mask = sample(rng, shape)
    value, d = gradient(policy_gradient_loss, log_probs, A, mask)
    twice = gradient(policy_gradient_loss, np.repeat(log_probs.data, 2, axis=1), A, np.repeat(mask, 2, axis=1))
    assert_close(twice[0], 2 * value)
    assert_close(twice[1], np.repeat(d, 2, axis=1))


def ppo(level):
    """PPO from old log-probs of 0: the log-probs themselves are the log-ratios."""
    def loss(log_probs, A, mask, **options):
        return ppo_clip_loss(log_probs, np.zeros(log_probs.shape, log_probs.dtype), A, mask, level=level, **options)
    return loss


LOSSES = {"policy_gradient": policy_gradient_loss, "ppo, token": ppo("token"), "ppo, sequence": ppo("sequence")}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
WITH_LENGTHS = {"ppo, geometric mean": ppo("geometric_mean"), **{
    f"{name}, {mean}": functools.partial(loss, token_mean=mean) for mean in MEANS[1:]
    for name, loss in (("policy_gradient", policy_gradient_loss), ("ppo", ppo("token")))}}


@pytest.mark.parametrize("loss", (LOSSES | WITH_LENGTHS).values(), ids=LOSSES | WITH_LENGTHS)
@given(rng=rngs, shape=shapes)
def test_nan_outside_the_mask_changes_neither_value_nor_gradient(loss, rng, shape):
    log_probs, A, mask = sample(rng, shape)
    value, d = gradient(loss, log_probs, A, mask)
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = gradient(loss, np.where(mask, log_probs.data, poison), A, mask)
        assert poisoned[0] == value
        np.testing.assert_array_equal(poisoned[1], d)
    assert np.isnan(loss(np.where(mask, np.nan, log_probs.data), A, mask).item())    # a NaN inside it is not hidden


@pytest.mark.parametrize("loss", (LOSSES | WITH_LENGTHS).values(), ids=LOSSES | WITH_LENGTHS)
@given(rng=rngs, shape=shapes, left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_changes_neither_value_nor_gradient(loss, rng, shape, left, right):
    """On either side, and of any amount."""
    log_probs, A, mask = sample(rng, shape)
    value, d = gradient(loss, log_probs, A, mask)
    widths = ((0, 0), (left, right))
    padded = gradient(loss, np.pad(log_probs.data, widths, constant_values=-9), A, np.pad(mask, widths))
    assert_close(padded[0], value)
    assert_close(padded[1], np.pad(d, widths))


@pytest.mark.parametrize("loss", [LOSSES["policy_gradient"], LOSSES["ppo, token"]])
@given(rng=rngs, shape=shapes)
@example(rng=np.random.default_rng(0), shape=(3, 5))
def test_advantages_of_padding_may_be_nan(loss, rng, shape):
    log_probs, A, mask = sample(rng, shape, per_token=True)
    value, d = gradient(loss, log_probs, A, mask)
    poisoned = gradient(loss, log_probs, np.where(mask, A, np.nan), mask)
    assert poisoned[0] == value
    np.testing.assert_array_equal(poisoned[1], d)


@each_loss
def test_an_empty_response_has_gradient_0_and_counts_among_the_n_responses(loss):
    """It is one of the N responses by which the sum is divided."""
    mask = np.array([[1, 1], [0, 0]])
    value, d = gradient(loss, np.zeros((2, 2)), np.array([3.0, 5.0]), mask)
    assert np.isfinite(value)
    np.testing.assert_array_equal(d, [[-1.5, -1.5], [0, 0]])


@each_loss
def test_microbatches_weighted_by_their_responses_equal_the_whole_batch(loss):
    """Each piece is weighted by its number of responses."""
    log_probs, A, mask = sample(np.random.default_rng(0), (5, 4))
    value, d = gradient(loss, log_probs, A, mask)
    pieces = [slice(0, 1), slice(1, 5)]
    parts = [gradient(loss, log_probs.data[s], A[s], mask[s]) for s in pieces]
    assert_close(parts[0][0] / 5 + parts[1][0] * 4 / 5, value)
    assert_close(np.concatenate([parts[0][1] / 5, parts[1][1] * 4 / 5]), d)


@each_loss
@pytest.mark.parametrize("mask_dtype", [bool, np.int64, np.float32, np.float64])
def test_float32_log_probs_take_advantages_and_masks_of_any_dtype(loss, mask_dtype):
    log_probs, A, mask = sample(np.random.default_rng(0), (3, 4))
    small = Tensor(log_probs.data.astype(np.float32), requires_grad=True)
    if loss is not policy_gradient_loss:
        small.data *= 0.1                                   # ratios near 1, away from the clip
        log_probs.data *= 0.1
    value = loss(small, A, mask.astype(mask_dtype))
    value.backward()
    assert value.dtype == small.grad.dtype == np.float32
    assert_close(small.grad, gradient(loss, log_probs, A, mask)[1], 1e-5)


@each_loss
@pytest.mark.parametrize("log_probs, A, mask", [
    ((2, 3), (3,), (2, 3)), ((2, 3), (2,), (3, 2)), ((2, 3), (2,), (2,)), ((2, 3), (2, 2), (2, 3)),
    ((2, 3), (2,), (1, 3)), ((0, 3), (0,), (0, 3)), ((3,), (3,), (3,))])
def test_shapes_that_do_not_fit_raise(loss, log_probs, A, mask):
    """No shape is broadcast silently; a batch without responses has no mean."""
    with pytest.raises(ValueError):
        loss(Tensor(np.zeros(log_probs)), np.ones(A), np.ones(mask))


# Means over tokens.

def scales(mask, token_mean):
    """s of each response, by its definition."""
    lengths = [int(row.sum()) for row in mask]
    return [{None: 1.0, "response": 1 / max(n, 1), "batch": len(mask) / sum(lengths), 2.5: 1 / 2.5}[token_mean]
            for n in lengths]


@means
@given(rng=rngs, shape=shapes, per_token=st.booleans())
def test_a_mean_over_tokens_and_its_gradient_are_the_closed_form(token_mean, rng, shape, per_token):
    log_probs, A, mask = sample(rng, shape, per_token)
    value, d = gradient(policy_gradient_loss, log_probs, A, mask, token_mean=token_mean)
    expected, s = np.zeros(shape), scales(mask, token_mean)
    for n, t in np.ndindex(shape):
        if mask[n, t]:
            expected[n, t] = -s[n] * (A[n, t] if per_token else A[n]) / shape[0]
    assert_close(d, expected)
    assert_close(value, (expected * log_probs.data).sum())
    gradcheck(lambda x: policy_gradient_loss(x, A, mask, token_mean), log_probs)


def test_the_names_of_the_means_say_what_is_divided_by():
    """Two responses, of 1 and 3 tokens, with advantages 1 and log-probs -1: the loss is the number of summands over
    the divisor."""
    mask = np.arange(3) < np.array([[1], [3]])
    losses = [policy_gradient_loss(np.full((2, 3), -1.0), np.ones(2), mask, mean).item()
              for mean in (None, "response", "batch", 4)]
    assert_close(losses, [4 / 2, (1 / 1 + 3 / 3) / 2, 4 / 4, 4 / (2 * 4)])


def test_the_mean_over_a_batch_is_a_constant_that_is_the_mean_length(rng):
    """So microbatches take the mean length of the whole batch as their constant."""
    log_probs, A, mask = sample(rng, (5, 4))
    value, d = gradient(policy_gradient_loss, log_probs, A, mask, token_mean="batch")
    parts = [gradient(policy_gradient_loss, log_probs.data[s], A[s], mask[s], token_mean=mask.sum() / 5)
             for s in (slice(0, 1), slice(1, 5))]
    assert_close(parts[0][0] / 5 + parts[1][0] * 4 / 5, value)
    assert_close(np.concatenate([parts[0][1] / 5, parts[1][1] * 4 / 5]), d)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("token_mean", MEANS[1:])
def test_a_batch_of_empty_responses_has_loss_0_under_every_mean(token_mean):
    for loss in (policy_gradient_loss, ppo("token")):
        value, d = gradient(loss, np.zeros((2, 3)), np.ones(2), np.zeros((2, 3)), token_mean=token_mean)
        assert value == 0 and (d == 0).all()


@pytest.mark.parametrize("token_mean", ["sum", "tokens", 0, -1.0, np.nan, [2.0], True])
def test_a_mean_that_is_none_of_these_raises(token_mean):
    for loss in (policy_gradient_loss, ppo("token")):
        with pytest.raises((ValueError, TypeError), match="token_mean is "):
            loss(np.zeros((2, 3)), np.ones(2), np.ones((2, 3)), token_mean=token_mean)


# PPO's clip.

@levels
@given(rng=rngs, shape=shapes)
def test_at_ratio_1_the_gradient_is_that_of_policy_gradient_loss(level, rng, shape):
    log_probs, A, mask = sample(rng, shape)
    value, d = gradient(ppo_clip_loss, log_probs, log_probs.data.copy(), A, mask, level=level)
    same = "response" if level == "geometric_mean" else None
    assert_close(d, gradient(policy_gradient_loss, log_probs, A, mask, token_mean=same)[1])
    assert_close(value, -np.mean(A * mask.sum(axis=1)) if level == "token" else -np.mean(A))


def off_policy(rng, shape, level, epsilon=0.2):
    """A sample whose ratios, per token or per response, are well inside the clip or well outside."""
    log_probs, A, mask = sample(rng, shape)
    steps = rng.choice([-2.5, -0.5, 0.5, 2.5], size=shape) * epsilon
    if level != "token":
        steps, wanted = rng.normal(size=shape), steps[:, 0]
        for n in range(shape[0]):                           # the first token makes the sum right
            if mask[n].any():
                first = mask[n].argmax()
                total = wanted[n] * (mask[n].sum() if level == "geometric_mean" else 1)
                steps[n, first] += total - steps[n][mask[n]].sum()
    return log_probs, log_probs.data - steps, A, mask


LEVELS_AND_MEANS = [*(("token", mean) for mean in MEANS), ("sequence", None), ("geometric_mean", None)]


@pytest.mark.parametrize("level, token_mean", LEVELS_AND_MEANS)
@pytest.mark.parametrize("high", [None, 0.9])
@given(rng=rngs, shape=shapes)
def test_ppo_and_its_gradient_are_the_closed_form(high, level, token_mean, rng, shape):
    """A ratio of e^0.5 is outside the clip at 1.2, and inside the one at 1.9."""
    log_probs, old, A, mask = off_policy(rng, shape, level)
    value, d = gradient(ppo_clip_loss, log_probs, np.where(mask, old, np.nan), A, mask, epsilon=0.2, level=level,
                        epsilon_high=high, token_mean=token_mean)
    N, total, expected = shape[0], 0.0, np.zeros(shape)
    highest, s = 1 + (high or 0.2), scales(mask, token_mean)
    for n in range(N):
        selected = [t for t in range(shape[1]) if mask[n, t]]
        groups = [[t] for t in selected] if level == "token" else [selected]
        for group in groups:                                # the tokens that share a ratio
            log_ratios = [log_probs.data[n, t] - old[n, t] for t in group]
            divisor = len(group) if level == "geometric_mean" and group else 1
            rho = np.exp(sum(log_ratios) / divisor)
            total += s[n] * min(rho * A[n], min(max(rho, 0.8), highest) * A[n])
            stopped = rho > highest if A[n] > 0 else rho < 0.8
            for t in group:
                expected[n, t] = 0.0 if stopped else -s[n] * rho * A[n] / divisor / N
    assert_close(value, -total / N)
    assert_close(d, expected)


@pytest.mark.parametrize("level, per_token, token_mean", [("token", True, None), ("token", True, "response"),
                                                          *((level, False, mean) for level, mean in LEVELS_AND_MEANS)])
@given(rng=rngs, shape=shapes)
def test_ppo_agrees_with_finite_differences(level, per_token, token_mean, rng, shape):
    log_probs, old, A, mask = off_policy(rng, shape, level)
    A = rng.normal(size=shape) if per_token else A
    gradcheck(lambda x: ppo_clip_loss(x, old, A, mask, level=level, epsilon_high=0.9, token_mean=token_mean), log_probs)


@levels
@pytest.mark.parametrize("A, ratio, moves", [(1, 1.5, False), (1, 0.5, True), (-1, 1.5, True), (-1, 0.5, False),
                                             (1, 1.1, True), (-1, 0.9, True), (1, 1.0, True), (-1, 1.0, True)])
def test_the_gradient_is_zero_exactly_where_the_clip_holds(level, A, ratio, moves):
    """It is 0 where A > 0 and the ratio is above 1 + epsilon, and where A < 0 and it is below 1 - epsilon."""
    log_probs = np.array([[np.log(ratio), -7.0]])
    value, d = gradient(ppo_clip_loss, log_probs, np.zeros((1, 2)), np.array([float(A)]), np.array([[1, 0]]),
                        level=level)
    assert_close(d, [[-A * ratio if moves else 0.0, 0.0]])
    assert_close(value, -A * (ratio if moves else np.clip(ratio, 0.8, 1.2)))


@levels
@given(rng=rngs)
def test_ppo_with_a_k2_penalty_agrees_with_finite_differences_from_the_logits(level, rng):
    """From logits to the scalar: the clipped loss plus beta times the penalty k2 of whole responses. With level
    "sequence" the value has the ratio of a response once, and not once for each token."""
    N, T, V, beta = 3, 3, 4, 0.3
    targets, mask = rng.integers(0, V, (N, T)), rng.random((N, T)) < 0.7
    mask[:, 0] = True
    logits, A = normal(rng, N, T, V), rng.normal(size=N)
    old = ops.gather(ops.log_softmax(logits.data), targets).data + 0.03 * rng.normal(size=(N, T))
    reference = rng.normal(size=N) - 3

    def objective(z):
        log_probs = ops.gather(ops.log_softmax(z), targets)
        penalty = ops.mean(k2(sequence_log_probs(log_probs, mask), reference))
        return ppo_clip_loss(log_probs, old, A, mask, epsilon=0.5, level=level) + penalty * beta

    gradcheck(objective, logits)
    log_probs = ops.log_softmax(logits.data).data[np.arange(N)[:, None], np.arange(T), targets]
    log_ratios = np.where(mask, log_probs - old, 0.0)
    ratios = {"token": (np.exp(log_ratios) * mask).sum(axis=1), "sequence": np.exp(log_ratios.sum(axis=1)),
              "geometric_mean": np.exp(log_ratios.sum(axis=1) / mask.sum(axis=1))}[level]
    drift = np.where(mask, log_probs, 0.0).sum(axis=1) - reference
    assert_close(objective(logits), -np.mean(ratios * A) + beta * np.mean(drift ** 2 / 2))


@pytest.mark.parametrize("level", ["sequence", "geometric_mean"])
def test_a_ratio_of_responses_with_advantages_per_token_or_a_mean_over_tokens_raises(level):
    with pytest.raises(ValueError, match="one advantage"):
        ppo_clip_loss(np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3)), level=level)
    with pytest.raises(ValueError, match="token_mean is 'response', but level"):
        ppo_clip_loss(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2), np.ones((2, 3)), level=level,
                      token_mean="response")


def test_a_level_that_is_none_of_these_raises():
    with pytest.raises(ValueError, match="level"):
        ppo_clip_loss(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2), np.ones((2, 3)), level="prompt")


@levels
@pytest.mark.parametrize("A, log_ratio, value", [(1.0, 1000.0, -1.2), (1.0, -1000.0, 0.0), (-1.0, -1000.0, 0.8),
                                                 (0.0, 1000.0, 0.0), (0.0, -1000.0, 0.0)])
@pytest.mark.filterwarnings("ignore:overflow")
def test_ppo_is_finite_at_a_log_ratio_of_1000_wherever_its_exact_value_is(level, A, log_ratio, value):
    """All cases but (A < 0, +1000), whose exact value is e^1000. A group of equal rewards has advantages of 0."""
    actual, d = gradient(ppo_clip_loss, np.array([[log_ratio]]), np.zeros((1, 1)), np.array([A]), np.ones((1, 1)),
                         level=level)
    assert actual == value and d == 0, f"{actual} (expected {value}), gradient {d}"


@pytest.mark.parametrize("epsilon", [0.2, np.float64(0.2)], ids=["float", "float64"])
def test_float32_log_probs_take_an_epsilon_in_numpy_float64(epsilon):
    small = Tensor(np.zeros((1, 2), np.float32), requires_grad=True)
    assert ppo_clip_loss(small, np.zeros((1, 2), np.float32), np.ones(1), np.ones((1, 2)), epsilon=epsilon).item() == -2


# On policy.

@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_samples_scored_at_their_own_temperature_have_ratio_1(temperature):
    """Scored at the temperature at which it was drawn, a sample has ratio 1, and both PPO losses have the gradient of
    policy_gradient_loss. Scored at T = 1 it has another ratio."""
    rng = np.random.default_rng(0)
    model = small_transformer(rng)
    prompts = rng.integers(1, 7, (6, 2))
    drawn = generate(model, prompts.tolist(), 5, rng, eos=0, temperature=temperature)
    assert 0 < drawn.mask.mean() < 1                        # some end early
    tokens = np.concatenate([prompts, drawn.tokens], axis=1)

    def scored(T):
        return model.log_probs(tokens, temperature=T)[:, 1:]

    assert_close(np.where(drawn.mask, scored(temperature).data, 0), drawn.log_probs)
    if temperature != 1:
        assert np.abs(np.where(drawn.mask, scored(1.0).data, 0) - drawn.log_probs).max() > 0.1
    A = rng.normal(size=6)
    _, expected = gradient(policy_gradient_loss, scored(temperature), A, drawn.mask)
    for level in ("token", "sequence"):
        _, d = gradient(ppo_clip_loss, scored(temperature), drawn.log_probs, A, drawn.mask, level=level)
        assert_close(d, expected)


# Metrics.

@given(rngs, st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.integers(0, 3))
def test_metrics_do_not_depend_on_padding(rng, P, K, T, amount):
    """Each metric equals its definition, also with padding of NaN appended."""
    rewards, kl = rng.normal(size=(2, P, K))
    rewards[0] = 0.3                                        # a prompt whose samples all got the same
    mask, entropies = rng.random((P * K, T)) < 0.7, rng.random((P * K, T))
    mask[0, 0] = True
    widths = ((0, 0), (0, amount))
    metrics = policy_gradient_metrics(rewards, kl, np.pad(mask, widths),
                                      np.pad(np.where(mask, entropies, np.nan), widths, constant_values=np.nan))
    expected = {"reward": rewards.mean(), "reward_std": np.sqrt(((rewards - rewards.mean()) ** 2).sum() / (P * K - 1)),
                "frac_reward_zero_std": 1 / P, "kl_sequence": kl.mean(), "kl_token": kl.sum() / mask.sum(),
                "completions/mean_length": mask.sum() / (P * K), "entropy": np.mean(entropies[mask])}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert type(metrics[name]) is float
        assert_close(metrics[name], value, name=name)
    assert "entropy" not in policy_gradient_metrics(rewards, kl, mask)


def test_metrics_of_a_single_response_and_of_empty_ones_are_finite():
    metrics = policy_gradient_metrics(np.ones((1, 1)), np.zeros((1, 1)), np.zeros((1, 3)), np.zeros((1, 3)))
    assert all(np.isfinite(list(metrics.values()))), f"{metrics}"


def test_equal_rewards_have_no_spread_whatever_rounding_says():
    rewards = np.full((1, 3), 0.1)
    assert rewards.std() > 0
    assert policy_gradient_metrics(rewards, 0 * rewards, np.ones((3, 1)))["frac_reward_zero_std"] == 1
