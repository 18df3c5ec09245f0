"""Expected losses and training on them: each sum equals a plain loop, each step agrees with differences."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, distributions, log_probs_along, parameter_gradients, rngs, small_transformer
from minilm import Tensor, ops
from minilm.exact.enumerable import EnumerableWorld, objective, objective_gradient
from minilm.exact.expectations import (
    comparisons,
    descend,
    gradient_over_comparisons,
    gradient_over_samples,
    tangent_kernel,
)
from minilm.objectives.dpo import dpo_loss


def small_world():
    """Two prompts of unequal length, seven responses to each."""
    return EnumerableWorld([[1], [0, 2]], vocab_size=3, max_new_tokens=2)


def policy(rng):
    return small_transformer(rng, vocab_size=3)


@given(distributions(1), rngs, st.floats(0, 0.5))
def test_comparisons_are_two_draws_and_a_judgement(drawn_from, rng, flips):
    log_mu, r = drawn_from[0], rng.normal(size=(2, 7))
    expected = np.zeros((2, 7, 7))
    for p, first, second in np.ndindex(2, 7, 7):
        drawn = np.exp(log_mu[p, first] + log_mu[p, second])
        wins = 1 / (1 + np.exp(r[p, second] - r[p, first]))
        expected[p, first, second] += drawn * ((1 - flips) * wins + flips * (1 - wins))
        expected[p, second, first] += drawn * ((1 - flips) * (1 - wins) + flips * wins)
    probabilities = comparisons(log_mu, r, flips)
    assert_close(probabilities, expected)
    assert_close(probabilities.sum(axis=(1, 2)), np.ones(2))


def test_gradient_over_comparisons_is_a_sum_over_single_comparisons():
    rng = np.random.default_rng(4)
    log_pi, reference = rng.normal(size=(2, 2, 3))
    probabilities = comparisons(reference - np.log(np.exp(reference).sum(1, keepdims=True)), log_pi)
    expected = np.zeros((2, 3))
    for p, c, r in np.ndindex(2, 3, 3):
        leaf = Tensor(log_pi[p, [c, r]], requires_grad=True)
        loss = dpo_loss(leaf[:1], leaf[1:], reference[p, [c]], reference[p, [r]], beta=0.3)
        (loss * float(probabilities[p, c, r])).backward()
        np.add.at(expected[p], [c, r], leaf.grad)
    actual = gradient_over_comparisons(lambda *a: dpo_loss(*a, beta=0.3), probabilities, log_pi, reference)
    assert_close(actual, expected)


@pytest.mark.parametrize("K", [1, 2])
def test_gradient_over_samples_visits_every_outcome_by_its_probability(K):
    """The loss is the sum of c(p, k, y_k) log pi; its expected gradient is pi(y) times the sum of c over k."""
    rng = np.random.default_rng(5)
    world = small_world()
    log_probs = world.token_log_probs(policy(rng)).data
    c = rng.normal(size=(2, K, 7))

    def loss(leaf, drawn):
        assert drawn.shape == (2, K)
        return ops.sum(leaf * c[np.arange(2)[:, None], np.arange(K), drawn].reshape(-1, 1))
    actual = gradient_over_samples(loss, log_probs, world.mask, K)
    pi = np.exp((log_probs * world.mask).sum(axis=-1))
    assert_close(actual, np.broadcast_to((pi * c.sum(axis=1))[..., None], log_probs.shape))


def test_gradient_over_samples_from_another_policy_weights_them_by_its_probabilities():
    rng = np.random.default_rng(6)
    world = small_world()
    log_probs = world.token_log_probs(policy(rng)).data
    log_mu = world.log_probs(policy(rng)).data
    c = rng.normal(size=(2, 7))
    actual = gradient_over_samples(lambda leaf, drawn: ops.sum(leaf * world.take(c, drawn)[:, None]), log_probs,
                                   world.mask, samples=1, drawn_from=log_mu)
    assert_close(actual, np.broadcast_to((np.exp(log_mu) * c)[..., None], log_probs.shape))


def test_descend_improves_j_at_every_step_and_is_deterministic():
    world, rewards = small_world(), np.random.default_rng(0).normal(size=(2, 7))
    reference = world.log_probs(policy(np.random.default_rng(1))).data

    def run():
        def gradient(log_pi):
            return -objective_gradient(log_pi, reference, rewards, 0.5)
        return list(descend(policy(np.random.default_rng(1)), world, gradient, 20, learning_rate=0.01))
    first, second = run(), run()
    assert len(first) == 21
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[0], reference)
    J = [objective(log_pi, reference, rewards, 0.5).sum() for log_pi in first]
    assert (np.diff(J) > 0).all()


def test_the_tangent_kernel_predicts_the_change_of_every_log_prob():
    rng = np.random.default_rng(7)
    world, model = small_world(), policy(rng)
    gradient = rng.normal(size=world.shape)
    actual = log_probs_along(model, world, parameter_gradients(model, world.log_probs(model), gradient), step=1e-5)
    assert_close(actual, -(tangent_kernel(model, world) @ gradient.reshape(-1)).reshape(world.shape), 1e-6)


def test_a_step_conserves_probability():
    world, model = small_world(), policy(np.random.default_rng(8))
    pi = np.exp(world.log_probs(model).data)
    kernel = tangent_kernel(model, world).reshape(*world.shape, *world.shape)
    assert_close(kernel, kernel.transpose(2, 3, 0, 1))
    assert np.abs(kernel).max() > 1
    assert_close(np.einsum("py,pyqz->pqz", pi, kernel), np.zeros((2, *world.shape)))


@pytest.mark.parametrize("flip_rate", [-0.1, 1.5, float("nan")])
def test_a_flip_rate_out_of_range_raises(flip_rate):
    with pytest.raises(ValueError, match="flip_rate"):
        comparisons(np.zeros((1, 2)), np.zeros((1, 2)), flip_rate)


def test_more_outcomes_than_the_limit_raise_with_their_number_and_what_to_reduce():
    log_probs, mask = np.zeros((2, 40, 3)), np.ones((2, 40, 3))
    with pytest.raises(ValueError, match="the limit is 6"):
        gradient_over_samples(lambda leaf, drawn: ops.sum(leaf), log_probs[:1, :7], mask[:1, :7], 1, most_outcomes=6)
    with pytest.raises(ValueError, match=r"2 draws for each of 2 prompts with 40 responses have Y\^\(P K\) = 2,560,000 "
                                         r"outcomes; the limit is 100,000.*Take one prompt, fewer samples"):
        gradient_over_samples(lambda leaf, drawn: ops.sum(leaf), log_probs, mask, samples=2)


def test_a_loss_may_use_the_chosen_responses_alone():
    """As SFT on the chosen responses does: no gradient reaches the rejected ones."""
    log_pi, probabilities = np.log(np.full((1, 3), 1 / 3)), np.arange(9.0).reshape(1, 3, 3)
    found = gradient_over_comparisons(lambda chosen, rejected: -ops.mean(chosen), probabilities, log_pi)
    assert_close(found, -probabilities.sum(axis=2))


def test_a_loss_over_samples_gets_copies_and_the_gradient_is_in_floats():
    def loss(log_probs, drawn):
        value = ops.sum(log_probs * (1.0 + drawn.reshape(-1, 1)))
        drawn[...] = 0
        return value
    log_probs, mask = np.log(np.full((1, 2, 1), 0.5)), np.ones((1, 2, 1))
    assert_close(gradient_over_samples(loss, log_probs, mask, 1), np.array([[[0.5], [1.0]]]))
    whole = gradient_over_samples(lambda leaf, drawn: 0.5 * ops.sum(leaf), np.zeros((1, 1, 1), int), mask[:, :1], 1)
    assert whole.tolist() == [[[0.5]]]
