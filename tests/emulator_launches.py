"""Launches of kernels that a test gives as text, on the emulator."""
import numpy as np

from minilm.kernels import emulator, launch

SCHEDULES = "forward", "reversed", 1, 2, 3


class Device:
    """An array of the device, as RawModule takes it."""

    def __init__(self, array):
        self.array = array

    def __minilm_buffer__(self):
        return self.array


def kernel(code, name, *options):
    return emulator.RawModule(code=launch.with_headers("test.cu", code), options=options).get_function(name)


def run(code, name, *args, grid=(1,), block=(64,), shared=0, options=()):
    """Launch a kernel; NumPy arrays are passed as arrays of the device, Python numbers as 32 bits."""
    kinds = {np.ndarray: Device, int: np.int32, float: np.float32}
    args = tuple(kinds.get(type(a), lambda a: a)(a) for a in args)
    kernel(code, name, *options)(grid, block, args, shared_mem=shared)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)
