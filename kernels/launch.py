"""From the text of a .cu file to a launch: compiled once, and every argument checked before the device sees it.

CuPy checks neither dtypes nor contiguity, passes a Python float as a double and a Python int as 64 bits, whatever
the kernel declares: it would read the wrong numbers without a word.
"""

import functools
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
REALS = {"float32": "float", "float64": "double"}
SHARED_UNASKED = 48 * 1024      # bytes of dynamic shared memory that a block may have before the driver is asked


@functools.lru_cache(maxsize=None)          # or every launch would read files
def source(room, text=None):
    """The prelude and kernels/<room>.cu (or another text for it), with the names and lines that errors are to show."""
    text = (FOLDER / f"{room}.cu").read_text() if text is None else text
    return f'#line 1 "prelude.cuh"\n{(FOLDER / "prelude.cuh").read_text()}\n#line 1 "{room}.cu"\n{text}'


def options(dtype, constants):
    """For the compiler: the precision, and the constants of a room by name."""
    return "--std=c++17", f"-DREAL={real(dtype)}", *(f"-D{name}={value}" for name, value in sorted(constants.items()))


def real(dtype):
    """C's name of float32 or float64. Raises TypeError for another dtype."""
    name = np.dtype(dtype).name
    if name not in REALS:
        raise TypeError(f"the kernels compute in float32 or float64, not in {name}")
    return REALS[name]


def function(xp, room, name, dtype, text=None, **constants):
    """The kernel of that name, for xp (CuPy), in that precision; compiled at its first launch, once."""
    return _function(xp.RawModule, source(room, text), name, options(dtype, constants), np.dtype(dtype))


class Kernel:
    """A compiled kernel and the precision that its real numbers have."""

    def __init__(self, compiled, name, dtype):
        self.compiled, self.name, self.dtype = compiled, name, dtype


@functools.lru_cache(maxsize=None)
def _module(raw_module, code, options):
    return raw_module(code=code, options=options)


@functools.lru_cache(maxsize=None)
def _function(raw_module, code, name, options, dtype):
    return Kernel(_module(raw_module, code, options).get_function(name), name, dtype)


def launch(kernel, grid, block, *arguments, shared=0):
    """Run it on a grid of blocks; shared: bytes of dynamic shared memory a block. An empty grid does nothing.

    A Python int goes as 32 bits, a float in the kernel's precision. Raises TypeError for an array that is
    not contiguous, OverflowError for an int that does not fit.
    """
    if 0 in grid:
        return
    if shared > SHARED_UNASKED:
        kernel.compiled.max_dynamic_shared_size_bytes = shared
    kernel.compiled(tuple(grid), tuple(block), tuple(_argument(kernel, a) for a in arguments), shared_mem=shared)


def _argument(kernel, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if hasattr(value, "flags") and not value.flags.c_contiguous:
            raise TypeError(f"{kernel.name}: an array of shape {value.shape} is not contiguous; pass a contiguous copy")
        return value
    if isinstance(value, float):
        return kernel.dtype.type(value)
    if not -2 ** 31 <= value < 2 ** 31:
        raise OverflowError(f"{kernel.name}: {value} does not fit 32 bits")
    return np.int32(value)


def check(name, array, dtype, shape):
    """Raises TypeError or ValueError, and says what is served, unless array is contiguous, of that dtype and shape.

    None in a shape is any length.
    """
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{name} is {array.dtype}; this kernel takes {np.dtype(dtype)}")
    if len(array.shape) != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape)):
        raise ValueError(f"{name} has shape {array.shape}; this kernel takes "
                         f"({', '.join('any' if n is None else str(n) for n in shape)})")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous; pass a contiguous copy")
