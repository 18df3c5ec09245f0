"""The frontier of a set of policies: the highest reward that they reach at each KL divergence.

A mixture of two policies, half and half, has the mean of their rewards. Its KL divergence from the reference is at most
the mean of theirs, because KL is convex. So every point on or below a straight line between two points (divergence,
reward) can be reached, and the frontier is the upper concave hull of the points. It compares training methods at equal
KL, independently of where each run stopped.
Tests: tests/test_frontier.py.
"""

import numpy as np

from minilm import checks


def frontier(divergences: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """The corners (M,2) of the upper concave hull of points (N,), in order of increasing divergence and reward.

    Include the point of the reference (0, its reward). The reward at divergence k is np.interp(k, *frontier(...).T).
    It is constant beyond the last corner, because a policy need not use the whole KL that is allowed.
    """
    divergences, rewards = checks.numbers("frontier", "N", divergences=divergences, rewards=rewards)
    points = zip(divergences.astype(float).tolist(), rewards.astype(float).tolist())
    corners = []
    for k, r in sorted(points):
        if corners and r <= corners[-1][1]:
            continue                    # more divergence for no more reward
        while len(corners) > 1 and _slope(corners[-2], (k, r)) >= _slope(corners[-2], corners[-1]):
            corners.pop()
        if corners and corners[-1][0] == k:
            corners.pop()
        corners.append((k, r))
    return np.array(corners)


def _slope(first, second):
    run = second[0] - first[0]
    return (second[1] - first[1]) / run if run > 0 else np.inf
