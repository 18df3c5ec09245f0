"""The Bradley-Terry loss against its formula. What it recovers from comparisons: test_exact_rewards.py."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, normal, rngs
from minilm import Tensor
from minilm.gradcheck import gradcheck
from minilm.objectives.reward import reward_loss, reward_metrics

sizes = st.integers(1, 8)
margins = st.floats(-2, 2)
centerings = st.floats(0, 1)


def leaves(*arrays):
    return [Tensor(np.array(a), requires_grad=True) for a in arrays]


def pairs(rng, B):
    """Chosen and rejected rewards of O(1), as leaves."""
    return normal(rng, B), normal(rng, B)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# Value and gradient.

@given(rngs, sizes, margins, centerings)
def test_the_loss_and_its_gradient_are_the_closed_form(rng, B, margin, centering):
    chosen, rejected = pairs(rng, B)
    loss = reward_loss(chosen, rejected, margin=margin, centering=centering)
    loss.backward()
    c, r = chosen.data, rejected.data
    right = sigmoid(c - r - margin)                 # the probability that the model gives to the observed order
    assert_close(loss, np.mean(-np.log(right)) + centering * np.mean((c + r) ** 2))
    assert_close(chosen.grad, (right - 1 + 2 * centering * (c + r)) / B)
    assert_close(rejected.grad, (1 - right + 2 * centering * (c + r)) / B)


@given(rngs, sizes, margins, centerings)
def test_the_gradient_agrees_with_finite_differences(rng, B, margin, centering):
    gradcheck(lambda c, r: reward_loss(c, r, margin=margin, centering=centering), *pairs(rng, B))


@given(rngs, sizes)
def test_a_margin_may_be_one_number_per_pair(rng, B):
    chosen, rejected = pairs(rng, B)
    margin = rng.normal(size=B)
    expected = np.mean([-np.log(sigmoid(c - r - m)) for c, r, m in zip(chosen.data, rejected.data, margin)])
    assert_close(reward_loss(chosen, rejected, margin=margin).data, expected)
    gradcheck(lambda c, r: reward_loss(c, r, margin=margin, centering=0.3), chosen, rejected)
    # The same as lowering the chosen reward by the margin.
    assert_close(reward_loss(chosen.data - margin, rejected.data).data, expected)


# Invariances.

@given(rngs, sizes, st.floats(-5, 5), margins)
def test_a_constant_added_to_both_rewards_does_not_change_the_loss(rng, B, shift, margin):
    chosen, rejected = pairs(rng, B)
    shifts = shift * rng.normal(size=B)      # a constant per prompt
    loss = reward_loss(chosen, rejected, margin=margin)
    assert_close(reward_loss(chosen.data + shifts, rejected.data + shifts, margin=margin).data, loss.data)
    loss.backward()
    np.testing.assert_array_equal(chosen.grad, -rejected.grad)


@given(rngs, sizes)
def test_swapping_chosen_and_rejected_turns_z_into_minus_z(rng, B):
    """softplus(-z) - softplus(z) = -z: the two losses differ by the mean difference of rewards."""
    chosen, rejected = pairs(rng, B)
    loss, swapped = reward_loss(chosen, rejected), reward_loss(rejected, chosen)
    assert_close(loss.data - swapped.data, -np.mean(chosen.data - rejected.data))
    (loss - swapped).backward()
    assert_close(chosen.grad, np.full(B, -1 / B))
    assert_close(rejected.grad, np.full(B, 1 / B))


@given(rngs, st.integers(2, 8), margins, centerings)
def test_the_loss_is_a_mean_over_pairs(rng, B, margin, centering):
    chosen, rejected = (t.data for t in pairs(rng, B))
    options = dict(margin=margin, centering=centering)
    each = [reward_loss(chosen[i:i + 1], rejected[i:i + 1], **options).item() for i in range(B)]
    assert_close(reward_loss(chosen, rejected, **options).data, np.mean(each))


@given(rngs, sizes)
def test_centring_selects_the_constant_that_makes_the_rewards_small(rng, B):
    """Among all shifts of both rewards, the loss has its minimum where their sum is 0."""
    chosen, rejected = (t.data for t in pairs(rng, B))
    centre = (chosen + rejected) / 2
    c, r = leaves(chosen - centre, rejected - centre)
    loss = reward_loss(c, r, centering=0.1)
    assert_close(loss, reward_loss(chosen, rejected).data)
    loss.backward()
    assert_close(c.grad + r.grad, np.zeros(B))
    assert reward_loss(c.data + 1, r.data + 1, centering=0.1).item() > loss.item() + 0.3


@given(rngs, sizes)
def test_centring_has_gradient_0_on_the_difference_of_a_pair(rng, B):
    """The centring term alone: its gradient is the same for both rewards, so only their sum changes."""
    chosen, rejected = pairs(rng, B)
    (reward_loss(chosen, rejected, centering=0.3) - reward_loss(chosen, rejected)).backward()
    assert_close(chosen.grad - rejected.grad, np.zeros(B))
    assert_close(chosen.grad + rejected.grad, 2 * 0.3 * 2 * (chosen.data + rejected.data) / B)


def test_a_split_of_a_batch_equals_the_whole():
    """Gradient accumulation: each piece is weighted by its number of pairs."""
    chosen, rejected = pairs(np.random.default_rng(5), 5)
    reward_loss(chosen, rejected, centering=0.2).backward()
    expected, chosen.grad, rejected.grad = chosen.grad, None, None
    for piece in (slice(0, 1), slice(1, 5)):
        part = reward_loss(chosen[piece], rejected[piece], centering=0.2)
        (part * ((piece.stop - piece.start) / 5)).backward()
    assert_close(chosen.grad, expected)


# Stability, dtypes, errors.

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("z, value, slope", [(1000.0, 0.0, 0.0), (-1000.0, 1000.0, -1.0), (0.0, np.log(2), -0.5)])
def test_loss_and_gradient_are_finite_at_differences_of_1000(dtype, z, value, slope):
    """-log sigmoid(z) at z = 1000 and -1000 is 0 and 1000, with slopes 0 and -1, and nothing overflows."""
    chosen, rejected = leaves(np.array([z / 2], dtype), np.array([-z / 2], dtype))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        loss = reward_loss(chosen, rejected)
        loss.backward()
    assert loss.dtype == chosen.grad.dtype == dtype
    assert_close(loss, value, 1e-7)
    assert_close(chosen.grad, [slope], 1e-7)
    assert_close(rejected.grad, [-slope], 1e-7)


def test_the_far_tail_keeps_its_digits():
    """sigmoid(-30) = 9.4e-14: computed as 1 - sigmoid(30) it would keep three digits."""
    chosen, rejected = leaves([30.0], [0.0])
    loss = reward_loss(chosen, rejected)
    loss.backward()
    tail = np.exp(-30.0) / (1 + np.exp(-30.0))
    np.testing.assert_allclose(chosen.grad, [-tail], rtol=1e-14)
    np.testing.assert_allclose(loss.data, np.log1p(np.exp(-30.0)), rtol=1e-14)


@pytest.mark.parametrize("options", [dict(margin=np.float64(0.5)), dict(centering=np.float64(0.5)),
                                     dict(margin=np.array([0.5, 1.0]))], ids=["margin", "centering", "margins"])
def test_float32_rewards_take_settings_in_numpy_float64(options):
    """A setting that comes from a NumPy array (a schedule, the margins of a data set) keeps the loss in float32."""
    chosen, rejected = leaves(np.array([1, 2], np.float32), np.array([0, 3], np.float32))
    loss = reward_loss(chosen, rejected, **options)
    assert loss.dtype == np.float32
    assert_close(loss, reward_loss(chosen.data.astype(float), rejected.data.astype(float), **options).data, 1e-6)


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((2,), (3,)), ((2,), (1,))])
def test_rewards_of_different_shapes_raise(shapes):
    with pytest.raises(ValueError, match="reward_loss"):
        reward_loss(*(np.zeros(s) for s in shapes))


@pytest.mark.parametrize("shape", [(2, 1), (1,), (3,), (1, 2)])
def test_a_margin_of_another_shape_raises(shape):
    with pytest.raises(ValueError, match="margin of shape"):
        reward_loss(np.zeros(2), np.zeros(2), margin=np.zeros(shape))


# Metrics.

@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=8))
def test_metrics_against_their_definitions(pairs):
    chosen, rejected = np.array(pairs, float).T
    metrics = reward_metrics(chosen, rejected)
    everything = [float(r) for pair in pairs for r in pair]
    expected = {"accuracy": np.mean([c > r for c, r in pairs]), "ties": np.mean([c == r for c, r in pairs]),
                "margin": np.mean([c - r for c, r in pairs]), "min_reward": min(everything),
                "mean_reward": np.mean(everything), "max_reward": max(everything)}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert type(metrics[name]) is float
        assert_close(metrics[name], value)


def test_strict_accuracy_is_zero_when_all_rewards_are_equal_and_ties_say_so():
    metrics = reward_metrics(np.zeros(3), np.zeros(3))
    assert metrics["accuracy"] == 0 and metrics["ties"] == 1
