"""The part of cupy.cuda that minilm uses: the device, copies to the host that it does not wait for, and events.

Everything else of the mock is done at once. A copy is not: until an event that was recorded behind it is waited for, or
the whole device, its memory on the host holds marks (running.poison). A program that looks too early then sees NaN.
Tests: tests/test_late.py.
"""

import types

import numpy as np

from minilm.kernels.emulator import work
from minilm.kernels.emulator.running import SHARED_MOST, poison

_copies: list = []          # (NumPy array to write to, its values), in the order of the queue


def begin_copy(out: np.ndarray, values: np.ndarray) -> None:
    """Copy values to out when the queue gets there."""
    _copies.append((out, values.copy()))
    poison(out.reshape(-1))


def finish_copies(count: int | None = None) -> None:
    """The first `count` copies of the queue; None: all of them."""
    for out, values in _copies[:count]:
        out[...] = values
    del _copies[:count]


class Event:
    """A mock of cupy.cuda.Event."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False):
        self._copies: list = []

    def record(self, stream=None):
        if stream is not None:
            raise TypeError("the mock of CuPy has one stream, the default one")
        self._copies = list(_copies)
        self._asked = work.asked

    def synchronize(self):
        if work.asked > self._asked:
            work.ask("late")
        else:
            work.wait()
        behind = [i for i, copy in enumerate(_copies) if any(copy is one for one in self._copies)]
        finish_copies(behind[-1] + 1 if behind else 0)


class Device:
    """A mock of cupy.cuda.Device."""

    compute_capability = "90"
    attributes = {"MaxSharedMemoryPerBlockOptin": SHARED_MOST}
    mem_info = 4 << 30, 4 << 30             # bytes: free, in all


def alloc_pinned_memory(size: int) -> memoryview:
    """A mock of cupy.cuda.alloc_pinned_memory: page-locked memory of so many bytes, and perhaps more."""
    return memoryview(bytearray(-(-max(size, 1) // 512) * 512))


cuda = types.ModuleType("cupy.cuda", __doc__)
vars(cuda).update(Device=Device, Event=Event, alloc_pinned_memory=alloc_pinned_memory)
