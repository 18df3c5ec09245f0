"""NumPy functions of a Tensor: `array * tensor` is a Tensor, and np.exp(tensor) raises with advice.

NumPy asks other classes for its ufuncs by __array_ufunc__ (NEP 13), for its other functions, as np.where, by
__array_function__ (NEP 18), and for an array by __array__. Without them np.where makes an array of objects, without a
gradient or an error. Tests: tests/test_tensor.py.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

OPERATORS = ("add", "subtract", "multiply", "divide", "power", "matmul")
# NumPy functions of x, or of x and y, that ops.py does not have, in terms of those that it has.
INSTEAD = {"logaddexp": "x + ops.softplus(y - x)",
           "square": "x * x"}
ELSEWHERE = {"einsum": "minilm.einsum.einsum"}
NAMES = {"stack": "concatenate", "hstack": "concatenate", "vstack": "concatenate", "dot": "matmul", "take": "getitem"}


def operations() -> Any:
    """The functions of Tensors, minilm.ops. It imports tensor.py, which imports this file."""
    return sys.modules["minilm.ops"]


class Ufuncs:
    """Tensor.__array_ufunc__: a function for NumPy, which asks the class; None for CuPy, which asks an object."""

    def __get__(self, tensor, owner):
        return self.apply if tensor is None else None

    def apply(self, tensor: Any, ufunc: Any, method: str, *inputs, **options):
        """`array * tensor` is a Tensor, `array == tensor` is False; any other ufunc of a Tensor raises TypeError."""
        name = ufunc.__name__
        plain_call = method == "__call__" and not options
        if plain_call and name in ("equal", "not_equal"):
            return name == "not_equal"
        if plain_call and name in OPERATORS:
            return getattr(operations(), name)(*inputs)
        advise(name)


class NumpyFunctions:
    """The base class of Tensor: the methods that NumPy calls."""

    __slots__ = ()
    __array_ufunc__ = Ufuncs()

    def __array_function__(self, function, types, inputs, options):
        if function.__name__ in ("shape", "ndim", "size"):
            return getattr(inputs[0], function.__name__)
        advise(function.__name__)

    def __array__(self, *arguments, **options):
        raise TypeError("np.array and np.asarray do not take a Tensor: use tensor.data for the array without a "
                        "gradient, tensor.item() for a number, or minilm.ops.concatenate to join Tensors")


def advise(name: str) -> NoReturn:
    """Raises TypeError for a function of NumPy, with the one of minilm.ops to use."""
    there = hasattr(operations(), NAMES.get(name, name))
    best = f"minilm.ops.{NAMES.get(name, name)}" if there else "the functions of minilm.ops"
    advice = f"use {ELSEWHERE.get(name, best)}"
    formula = f"; ops has no {name}, but {INSTEAD[name]} is the same" if name in INSTEAD else ""
    raise TypeError(f"np.{name} does not take a Tensor: {advice}, or tensor.data for the array without a gradient"
                    f"{formula}")
