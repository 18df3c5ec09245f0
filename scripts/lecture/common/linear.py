"""Linear rewards: a baseline for reward models, fitted in closed form or by Newton's method.

    r(prompt, response) = w . x(prompt, response)

x counts the tokens of the response, and counts each of them again together with each token of the prompt at its
position. Comparisons determine w by the Bradley-Terry model (a logistic regression on differences of x), ratings by
least squares. Both use a ridge penalty, lambda |w|^2 / 2, so that the solution is unique from the first judgement on.
Tests: tests/test_linear.py.
"""

import numpy as np

from minilm import checks
from minilm.exact.enumerable import EnumerableWorld
from minilm.ops import stable_sigmoid


def counts(world: EnumerableWorld) -> np.ndarray:
    """x (P,Y,F) of a world whose prompts all have T tokens.

    F = V + (T-1) V W, where W is the number of different tokens per prompt position. The first token of the prompt,
    the same for all, is left out.
    """
    V = world.vocab_size
    tokens = np.array([np.bincount(response, minlength=V) for response in world.responses], float)        # (Y,V)
    prompts = np.eye(V)[np.array(world.prompts)[:, 1:]].reshape(len(world.prompts), -1)                   # (P,(T-1)V)
    prompts = prompts[:, prompts.any(axis=0)]                                                             # (P,(T-1)W)
    together = (prompts[:, None, :, None] * tokens[None, :, None, :]).reshape(*world.shape, -1)
    return np.concatenate([np.broadcast_to(tokens, (*world.shape, V)), together], axis=-1)


def bradley_terry(differences: np.ndarray, ridge: float = 1.0, iterations: int = 25) -> np.ndarray:
    """w (F,) that minimises  sum_b -log sigma(w . d_b) + ridge |w|^2 / 2.

    differences d (B,F): x of the chosen response minus x of the rejected one. Newton's method without a line search:
    the loss is convex, and the ridge keeps the steps short enough.
    """
    checks.number("bradley_terry", "ridge", ridge, above=0)
    checks.integer("bradley_terry", "iterations", iterations, at_least=1)
    w = np.zeros(differences.shape[1])
    for _ in range(iterations):
        wrong = stable_sigmoid(-differences @ w)
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + ridge * np.eye(len(w))
        w += np.linalg.solve(curvature, differences.T @ wrong - ridge * w)
    return w


def least_squares(x: np.ndarray, ratings: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """w (F,) that minimises  |x w - ratings|^2 / 2 + ridge |w|^2 / 2:  x (B,F), ratings (B,)."""
    checks.number("least_squares", "ridge", ridge, above=0)
    checks.same_shape("least_squares", axes="B", ratings=ratings, rows_of_x=x[:, 0])
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ ratings)
