"""Sampling by inverse CDF: one token for each row of probabilities.

The cumulative probability of token i is c[i] = p[0] + ... + p[i]. With u uniform in [0, 1), the sampled token is the
first one with c[i] > u. So token i is drawn with probability p[i], and a token of probability 0 never.

    p          (B, V), at least 0. A row may add up to another number than 1 (by rounding, or because it is not
               normalised): tokens are then drawn in proportion to p
    u          (B,), uniform in [0, 1)
    returns    tokens, (B,), integers
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm import generate
from minilm.exercises.task import Mistake, Property, Task, forms


def categorical(p, u) -> np.ndarray:
    """The first token of each row whose cumulative probability is above u."""
    cumulative = p.cumsum(axis=-1)
    return (cumulative > u[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    p = rng.dirichlet(np.ones(4), size=6)
    return {"one row": (np.array([[0.5, 0.3, 0.2]]), np.array([0.6])),
            "six rows": (p, rng.random(6)),
            "u is 0, and the first tokens are impossible": (np.array([[0.0, 0.0, 0.7, 0.3], [0.2, 0.0, 0.0, 0.8]]),
                                                            np.array([0.0, 0.2])),
            "rows that do not add up to 1": (np.array([[1.0, 2.0, 1.0], [0.1, 0.1, 0.2]]), np.array([0.5, 0.9])),
            "as many rows as tokens": (rng.dirichlet(np.ones(3), size=3), np.array([0.1, 0.6, 0.95]))}


def properties(function: Callable) -> Iterator[Property]:
    p = np.array([0.1, 0.0, 0.35, 0.2, 0.35])
    u = (np.arange(1000) + 0.5) / 1000
    counts = np.bincount(function(np.tile(p, (1000, 1)), u), minlength=5)
    yield Property("for 1000 evenly spaced u, token i comes 1000 p[i] times", counts, 1000 * p)


TASK = Task(
    solution=categorical, returns=("tokens",), cases=cases, expected=generate.categorical, properties=properties,
    read="minilm/generate.py, categorical",
    hints=("np.cumsum along the last axis, a comparison with u[:, None], and the first True of each row.",
           "argmax of a bool array is the index of its first True. Scale u by the last cumulative number, so that a "
           "row need not add up to 1."),
    mistakes=(
        Mistake("With >= instead of >, u = 0 draws token 0 even if its probability is 0.", "cumulative > u",
                "cumulative >= u"),
        *forms("u is not scaled by the sum of the row. If the row adds up to less than u, no token is found.",
               "(cumulative > u[:, None] * cumulative[:, -1:]).argmax(axis=-1)",
               "(cumulative > u[:, None]).argmax(axis=-1)", "(cumulative <= u[:, None]).sum(axis=-1)"),
        Mistake("The comparison is reversed: the first token that is not above u is always token 0.",
                "cumulative > u", "cumulative < u"),
        Mistake("This is the most likely token, without randomness.",
                "(cumulative > u[:, None] * cumulative[:, -1:]).argmax(axis=-1)", "p.argmax(axis=-1)"),
        Mistake("The cumulative sum leaves out the token itself: it must be p[0] + ... + p[i].",
                "p.cumsum(axis=-1)", "p.cumsum(axis=-1) - p"),
        Mistake("The cumulative sum runs over the whole array; each row is a distribution of its own.",
                "p.cumsum(axis=-1)", "p.cumsum().reshape(p.shape)"),
        Mistake("The cumulative sum runs down the columns.", "p.cumsum(axis=-1)", "p.cumsum(axis=0)"),
        Mistake("Cumulative sum, total and argmax run over the first axis. The tokens are the last axis.",
                "p.cumsum(axis=-1)\n    return (cumulative > u[:, None] * cumulative[:, -1:]).argmax(axis=-1)",
                "p.cumsum(axis=0)\n    return (cumulative > u[:, None] * cumulative[-1:]).argmax(axis=0)"),
        Mistake("The argmax runs over the rows: it must give one token for each row.", ".argmax(axis=-1)",
                ".argmax(axis=0)"),
        Mistake("This is the token after the right one: argmax already gives the index of the first cumulative number "
                "above u.", ".argmax(axis=-1)", ".argmax(axis=-1) + 1"),
        Mistake("One u is used for all rows.", "u[:, None] *", "u[0] *")))
