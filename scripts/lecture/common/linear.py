"""Rewards linear in what can be counted: the baseline of every reward model, fitted in closed form or by Newton.

    r(prompt, response) = w . x(prompt, response)

x counts the tokens of the response, and once more each of them together with each token of the prompt in its place.
Comparisons give w by Bradley and Terry's law (a logistic regression on differences of x), ratings by least squares;
both with a ridge, lambda |w|^2 / 2, so that there is one answer from the first judgement on.
Tests: tests/test_linear.py.
"""

import numpy as np

from minilm.ops import stable_sigmoid


def counts(world):
    """x (P,N,F) of an EnumerableWorld whose prompts have one length T: F = V + (T-1) V^2, less what never occurs.

    The first token of the prompt, where all begin alike, is left out.
    """
    V = world.vocab_size
    tokens = np.array([np.bincount(response, minlength=V) for response in world.responses], float)        # (N,V)
    said = np.eye(V)[np.array(world.prompts)[:, 1:]].reshape(len(world.prompts), -1)                      # (P,(T-1)V)
    said = said[:, said.any(axis=0)]
    together = (said[:, None, :, None] * tokens[None, :, None, :]).reshape(*world.shape, -1)
    return np.concatenate([np.broadcast_to(tokens, (*world.shape, V)), together], axis=-1)


def bradley_terry(differences, ridge=1.0, iterations=25):
    """w (F,) that minimises  sum -log sigma(w . d) + ridge |w|^2 / 2  over differences d (B,F), x of the chosen less x
    of the rejected.

    Newton's method; the loss is convex, and the ridge keeps its steps short enough to need no line search.
    """
    w = np.zeros(differences.shape[1])
    for _ in range(iterations):
        wrong = stable_sigmoid(-differences @ w)
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + ridge * np.eye(len(w))
        w += np.linalg.solve(curvature, differences.T @ wrong - ridge * w)
    return w


def least_squares(x, ratings, ridge=1.0):
    """w (F,) that minimises  |x w - ratings|^2 / 2 + ridge |w|^2 / 2:  x (B,F), ratings (B,)."""
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ ratings)
