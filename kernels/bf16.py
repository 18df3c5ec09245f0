"""bfloat16 on the host: the upper half of a float32, stored as uint16, because NumPy has no such dtype.

A kernel declares bf16* (tensor.cuh) and takes arrays of uint16. to_bf16 rounds as the kernels do, bit for bit.
Tests: tests/test_tensor_cores.py.
"""

import numpy as np

NAN = 0x7FFF                    # of every NaN, as the PTX instruction cvt gives it
SUMS = {"float32": "float32", "float64": "float64", "uint16": "float32"}    # {dtype of stored numbers: of their sums}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 of any shape to the bits of bfloat16 (uint16): to the nearest, ties to even; every NaN becomes 0x7fff."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):            # of a NaN, which is replaced
        rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), NAN, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 (uint16) of any shape to float32. Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
