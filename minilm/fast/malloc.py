"""Tell glibc's malloc to keep the memory of freed arrays. Measured gain: scripts/bench/tricks.py."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> bool:
    """Ask the C library to keep the memory of freed arrays instead of giving it back to the system.

    Every step of a training loop frees and takes the same large arrays; by default glibc returns
    each to the kernel, and the page faults of taking it again cost more than the arithmetic (a
    matmul of 2048x64 with 64x352 in float32, on a virtual machine: 8.0 ms against 0.7). For
    programs, not for libraries: it holds for the whole process. Returns whether it was possible
    (glibc only).
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # No arrays outside the heap, nothing trimmed off its top, one heap for all threads.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26), (M_ARENA_MAX, 1))
    return all([mallopt(option, value) == 1 for option, value in settings])


def return_freed_memory() -> None:
    """Give back to the system, once, what was freed until now, also where keep_freed_memory keeps it (glibc only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass
