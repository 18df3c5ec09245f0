"""The gradient of SwiGLU, the nonlinearity of the feed-forward layer.

    y = silu(gate) * up,      silu(g) = g sigmoid(g),      elementwise

    gate, up, dy    float64 arrays of one shape
    returns         dgate and dup, of the same shape

Shazeer 2020, arXiv:2002.05202.
"""

import numpy as np

from minilm import Tensor, ops
from minilm.exercises.task import Mistake, Task


def swiglu_backward(gate, up, dy) -> tuple:
    """dL/dgate and dL/dup, from dL/dy."""
    s = 1 / (1 + np.exp(-gate))
    dup = dy * gate * s
    dgate = dy * up * (s + gate * s * (1 - s))
    return dgate, dup


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"three numbers": (np.array([0.0, 1.0, -2.0]), np.array([1.0, 2.0, 3.0]), np.array([1.0, -1.0, 0.5])),
            "a matrix": (rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=(2, 3)))}


def expected(gate, up, dy) -> tuple:
    leaves = Tensor(gate, requires_grad=True), Tensor(up, requires_grad=True)
    (leaves[0] * ops.sigmoid(leaves[0]) * leaves[1]).backward(dy)
    return leaves[0].grad, leaves[1].grad


TASK = Task(
    solution=swiglu_backward, returns=("dgate", "dup"), cases=cases, expected=expected, read="minilm/layers.py, swiglu",
    scalar=lambda gate, up, dy: (gate / (1 + np.exp(-gate)) * up * dy).sum(), wrt=("gate", "up"),
    hints=("y is a product of two factors: dup needs no derivative, dgate needs silu'. silu is itself a product.",
           "silu'(g) = s + g s (1 - s), with s = sigmoid(g). dup = dy silu(gate), dgate = dy up silu'(gate)."),
    mistakes=(
        Mistake("silu' lacks its second term: sigmoid(g) also depends on g.", "(s + gate * s * (1 - s))", "s"),
        Mistake("silu' lacks its first term, the derivative of the factor g.", "(s + gate * s * (1 - s))",
                "(gate * s * (1 - s))"),
        Mistake("up is missing in dgate.", "dy * up * (s", "dy * (s"),
        Mistake("The sigmoid is missing in dup: y = g sigmoid(g) up.", "dy * gate * s", "dy * gate"),
        Mistake("The two results are in the wrong order: dgate comes first.", "return dgate, dup", "return dup, dgate"),
        Mistake("sigmoid' is s (1 - s); the factor s is missing.", "gate * s * (1 - s)", "gate * (1 - s)"),
        Mistake("sigmoid' is s (1 - s), not s (1 + s).", "(1 - s)", "(1 + s)"),
        Mistake("The gate is missing in dup: this is the derivative for y = sigmoid(gate) up.", "dy * gate * s",
                "dy * s"),
        Mistake("This is the gradient for y = sigmoid(gate) up, the gate of an LSTM: silu has a factor g more.",
                "(s + gate * s * (1 - s))", "(s * (1 - s))")))
