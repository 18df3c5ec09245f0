"""Sums of values that have the same index, in a fixed order: the gradient of an embedding. Tests: tests/test_ops.py,
tests/test_sums_by_index.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilm.backend import array_module, is_cupy


def segment_sum(indices: np.ndarray, values: Any) -> tuple[np.ndarray, Any]:
    """The distinct indices of indices (n,), ascending, and for each the sum of its values, out of values (n,..), which
    may be on a GPU. The indices are NumPy's: the host needs to know how many are distinct.

    Sorted first, so that the order of summation, and with it the last bits, are the same in every run: np.add.at
    visits the elements one by one, and CuPy's add.at in an order that changes from run to run.
    """
    if not len(indices):
        return indices, values
    rows = values.reshape(len(indices), -1)
    order = np.argsort(indices, kind="stable")
    distinct, starts = np.unique(indices[order], return_index=True)
    if is_cupy(values):
        from minilm.kernels.sums_by_index import sums_by_index
        sums = sums_by_index(array_module(rows).ascontiguousarray(rows), order, starts)
    else:
        sums = np.add.reduceat(rows[order], starts, axis=0)
    return distinct, sums.reshape(-1, *values.shape[1:])
