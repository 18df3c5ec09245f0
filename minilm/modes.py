"""Modes of the calls of primitives: recorded or not, on Tensors or on arrays, watched.

Each holds in the thread that entered it, and ends with its `with` block. Tests: tests/test_tensor.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import numpy as np


class _Modes(threading.local):
    grad_enabled = True
    arrays_only = False
    watch = None


thread = _Modes()


@contextlib.contextmanager
def _mode(name, value):
    before = getattr(thread, name)
    setattr(thread, name, value)
    try:
        yield
    finally:
        setattr(thread, name, before)


def grad_enabled() -> bool:
    """Whether primitives called in this thread are recorded."""
    return thread.grad_enabled


def recording(enabled: bool) -> contextlib.AbstractContextManager:
    """Within it, calls of primitives are recorded or not."""
    return _mode("grad_enabled", enabled)


def no_grad() -> contextlib.AbstractContextManager:
    """Within it, no call is recorded and nothing is kept for a backward."""
    return recording(False)


def arrays_only() -> contextlib.AbstractContextManager:
    """Within it, primitives take arrays and return arrays: no Tensor, no record.

    For cached generation, where a few rows have one token each and records would take about as long as the arithmetic.
    """
    return _mode("arrays_only", True)


def watching(watch: Callable[[str, np.ndarray], None]) -> contextlib.AbstractContextManager:
    """Within it, watch(name, output) is called after each call of a primitive."""
    return _mode("watch", watch)
