"""NumPy or CuPy: the device follows the data.

Code that works on arrays asks for their library once, `xp = array_module(x)`, and then
reads the same for both. There is no default device, no environment variable and no
import-time alias; CuPy is imported only by whoever asks for the GPU.
"""

import numpy as np


def is_cupy(x):
    """Whether x is a CuPy array (answered without importing CuPy)."""
    return type(x).__module__.partition(".")[0] == "cupy"


def array_module(*arrays):
    """The library, numpy or cupy, that the arrays belong to.

    Python scalars fit both. Raises TypeError when arrays of the two are mixed.
    """
    found = {is_cupy(a) for a in arrays if isinstance(a, np.ndarray) or is_cupy(a)}
    if found == {True, False}:
        raise TypeError("arrays on the CPU (numpy) and on the GPU (cupy) are mixed; "
                        "move them to one device with minilm.backend.to_device")
    if found == {True}:
        import cupy
        return cupy
    return np


def to_device(x, device):
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


def to_numpy(x):
    """x as a NumPy array: copied from the GPU if it lives there, itself if it does not."""
    return x.get() if is_cupy(x) else np.asarray(x)


def concatenate(arrays):
    """Arrays of either device end to end, as one NumPy array."""
    return np.concatenate([to_numpy(a) for a in arrays])


def keep_freed_memory():
    """Ask the C library to keep the memory of freed arrays instead of giving it back to the system.

    Every step of a training loop frees and takes the same large arrays; by default glibc returns
    each to the kernel, and the page faults of taking it again cost more than the arithmetic (a
    matmul of 2048x64 with 64x352 in float32, on a virtual machine: 8.0 ms against 0.7). For
    programs, not for libraries: it holds for the whole process. Returns whether it was possible
    (glibc only).
    """
    import ctypes
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # No arrays outside the heap, nothing trimmed off its top, one heap for all threads.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26), (M_ARENA_MAX, 1))
    return all([mallopt(option, value) == 1 for option, value in settings])


def return_freed_memory():
    """Give back to the system, once, what was freed until now, also where keep_freed_memory keeps it (glibc only)."""
    import ctypes
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass
