"""A mock of CuPy's array for machines without a GPU: a NumPy array that NumPy cannot reach.

Only explicit conversions cross the border between host and device, under CuPy's names: numbers go in, `.get()` and
`.item()` come out. An implicit conversion raises TypeError: a NumPy function of such an array, or an operation of such
an array with a NumPy array. Two cases are stricter than in CuPy: a NumPy array as an index raises TypeError, and an
index out of bounds raises IndexError (CuPy wraps it around).

The array follows CuPy where CuPy differs from NumPy. An element is an array without axes instead of a number, and a
view of its array (x[0] changes when x changes). A reduction also returns an array without axes. Assigning two values to
one place raises ValueError, because on a GPU either of them may remain. The mock has only what minilm uses.
Tests: tests/test_cupy_double.py, which compares the names and arguments with the real package; tests/test_device.py.
"""

import functools
import operator
import weakref
from types import SimpleNamespace

import numpy as np

from minilm.kernels.emulator.stream import begin_copy, finish_copies
from minilm.kernels.emulator.work import ask, wait

NUMBERS = bool, int, float, complex, np.bool_, np.number
ADDRESSES = weakref.WeakValueDictionary()       # {address: the NumPy array there} of arrays that were asked for theirs
DTYPES = tuple(map(np.dtype, "? b h i l q B H I L Q e f d F D".split()))


class ndarray:
    """A mock of cupy.ndarray; see the module. `_backing` is the NumPy array behind it, owned by it alone."""

    __module__ = "cupy"             # minilm.backend recognises CuPy's arrays by it
    __slots__ = ("_backing",)
    __hash__ = None
    __array_ufunc__ = None          # np.float64(2) * x asks x; np.exp(x) raises TypeError

    def __init__(self, backing):
        backing = np.asarray(backing)
        if backing.dtype not in DTYPES:
            raise TypeError(f"Unsupported dtype {backing.dtype}")
        self._backing = backing

    # Conversions: implicit ones raise, explicit ones return NumPy arrays and numbers.

    def __array__(self, *args, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                        "Please use `.get()` to construct a NumPy array explicitly.")

    def __array_function__(self, function, *rest):
        raise TypeError(f"numpy.{function.__name__} of an array on the GPU; call the same function of array_module(x)")

    def __reduce_ex__(self, protocol):
        raise TypeError("an array on the GPU cannot be pickled, or copied by the module copy; use .get() or .copy()")

    def __getattr__(self, name):
        raise AttributeError(f"the mock of CuPy has no cupy.ndarray.{name}. To use it: check that CuPy has it and how "
                             "it differs from NumPy, then add it to kernels/emulator/arrays.py")

    def __minilm_buffer__(self):
        """The NumPy array itself; only for the kernels of the emulator."""
        return self._backing

    def get(self, *, out=None, blocking=True):
        if out is not None:
            if blocking:
                raise TypeError("the mock of CuPy copies to `out` with blocking=False alone")
            begin_copy(out, self._backing)
            return out
        _wait()
        return self._backing.copy()

    def item(self):
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        _wait()
        return self._backing.item()

    def __float__(self):
        return float(self._one())

    def __int__(self):
        return int(self._one())

    def _one(self):
        if self.size != 1:
            raise TypeError("only an array of one element can be converted to a number")
        _wait()
        return self._backing.item()

    def __bool__(self):
        if self.size != 1:
            raise ValueError("The truth value of an array with more or fewer elements than one is ambiguous")
        _wait()
        return bool(self._backing.item())

    def __repr__(self):
        return repr(self._backing)

    # Attributes.

    shape = property(lambda self: self._backing.shape)
    ndim = property(lambda self: self._backing.ndim)
    size = property(lambda self: self._backing.size)
    dtype = property(lambda self: self._backing.dtype)
    strides = property(lambda self: self._backing.strides)
    nbytes = property(lambda self: self._backing.nbytes)
    itemsize = property(lambda self: self._backing.itemsize)
    T = property(lambda self: ndarray(self._backing.T))

    @property
    def base(self):
        return None if self._backing.base is None else ndarray(self._backing.base)

    @property
    def data(self):
        owner = self._backing if self._backing.base is None else self._backing.base
        ADDRESSES[owner.ctypes.data] = owner
        return SimpleNamespace(ptr=self._backing.ctypes.data)

    @property
    def flags(self):
        flags = self._backing.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    @property
    def real(self):
        return ndarray(self._backing.real)

    @real.setter
    def real(self, value):
        ask("operations")
        self._backing.real = backing(value)

    @property
    def imag(self):
        return ndarray(self._backing.imag)

    @imag.setter
    def imag(self, value):
        ask("operations")
        self._backing.imag = backing(value)

    # Indexing.

    def __len__(self):
        return len(self._backing)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        index = _index(key)
        if any(isinstance(part, np.ndarray) for part in index):
            ask("operations")
        if _has_mask(index):
            _wait()
        found = self._backing[index]
        # CuPy gathers in C order; NumPy may choose another order.
        return ndarray(np.ascontiguousarray(found) if any(isinstance(part, np.ndarray) for part in index) else found)

    def __setitem__(self, key, value):
        index = _index(key)
        ask("operations")
        if _has_mask(index):
            _wait()
        value = backing(value)
        if np.size(value) > 1 and any(isinstance(part, np.ndarray) and part.dtype != bool for part in index):
            places = np.arange(self.size).reshape(self.shape)[index]
            if np.unique(places).size < places.size:
                raise ValueError("several values are assigned to one place; on a GPU it is undefined which one remains")
        self._backing[index] = value

    def take(self, indices, axis=None):
        return ndarray(self._backing.take(backing(indices), axis))

    # Conversion and shape.

    def astype(self, dtype, *, copy=True):
        return self if not copy and self.dtype == dtype else ndarray(self._backing.astype(dtype))

    def copy(self):
        return ndarray(self._backing.copy())

    def view(self, dtype):
        return ndarray(self._backing.view(dtype))

    def reshape(self, *shape):
        found = self._backing.reshape(*shape)
        if not np.may_share_memory(found, self._backing):       # a copy, because no view has this shape
            ask("operations")
        return ndarray(found)

    def transpose(self, *axes):
        return ndarray(self._backing.transpose(*axes))

    def swapaxes(self, axis1, axis2):
        return ndarray(self._backing.swapaxes(axis1, axis2))

    def squeeze(self, axis=None):
        return ndarray(self._backing.squeeze(axis))

    def fill(self, value):
        if not isinstance(value, NUMBERS):
            raise TypeError("fill takes a number")
        self._backing.fill(value)

    def conj(self):
        return ndarray(self._backing.conj())

    def clip(self, min=None, max=None):
        return ndarray(self._backing.clip(min, max))

    # Reductions.

    def sum(self, axis=None, *, out=None, keepdims=False):
        return _to(out, self._backing.sum(axis=axis, out=_given(out), keepdims=keepdims))

    def mean(self, axis=None, *, keepdims=False):
        return ndarray(self._backing.mean(axis=axis, keepdims=keepdims))

    def max(self, axis=None, *, keepdims=False):
        return ndarray(self._backing.max(axis=axis, keepdims=keepdims))

    def min(self, axis=None, *, keepdims=False):
        return ndarray(self._backing.min(axis=axis, keepdims=keepdims))

    def all(self, axis=None):
        return ndarray(self._backing.all(axis=axis))

    def any(self, axis=None):
        return ndarray(self._backing.any(axis=axis))

    def argmax(self, axis=None):
        return ndarray(self._backing.argmax(axis=axis))

    def cumsum(self, axis=None, dtype=None):
        return ndarray(self._backing.cumsum(axis=axis, dtype=dtype))


