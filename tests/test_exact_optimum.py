"""Proofs by enumeration: where each objective leads to.

A Transformer is trained on exact gradients, over 40 responses to each of two prompts. RLHF and DPO arrive at the
same policy, pi* = pi_ref exp(r/beta)/Z; IPO and DPO on labels without probabilities arrive elsewhere.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm.model import Config, Transformer
from minilm.objectives.dpo import dpo_loss, ipo_loss, robust_dpo_loss
from minilm.exact.enumerable import (EnumerableWorld, divergence, ipo_optimum, objective, objective_gradient,
                                     optimum, preference, total_variation)
from minilm.exact.expectations import comparisons, descend, gradient_over_comparisons

BETA = 1.0
# Prompts begin with a 0 that no response begins with: attention over equal tokens gives the same
# however many there are, so [1] and [1, 1] would be one context.
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
ERR = 0.2       # the share of labels that are wrong, where some are


def trained(gradient, steps=300):
    """log-probs (P,N) of the policy after training on an exact gradient."""
    *_, l = descend(start(), WORLD, gradient, steps, learning_rate=0.007)
    return l


def expected(loss, probabilities):
    """The gradient of loss(chosen, rejected, reference_chosen, reference_rejected) over comparisons."""
    return lambda l: gradient_over_comparisons(loss, probabilities, l, REFERENCE)


def expected_loss(loss, probabilities, l, reference):
    """Its value, one comparison after the other."""
    total = 0.0
    for p, c, r in np.argwhere(probabilities):
        one = [a[p:p + 1, y] for a in (l, reference) for y in (c, r)]
        total += probabilities[p, c, r] * loss(*one).item()
    return total


dpo = functools.partial(dpo_loss, beta=BETA)


# The optimum itself.

@given(rngs, st.floats(0.1, 3))
def test_the_best_value_of_j_is_beta_log_z(rng, beta):
    """J(pi) = beta log Z - beta KL(pi || pi*) for every policy: J* = beta log Z, and no other reaches it."""
    l, reference = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in rng.normal(size=(2, 3, 9)))
    rewards = rng.normal(size=l.shape)
    best, log_Z = optimum(reference, rewards, beta)
    assert_close(np.exp(best).sum(axis=1), np.ones(3))
    assert_close(np.exp(best), np.exp(reference + rewards / beta) / np.exp(log_Z)[:, None])
    assert_close(objective(best, reference, rewards, beta), beta * log_Z)
    assert_close(objective(l, reference, rewards, beta), beta * log_Z - beta * divergence(l, best))


def test_the_implied_reward_of_the_optimum_is_the_reward_up_to_a_constant_per_prompt():
    """r = beta log(pi*/pi_ref) + beta log Z: the identity behind DPO."""
    assert_close(BETA * (OPTIMUM - REFERENCE) + BETA * LOG_Z[:, None], REWARDS)


# RLHF and DPO.

def test_gradient_ascent_on_j_reaches_the_optimum():
    l = trained(lambda l: -objective_gradient(l, REFERENCE, REWARDS, BETA))
    assert total_variation(REFERENCE, OPTIMUM).min() > 0.15
    assert total_variation(l, OPTIMUM).max() < 1e-3
    assert_close(objective(l, REFERENCE, REWARDS, BETA), BETA * LOG_Z, 1e-5)


def test_descent_on_the_expected_dpo_loss_reaches_the_optimum():
    """No reward and no sample of the policy: only who wins how often among responses of the reference."""
    assert total_variation(trained(expected(dpo, comparisons(REFERENCE, REWARDS))), OPTIMUM).max() < 1e-3


def test_dpos_gradient_vanishes_at_the_optimum_for_any_frequencies_of_the_pairs():
    """At pi* the two orders of a pair cancel, pair by pair: with any weights the gradient vanishes."""
    weights = np.random.default_rng(2).random((*WORLD.shape, WORLD.shape[1]))
    probabilities = (weights + weights.transpose(0, 2, 1)) * preference(REWARDS)
    assert np.abs(expected(dpo, probabilities)(OPTIMUM)).max() < 1e-12


def test_the_gradient_of_j_at_a_rare_response_vanishes_and_dpos_does_not():
    """Of J, the gradient at a response is in proportion to its probability under the policy; of DPO, to how
    often the pairs hold it. So RLHF may stay short of pi* for long, where a response was lost early."""
    lost = OPTIMUM.copy()
    lost[:, 0] -= 12
    lost -= np.logaddexp.reduce(lost, axis=1, keepdims=True)
    of_j = objective_gradient(lost, REFERENCE, REWARDS, BETA)[:, 0]
    of_dpo = expected(dpo, comparisons(REFERENCE, REWARDS))(lost)[:, 0]
    assert (of_j > 0).all() and (of_j < 1e-4).all()         # ascent on J
    assert (of_dpo < -0.01).all()                           # descent on the loss


# Labels that are wrong.

def test_descent_on_the_robust_loss_of_flipped_labels_reaches_the_optimum():
    robust = functools.partial(robust_dpo_loss, beta=BETA, flip_rate=ERR)
    l = trained(expected(robust, comparisons(REFERENCE, REWARDS, ERR)))
    assert total_variation(l, OPTIMUM).max() < 1e-3


@given(rngs, st.floats(0.01, 0.45))
def test_the_expected_robust_loss_of_flipped_labels_is_dpos_loss_of_clean_ones(rng, eps):
    """Value and gradient, at any policy."""
    l, reference = rng.normal(size=(2, 1, 4))
    rewards, written_by = rng.normal(size=(1, 4)), np.log(rng.dirichlet(np.ones(4), size=1))
    robust = functools.partial(robust_dpo_loss, beta=BETA, flip_rate=eps)
    clean, flipped = comparisons(written_by, rewards), comparisons(written_by, rewards, eps)
    assert_close(expected_loss(robust, flipped, l, reference), expected_loss(dpo, clean, l, reference))
    assert_close(gradient_over_comparisons(robust, flipped, l, reference), gradient_over_comparisons(dpo, clean, l, reference))


@pytest.mark.parametrize("smoothing", [0.0, ERR])
def test_neither_dpo_nor_cdpo_undoes_flips(smoothing):
    """Their gradient does not vanish at pi*: they stop short of it, at margins that flipped labels support."""
    cdpo = functools.partial(dpo_loss, beta=BETA, label_smoothing=smoothing)
    gradient = expected(cdpo, comparisons(REFERENCE, REWARDS, ERR))
    assert np.abs(gradient(OPTIMUM)).max() > 1e-3
    l = trained(gradient)
    assert total_variation(l, OPTIMUM).min() > 0.03
    assert (divergence(l, REFERENCE) < divergence(OPTIMUM, REFERENCE)).all()


# Labels that say who won, and not how often.

def winners(rewards):
    """Every pair of the reference's responses, the one of higher reward always preferred."""
    drawn = np.exp(REFERENCE)
    return 2 * drawn[:, :, None] * drawn[:, None, :] * (rewards[:, :, None] > rewards[:, None, :])


