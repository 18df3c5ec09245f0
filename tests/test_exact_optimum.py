"""Exact, by enumeration: the policy at which training on each objective ends.

A Transformer is trained on exact gradients, with 40 responses to each of two prompts. RLHF and DPO end at the same
policy, pi* = pi_ref exp(r/beta) / Z. IPO, and DPO on labels that say only who won, end at other policies.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm.exact.enumerable import (
    EnumerableWorld,
    divergence,
    ipo_optimum,
    objective,
    objective_gradient,
    optimum,
    preference,
    total_variation,
)
from minilm.exact.expectations import comparisons, descend, gradient_over_comparisons
from minilm.model import Config, Transformer
from minilm.objectives.dpo import dpo_loss, ipo_loss, robust_dpo_loss

BETA = 1.0
# Prompts begin with 0, and a response that begins with 0 ends there: attention over equal tokens does not depend on
# their number, so the contexts [1] and [1, 1] would be the same to the model.
WORLD = EnumerableWorld([[0, 1], [0, 2, 3]], vocab_size=4, max_new_tokens=3)
REWARDS = np.random.default_rng(0).normal(size=WORLD.shape)


def start():
    """The reference, from which every run starts."""
    rng = np.random.default_rng(1)
    model = Transformer(Config(vocab_size=4, width=24, layers=2, heads=2, context=8), rng, np.float64)
    model.unembedding.data[...] = rng.normal(size=model.unembedding.shape) * 0.12
    return model


REFERENCE = WORLD.log_probs(start()).data
OPTIMUM, LOG_Z = optimum(REFERENCE, REWARDS, BETA)
FLIP_RATE = 0.2         # the fraction of labels that are wrong, in the tests of flipped labels


def trained(gradient, steps=300):
    """log_pi (P,Y) after training on an exact gradient."""
    *_, log_pi = descend(start(), WORLD, gradient, steps, learning_rate=0.007)
    return log_pi


def expected(loss, probabilities):
    """A function of log_pi: the expected gradient of loss(chosen, rejected, reference_chosen, reference_rejected)."""
    return lambda log_pi: gradient_over_comparisons(loss, probabilities, log_pi, REFERENCE)


def expected_loss(loss, probabilities, log_pi, reference):
    """The expected value of the loss, one comparison at a time."""
    total = 0.0
    for p, c, r in np.argwhere(probabilities):
        one = [a[p:p + 1, y] for a in (log_pi, reference) for y in (c, r)]
        total += probabilities[p, c, r] * loss(*one).item()
    return total


dpo = functools.partial(dpo_loss, beta=BETA)


# The optimum itself.

@given(rngs, st.floats(0.1, 3))
def test_the_best_value_of_j_is_beta_log_z(rng, beta):
    """J(pi) = beta log Z - beta KL(pi || pi*) for every policy, so only pi* reaches J* = beta log Z."""
    log_pi, reference = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in rng.normal(size=(2, 3, 9)))
    rewards = rng.normal(size=log_pi.shape)
    best, log_Z = optimum(reference, rewards, beta)
    assert_close(np.exp(best).sum(axis=1), np.ones(3))
    assert_close(np.exp(best), np.exp(reference + rewards / beta) / np.exp(log_Z)[:, None])
    assert_close(objective(best, reference, rewards, beta), beta * log_Z)
    assert_close(objective(log_pi, reference, rewards, beta), beta * log_Z - beta * divergence(log_pi, best))


def test_the_implied_reward_of_the_optimum_is_the_reward_up_to_a_constant_per_prompt():
    """r = beta log(pi*/pi_ref) + beta log Z: the identity behind DPO."""
    assert_close(BETA * (OPTIMUM - REFERENCE) + BETA * LOG_Z[:, None], REWARDS)


# RLHF and DPO.

def test_gradient_ascent_on_j_reaches_the_optimum():
    log_pi = trained(lambda log_pi: -objective_gradient(log_pi, REFERENCE, REWARDS, BETA))
    assert total_variation(REFERENCE, OPTIMUM).min() > 0.15
    assert total_variation(log_pi, OPTIMUM).max() < 1e-3
    assert_close(objective(log_pi, REFERENCE, REWARDS, BETA), BETA * LOG_Z, 1e-5)


def test_descent_on_the_expected_dpo_loss_reaches_the_optimum():
    """It uses only how often each response of the reference is preferred to another: no reward, no samples."""
    assert total_variation(trained(expected(dpo, comparisons(REFERENCE, REWARDS))), OPTIMUM).max() < 1e-3


def test_dpos_gradient_vanishes_at_the_optimum_for_any_frequencies_of_the_pairs():
    """At pi* the gradients of the two orders of a pair cancel, for each pair alone."""
    weights = np.random.default_rng(2).random((*WORLD.shape, WORLD.shape[1]))
    probabilities = (weights + weights.transpose(0, 2, 1)) * preference(REWARDS)
    assert np.abs(expected(dpo, probabilities)(OPTIMUM)).max() < 1e-12


def test_the_gradient_of_j_at_a_rare_response_vanishes_and_dpos_does_not():
    """The gradient of J at a response is proportional to its probability under the policy; that of DPO, to its
    frequency in the pairs. So RLHF can stay far from pi* for long if a response became rare early."""
    lost = OPTIMUM.copy()
    lost[:, 0] -= 12
    lost -= np.logaddexp.reduce(lost, axis=1, keepdims=True)
    of_j = objective_gradient(lost, REFERENCE, REWARDS, BETA)[:, 0]
    of_dpo = expected(dpo, comparisons(REFERENCE, REWARDS))(lost)[:, 0]
    assert (of_j > 0).all() and (of_j < 1e-4).all()         # ascent on J
    assert (of_dpo < -0.01).all()                           # descent on the loss


# Flipped labels.

def test_descent_on_the_robust_loss_of_flipped_labels_reaches_the_optimum():
    robust = functools.partial(robust_dpo_loss, beta=BETA, flip_rate=FLIP_RATE)
    log_pi = trained(expected(robust, comparisons(REFERENCE, REWARDS, FLIP_RATE)))
    assert total_variation(log_pi, OPTIMUM).max() < 1e-3


@given(rngs, st.floats(0.01, 0.45))
def test_the_expected_robust_loss_of_flipped_labels_is_dpos_loss_of_clean_ones(rng, eps):
    """Value and gradient, at every policy."""
    log_pi, reference = rng.normal(size=(2, 1, 4))
    rewards, log_mu = rng.normal(size=(1, 4)), np.log(rng.dirichlet(np.ones(4), size=1))
    robust = functools.partial(robust_dpo_loss, beta=BETA, flip_rate=eps)
    clean, flipped = comparisons(log_mu, rewards), comparisons(log_mu, rewards, eps)
    assert_close(expected_loss(robust, flipped, log_pi, reference), expected_loss(dpo, clean, log_pi, reference))
    assert_close(gradient_over_comparisons(robust, flipped, log_pi, reference),
                 gradient_over_comparisons(dpo, clean, log_pi, reference))


@pytest.mark.parametrize("smoothing", [0.0, FLIP_RATE])
def test_neither_dpo_nor_cdpo_undoes_flips(smoothing):
    """Their gradient does not vanish at pi*. They end nearer to the reference: flipped labels have smaller margins."""
    cdpo = functools.partial(dpo_loss, beta=BETA, label_smoothing=smoothing)
    gradient = expected(cdpo, comparisons(REFERENCE, REWARDS, FLIP_RATE))
    assert np.abs(gradient(OPTIMUM)).max() > 1e-3
    log_pi = trained(gradient)
    assert total_variation(log_pi, OPTIMUM).min() > 0.03
    assert (divergence(log_pi, REFERENCE) < divergence(OPTIMUM, REFERENCE)).all()


# Hard labels: they say which response was preferred, not how often.

def winners(rewards):
    """All pairs of responses drawn from the reference, the one with the higher reward always preferred."""
    drawn = np.exp(REFERENCE)
    return 2 * drawn[:, :, None] * drawn[:, None, :] * (rewards[:, :, None] > rewards[:, None, :])


def test_hard_labels_determine_only_the_order_of_the_rewards():
    """So DPO cannot find pi* from them: another reward with the same order gives the same labels, the same gradients
    and the same policy, but has another pi*."""
    stretched = np.sinh(2 * REWARDS)
    np.testing.assert_array_equal(winners(REWARDS), winners(stretched))
    assert total_variation(optimum(REFERENCE, stretched, BETA)[0], OPTIMUM).min() > 0.3
    log_pi = trained(expected(dpo, winners(REWARDS)), steps=100)
    assert total_variation(log_pi, OPTIMUM).min() > 0.3
    assert (divergence(log_pi, REFERENCE) > divergence(OPTIMUM, REFERENCE)).all()


def test_dpo_on_hard_labels_of_finitely_many_pairs_moves_away_from_the_optimum():
    """The loss has its infimum at infinite margins: longer training ends farther from pi* and from the reference."""
    rng, labels = np.random.default_rng(3), np.zeros((2, 40, 40))
    for p in range(2):
        for i, j in rng.permutation(40).reshape(20, 2):     # every response in one pair
            i_wins = rng.random() < 1 / (1 + np.exp(REWARDS[p, j] - REWARDS[p, i]))
            labels[(p, i, j) if i_wins else (p, j, i)] = 1 / 20
    gradient = expected(dpo, labels)
    assert np.abs(gradient(OPTIMUM)).max() > 1e-3           # not even a stationary point
    policies = [trained(gradient, steps) for steps in (30, 100, 300)]
    losses = [expected_loss(dpo, labels, log_pi, REFERENCE) for log_pi in policies]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01
    assert expected_loss(dpo, labels, OPTIMUM, REFERENCE) > 0.2      # pi* does not fit the noise in the labels
    assert divergence(policies[-1], REFERENCE).min() > 2 * divergence(OPTIMUM, REFERENCE).max()
    assert min(total_variation(log_pi, OPTIMUM).min() for log_pi in policies) > 0.3


def test_with_many_judgements_of_every_pair_the_gradient_at_the_optimum_goes_to_0():
    """It shrinks as 1 over the square root of the number of judgements."""
    probabilities, rng = comparisons(REFERENCE, REWARDS), np.random.default_rng(4)

    def gradient(count):
        judged = [rng.multinomial(count, p.reshape(-1) / p.sum()).reshape(40, 40) / count for p in probabilities]
        return gradient_over_comparisons(dpo, np.array(judged), OPTIMUM, REFERENCE)
    sizes = [np.mean([np.linalg.norm(gradient(count)) for _ in range(20)]) for count in (10**4, 10**6, 10**8)]
    assert_close(np.divide(sizes[1:], sizes[:-1]), [0.1, 0.1], 0.2)


# IPO.

def test_ipo_reaches_its_own_optimum_and_not_dpos():
    own = ipo_optimum(REFERENCE, REFERENCE, REWARDS, BETA)
    log_pi = trained(expected(functools.partial(ipo_loss, beta=BETA), comparisons(REFERENCE, REWARDS)))
    assert total_variation(log_pi, own).max() < 1e-3
    assert total_variation(own, OPTIMUM).min() > 0.1


@given(rngs, st.floats(0.2, 2))
def test_each_gradient_vanishes_at_its_own_optimum_and_ipos_depends_on_the_behaviour_policy(rng, beta):
    reference, log_mu = np.log(rng.dirichlet(np.full(5, 5.0), size=(2, 1)))
    rewards = rng.uniform(-1, 1, size=(1, 5))
    probabilities = comparisons(log_mu, rewards)
    for loss, own in ((dpo_loss, optimum(reference, rewards, beta)[0]),
                      (ipo_loss, ipo_optimum(reference, log_mu, rewards, beta))):
        d = gradient_over_comparisons(functools.partial(loss, beta=beta), probabilities, own, reference)
        assert np.abs(d).max() < 1e-12


def test_no_gradient_vanishes_at_the_optimum_of_another_loss():
    """DPO's gradient does not vanish at IPO's optimum, nor at pi* with log-probs averaged over tokens; IPO's does not
    at pi*, nor at its own optimum for another behaviour policy."""
    rng, lengths = np.random.default_rng(6), np.array([[1, 2, 3, 1, 2]])
    reference, log_mu = np.log(rng.dirichlet(np.full(5, 5.0), size=(2, 1)))
    rewards = np.array([[-1, 1, 0.3, -0.5, 0.6]])
    star = optimum(reference, rewards, 1.0)[0]
    by_reference, by_other = (ipo_optimum(reference, mu, rewards, 1.0) for mu in (reference, log_mu))

    def gradient(loss, log_pi, reference=reference):
        probabilities = comparisons(log_mu, rewards)
        d = gradient_over_comparisons(functools.partial(loss, beta=1.0), probabilities, log_pi, reference)
        return np.abs(d).max()
    for wrong in (gradient(dpo_loss, by_other), gradient(ipo_loss, star), gradient(ipo_loss, by_reference),
                  gradient(dpo_loss, star / lengths, reference / lengths)):
        assert wrong > 1e-3
