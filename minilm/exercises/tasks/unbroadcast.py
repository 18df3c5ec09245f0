"""The gradient of broadcasting.

NumPy broadcasts: in y = x + z with x of shape (3,) and z of shape (2, 3), each number of x is used twice. dy has the
shape of y. The gradient of a number that is used several times is the sum over its uses, so dx is the sum of dy over
the axes that broadcasting has added or stretched.

    dy         float64 array, of the shape that x was broadcast to
    shape      the shape of x: dy's axes from the right, each of the same length or 1; it may have fewer axes
    returns    dx, of shape `shape`
"""

import numpy as np

from minilm import ops
from minilm.exercises.task import Mistake, Task, forms


def unbroadcast(dy, shape) -> np.ndarray:
    """dL/dx, of shape `shape`, from dL/dy."""
    added = dy.ndim - len(shape)
    dx = dy.sum(axis=tuple(range(added)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1)
    return dx.sum(axis=stretched, keepdims=True)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"nothing was broadcast": (rng.normal(size=(2, 3)), (2, 3)),
            "a row to a matrix": (rng.normal(size=(2, 3)), (3,)),
            "a column to a matrix": (rng.normal(size=(2, 3)), (2, 1)),
            "a number to a matrix": (rng.normal(size=(2, 3)), ()),
            "both at once": (rng.normal(size=(4, 2, 3)), (2, 1)),
            "square": (rng.normal(size=(3, 3)), (3,)),
            "an axis of length 1 in both": (rng.normal(size=(2, 1)), (2, 1))}


TASK = Task(
    solution=unbroadcast, returns=("dx",), cases=cases, read="minilm/ops.py, unbroadcast",
    expected=lambda dy, shape: np.asarray(ops.unbroadcast(dy, shape)),
    hints=("Broadcasting does two things: it adds axes on the left, and it stretches axes of length 1. Undo one, "
           "then the other.",
           "Sum over the first dy.ndim - len(shape) axes, which disappear. Then sum over each axis where shape has 1, "
           "with keepdims=True."),
    mistakes=(
        Mistake("Axes that were stretched from length 1 are not summed; only the added ones are.",
                "dx.sum(axis=stretched, keepdims=True)", "dx"),
        Mistake("The sum over the stretched axes drops them: dx must have shape `shape`, with its axes of length 1.",
                "keepdims=True", "keepdims=False"),
        Mistake("The added axes are kept with length 1. They must disappear: x does not have them.",
                "dy.sum(axis=tuple(range(added)))", "dy.sum(axis=tuple(range(added)), keepdims=True)"),
        *forms("Axes that broadcasting has added are not summed; only the stretched ones are.",
               "dy.sum(axis=tuple(range(added)))", "dy",
               "dy\n    return dy.sum(axis=tuple(added + i for i, n in enumerate(shape) if n == 1), keepdims=True)"),
        Mistake("dy is returned as it is. Where broadcasting has added or stretched an axis, it has another shape than "
                "x.", "dx.sum(axis=stretched, keepdims=True)", "dy"),
        Mistake("dy is summed over its first axis, whatever the shape of x is. Compare the two shapes.",
                "dx.sum(axis=stretched, keepdims=True)", "dy.sum(axis=0)"),
        Mistake("Means instead of sums. Each use of a number adds its gradient.",
                "dy.sum(axis=tuple(range(added)))\n    stretched = tuple(i for i, n in enumerate(shape) if n == 1)\n"
                "    return dx.sum(axis=stretched, keepdims=True)",
                "dy.mean(axis=tuple(range(added)))\n    stretched = tuple(i for i, n in enumerate(shape) if n == 1)\n"
                "    return dx.mean(axis=stretched, keepdims=True)"),
        Mistake("The stretched axes are averaged. Each use of a number adds its gradient: sum them.",
                "dx.sum(axis=stretched, keepdims=True)", "dx.mean(axis=stretched, keepdims=True)"),
        Mistake("The added axes are averaged. Each use of a number adds its gradient: sum them.",
                "dy.sum(axis=tuple(range(added)))", "dy.mean(axis=tuple(range(added)))"),
        Mistake("The last axes are summed away. Broadcasting adds axes on the left.",
                "tuple(range(added))", "tuple(range(dy.ndim - added, dy.ndim))"),
        Mistake("One entry of each stretched axis is kept, instead of the sum of all.",
                "dx.sum(axis=stretched, keepdims=True)",
                "dx[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]")))
