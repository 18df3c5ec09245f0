"""Rotary positions (RoPE): rotate pairs of numbers by angles that grow with the position.

Pair i of a head of K numbers is the numbers i and i + K/2. At position m it is rotated by the angle

    angle = m base^(-2i/K),      (a, b)  ->  (a cos - b sin,  b cos + a sin)

    x            (T, K), K even: queries or keys of one head
    positions    (T,), integers: the position of each row; it need not start at 0
    base         a number, 10000 in most models
    returns      the rotated x, (T, K)

Su et al. 2021, arXiv:2104.09864; the pairs (i, i + K/2) are those of Llama's code in Hugging Face.
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm import rotary
from minilm.exercises.task import Mistake, Property, Task, forms


def rope(x, positions, base) -> np.ndarray:
    """x with each pair rotated by the angle of its position."""
    K = x.shape[1]
    angles = positions[:, None] * base ** (-np.arange(0, K, 2) / K)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[:, :K // 2], x[:, K // 2:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"one pair": (np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.arange(3), 10000.0),
            "four pairs": (rng.normal(size=(3, 8)), np.arange(3), 100.0),
            "later positions": (rng.normal(size=(2, 4)), np.array([7, 9]), 10000.0)}


def expected(x, positions, base) -> np.ndarray:
    cos, sin = rotary.rope_tables(positions, x.shape[1], base, "float64")
    return rotary.rope(x[None, None], cos, sin).data[0, 0]


def properties(function: Callable) -> Iterator[Property]:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 6))

    def products(m):
        return (function(q, np.full(5, m), 50.0) * function(k, np.full(5, m - 3), 50.0)).sum(axis=1)

    yield Property("q.k depends on the difference of the two positions alone", products(20), products(3))


TASK = Task(
    solution=rope, returns=("rotated x",), cases=cases, expected=expected, read="minilm/rotary.py",
    properties=properties,
    hints=("K/2 frequencies, one for each pair. angles = positions[:, None] * frequencies has shape (T, K/2).",
           "frequencies = base ** (-np.arange(0, K, 2) / K); a = x[:, :K//2], b = x[:, K//2:]; join "
           "a cos - b sin and b cos + a sin."),
    mistakes=(
        Mistake("The pairs are the neighbours 2i and 2i + 1, as in the paper. Here they are i and i + K/2.",
                "a, b = x[:, :K // 2], x[:, K // 2:]\n    return np.concatenate([a * cos - b * sin, b * cos + a * "
                "sin], axis=1)", "a, b = x[:, 0::2], x[:, 1::2]\n    return np.stack([a * cos - b * sin, b * cos + a "
                "* sin], axis=2).reshape(x.shape)"),
        Mistake("The rotation runs backwards: the signs of the two sines are exchanged.",
                "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
        Mistake("The exponent is -i/K instead of -2i/K.", "np.arange(0, K, 2) / K", "np.arange(K // 2) / K"),
        Mistake("The positions are ignored: row t is rotated as position t.", "positions[:, None]",
                "np.arange(len(x))[:, None]"),
        *forms("The second half is computed from the new first half. Both need the old numbers: keep them until both "
               "are computed.", "    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)",
               "    a[:] = a * cos - b * sin\n    b[:] = b * cos + a * sin\n    return x",
               "    a = a * cos - b * sin\n    b = b * cos + a * sin\n    return np.concatenate([a, b], axis=1)"),
        Mistake("Both sines have the same sign, so this is no rotation: the length of a pair changes.",
                "a * cos - b * sin", "a * cos + b * sin"),
        Mistake("The frequencies grow with i; the exponent must be negative.", "base ** (-np.arange(0, K, 2) / K)",
                "base ** (np.arange(0, K, 2) / K)"),
        Mistake("The positions are counted from 1.", "positions[:, None]", "(positions[:, None] + 1)"),
        Mistake("Every pair has the same frequency, 1.", "base ** (-np.arange(0, K, 2) / K)",
                "np.ones(K // 2)"),
        Mistake("The two halves of the result are exchanged.", "[a * cos - b * sin, b * cos + a * sin]",
                "[b * cos + a * sin, a * cos - b * sin]")))
