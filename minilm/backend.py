"""NumPy or CuPy: the device follows the data.

Code on arrays gets their library once, `xp = array_module(x)`, and is the same for both. There is no default device,
no environment variable and no import-time alias. CuPy is imported only when arrays are on the GPU, or are moved there.
Tests: tests/test_backend.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def is_cupy(x: Any) -> bool:
    """Whether x is a CuPy array (answered without importing CuPy)."""
    return type(x) is not np.ndarray and type(x).__module__.partition(".")[0] == "cupy"


def array_module(*arrays) -> Any:
    """The library of the arrays, numpy or cupy. Python scalars fit both. Raises TypeError for arrays of both."""
    if {np.ndarray}.issuperset(map(type, arrays)):      # most calls
        return np
    found = {is_cupy(a) for a in arrays if isinstance(a, np.ndarray) or is_cupy(a)}
    if found == {True, False}:
        raise TypeError("arrays on the CPU (numpy) and on the GPU (cupy) are mixed; "
                        "move them to one device with minilm.backend.to_device")
    if found == {True}:
        import cupy
        return cupy
    return np


def to_device(x: Any, device: str) -> Any:
    """x as an array on `device`, "cpu" or "gpu". Raises ValueError, ImportError."""
    if device == "cpu":
        return to_numpy(x)
    if device != "gpu":
        raise ValueError(f"device is {device!r}; it must be 'cpu' or 'gpu'")
    try:
        import cupy
    except ImportError as error:
        raise ImportError("device 'gpu' needs CuPy: pip install 'cupy-cuda13x[ctk]' "
                          "(or cupy-cuda12x, whichever your driver serves)") from error
    return cupy.asarray(x)


def to_numpy(x: Any) -> np.ndarray:
    """x as a NumPy array of the base class: a copy if it is on the GPU, else a view of x or x itself.

    Raises TypeError for a masked array: its mask would be lost without a word.
    """
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray) and hasattr(x, "mask"):
        raise TypeError(f"a masked array of shape {x.shape}: its mask would have no effect; fill or compress it")
    return x.get() if is_cupy(x) else np.asarray(x)


def plain_argument(x: Any, copy: bool = False) -> Any:
    """An argument of arithmetic: NumPy scalars as Python numbers, and what NumPy takes for an array as one. A memmap or
    an np.matrix, whose * is a matrix product, would bring rules of its own.

    copy: copies of arrays of numbers; on a GPU, where a copy costs a launch, of integers and masks alone.
    """
    if not hasattr(type(x), "__array__"):
        return x
    if isinstance(x, np.generic):       # np.float64(2) turns float32 arithmetic into float64, a Python number does not
        return x.item()
    array = x if is_cupy(x) else to_numpy(x)
    return array.copy() if copy and array.dtype.kind in ("iub" if is_cupy(x) else "iubf") else array


def concatenate(arrays: Iterable) -> np.ndarray:
    """Arrays of either device, one after the other, as one NumPy array. Those of a GPU are joined there: the host waits
    once."""
    arrays = list(arrays)
    if all(map(is_cupy, arrays)):
        return to_numpy(array_module(*arrays).concatenate(arrays))
    return np.concatenate([to_numpy(a) for a in arrays])
