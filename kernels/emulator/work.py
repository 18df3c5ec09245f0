"""Counts what a program asks of the device, and where the host waits for it.

    with as_cupy(), counted() as work:
        step()
    work.launches, work.waits           # 51, ["minilm/optim.py:99", ..]

A GPU works through a queue, and the host only adds to it. Where the host needs a number of the device, it waits until
the queue is empty, and then the device waits for the host. The waits are those of CuPy: .get(), .item(), float(), int()
and bool(), and a mask as an index, because the host needs the size of the result. An event is a mark in the queue: to
wait for one costs the device nothing if there is more work behind it.
Tests: tests/test_work.py.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minilm.kernels.emulator.running import setting_of_now

HERE = str(Path(__file__).parent)
asked = 0           # what the device was asked for since the program began


@dataclass
class Work:
    """launches     of kernels in .cu files
    products     of matrices
    operations   other functions of CuPy, which launch a kernel or a few
    copies       of arrays of the host to the device
    late         waits for an event that had more work behind it
    waits        "file:line" of each other place where the host waited, in the order of time
    """
    launches: int = 0
    products: int = 0
    operations: int = 0
    copies: int = 0
    late: int = 0
    waits: list[str] = field(default_factory=list)


@contextlib.contextmanager
def counted() -> Iterator[Work]:
    """In the `with` block what is asked of the device is counted: a Work, which grows.

    The garbage collector is off in the block, as in timeit: objects of earlier work may wait when they are freed.
    """
    work = Work()
    token = setting_of_now.set(setting_of_now.get()._replace(work=work))
    collects = gc.isenabled()
    gc.disable()
    try:
        yield work
    finally:
        setting_of_now.reset(token)
        if collects:
            gc.enable()


def ask(kind: str) -> None:
    """Count a launch, a product, an operation, a copy or a late wait, given as the name of the field."""
    global asked
    asked += kind != "late"
    work = setting_of_now.get().work
    if work is not None:
        setattr(work, kind, getattr(work, kind) + 1)


def wait() -> None:
    """Note that the host waits, and the line outside of the emulator that makes it wait."""
    work = setting_of_now.get().work
    if work is None:
        return
    frame = sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    work.waits.append(f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}")