def _wait():
    wait()
    finish_copies()


def backing(x):
    """The NumPy array behind x, or x if it is a number. Raises TypeError for anything else, NumPy arrays included."""
    if isinstance(x, ndarray):
        return x._backing
    if isinstance(x, NUMBERS):
        return x
    raise TypeError(f"Unsupported type {type(x)}: arrays on the GPU combine only with arrays on the GPU and numbers; "
                    "move it there with asarray")


def _given(out):
    return None if out is None else backing(out)


def _to(out, result):
    """The array `out` that was given to write to, or the result as a new array."""
    return ndarray(result) if out is None else out


def _index(key):
    """A key for NumPy, as a tuple. Without arrays it ends in Ellipsis, so that even a single element is a view."""
    parts = [_index_part(part) for part in (key if isinstance(key, tuple) else (key,))]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) > 1 and any(array.dtype == bool for array in arrays):
        raise TypeError("CuPy takes one mask without any index array beside it")
    if not arrays and not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    return tuple(parts)


def _index_part(part):
    if isinstance(part, ndarray) and part.dtype.kind in "iub":
        return part._backing
    if isinstance(part, list) and all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in part):
        return np.array(part, np.int64)
    number = isinstance(part, (int, np.integer)) and not isinstance(part, bool)
    if number or part is None or part is Ellipsis or isinstance(part, slice):
        return part
    raise TypeError(f"an index of type {type(part)}: move it to the GPU with asarray")


def _has_mask(index):
    return any(isinstance(part, np.ndarray) and part.dtype == bool for part in index)


def operation(function):
    """A function of arrays that launches a kernel of CuPy."""
    @functools.wraps(function)
    def counted(*arguments, **options):
        ask("operations")
        return function(*arguments, **options)
    return counted


for _name in ("take astype copy fill conj clip sum mean max min all any argmax cumsum").split():
    setattr(ndarray, _name, operation(getattr(ndarray, _name)))


def _unary(function):
    return operation(lambda x: ndarray(function(x._backing)))


def _operators():
    """x + y, y + x, x += y and the like."""
    def reflects(y):            # for example a minilm.Tensor, whose own operator must be called
        return not isinstance(y, ndarray) and getattr(y, "__array_ufunc__", False) is None

    def define(name, function, in_place):
        kind = "products" if name == "matmul" else "operations"

        def forward(x, y):
            if reflects(y):
                return NotImplemented
            ask(kind)
            return ndarray(function(x._backing, backing(y)))

        def reflected(x, y):
            if reflects(y):
                return NotImplemented
            ask(kind)
            return ndarray(function(backing(y), x._backing))

        def assigned(x, y):
            ask(kind)
            in_place(x._backing, backing(y), out=x._backing)
            return x

        setattr(ndarray, f"__{name}__", forward)
        if in_place is not None:
            setattr(ndarray, f"__r{name}__", reflected)
            setattr(ndarray, f"__i{name}__", assigned)

    for name, ufunc in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("truediv", np.divide),
                        ("pow", np.power), ("matmul", None), ("and", np.bitwise_and), ("or", np.bitwise_or)):
        define(name, getattr(operator, f"__{name}__"), ufunc)
    for name in ("lt", "le", "eq", "ne", "gt", "ge"):
        define(name, getattr(operator, name), None)
    for name in ("neg", "invert"):
        setattr(ndarray, f"__{name}__", _unary(getattr(operator, name)))


_operators()
