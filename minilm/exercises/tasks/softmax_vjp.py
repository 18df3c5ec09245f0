"""The vjp of softmax.

p = softmax(x) over the last axis, a scalar L depends on p, and dp is its gradient. Every p[j] of a row depends on every
x[i] of this row, because they share one denominator.

    x, dp      (N, V), float64
    returns    dx = dL/dx, (N, V)
"""

import numpy as np

from minilm import Tensor, ops
from minilm.exercises.task import Mistake, Task


def softmax(x) -> np.ndarray:
    """(N, V) -> (N, V)"""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_vjp(x, dp) -> np.ndarray:
    """dL/dx, from dL/dp."""
    p = softmax(x)
    return p * (dp - (dp * p).sum(axis=-1, keepdims=True))


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"one row": (np.array([[0.0, 1.0, -1.0]]), np.array([[1.0, 0.0, 0.0]])),
            "two rows": (rng.normal(size=(2, 4)), rng.normal(size=(2, 4))),
            "square": (rng.normal(size=(3, 3)), rng.normal(size=(3, 3)))}


def expected(x, dp) -> np.ndarray:
    leaf = Tensor(x, requires_grad=True)
    ops.softmax(leaf).backward(dp)
    return leaf.grad


TASK = Task(
    solution=softmax_vjp, returns=("dx",), cases=cases, expected=expected, read="minilm/ops.py, softmax",
    given=(softmax,), scalar=lambda x, dp: (softmax(x) * dp).sum(), wrt=("x",),
    hints=("dp_j/dx_i = p_j (1[i = j] - p_i). Sum dp_j dp_j/dx_i over j.",
           "dx_i = p_i (dp_i - sum_j dp_j p_j), with one sum for each row."),
    mistakes=(
        Mistake("The row sum is missing: only p_i (1[i = j]) is there, as if the denominator were a constant.",
                "(dp - (dp * p).sum(axis=-1, keepdims=True))", "dp"),
        Mistake("p (1 - p) is the diagonal of the Jacobian alone (it is the derivative of sigmoid). Each x_i also "
                "changes the other p_j.", "(dp - (dp * p).sum(axis=-1, keepdims=True))", "(1 - p) * dp"),
        Mistake("The sum runs over the whole array. Each row is a softmax of its own.",
                "(dp * p).sum(axis=-1, keepdims=True)", "(dp * p).sum()"),
        Mistake("The sum runs over the first axis. Each row is a softmax of its own, over the last axis.",
                "(dp * p).sum(axis=-1, keepdims=True)", "(dp * p).sum(axis=0, keepdims=True)"),
        Mistake("p is missing in the row sum.", "(dp * p).sum(axis=-1, keepdims=True)",
                "dp.sum(axis=-1, keepdims=True)"),
        Mistake("A mean in place of the row sum.", "(dp * p).sum(axis=-1, keepdims=True)",
                "(dp * p).mean(axis=-1, keepdims=True)"),
        Mistake("The axis of the row sum is dropped, so NumPy subtracts the sum of row j from column j (or raises).",
                "(dp * p).sum(axis=-1, keepdims=True)", "(dp * p).sum(axis=-1)"),
        Mistake("The row sum has the wrong sign.", "dp - (dp * p)", "dp + (dp * p)"),
        Mistake("The factor p in front is missing.", "p * (dp - ", "(dp - "),
        Mistake("This is the vjp of log softmax: dp - p sum dp.",
                "p * (dp - (dp * p).sum(axis=-1, keepdims=True))", "dp - p * dp.sum(axis=-1, keepdims=True)")))
