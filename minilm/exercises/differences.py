"""Finite differences of a task's scalar: what its results must be, without any formula for them."""

import numpy as np

from minilm.exercises.task import Task, copies

STEP = 6e-6             # as in gradcheck


def difference(task: Task, arguments: tuple, result: int, place: tuple[int, ...]) -> float:
    """The derivative that number `place` of a result must be equal to, by a central difference of task.scalar."""
    assert task.scalar is not None
    index = task.arguments.index(task.wrt[result])
    x = np.asarray(arguments[index])[place]
    h = STEP * max(1.0, abs(x))
    values = []
    for sign in (1, -1):
        moved = [*copies(arguments)]
        moved[index] = np.array(moved[index], float)
        moved[index][place] = x + sign * h
        values.append(float(task.scalar(*moved)))
    return (values[0] - values[1]) / (2 * h)


def difference_error(task: Task, arguments: tuple, results: tuple[np.ndarray, ...]) -> float:
    """max|result - finite differences| / max(max|finite differences|, 1e-3), the largest of all results."""
    errors = []
    for i, result in enumerate(results):
        slopes = np.array([difference(task, arguments, i, place) for place in np.ndindex(result.shape)])
        slopes = slopes.reshape(result.shape)
        errors.append(np.abs(slopes - result).max(initial=0) / max(np.abs(slopes).max(initial=0), 1e-3))
    return float(max(errors))
