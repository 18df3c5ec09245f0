"""A mock of CuPy for machines without a GPU: the functions of CuPy that minilm calls, on the arrays of arrays.py.

    with as_cupy():                 # inside, sys.modules["cupy"] is the mock
        model.to_device("gpu")

The mock has only the functions that minilm uses. Each takes the arguments of CuPy's function, or fewer of them
(tests/test_cupy_double.py compares them with the real package), and follows CuPy where CuPy differs from NumPy: argsort
is stable. Memory of empty() is marked as never written (running.poison; bf16: NaN), so that reading it shows.
"""

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator

import numpy as np

from minilm.kernels.emulator.arrays import _given, _to, backing, ndarray, operation
from minilm.kernels.emulator.cublas import cublas, device
from minilm.kernels.emulator.running import poison
from minilm.kernels.emulator.stream import cuda
from minilm.kernels.emulator.work import ask

UNWRITTEN_BF16 = 0xFFFF         # a NaN of bf16: 16 bits cannot hold the mark of poison
FUNCTIONS = {"finfo": np.finfo, "inf": np.inf}
# Other libraries look at these to tell whether an array is CuPy's, or whether CuPy is installed.
TYPES = {"ndarray": ndarray, "generic": np.generic, "dtype": np.dtype,
         **{name: getattr(np, name) for name in ("bool_", "float16", "float32", "float64", "complex64", "complex128",
                                                 *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))}}


def _view(function):
    """A function that launches nothing, or counts by itself what it asks for."""
    FUNCTIONS[function.__name__] = function
    return function


def _function(function):
    return _view(operation(function))


# New arrays.

@_view
def array(obj, dtype=None):
    ask("operations" if isinstance(obj, ndarray) else "copies")
    return ndarray(np.array(obj._backing if isinstance(obj, ndarray) else obj, dtype))


@_view
def asarray(a, dtype=None):
    return a if isinstance(a, ndarray) and dtype in (None, a.dtype) else array(a, dtype)


@_view
def ascontiguousarray(a):
    return a if backing(a).flags.c_contiguous else a.copy()


@_view
def empty(shape, dtype=float):
    host = np.full(shape, UNWRITTEN_BF16 if np.dtype(dtype) == np.uint16 else 1, dtype)
    poison(host.reshape(-1))            # the checkers recognise the mark; in arithmetic it is a NaN
    return ndarray(host)


@_view
def empty_like(prototype, /):
    return empty(prototype.shape, prototype.dtype)


@_function
def zeros(shape, dtype=float):
    return ndarray(np.zeros(shape, dtype))


@_function
def zeros_like(a, /):
    return ndarray(np.zeros_like(backing(a)))


@_function
def ones(shape, dtype=float):
    return ndarray(np.ones(shape, dtype))


@_function
def ones_like(a, /):
    return ndarray(np.ones_like(backing(a)))


@_function
def arange(start, stop=None, step=1, dtype=None):
    return ndarray(np.arange(*((0, start) if stop is None else (start, stop)), step, dtype))


@_function
def eye(N, M=None, k=0, dtype=float):
    return ndarray(np.eye(N, M, k, dtype))


@_function
def tri(N, M=None, k=0, dtype=float):
    return ndarray(np.tri(N, M, k, dtype))


# Memory.

@_view
def may_share_memory(a, b):
    return np.may_share_memory(backing(a), backing(b))


@_view
def shares_memory(a, b):
    return np.shares_memory(backing(a), backing(b))


# Element by element.

class ufunc:
    def __init__(self, name):
        self.function = getattr(np, name)

    def __call__(self, *inputs, out=None):
        if len(inputs) != self.function.nin:
            raise TypeError(f"{self.function.__name__} takes {self.function.nin} arguments, and out= by name")
        ask("operations")
        return _to(out, self.function(*map(backing, inputs), out=_given(out)))


for _name in ("exp", "expm1", "log", "sqrt", "tanh", "sin", "cos", "abs", "isfinite",
              "add", "subtract", "multiply", "divide", "minimum", "maximum", "logaddexp"):
    FUNCTIONS[_name] = ufunc(_name)


@_function
def clip(a, a_min, a_max):
    return ndarray(np.clip(backing(a), backing(a_min), backing(a_max)))


@_function
def where(condition, x, y):
    if not isinstance(condition, ndarray):
        raise TypeError(f"where: the condition must be an array on the GPU, not {type(condition)}")
    return ndarray(np.where(backing(condition), backing(x), backing(y)))


@_function
def copyto(dst, src, *, where):
    np.copyto(backing(dst), backing(src), where=backing(where))


# Products.

@_view
def matmul(x1, x2, /, *, out=None):
    ask("products")
    return _to(out, np.matmul(backing(x1), backing(x2), out=_given(out)))


@_function
def einsum(subscripts, /, *operands):
    return ndarray(np.einsum(subscripts, *map(backing, operands)))


# Order and indices.

@_function
def concatenate(tup, axis=0):
    return ndarray(np.concatenate([backing(a) for a in tup], axis))


@_function
def tile(A, reps):
    return ndarray(np.tile(backing(A), reps))


@_view
def expand_dims(a, axis):
    return ndarray(np.expand_dims(backing(a), axis))


@_view
def broadcast_to(array, shape):
    return ndarray(np.broadcast_to(backing(array), shape))


@_function
def take_along_axis(a, indices, axis):
    return ndarray(np.take_along_axis(backing(a), backing(indices), axis))


@_function
def put_along_axis(arr, indices, values, axis):
    index = backing(indices)
    arr = backing(arr)
    if np.unique(index, axis=axis).shape[axis] and (np.diff(np.sort(index, axis), axis=axis) == 0).any():
        raise ValueError("several values are put into one place; on a GPU it is undefined which one remains")
    np.put_along_axis(arr, index, backing(values), axis)


@_function
def argsort(a, axis=-1, kind=None):
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    return ndarray(np.argsort(backing(a), axis, kind="stable"))


@_function
def partition(a, kth, axis=-1):
    return ndarray(np.partition(backing(a), kth, axis))


class _CuPy(types.ModuleType):
    def __getattr__(self, name):
        if name == "RawModule":
            from minilm.kernels.emulator.module import RawModule
            return RawModule
        raise AttributeError(f"the mock of CuPy has no cupy.{name}. To use it: check that CuPy has it and how it "
                             "differs from NumPy, then add it to kernels/emulator/cupy.py")


cupy = _CuPy("cupy", __doc__)
cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)        # importlib.util.find_spec raises without one
vars(cuda).update(cublas=cublas, device=device)
vars(cupy).update(FUNCTIONS, **TYPES, cuda=cuda, __version__="14.0.0")


@contextlib.contextmanager
def as_cupy() -> Iterator[types.ModuleType]:
    """In the `with` block `import cupy` finds the mock. At its end the modules that were there before are there again.

    Other libraries work as before: they find cupy.ndarray, and none of their arrays is one.
    """
    before = _modules_of_cupy()
    for name in before:
        del sys.modules[name]
    sys.modules["cupy"] = cupy
    try:
        yield cupy
    finally:
        for name in _modules_of_cupy():
            del sys.modules[name]
        sys.modules.update(before)


def _modules_of_cupy():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "cupy"}
