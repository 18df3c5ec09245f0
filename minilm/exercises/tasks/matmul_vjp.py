"""The vjp of a matrix product.

y = x w. A scalar L depends on y, and dy is its gradient.

    x          (N, D), one row per token
    w          (D, F), the weights
    dy         (N, F), dL/dy
    returns    dx (N, D) and dw (D, F)
"""

import numpy as np

from minilm import Tensor
from minilm.exercises.task import Mistake, Task


def matmul_vjp(x, w, dy) -> tuple:
    """dL/dx and dL/dw, from dL/dy."""
    dx = dy @ w.T
    dw = x.T @ dy
    return dx, dw


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"(2, 3) @ (3, 4)": (rng.normal(size=(2, 3)), rng.normal(size=(3, 4)), rng.normal(size=(2, 4))),
            "square": (rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rng.normal(size=(3, 3))),
            "one row": (rng.normal(size=(1, 2)), rng.normal(size=(2, 3)), rng.normal(size=(1, 3)))}


def expected(x, w, dy) -> tuple:
    leaves = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
    (leaves[0] @ leaves[1]).backward(dy)
    return leaves[0].grad, leaves[1].grad


TASK = Task(
    solution=matmul_vjp, returns=("dx", "dw"), cases=cases, expected=expected, read="minilm/ops.py, matmul",
    scalar=lambda x, w, dy: ((x @ w) * dy).sum(), wrt=("x", "w"),
    hints=("y[n, f] = sum_d x[n, d] w[d, f]. In which y does x[n, d] occur, and with which factor? The shapes then "
           "leave one choice.",
           "dx[n, d] = sum_f dy[n, f] w[d, f], which is dy w^T. dw[d, f] = sum_n x[n, d] dy[n, f], which is x^T dy."),
    mistakes=(
        Mistake("w is not transposed in dx. In a square case the shapes fit, and the numbers are wrong.", "dy @ w.T",
                "dy @ w"),
        Mistake("dw is transposed: it must have the shape of w, (D, F).", "x.T @ dy", "dy.T @ x"),
        Mistake("The two results are in the wrong order.", "return dx, dw", "return dw, dx"),
        Mistake("dw is averaged over the rows. Each row uses the same w, and the gradients of uses are added.",
                "x.T @ dy", "x.T @ dy / len(x)"),
        Mistake("x is not transposed in dw.", "x.T @ dy", "x @ dy"),
        Mistake("dy is missing in dx: every entry of dy is taken as 1.", "dy @ w.T", "np.ones_like(dy) @ w.T"),
        Mistake("dy is missing in dw: every entry of dy is taken as 1.", "x.T @ dy", "x.T @ np.ones_like(dy)")))
