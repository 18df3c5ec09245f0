"""How launches are run, fast or checked and in which order, and what is kept of them."""

import contextlib
import contextvars
from typing import NamedTuple

import numpy as np

ORDERS = {"forward": 0, "reversed": 1}


class Launch(NamedTuple):
    """One launch as it was. traffic: bytes read and written by the index of the argument, if it was checked."""
    kernel: str
    parameters: tuple
    grid: tuple
    block: tuple
    shared: int
    traffic: dict
    shared_traffic: tuple


class Setting(NamedTuple):
    mode: str = "fast"
    schedule: object = "forward"
    launches: list = None


setting_of_now = contextvars.ContextVar("emulator", default=Setting())
_last = None


def note(launch):
    """Keep what is to be known of a launch."""
    global _last
    setting = setting_of_now.get()
    if setting.launches is not None:
        setting.launches.append(launch)
    if setting.mode == "checked":
        _last = launch


@contextlib.contextmanager
def _running(**setting):
    if setting["schedule"] not in ORDERS and not isinstance(setting["schedule"], int):
        raise ValueError("a schedule is 'forward', 'reversed', or an int, the seed of a random one")
    token = setting_of_now.set(setting_of_now.get()._replace(**setting))
    try:
        yield setting_of_now.get().launches
    finally:
        setting_of_now.reset(token)


def checked(schedule="forward"):
    """Inside, every launch runs under all checkers, threads and blocks in that order. Gives the list of launches."""
    return _running(mode="checked", schedule=schedule, launches=[])


def fast(schedule="forward"):
    """Inside, every launch is fast and unchecked, as it is outside, but in that order. Gives the list of launches."""
    return _running(mode="fast", schedule=schedule, launches=[])


def debug():
    """Inside, every launch is of a build for gdb."""
    return _running(mode="debug", schedule="forward", launches=[])


def traffic():
    """Bytes that the last checked launch read and wrote in global memory: {index of the argument: (read, written)}.

    Every load and store counts as the source has it, cached or not; an atomic operation is one of each.
    """
    return _last_checked().traffic


def shared_traffic():
    """Bytes that the last checked launch read and wrote in shared memory."""
    return _last_checked().shared_traffic


def _last_checked():
    if _last is None:
        raise RuntimeError("no launch was checked yet; use `with emulator.checked():`")
    return _last


def poison(array):
    """Mark a NumPy array as never written to: a checked kernel that reads such an element is at fault. Returns it.

    The mark is a value, 0x7ffa5a5a (a NaN as a float, twice as a double), that no computation makes; types
    of fewer than 4 bytes cannot carry it.
    """
    if array.dtype.itemsize >= 4:
        array.view(np.uint32)[...] = 0x7FFA5A5A
    return array
