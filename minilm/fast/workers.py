"""Worker processes that share one batch: SPMD, as under torchrun or mpiexec.

Every worker (rank) runs the same program with the same random numbers, on its own shards of the data, and all-gathers
the results. Workers are processes, because threads would share one interpreter lock; they are forked, so that each
has the model and the data without a copy. Parameters and gradients are in memory that all of them share. Nothing is
unpickled: a message is JSON and the bytes of arrays.
Results differ from those of one process by rounding only. Measured gain: scripts/bench/tricks.py.
Tests: tests/test_workers.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from mmap import mmap
from multiprocessing import Pipe
from typing import Any

import numpy as np

from minilm.backend import is_cupy, to_numpy
from minilm.ranks import Ranks, WorkerFailed


class ProcessGroup(Ranks):
    """Ranks 0 to size - 1. Rank 0 is the calling process; the others exist within

        with group:

    All of them run that body, so the calls of each() and all_gather() must be the same in all. Only rank 0 leaves the
    body at its end; the other processes end there, and work after their last all_gather may be lost. Outside the body
    rank 0 is alone and computes everything itself.
    whole_program: whether the other processes run all of the caller's program. Then they keep its open files, and leave
    SIGTERM to rank 0.
    Raises ValueError for a size below 1, and for one above 1 where processes cannot be forked.
    """

    everyone = False            # only rank 0 comes back to the caller between two steps of a stage

    def __init__(self, size, whole_program=False):
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ValueError(f"ProcessGroup: size is {size!r}; it must be an integer of at least 1")
        if size > 1 and not can_fork():
            raise ValueError(f"{size} workers: this system cannot fork processes; ask for 1")
        self.size, self.rank = size, 0
        self._whole_program = whole_program
        self.lines, self.processes = [], []

    @property
    def active_size(self):
        """How many processes there are now: size within `with`, else 1."""
        return self.size if self.lines else 1

    def zeros(self, count, dtype, xp=np):
        """A flat array of zeros, in shared memory if there are several workers."""
        dtype = np.dtype(dtype)
        if self.size == 1 or count == 0:
            return xp.zeros(count, dtype)
        if xp is not np:
            raise ValueError(f"{self.size} workers are processes that share a CPU's memory; on a GPU, ask for 1")
        return np.frombuffer(mmap(-1, count * dtype.itemsize), dtype)

    def __enter__(self):
        if self.lines:
            raise RuntimeError("this group is running already: end its `with` block first, or make another group")
        for rank in range(1, self.size):
            try:
                ours, theirs = Pipe()
                with warnings.catch_warnings():     # other threads may hold locks; a worker process takes none of them
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process = os.fork()
            except OSError:
                self.__exit__(None, None, None)     # ends the processes forked before
                raise
            if process == 0:
                self._enter_worker(rank, theirs, (*self.lines, ours))
                break
            theirs.close()
            self.lines.append(ours)
            self.processes.append(process)
        return self

    def _enter_worker(self, rank, line, lines_of_rank_0):
        try:
            for other in lines_of_rank_0:
                other.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)        # rank 0 handles Ctrl-C, and ends the others
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._whole_program else signal.SIG_DFL)
            if not self._whole_program:
                os.closerange(3, line.fileno())
                os.closerange(line.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
            self.rank, self.lines, self.processes = rank, [line], []
        except BaseException:
            os._exit(1)         # otherwise two processes run the caller's program from here on

    def __exit__(self, kind, error, trace):
        if self.rank:
            try:
                if error is not None and kind is not _Over:
                    text = "".join(traceback.format_exception(kind, error, trace))
                    self.lines[0].send_bytes(encode(("failed", text)))
            finally:
                os._exit(0)     # whatever fails, a worker process ends here
        for line in self.lines:
            line.close()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):    # SIGCHLD is ignored: it is gone
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        self.lines, self.processes = [], []

    def _exchange(self, message):
        try:
            if self.rank:
                self.lines[0].send_bytes(encode(("gave", message)))
                return decode(self.lines[0].recv_bytes())
            values = [message]
            for line in self.lines:
                what, given = decode(line.recv_bytes())
                if what == "failed":
                    raise WorkerFailed(f"worker {len(values)} raised an error that worker 0 did not:\n{given}")
                values.append(given)
            everything = encode(values)
            for line in self.lines:
                line.send_bytes(everything)
            return decode(everything)
        except (EOFError, ConnectionError):
            if self.rank:
                raise _Over from None
            raise WorkerFailed("a worker process has ended: was it killed, or out of memory? "
                               "Fewer workers need less memory.") from None

    # Flat arrays: an optimiser's step, shared by the ranks (ZeRO stage 1). Here they are in one memory.

    def add_up(self, flat, others):
        """This rank's stretch of flat becomes the sum over the ranks: of flat, and of others in this order."""
        stretch = self.stretch(flat.size)
        for other in others:
            flat[stretch] += other[stretch]

    def share(self, flat):
        """After every rank has written its stretch of flat: give it to the others. They have it already."""


class _Over(BaseException):
    """Rank 0 has left the `with` block."""


def parallel_map(work: Callable, parts: Sequence, workers: int) -> list:
    """[work(part) for part in parts], computed by that many workers, forked for this call.

    Results are of the kinds that ProcessGroup.all_gather takes. Raises ValueError as ProcessGroup does.
    """
    with ProcessGroup(max(1, min(workers, len(parts))) if workers > 0 else workers) as group:
        return group.each(work, parts)[0]


def can_fork() -> bool:
    """Whether this system can have more than one worker: Windows, for example, cannot fork processes."""
    return hasattr(os, "fork")


def in_shared_memory(array: np.ndarray) -> bool:
    """Whether an array, or the array that it is a view of, was made by ProcessGroup.zeros for several workers."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(getattr(array, "obj", array), mmap)       # the base is a memoryview of the mmap


def available_cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A message: the length of the JSON, the JSON, and the bytes of the arrays, whose dtypes and shapes the JSON holds.

def encode(value: Any) -> bytes:
    """A value of the kinds that all_gather takes, as a message."""
    arrays: list[np.ndarray] = []
    header = json.dumps(_plain(value, arrays)).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *(a.tobytes() for a in arrays)])


def decode(message: bytes) -> Any:
    """The value of a message."""
    end = 8 + int.from_bytes(message[:8], "little")
    return _rebuilt(json.loads(message[8:end]), io.BytesIO(message[end:]))


def _plain(value, arrays):
    if is_cupy(value):
        value = to_numpy(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        arrays.append(value)
        return {"array": [value.dtype.str, value.shape]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        items = [_plain(v, arrays) for v in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _plain(v, arrays) for name, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"all_gather: {value!r} ({type(value).__name__}) cannot be sent; send None, bool, int, float, str, "
                    "arrays of numbers, and tuples, lists and dicts (with str keys) of these")


def _rebuilt(value, data):
    if isinstance(value, list):
        return [_rebuilt(v, data) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "array":
        dtype, shape = np.dtype(content[0]), content[1]
        return np.frombuffer(bytearray(data.read(math.prod(shape) * dtype.itemsize)), dtype).reshape(shape)
    if kind == "tuple":
        return tuple(_rebuilt(v, data) for v in content)
    return {name: _rebuilt(v, data) for name, v in content.items()}
