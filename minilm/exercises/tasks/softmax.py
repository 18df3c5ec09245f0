"""Softmax: probabilities from logits.

    p[..., i] = exp(x[..., i]) / sum_j exp(x[..., j])

over the last axis. Logits may be large (1000) or -inf (a token that is forbidden); p must be finite all the same.

    x          (..., V), float64; at least one logit of each row is finite
    returns    p, (..., V); each row adds up to 1
"""

import numpy as np

from minilm import ops
from minilm.exercises.task import Mistake, Task


def softmax(x) -> np.ndarray:
    """Probabilities from logits, over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    forbidden = rng.normal(size=(2, 3))
    forbidden[0, 1] = -np.inf
    return {"one row": (np.array([0.0, 1.0, -1.0]),), "three rows": (rng.normal(size=(3, 4)),),
            "square": (rng.normal(size=(3, 3)),), "two leading axes": (rng.normal(size=(2, 3, 4)),),
            "logits of order 1000": (np.array([[1000.0, 1001.0], [-1000.0, -1000.0]]),),
            "a forbidden token": (forbidden,)}


TASK = Task(
    solution=softmax, returns=("p",), cases=cases, expected=lambda x: ops.softmax(x).data,
    read="minilm/ops.py, softmax",
    hints=("Subtracting one number from all logits of a row does not change p. Which number keeps exp from "
           "overflowing?",
           "e = exp(x - max of the row), p = e / sum of e. Both reductions keep the axis (keepdims=True)."),
    mistakes=(
        Mistake("exp overflows above 709. Subtract one number from every logit of a row first: p does not change.",
                "np.exp(x - x.max(axis=-1, keepdims=True))", "np.exp(x)"),
        Mistake("The whole array adds up to 1. Each row is a distribution of its own: sum over the last axis.",
                "e.sum(axis=-1, keepdims=True)", "e.sum()"),
        Mistake("The sum runs over the first axis, the maximum over the last. Each row is a distribution.",
                "e.sum(axis=-1, keepdims=True)", "e.sum(axis=0, keepdims=True)"),
        Mistake("The softmax runs over the first axis, so the columns add up to 1. Each row is a distribution.",
                "np.exp(x - x.max(axis=-1, keepdims=True))\n    return e / e.sum(axis=-1, keepdims=True)",
                "np.exp(x - x.max(axis=0, keepdims=True))\n    return e / e.sum(axis=0, keepdims=True)"),
        Mistake("The axis of the sum is dropped, so NumPy divides column j by the sum of row j (or raises). Keep it.",
                "e.sum(axis=-1, keepdims=True)", "e.sum(axis=-1)"),
        Mistake("These numbers are not divided by their sum.", "e / e.sum(axis=-1, keepdims=True)", "e"),
        Mistake("This is the logarithm of softmax.", "e / e.sum(axis=-1, keepdims=True)",
                "x - x.max(axis=-1, keepdims=True) - np.log(e.sum(axis=-1, keepdims=True))"),
        Mistake("The maximum of the whole array is subtracted. A row far below it underflows to 0, and 0 / 0 is NaN.",
                "x.max(axis=-1, keepdims=True)", "x.max()"),
        Mistake("Maximum and sum are those of the whole array, so the whole array adds up to 1. Each row is a "
                "distribution of its own: both run over the last axis.",
                "x.max(axis=-1, keepdims=True))\n    return e / e.sum(axis=-1, keepdims=True)",
                "x.max())\n    return e / e.sum()"),
        Mistake("The exponent has the wrong sign: the largest logit must get the largest probability.",
                "np.exp(x - x.max(axis=-1, keepdims=True))", "np.exp(x.min(axis=-1, keepdims=True) - x)")))
