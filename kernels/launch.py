"""From the text of a .cu file to a launch: compiled once, with every argument checked before the launch.

CuPy checks neither dtypes nor contiguity. It passes a Python float as a double and a Python int as 64 bits, whatever
the kernel declares, and the kernel then reads wrong numbers without an error.

A module of minilm.kernels, X.cu and X.py, has two functions for the tools:
    variants()              yields (kernel, compiler options, threads of a block, bytes of dynamic shared memory) for
                            every configuration in which its kernels are launched (scripts/dev/kernel_report.py)
    example(xp, rng, ..)    launches its kernels on random numbers (python -m minilm.kernels.emulator X)
"""

import functools
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

Array = Any                     # an array of CuPy, or of the mock of the emulator
Variants = Iterator[tuple[str, tuple[str, ...], int, int]]         # the result of variants() of a module
FOLDER = Path(__file__).resolve().parent
REALS = {np.dtype("float32"): "float", np.dtype("float64"): "double"}
MOST_BLOCKS = 2 ** 31 - 1, 65_535, 65_535               # of a grid along x, y and z
MOST_COUNT = 2 ** 31 - 2 ** 24          # kernels count in 32 bits, and a loop steps beyond the end by less than 2^24
HEADERS = re.compile(r'^#include "(tensor|segments|rows)\.cuh"$', re.MULTILINE)
SHARED_UNASKED = 48 * 1024      # bytes of dynamic shared memory of a block; more must be requested from the driver


@functools.lru_cache(maxsize=None)          # a launch must not read files
def source(module: str, text: str | None = None) -> str:
    """The prelude and kernels/<module>.cu (or `text` in its place), with #line directives for error messages."""
    text = (FOLDER / f"{module}.cu").read_text("utf-8") if text is None else text
    return f'#line 1 "prelude.cuh"\n{(FOLDER / "prelude.cuh").read_text("utf-8")}\n{with_headers(f"{module}.cu", text)}'


def with_headers(name: str, text: str) -> str:
    """The text of a .cu file with #line directives. A line `#include "tensor.cuh"` (or segments, rows) becomes that
    file, the first time: neither CuPy nor the emulator then needs a path."""
    known = set()

    def header(found):
        if found[1] in known:
            return ""
        known.add(found[1])
        after = text.count("\n", 0, found.end()) + 2
        file = f"{found[1]}.cuh"
        return f'#line 1 "{file}"\n{(FOLDER / file).read_text("utf-8")}#line {after} "{name}"'
    return f'#line 1 "{name}"\n{HEADERS.sub(header, text)}'


def options(dtype: DTypeLike, constants: dict[str, Any]) -> tuple[str, ...]:
    """Options of the compiler: the precision, and the constants of a module as -DNAME=VALUE."""
    return "--std=c++17", f"-DREAL={real(dtype)}", *(f"-D{name}={value}" for name, value in sorted(constants.items()))


def real(dtype: DTypeLike) -> str:
    """The C type of float32 or float64. Raises TypeError for another dtype."""
    found = REALS.get(np.dtype(dtype))
    if found is None:
        raise TypeError(f"the kernels compute in float32 or float64, not in {np.dtype(dtype)}")
    return found


def function(xp, module: str, name: str, dtype: DTypeLike, text: str | None = None, **constants) -> "Kernel":
    """The kernel of that name for xp (CuPy) in that precision; compiled once, at its first launch. Raises TypeError for
    NumPy."""
    if not hasattr(xp, "RawModule"):
        raise TypeError(f"{name}: the arrays are on the CPU; this kernel takes CuPy's, on a GPU")
    return _function(xp.RawModule, module, text, name, np.dtype(dtype), tuple(constants.items()))


class Kernel:
    """A compiled kernel and the dtype of its `real`."""

    def __init__(self, compiled, name, dtype):
        self.compiled = compiled
        self.name = name
        self.dtype = dtype


@functools.lru_cache(maxsize=None)
def _module(raw_module, code, options):
    return raw_module(code=code, options=options)


@functools.lru_cache(maxsize=None)
def _function(raw_module, module, text, name, dtype, constants):
    compiled = _module(raw_module, source(module, text), options(dtype, dict(constants)))
    return Kernel(compiled.get_function(name), name, dtype)


@functools.lru_cache(maxsize=None)
def shared_memory(xp) -> int:
    """Bytes of shared memory that a block can ask for on the device of xp, cupy, of which a process uses one; 0 for
    NumPy."""
    return xp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"] if hasattr(xp, "cuda") else 0


def launch(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], *arguments, shared: int = 0) -> None:
    """Run a kernel on a grid of blocks. An empty grid does nothing. shared: bytes of dynamic shared memory of a block.

    A Python int is passed as 32 bits, a Python float in the kernel's precision. Raises TypeError for an array that is
    not contiguous, OverflowError for a grid or an int that is too large.
    """
    if 0 in grid:
        return
    if any(map(operator.gt, grid, MOST_BLOCKS)):
        raise OverflowError(f"{kernel.name}: a grid of {tuple(grid)} blocks; a device takes at most "
                            f"{MOST_BLOCKS[:len(grid)]}. Give it fewer rows or heads at a time")
    if shared > SHARED_UNASKED:
        kernel.compiled.max_dynamic_shared_size_bytes = shared
    kernel.compiled(tuple(grid), tuple(block), tuple(_argument(kernel, a) for a in arguments), shared_mem=shared)


def _argument(kernel, value):
    if type(value) is int:
        if not -MOST_COUNT <= value <= MOST_COUNT:
            counts(f"{kernel.name}: an argument", value)
        return np.int32(value)
    if isinstance(value, float):            # np.float64 too
        return kernel.dtype.type(value)
    if hasattr(value, "flags") and not value.flags.c_contiguous:
        raise TypeError(f"{kernel.name}: an array of shape {value.shape} is not contiguous; pass a contiguous copy")
    return value


def counts(name: str, values: ArrayLike) -> np.ndarray:
    """Integers as int32, in which kernels count. Raises OverflowError for one beyond MOST_COUNT: none wraps."""
    values = np.asarray(values)
    if values.size and not -MOST_COUNT <= values.min() <= values.max() <= MOST_COUNT:
        wrong = values.min() if values.min() < -MOST_COUNT else values.max()
        raise OverflowError(f"{name} is {wrong}; the kernels count in 32 bits, so at most {MOST_COUNT}. Give them "
                            "fewer rows at a time")
    return values.astype(np.int32)


def check(name: str, array: Array, dtype: DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Raise TypeError or ValueError, naming the supported dtype and shape, unless the array has them and is contiguous.

    None in a shape stands for any length.
    """
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{name} is {array.dtype}; this kernel takes {np.dtype(dtype)}")
    if len(array.shape) != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape)):
        raise ValueError(f"{name} has shape {array.shape}; this kernel takes "
                         f"({', '.join('any' if n is None else str(n) for n in shape)})")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous; pass a contiguous copy")
