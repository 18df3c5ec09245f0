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


def slopes(task: Task, arguments: tuple, results: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """What all results must be, by finite differences. results: arrays of the right shapes."""
    return tuple(np.array([difference(task, arguments, i, place) for place in np.ndindex(result.shape)])
                 .reshape(result.shape) for i, result in enumerate(results))


def difference_error(by_differences: tuple[np.ndarray, ...], results: tuple[np.ndarray, ...]) -> float:
    """max|result - finite differences| / max(max|finite differences|, 1e-3), the largest of all results."""
    errors = [np.abs(slope - result).max(initial=0) / max(np.abs(slope).max(initial=0), 1e-3)
              for slope, result in zip(by_differences, results, strict=True)]
    return float(max(errors))
