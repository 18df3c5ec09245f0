"""Check a hand-written gradient against finite differences of its function.

    >>> import numpy as np
    >>> from minilm import Tensor, ops
    >>> from minilm.gradcheck import gradcheck
    >>> x = Tensor(np.random.default_rng(0).normal(size=(3, 4)), requires_grad=True)
    >>> gradcheck(ops.tanh, x) < 1e-8
    True

Inputs should be of order 1. Tiny inputs hide wrong gradients: an error of 100% in a term that is small
next to the other terms passes any tolerance. For the weights of a Transformer, see
minilm.exact.gradients.redraw_weights.
Tests: tests/test_gradcheck.py, which checks that wrong gradients are found.
"""

from collections.abc import Callable

import numpy as np

from minilm import checks, ops
from minilm.backend import array_module, to_numpy
from minilm.tensor import Tensor

# The smallest denominator of a relative error.
FLOOR = 1e-3


class GradientError(AssertionError):
    """The gradient from backward differs from finite differences, or is missing."""


def gradcheck(function: Callable[..., Tensor], *tensors: Tensor, tolerance: float = 1e-6, step: float = 6e-6,
              directions: int | None = None, rng: np.random.Generator | None = None) -> float:
    """Compare backward with central differences, for every Tensor that requires a gradient.

    function    maps the tensors to a Tensor of any shape; must return the same value each time
    tensors     its arguments, float64; those with requires_grad are checked, on copies of their arrays
    tolerance   for max|a - n| / max(max|n|, 1e-3) of each Tensor: a is the gradient from backward, n the one from
                finite differences
    step        of the difference, relative to max(1, |x|). The error is of order step^2 from
                curvature plus 1e-16/step from rounding: about 1e-10 for a well-scaled function
    directions  None checks every element (two evaluations each); an integer checks that many
                random directions over all Tensors at once, for functions of many parameters
    rng         numpy Generator, for the directions and for c in the next line

    An output y that is not a scalar is replaced by sum(c y), with random numbers c of its shape: the cotangent of y.
    Returns the largest relative error. Raises GradientError with the worst element and both values,
    TypeError if a Tensor is not float64 or the function gives no Tensor, ValueError if no Tensor requires
    a gradient, and for settings out of range.
    """
    rng = np.random.default_rng(0) if rng is None else checks.generator("gradcheck", rng)
    checks.number("gradcheck", "tolerance", tolerance, above=0)
    checks.number("gradcheck", "step", step, above=0)
    checked = list(dict.fromkeys(t for t in tensors if isinstance(t, Tensor) and t.requires_grad))
    if not checked:
        raise ValueError("gradcheck: no Tensor has requires_grad=True, so there is nothing to check; "
                         "make the inputs with Tensor(array, requires_grad=True)")
    if any(t.dtype != np.float64 for t in checked):
        raise TypeError("gradcheck needs float64, because differences of float32 are rounding noise; convert the "
                        "inputs with .astype(np.float64)")
    checks.integer("gradcheck", "directions", 1 if directions is None else directions, at_least=1)

    kept = [(t.data, t.grad, t.grad_buffer) for t in checked]
    try:
        for t in checked:           # arrays of their own: those of the caller may share memory, or be read-only
            t.data, t.grad, t.grad_buffer = t.data.copy(), None, None
        return _check(function, tensors, checked, tolerance, step, directions, rng)
    finally:
        for t, before in zip(checked, kept):
            t.data, t.grad, t.grad_buffer = before


def _check(function, tensors, checked, tolerance, step, directions, rng):
    output = function(*tensors)
    if not isinstance(output, Tensor):
        raise TypeError(f"gradcheck: function gave {checks.shown(output)}; it must give a Tensor")
    cotangent = rng.normal(size=output.shape) if output.size > 1 else np.ones(output.shape)
    cotangent = array_module(output.data).asarray(cotangent)

    def value():
        return float((function(*tensors).data * cotangent).sum())

    ops.sum(output * cotangent).backward()
    analytic = [None if t.grad is None else to_numpy(t.grad) for t in checked]
    if missing := [i for i, a in enumerate(analytic) if a is None]:
        raise GradientError(f"gradcheck: no gradient reached Tensor {missing[0]} (shape {checked[missing[0]].shape}): "
                            "the output does not depend on it, or a vjp returned no gradient for it")
    if directions is None:
        return max(_every_element(i, t, a, value, step, tolerance) for i, (t, a) in enumerate(zip(checked, analytic)))
    return max(_one_direction(i, checked, analytic, value, step, tolerance, rng) for i in range(directions))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """max|actual - expected| / max(max|expected|, 1e-3), and the index of the worst element."""
    if not np.size(expected):
        return 0.0, ()
    difference = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(difference), np.shape(difference))
    return float(difference[worst] / max(np.abs(expected).max(), FLOOR)), tuple(int(i) for i in worst)


def _every_element(which, tensor, analytic, value, step, tolerance):
    numeric = np.empty(tensor.shape)
    for index in np.ndindex(tensor.shape):
        x = tensor.data[index].item()       # a Python number: on a GPU, tensor.data[index] is a view
        h = step * max(1.0, abs(x))
        tensor.data[index] = x + h
        above = value()
        tensor.data[index] = x - h
        numeric[index] = (above - value()) / (2 * h)
        tensor.data[index] = x
    error, worst = relative_error(analytic, numeric)
    if not error <= tolerance:       # also when it is NaN
        raise GradientError(f"Tensor {which}, shape {tensor.shape}: relative error {error:.2e} "
                            f"(tolerance {tolerance:.0e}), worst at {worst}: "
                            f"backward {analytic[worst]:.10g}, differences {numeric[worst]:.10g}")
    return error


def _one_direction(which, tensors, analytic, value, step, tolerance, rng):
    arrows = [rng.normal(size=t.shape) for t in tensors]
    length = np.sqrt(sum((a * a).sum() for a in arrows)) or 1.0             # 0 for arrays without elements
    before = [t.data for t in tensors]
    values = []
    for sign in (1, -1):
        for t, x, a in zip(tensors, before, arrows):
            t.data = array_module(x).asarray(x + array_module(x).asarray(sign * step * a / length))
        values.append(value())
    for t, x in zip(tensors, before):
        t.data = x
    numeric = (values[0] - values[1]) / (2 * step)
    exact = sum((g * a).sum() for g, a in zip(analytic, arrows)) / length
    # A direction nearly orthogonal to the gradient has almost no derivative: compare the error with a typical one.
    size = max(1, sum(t.size for t in tensors))
    typical = np.sqrt(sum((g * g).sum() for g in analytic) / size)
    error = float(abs(exact - numeric) / max(abs(numeric), typical, FLOOR))
    if not error <= tolerance:
        raise GradientError(f"direction {which}: relative error {error:.2e} (tolerance {tolerance:.0e}): "
                            f"backward {exact:.10g}, differences {numeric:.10g}")
    return error