def test_hard_labels_determine_only_the_order_of_the_rewards():
    """Why DPO cannot find pi* from them: another reward of the same order gives the same labels, hence the
    same gradients and the same policy, while its pi* is another."""
    stretched = np.sinh(2 * REWARDS)
    np.testing.assert_array_equal(winners(REWARDS), winners(stretched))
    assert total_variation(optimum(REFERENCE, stretched, BETA)[0], OPTIMUM).min() > 0.3
    l = trained(expected(dpo, winners(REWARDS)), steps=100)
    assert total_variation(l, OPTIMUM).min() > 0.3
    assert (divergence(l, REFERENCE) > divergence(OPTIMUM, REFERENCE)).all()


def test_dpo_on_hard_labels_of_finitely_many_pairs_moves_away_from_the_optimum():
    """Its loss is least at infinite margins: the longer the training, the farther from pi* and the reference."""
    rng, labels = np.random.default_rng(3), np.zeros((2, 40, 40))
    for p in range(2):
        for i, j in rng.permutation(40).reshape(20, 2):     # every response in one pair
            i_wins = rng.random() < 1 / (1 + np.exp(REWARDS[p, j] - REWARDS[p, i]))
            labels[(p, i, j) if i_wins else (p, j, i)] = 1 / 20
    gradient = expected(dpo, labels)
    assert np.abs(gradient(OPTIMUM)).max() > 1e-3           # not even a stationary point
    policies = [trained(gradient, steps) for steps in (30, 100, 300)]
    losses = [expected_loss(dpo, labels, l, REFERENCE) for l in policies]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01
    assert expected_loss(dpo, labels, OPTIMUM, REFERENCE) > 0.2      # pi* fits the labels worse, and rightly so
    assert divergence(policies[-1], REFERENCE).min() > 2 * divergence(OPTIMUM, REFERENCE).max()
    assert min(total_variation(l, OPTIMUM).min() for l in policies) > 0.3


