"""The vector-Jacobian product (vjp) of exp.

y = exp(x), elementwise. A scalar L depends on y, and dy is its gradient: dy[i] = dL/dy[i].
Return dx[i] = dL/dx[i]. This is the chain rule, and every gradient of minilm is made of such steps.

    x, dy      float64 arrays of one shape, any shape
    returns    dx, of the same shape
"""

import numpy as np

from minilm import Tensor, ops
from minilm.exercises.task import Mistake, Task


def exp_vjp(x, dy) -> np.ndarray:
    """dL/dx, from dL/dy."""
    return dy * np.exp(x)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"two numbers": (np.array([0.0, 1.0]), np.array([3.0, -1.0])),
            "a matrix": (rng.normal(size=(2, 3)), rng.normal(size=(2, 3))),
            "an array without axes": (np.array(0.5), np.array(-2.0))}


def expected(x, dy) -> np.ndarray:
    leaf = Tensor(x, requires_grad=True)
    ops.exp(leaf).backward(dy)
    return leaf.grad


TASK = Task(
    solution=exp_vjp, returns=("dx",), cases=cases, expected=expected, read="minilm/ops.py, exp",
    scalar=lambda x, dy: (np.exp(x) * dy).sum(), wrt=("x",),
    hints=("Each x[i] acts on one y[i] alone. So dL/dx[i] is dL/dy[i] times one derivative.",
           "d exp(x) / dx = exp(x), so dx = dy exp(x), elementwise."),
    mistakes=(
        Mistake("dy is missing: this is dy/dx, the derivative of exp. The vjp multiplies it by dL/dy.",
                "dy * np.exp(x)", "np.exp(x)"),
        Mistake("This is the rule of log: it divides by the derivative of exp.", "dy * np.exp(x)", "dy / np.exp(x)"),
        Mistake("The rule of powers does not hold for exp: the derivative of exp(x) is not x exp(x - 1).",
                "dy * np.exp(x)", "dy * x * np.exp(x - 1)"),
        Mistake("The derivative is taken at dy; it is the derivative at x.", "dy * np.exp(x)", "x * np.exp(dy)"),
        Mistake("The chain rule multiplies the two derivatives; they are added here.", "dy * np.exp(x)",
                "dy + np.exp(x)"),
        Mistake("The result is summed to one number. Each x[i] has a derivative of its own.", "dy * np.exp(x)",
                "(dy * np.exp(x)).sum()"),
        Mistake("The derivative of exp is missing: this is dL/dy.", "dy * np.exp(x)", "dy"),
        Mistake("dy goes into the exponential. The chain rule multiplies by dy outside.", "dy * np.exp(x)",
                "np.exp(dy * x)")))
