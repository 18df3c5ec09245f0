"""NumPy functions of a Tensor: `array * tensor` is a Tensor, and np.exp(tensor) raises with advice.

NumPy offers its ufuncs to other classes by __array_ufunc__ (NEP 13). Tests: tests/test_tensor.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPERATORS = ("add", "subtract", "multiply", "divide", "matmul")
# NumPy functions of x, or of x and y, that ops.py does not have, in terms of those that it has.
INSTEAD = {"absolute": "-ops.minimum(x, -x)",
           "logaddexp": "x + ops.softplus(y - x)",
           "maximum": "-ops.minimum(-x, -y)",
           "square": "x * x"}


class NumpyFunctions:
    """Tensor.__array_ufunc__: a function for NumPy, which asks the class; None for CuPy, which asks an object.

    operations: returns the module with the functions of Tensors, minilm.ops.
    """

    def __init__(self, operations: Callable[[], Any]):
        self.operations = operations

    def __get__(self, tensor, owner):
        return self.apply if tensor is None else None

    def apply(self, tensor, ufunc, method: str, *inputs, **options):
        """`array * tensor` is a Tensor, `array == tensor` is False; any other ufunc of a Tensor raises TypeError."""
        name = ufunc.__name__
        plain_call = method == "__call__" and not options
        if plain_call and name in ("equal", "not_equal"):
            return name == "not_equal"
        if plain_call and name in OPERATORS:
            return getattr(self.operations(), name)(*inputs)
        there = name != "power" and hasattr(self.operations(), name)        # ops.power takes a number as exponent
        advice = f"use minilm.ops.{name}" if there else "use the functions of minilm.ops"
        formula = f"; ops has no {name}, but {INSTEAD[name]} is the same" if name in INSTEAD else ""
        raise TypeError(f"np.{name} does not take a Tensor: {advice}, or tensor.data for the array without a gradient"
                        f"{formula}")
