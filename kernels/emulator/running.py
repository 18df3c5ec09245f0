"""The mode of launches (fast, contracted, checked, debug), the order of their threads, and the records they leave."""

import contextlib
import contextvars
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from minilm import checks

ORDERS = {"forward": 0, "reversed": 1}


class Launch(NamedTuple):
    """The record of one launch. traffic: {index of the argument: (bytes read, bytes written)}, None if not checked."""
    kernel: str
    parameters: tuple
    grid: tuple
    block: tuple
    shared: int
    traffic: dict
    shared_traffic: tuple


SHARED_MOST = 227 << 10     # bytes of shared memory that a block can ask for, as on sm_90
STEPS = 50_000_000          # of a thread in a block; some seconds under the checkers
SECONDS = 60.0              # of processor time of a block


class Setting(NamedTuple):
    mode: str = "fast"
    schedule: object = "forward"
    launches: list = None
    steps: int = STEPS
    seconds: float = SECONDS
    work: object = None         # see work.py


setting_of_now = contextvars.ContextVar("emulator", default=Setting())       # noqa: B039, a Setting never changes
_last = None


def note(launch: Launch) -> None:
    """Keep the record of a launch."""
    global _last
    setting = setting_of_now.get()
    if setting.launches is not None:
        setting.launches.append(launch)
    if setting.mode == "checked":
        _last = launch


@contextlib.contextmanager
def _running(**setting):
    if setting["schedule"] not in ORDERS and not isinstance(setting["schedule"], int):
        raise ValueError(f"schedule is {setting['schedule']!r}; it must be 'forward', 'reversed', or an int, the seed "
                         "of a random order")
    token = setting_of_now.set(setting_of_now.get()._replace(**setting))
    try:
        yield setting_of_now.get().launches
    finally:
        setting_of_now.reset(token)


def checked(schedule: str | int = "forward", steps: int = STEPS) -> AbstractContextManager[list[Launch]]:
    """In the `with` block every launch runs under all checkers, in that order of threads and blocks. Gives the list
    of Launch records. steps: a thread that takes more of them in a block is in an endless loop (endless.cpp)."""
    return _running(mode="checked", schedule=schedule, launches=[],
                    steps=checks.integer("checked", "steps", steps, at_least=1))


def fast(schedule: str | int = "forward", seconds: float = SECONDS) -> AbstractContextManager[list[Launch]]:
    """In the `with` block every launch runs fast and unchecked, as by default, but in that order. Gives the list of
    Launch records. seconds: of processor time; a block that takes more is in an endless loop."""
    return _running(mode="fast", schedule=schedule, launches=[],
                    seconds=checks.number("fast", "seconds", seconds, above=0))


def contracted() -> AbstractContextManager[list[Launch]]:
    """In the `with` block every launch runs fast, and a * b + c is rounded once, as compilers for a GPU do by default:
    results that differ much from those of fast() depend on it. The processor needs FMA instructions."""
    return _running(mode="contracted", schedule="forward", launches=[])


def debug() -> AbstractContextManager[list[Launch]]:
    """In the `with` block every launch runs a build for gdb."""
    return _running(mode="debug", schedule="forward", launches=[])


def traffic() -> dict[int, tuple[int, int]]:
    """Bytes that the last checked launch read and wrote in global memory: {index of the argument: (read, written)}.

    Every load and store of the source counts, cached or not. An atomic operation is one load and one store.
    """
    return _last_checked().traffic


def shared_traffic() -> tuple[int, int]:
    """Bytes that the last checked launch read and wrote in shared memory."""
    return _last_checked().shared_traffic


def _last_checked():
    if _last is None:
        raise RuntimeError("no launch was checked yet; put the launch into `with emulator.checked():`")
    return _last


MARK = 0x7FFA5A5A           # as UNINITIALISED in runtime.h; a NaN as a float, and twice as a double


def poison(array: np.ndarray) -> np.ndarray:
    """Mark the elements of a NumPy array as never written: a checked kernel that reads one is at fault. Returns it.

    The mark is a value that no computation gives. Types of fewer than 4 bytes cannot hold it.
    """
    if array.dtype.itemsize >= 4:
        array.view(np.uint32)[...] = MARK
    return array


def never_written(array: np.ndarray) -> np.ndarray:
    """For each element of a contiguous NumPy array (n,), whether it still holds the mark of poison()."""
    if array.dtype.itemsize < 4:
        return np.zeros(array.shape, bool)
    return (array.view(np.uint32).reshape(array.size, array.itemsize // 4) == MARK).all(axis=1)
