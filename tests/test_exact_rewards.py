"""Exact, by enumeration: the reward that comparisons determine, and the divergence of best-of-n from its policy."""

import functools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm.evaluate import best_of_n_kl
from minilm.exact.enumerable import EnumerableWorld, best_of_n, divergence, expectation, objective, optimum
from minilm.exact.expectations import comparisons, gradient_over_comparisons
from minilm.model import Config, RewardModel, Transformer
from minilm.objectives.reward import reward_loss
from minilm.optim import AdamW, warmup_cosine

WORLD = EnumerableWorld([[0, 1], [0, 2]], vocab_size=3, max_new_tokens=3)
REWARDS = np.random.default_rng(0).normal(size=WORLD.shape)


def uniform(shape):
    return np.full(shape, -np.log(shape[-1]))


def centred(rewards):
    return rewards - rewards.mean(axis=-1, keepdims=True)


def fitted(loss, probabilities, steps=500):
    """Rewards (P,Y) of a RewardModel trained on the expected loss over comparisons."""
    rng, config = np.random.default_rng(1), Config(vocab_size=3, width=24, layers=2, heads=2, context=8)
    model = RewardModel(Transformer(config, rng, np.float64), rng)
    optimizer = AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        r = WORLD.rewards(model)
        optimizer.zero_grad()
        r.backward(gradient_over_comparisons(loss, probabilities, r.data))
        optimizer.step(warmup_cosine(step, steps, 0.01, warmup=10, floor=0.0))
    return WORLD.rewards(model).data


# Bradley and Terry.

def test_bradley_terry_on_expected_comparisons_recovers_the_reward_up_to_a_constant_per_prompt():
    r = fitted(reward_loss, comparisons(uniform(WORLD.shape), REWARDS))
    assert_close(centred(r), centred(REWARDS), 1e-3)


@given(rngs)
def test_the_gradient_vanishes_at_the_reward_plus_any_constant_per_prompt_and_elsewhere_descends_to_it(rng):
    rewards, log_mu = rng.normal(size=(2, 5)), np.log(rng.dirichlet(np.ones(5), size=2))
    gradient = functools.partial(gradient_over_comparisons, reward_loss, comparisons(log_mu, rewards))
    assert np.abs(gradient(rewards + 10 * rng.normal(size=(2, 1)))).max() < 1e-14
    elsewhere = rewards + centred(rng.normal(size=(2, 5)))
    # The loss is convex, so from every point the direction back to the rewards is downhill.
    assert (gradient(elsewhere) * (elsewhere - rewards)).sum() > 0


def test_centring_selects_the_constant_and_in_expectation_shrinks_the_differences_a_little():
    """For independent draws E[(r + r')^2] = 2 Var[r] + 4 E[r]^2: the mean goes to 0, and the differences shrink."""
    r = fitted(functools.partial(reward_loss, centering=1e-3), comparisons(uniform(WORLD.shape), REWARDS))
    assert np.abs(r.mean(axis=1)).max() < 0.01
    assert_close(centred(r), centred(REWARDS), 0.05)
    assert (r.var(axis=1) < REWARDS.var(axis=1)).all()


@given(rngs, st.floats(0.001, 1))
def test_the_expected_gradient_of_centring_is_that_of_variance_and_mean(rng, c):
    """In expectation over pairs of responses drawn independently from pi, it is the gradient of c (2 Var + 4 mean^2).

    For a single pair it is 0 on the difference: tests/test_reward.py."""
    r, pi = rng.normal(size=(1, 5)), rng.dirichlet(np.ones(5), size=1)
    probabilities = comparisons(np.log(pi), rng.normal(size=(1, 5)))
    with_pull, without = (gradient_over_comparisons(functools.partial(reward_loss, centering=value), probabilities, r)
                          for value in (c, 0.0))
    mean = (pi * r).sum()
    assert_close(with_pull - without, c * (4 * pi * (r - mean) + 8 * mean * pi))


