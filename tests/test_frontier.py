"""The frontier is the best reward of all mixtures of two policies, and such mixtures exist."""

import itertools

import numpy as np
from hypothesis import given, strategies as st

from common.frontier import frontier
from helpers import assert_close, distributions, rngs
from minilm.exact.enumerable import divergence, expectation, optimum


@given(rngs, st.integers(1, 12), st.booleans())
def test_it_is_the_best_point_of_any_line_between_two_points_within_the_divergence(rng, count, on_a_grid):
    k, r = rng.uniform(0, 3, count), rng.normal(size=count)
    if on_a_grid:                                   # many ties
        k, r = np.round(k), np.round(r)
    k[0] = 0
    corners = frontier(k, r)
    for at in (0.0, 0.4, 1.0, 2.0, 3.5):
        possible = [r[i] for i in range(count) if k[i] <= at]
        for i, j in itertools.permutations(range(count), 2):
            if k[i] < at < k[j]:
                possible.append(r[i] + (r[j] - r[i]) * (at - k[i]) / (k[j] - k[i]))
        assert_close(np.interp(at, *corners.T), max(possible))


def test_a_point_under_the_line_between_its_neighbours_is_no_corner():
    assert frontier([2, 0, 1, 3], [2, 0, 0.9, 1.5]).tolist() == [[0, 0], [2, 2]]
    assert frontier([2, 0, 1, 3], [2, 0, 1.1, 2.5]).tolist() == [[0, 0], [1, 1.1], [2, 2], [3, 2.5]]


@given(rngs)
def test_its_corners_are_points_with_decreasing_slopes(rng):
    k, r = rng.uniform(0, 3, 20), rng.normal(size=20)
    corners = frontier(k, r)
    assert {tuple(corner) for corner in corners} <= set(zip(k, r))
    slopes = np.diff(corners[:, 1]) / np.diff(corners[:, 0])
    assert (np.diff(corners, axis=0) > 0).all() and (np.diff(slopes) < 0).all()
    assert corners[-1, 1] == r.max()


@given(distributions(3), rngs)
def test_a_mixture_of_two_policies_has_the_reward_of_the_line_at_no_more_divergence(three, rng):
    reference, one, other = three
    rewards, share = rng.normal(size=reference.shape), rng.random()
    mixture = np.log((1 - share) * np.exp(one) + share * np.exp(other))
    assert_close(expectation(mixture, rewards),
                 (1 - share) * expectation(one, rewards) + share * expectation(other, rewards))
    assert (divergence(mixture, reference)
            <= (1 - share) * divergence(one, reference) + share * divergence(other, reference) + 1e-12).all()


@given(distributions(1), rngs)
def test_optimal_policies_are_all_on_it(distribution, rng):
    """pi* over beta is a concave curve: none of its points lies under a line between two others."""
    rewards = rng.normal(size=distribution[0].shape)
    best = [optimum(distribution[0], rewards, beta)[0] for beta in (4.0, 2.0, 1.0, 0.5)]
    points = np.array([(divergence(log_pi, distribution[0]).mean(), expectation(log_pi, rewards).mean())
                       for log_pi in best])
    assert_close(frontier(*points.T), points)
