"""Numbers of a GPU on their way to the host, in one copy that the host does not wait for.

The arrays are joined on the device and copied to page-locked memory, behind the work that computes them. get() waits
for that copy alone, and not for what the GPU was asked for afterwards.
Tests: tests/test_late.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilm.backend import array_module, is_cupy


class Readback:
    """A copy of `tree`, lists, tuples and dicts with CuPy arrays in them, that has begun. Other values stay."""

    def __init__(self, tree: Any):
        self._tree = tree
        self._copied: Any = None
        arrays: list = []
        replaced(tree, arrays.append)
        xp = array_module(*arrays)
        flat = xp.concatenate([array.reshape(-1) for array in arrays])
        self._host = np.frombuffer(xp.cuda.alloc_pinned_memory(flat.nbytes), flat.dtype, flat.size)
        flat.get(out=self._host, blocking=False)
        self._copied = xp.cuda.Event(disable_timing=True)
        self._copied.record()

    def __del__(self):
        # Freed page-locked memory is given to the next copy at once, and this copy would still be written to it.
        self._wait()

    def _wait(self):
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def get(self) -> Any:
        """The tree with NumPy arrays in place of CuPy's, when the copy is complete."""
        self._wait()
        place = 0

        def of_host(array):
            nonlocal place
            place += array.size
            return self._host[place - array.size:place].reshape(array.shape).astype(array.dtype)
        return replaced(self._tree, of_host)


def replaced(tree: Any, function: Callable) -> Any:
    """tree with function(array) in place of every CuPy array, from the first to the last."""
    if is_cupy(tree):
        return function(tree)
    if isinstance(tree, dict):
        return {name: replaced(value, function) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [replaced(value, function) for value in tree]
        make = list if isinstance(tree, list) else getattr(tree, "_make", tuple)         # a NamedTuple is one again
        return make(values)
    return tree