def test_with_many_judgements_of_every_pair_the_gradient_at_the_optimum_goes_to_0():
    """The gradient at pi* shrinks as one over the square root of their number, to 0."""
    probabilities, rng = comparisons(REFERENCE, REWARDS), np.random.default_rng(4)

    def gradient(count):
        judged = [rng.multinomial(count, p.reshape(-1) / p.sum()).reshape(40, 40) / count for p in probabilities]
        return gradient_over_comparisons(dpo, np.array(judged), OPTIMUM, REFERENCE)
    sizes = [np.mean([np.linalg.norm(gradient(count)) for _ in range(20)]) for count in (10**4, 10**6, 10**8)]
    assert_close(np.divide(sizes[1:], sizes[:-1]), [0.1, 0.1], 0.2)


# IPO.

def test_ipo_reaches_its_own_optimum_and_not_dpos():
    own = ipo_optimum(REFERENCE, REFERENCE, REWARDS, BETA)
    l = trained(expected(functools.partial(ipo_loss, beta=BETA), comparisons(REFERENCE, REWARDS)))
    assert total_variation(l, own).max() < 1e-3
    assert total_variation(own, OPTIMUM).min() > 0.1


@given(rngs, st.floats(0.2, 2))
def test_each_gradient_vanishes_at_its_own_optimum_and_ipos_depends_on_the_behaviour_policy(rng, beta):
    reference, written_by = np.log(rng.dirichlet(np.full(5, 5.0), size=(2, 1)))
    rewards = rng.uniform(-1, 1, size=(1, 5))
    probabilities = comparisons(written_by, rewards)
    for loss, own in ((dpo_loss, optimum(reference, rewards, beta)[0]),
                      (ipo_loss, ipo_optimum(reference, written_by, rewards, beta))):
        d = gradient_over_comparisons(functools.partial(loss, beta=beta), probabilities, own, reference)
        assert np.abs(d).max() < 1e-12


def test_no_gradient_vanishes_at_the_optimum_of_another_loss():
    """Neither gradient vanishes at the other's optimum, nor DPO's at pi* with log-probs averaged over tokens,
    nor IPO's where another wrote the responses."""
    rng, lengths = np.random.default_rng(6), np.array([[1, 2, 3, 1, 2]])
    reference, written_by = np.log(rng.dirichlet(np.full(5, 5.0), size=(2, 1)))
    rewards = np.array([[-1, 1, 0.3, -0.5, 0.6]])
    star = optimum(reference, rewards, 1.0)[0]
    by_reference, by_other = (ipo_optimum(reference, writer, rewards, 1.0) for writer in (reference, written_by))

    def gradient(loss, l, reference=reference):
        probabilities = comparisons(written_by, rewards)
        d = gradient_over_comparisons(functools.partial(loss, beta=1.0), probabilities, l, reference)
        return np.abs(d).max()
    for wrong in (gradient(dpo_loss, by_other), gradient(ipo_loss, star), gradient(ipo_loss, by_reference),
                  gradient(dpo_loss, star / lengths, reference / lengths)):
        assert wrong > 1e-3
