"""One step of AdamW.

    m <- b1 m + (1 - b1) g,      v <- b2 v + (1 - b2) g^2
    p <- p - lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay p )

t is the number of this update, from 1 on. m and v start at 0, so they are too small at first; the divisions by 1 - b^t
correct this. The decay is outside the fraction (decoupled), and is scaled by lr as in PyTorch.

    p, g, m, v                  (D, F): parameter, its gradient, and the state before this update
    t                           integer
    lr, b1, b2, eps, decay      numbers
    returns                     p, m and v after the update: new arrays, the old ones stay as they are

Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

import numpy as np

from minilm import Tensor, plain
from minilm.exercises.task import Mistake, Task, forms


def adamw(p, g, m, v, t, lr, b1, b2, eps, decay) -> tuple:
    """p, m and v after update number t."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g ** 2
    direction = m / (1 - b1 ** t) / (np.sqrt(v / (1 - b2 ** t)) + eps)
    return p - lr * (direction + decay * p), m, v


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    def normal():
        return rng.normal(size=(2, 3))
    return {"the first update": (normal(), normal(), np.zeros((2, 3)), np.zeros((2, 3)), 1, 0.1, 0.9, 0.95, 1e-8, 0.0),
            "the third, with decay": (normal(), normal(), normal(), normal() ** 2, 3, 0.1, 0.8, 0.95, 1e-8, 0.3),
            "a large eps": (normal(), normal(), normal(), normal() ** 2, 2, 0.5, 0.9, 0.99, 0.5, 0.1)}


def expected(p, g, m, v, t, lr, b1, b2, eps, decay) -> tuple:
    leaf = Tensor(p, requires_grad=True)
    leaf.grad = g
    state = {"p": (t - 1, m, v)}
    plain.adamw({"p": leaf}, state, lr, (b1, b2), eps, decay)
    return leaf.data, *state["p"][1:]


TASK = Task(
    solution=adamw, returns=("p", "m", "v"), cases=cases, expected=expected, read="minilm/plain.py, adamw",
    hints=("First the new m and v, then the direction from both, then p. The m and v that are returned are not "
           "corrected.",
           "direction = m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps); p - lr (direction + decay p)."),
    mistakes=(
        Mistake("Neither m nor v is corrected for its start at 0: the first steps are too long (with these betas).",
                "m / (1 - b1 ** t) / (np.sqrt(v / (1 - b2 ** t)) + eps)", "m / (np.sqrt(v) + eps)"),
        Mistake("v is not corrected for its start at 0; m is.", "np.sqrt(v / (1 - b2 ** t))", "np.sqrt(v)"),
        Mistake("m is not corrected for its start at 0; v is.", "m / (1 - b1 ** t)", "m"),
        Mistake("The decay is left out.", "(direction + decay * p)", "direction"),
        Mistake("The decay has the wrong sign: p would grow.", "direction + decay", "direction - decay"),
        Mistake("t is the number of this update, from 1 on; the corrections use t - 1.",
                "direction = m / (1 - b1 ** t)", "t = t - 1\n    direction = m / (1 - b1 ** t)"),
        Mistake("t is the number of this update, from 1 on; the corrections use t + 1.",
                "direction = m / (1 - b1 ** t)", "t = t + 1\n    direction = m / (1 - b1 ** t)"),
        Mistake("The decay is part of the gradient, as in Adam with an L2 penalty. Then sqrt(v) scales it. In AdamW it "
                "acts on p alone.", "m = b1 * m + (1 - b1) * g", "g = g + decay * p\n    decay = 0\n    m = b1 * m + "
                "(1 - b1) * g"),
        Mistake("eps is added within the root.", "(np.sqrt(v / (1 - b2 ** t)) + eps)",
                "np.sqrt(v / (1 - b2 ** t) + eps)"),
        Mistake("The decay is not scaled by lr.", "p - lr * (direction + decay * p)",
                "p - lr * direction - decay * p"),
        Mistake("v is the running mean of g, not of g^2.", "(1 - b2) * g ** 2", "(1 - b2) * np.abs(g)"),
        *forms("b1 and b2 are exchanged: b1 belongs to m, b2 to v.",
               "m = b1 * m + (1 - b1) * g\n    v = b2 * v + (1 - b2) * g ** 2",
               "m = b2 * m + (1 - b2) * g\n    v = b1 * v + (1 - b1) * g ** 2",
               "b1, b2 = b2, b1\n    m = b1 * m + (1 - b1) * g\n    v = b2 * v + (1 - b2) * g ** 2"),
        Mistake("The root is missing: the step is divided by v, not by sqrt(v).", "np.sqrt(v / (1 - b2 ** t))",
                "(v / (1 - b2 ** t))"),
        Mistake("The corrected m and v are returned. The state of the next update is the uncorrected one.",
                "* p), m, v", "* p), m / (1 - b1 ** t), v / (1 - b2 ** t)"),
        Mistake("The step goes up the gradient.", "p - lr * (direction", "p - lr * (-direction")))
