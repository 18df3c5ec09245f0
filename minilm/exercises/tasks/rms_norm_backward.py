"""The gradient of RMSNorm.

    y = x r weight,      r = 1 / sqrt(mean(x^2) + eps),      the mean over the last axis

    x          (N, D), one row per token
    weight     (D,)
    dy         (N, D), dL/dy
    eps        a number above 0
    returns    dx (N, D) and dweight (D,)

Zhang and Sennrich 2019, arXiv:1910.07467.
"""

import numpy as np

from minilm import Tensor, layers
from minilm.exercises.task import Mistake, Task


def rms_norm_backward(x, weight, dy, eps) -> tuple:
    """dL/dx and dL/dweight, from dL/dy."""
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    n = x * r
    dn = dy * weight
    dx = r * (dn - n * (dn * n).mean(axis=-1, keepdims=True))
    dweight = (dy * n).sum(axis=0)
    return dx, dweight


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"one row, weight 1": (np.array([[1.0, 2.0, -2.0]]), np.ones(3), np.array([[1.0, 0.0, 0.0]]), 1e-6),
            "two rows": (rng.normal(size=(2, 4)), rng.normal(size=4), rng.normal(size=(2, 4)), 1e-6),
            "a large eps": (rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=(3, 3)), 0.5)}


def expected(x, weight, dy, eps) -> tuple:
    leaves = Tensor(x, requires_grad=True), Tensor(weight, requires_grad=True)
    layers.rms_norm(*leaves, eps).backward(dy)
    return leaves[0].grad, leaves[1].grad


TASK = Task(
    solution=rms_norm_backward, returns=("dx", "dweight"), cases=cases, expected=expected,
    read="minilm/layers.py, rms_norm", wrt=("x", "weight"),
    scalar=lambda x, weight, dy, eps: (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight * dy).sum(),
    hints=("With n = x r and dn = dy * weight: x acts on n directly, and through r. dr/dx_i = -r^3 x_i / D.",
           "dx = r (dn - n mean(dn * n)), with one mean for each row; dweight is the sum of dy * n over all rows."),
    mistakes=(
        Mistake("r is treated as a constant, so the second term of dx is missing.",
                "(dn - n * (dn * n).mean(axis=-1, keepdims=True))", "dn"),
        Mistake("A sum over the row in place of the mean: r contains a mean over D numbers, which brings 1/D.",
                "(dn * n).mean(axis=-1, keepdims=True)", "(dn * n).sum(axis=-1, keepdims=True)"),
        Mistake("dweight is computed from x instead of n: the weight multiplies the normalised x.",
                "(dy * n).sum(axis=0)", "(dy * x).sum(axis=0)"),
        Mistake("The weight is missing in dx: dy first goes back through the product with the weight.",
                "dn = dy * weight", "dn = dy"),
        Mistake("eps is missing in r.", " + eps)", ")"),
        Mistake("eps is added outside the root.", "np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)",
                "(np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps)"),
        Mistake("Both means run over the rows. Each row is normalised by itself: they run over the last axis.",
                "np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)\n    n = x * r\n    dn = dy * weight\n    "
                "dx = r * (dn - n * (dn * n).mean(axis=-1, keepdims=True))",
                "np.sqrt((x * x).mean(axis=0, keepdims=True) + eps)\n    n = x * r\n    dn = dy * weight\n    "
                "dx = r * (dn - n * (dn * n).mean(axis=0, keepdims=True))"),
        Mistake("dweight is summed over the last axis. One weight is used in every row: sum over the rows.",
                "(dy * n).sum(axis=0)", "(dy * n).sum(axis=-1)"),
        Mistake("dweight is not summed. One weight is used in every row: its gradient is the sum over the rows.",
                "(dy * n).sum(axis=0)", "dy * n"),
        Mistake("The weight is a factor of dweight, too. y = n weight, and its derivative in the weight is n.",
                "(dy * n).sum(axis=0)", "(dn * n).sum(axis=0)"),
        Mistake("dweight is averaged over the rows. One weight is used in every row: its gradients are added.",
                "(dy * n).sum(axis=0)", "(dy * n).mean(axis=0)"),
        Mistake("The weight is missing in the mean: it is the mean of dn * n, not of dy * n.", "(dn * n).mean",
                "(dy * n).mean"),
        Mistake("The second term of dx has the wrong sign: dr/dx is negative.", "dn - n *", "dn + n *"),
        Mistake("The factor r in front of dx is missing.", "r * (dn - ", "(dn - "),
        Mistake("The second term of dx has x where n belongs: a factor r is missing.", "(dn - n * (dn * n)",
                "(dn - x * (dn * n)"),
        Mistake("This is the gradient of LayerNorm: RMSNorm does not subtract the mean.", "r * (dn - n",
                "r * (dn - dn.mean(axis=-1, keepdims=True) - n")))