@pytest.mark.parametrize("d, m", [(0.5, 2.0), (1.5, 1.0), (3.0, 0.5)])
def test_a_margin_stretches_the_difference_that_is_recovered(d, m):
    """From d to the root x of q sigmoid(m - x) = (1 - q) sigmoid(m + x), q = sigmoid(d): quadratic in e^x."""
    a, b = np.exp(-m), np.exp(-d)
    x = np.log(((1 - b) + np.sqrt((1 - b) ** 2 + 4 * a * a * b)) / (2 * a * b))
    loss = functools.partial(reward_loss, margin=m)
    probabilities = comparisons(uniform((1, 2)), np.array([[d, 0.0]]))
    assert x > d and np.abs(gradient_over_comparisons(loss, probabilities, np.array([[x, 0.0]]))).max() < 1e-15


@pytest.mark.parametrize("flips", [0.1, 0.3])
def test_flipped_labels_shrink_the_difference_of_a_pair_and_keep_its_sign(flips):
    """The fitted difference is the log-odds of the observed labels, (1 - 2 eps) sigmoid + eps."""
    probabilities = comparisons(uniform((1, 2)), np.array([[1.5, 0.0]]), flips)
    seen = (1 - 2 * flips) / (1 + np.exp(-1.5)) + flips
    log_odds = np.log(seen / (1 - seen))
    assert 0 < log_odds < 1.5
    assert np.abs(gradient_over_comparisons(reward_loss, probabilities, np.array([[log_odds, 0.0]]))).max() < 1e-15


# Best of n.

@given(rngs, st.integers(1, 40), st.booleans())
def test_best_of_n_stays_within_the_bound_and_meets_it_only_at_n_1(rng, n, ties):
    log_pi = np.log(rng.dirichlet(np.ones(8), size=2))
    scores = rng.integers(0, 3, size=(2, 8)) if ties else rng.normal(size=(2, 8))
    kl = divergence(best_of_n(log_pi, scores, n), log_pi)
    assert (kl >= -1e-12).all()
    assert (kl < best_of_n_kl(n)).all() if n > 1 else np.abs(kl).max() < 1e-12
    assert (kl <= -log_pi.min(axis=1) + 1e-12).all()             # the bound grows without limit; the KL does not


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_bound_is_met_in_the_limit_of_many_responses_without_ties_and_not_with_them(n):
    gaps, with_ties = [], []
    for N in (100, 1000, 10000):
        log_pi, scores = uniform((1, N)), np.arange(N, dtype=float)[None]
        gaps.append(best_of_n_kl(n) - divergence(best_of_n(log_pi, scores, n), log_pi)[0])
        with_ties.append(best_of_n_kl(n) - divergence(best_of_n(log_pi, scores // (N // 4), n), log_pi)[0])
    assert all(0 < after < 0.02 * before for before, after in zip(gaps, gaps[1:]))      # closes about as 1/N^2
    assert_close(with_ties[1:], with_ties[:-1])                       # four different scores: the gap stays
    assert with_ties[0] > 0.01


@given(rngs, st.integers(2, 12))
def test_best_of_n_has_less_reward_than_the_optimum_at_the_same_divergence(rng, n):
    """At the beta where pi* has the KL of best-of-n: no policy with this KL has a higher reward than pi*."""
    log_pi, rewards = np.log(rng.dirichlet(np.full(9, 2.0), size=1)), rng.normal(size=(1, 9))
    best = best_of_n(log_pi, rewards, n)
    kl, low, high = divergence(best, log_pi)[0], 1e-9, 1e3
    for _ in range(300):                                    # the KL of pi* falls with beta
        beta = np.sqrt(low * high)
        low, high = (beta, high) if divergence(optimum(log_pi, rewards, beta)[0], log_pi)[0] > kl else (low, beta)
    star = optimum(log_pi, rewards, beta)[0]
    assert_close(divergence(star, log_pi), [kl], 1e-6)
    assert expectation(star, rewards)[0] > expectation(best, rewards)[0] > expectation(log_pi, rewards)[0]
    assert objective(best, log_pi, rewards, beta)[0] < objective(star, log_pi, rewards, beta)[0]


def test_best_of_very_many_draws_is_the_response_with_the_highest_score():
    log_pi, scores = np.log(np.array([[0.9, 0.09, 0.01]])), np.array([[0.0, 1.0, 2.0]])
    best = best_of_n(log_pi, scores, 100_000)
    assert_close(np.exp(best), [[0, 0, 1]])
    assert_close(divergence(best, log_pi), [-np.log(0.01)])
