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
