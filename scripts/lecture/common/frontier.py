"""What reward can be had at what KL divergence: the frontier of a set of policies.

Two policies mixed half and half have the mean of their rewards, and no more than the mean of their divergences
from the reference, for KL is convex. So whatever lies under a straight line between two points
(divergence, reward) can be had, and the frontier of some policies is the upper concave hull of their points. It
compares ways of training at equal KL, wherever each of them happened to stop.
Tests: tests/test_frontier.py.
"""

import numpy as np


def frontier(divergences, rewards):
    """The corners (M,2) of the upper concave hull of points (N,), from the least divergence to the greatest reward.

    Give the reference's own point (0, its reward) with them. At divergence k: np.interp(k, *frontier(...).T), which
    stays level beyond the last corner: nobody has to go further.
    """
    corners = []
    for k, r in sorted(zip(np.asarray(divergences, float).tolist(), np.asarray(rewards, float).tolist())):
        if corners and r <= corners[-1][1]:
            continue                    # no further for less
        while len(corners) > 1 and _rise(corners[-2], (k, r)) >= _rise(corners[-2], corners[-1]):
            corners.pop()
        if corners and corners[-1][0] == k:
            corners.pop()
        corners.append((k, r))
    return np.array(corners)


def _rise(first, second):
    run = second[0] - first[0]
    return (second[1] - first[1]) / run if run > 0 else np.inf
