"""Several processes at work on one batch: the same program in each, on parts of its own.

Threads would have to hand Python's interpreter lock to each other between any two operations on arrays; processes
have a lock each. They are forked, so that each has the model and the data before it without a copy. As under MPI,
every worker runs the same code and draws the same numbers; what differs is which parts it works on, and what one
found the others get by an exchange. Parameters and gradients lie in memory that all of them see.
"""

import io
import json
import math
import os
import signal
import traceback
import warnings
from mmap import mmap
from multiprocessing import Pipe

import numpy as np


class WorkerFailed(RuntimeError):
    """A worker ended, or met an error that worker 0 did not."""


class ProcessGroup:
    """Workers 0 to size - 1. Worker 0 is the process of the caller, the others exist within

        with team:

    whose body all of them run: rank says who one is, the calls of each() and exchange() must be the same in
    all, and only worker 0 comes out at its end; the others end there. What they did after the last
    exchange may be lost. Outside of it worker 0 is alone, and does everything itself. Raises ValueError
    for a size above 1 where processes cannot be forked.
    """

    def __init__(self, size):
        if size > 1 and not hasattr(os, "fork"):
            raise ValueError(f"{size} workers: this system cannot fork processes; ask for 1")
        self.size, self.rank = size, 0
        self._lines, self._helpers = [], []

    @property
    def active_size(self):
        """How many workers there are now: 1 outside of `with`."""
        return self.size if self._lines else 1

    def zeros(self, count, dtype, xp=np):
        """A flat array, in memory that the workers share if there are several."""
        dtype = np.dtype(dtype)
        if self.size == 1 or count == 0:
            return xp.zeros(count, dtype)
        if xp is not np:
            raise ValueError(f"{self.size} workers are processes that share a CPU's memory; on a GPU, ask for 1")
        return np.frombuffer(mmap(-1, count * dtype.itemsize), dtype)

    def __enter__(self):
        if self._lines:
            raise RuntimeError("this team is at work already; end that first, or make another")
        for rank in range(1, self.size):
            try:
                ours, theirs = Pipe()
                with warnings.catch_warnings():     # that other threads may hold locks: a helper takes none they know
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process = os.fork()
            except OSError:
                self.__exit__(None, None, None)     # ends those before it
                raise
            if process == 0:
                for line in (*self._lines, ours):
                    line.close()
                self._become(rank, theirs)
                break
            theirs.close()
            self._lines.append(ours)
            self._helpers.append(process)
        return self

    def _become(self, rank, line):
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for worker 0, which ends the others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # No file, and no lock on one, outlives worker 0 in here.
        os.closerange(3, line.fileno())
        os.closerange(line.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        self.rank, self._lines, self._helpers = rank, [line], []

    def __exit__(self, kind, error, trace):
        if self.rank:
            if error is not None and kind is not _Over:
                text = "".join(traceback.format_exception(kind, error, trace))
                try:
                    self._lines[0].send_bytes(_encode(("failed", text)))
                except OSError:
                    pass
            os._exit(0)
        for line in self._lines:
            line.close()
        for process in self._helpers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self._lines, self._helpers = [], []

    def all_gather(self, value):
        """The values that the workers gave, in the order of their ranks. All wait here for the slowest.

        Of None, bool, int, float, str, arrays, and tuples, lists and dicts (with names for keys) of such.
        """
        if not self._lines:
            return [value]
        try:
            if self.rank:
                self._lines[0].send_bytes(_encode(("gave", value)))
                return _decode(self._lines[0].recv_bytes())
            values = [value]
            for line in self._lines:
                what, given = _decode(line.recv_bytes())
                if what == "failed":
                    raise WorkerFailed(f"worker {len(values)} met an error that worker 0 did not:\n{given}")
                values.append(given)
            everything = _encode(values)
            for line in self._lines:
                line.send_bytes(everything)
            return _decode(everything)
        except (EOFError, ConnectionError):
            if self.rank:
                raise _Over from None
            raise WorkerFailed("a worker has ended: killed from outside, or for want of memory? "
                               "Fewer workers need less.") from None

    def broadcast(self, work):
        """work() of worker 0, for everyone: what may have a state or chance of its own."""
        return self.all_gather(work() if self.rank == 0 else None)[0]

    def map(self, work, parts, then=lambda: None):
        """work(part) for every part, part i by worker i mod size: the list of results, which every worker gets.

        then() is called by every worker after the last of its parts. An error in any part is raised by worker 0.
        """
        results, failed = [], None
        for i in range(self.rank, len(parts), self.active_size):
            try:
                results.append(work(parts[i]))
            except Exception:
                if self.rank == 0:
                    raise
                failed = i
                break
        then()
        given = self.all_gather((results, failed))
        for _, failed in given:
            if failed is not None:
                if self.rank == 0:
                    work(parts[failed])         # once more: so the error is raised here, whole
                    raise WorkerFailed(f"part {failed} failed for another worker, and not here")
                raise _Over
        return [given[i % self.active_size][0][i // self.active_size] for i in range(len(parts))]


class _Over(BaseException):
    """Worker 0 needs no others any more."""


def parallel_map(work, parts, workers):
    """work(part) for every part, a list; by so many workers, forked for it. Results: as for Team.exchange."""
    with ProcessGroup(max(1, min(workers, len(parts)))) as team:
        return team.map(work, parts)


def available_cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A message: the length of the JSON, the JSON, and the bytes of its arrays, which it names by dtype and shape.

def _encode(value):
    arrays = []
    header = json.dumps(_plain(value, arrays)).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *(a.tobytes() for a in arrays)])


def _decode(message):
    end = 8 + int.from_bytes(message[:8], "little")
    return _rebuilt(json.loads(message[8:end]), io.BytesIO(message[end:]))


def _plain(value, arrays):
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": [value.dtype.str, value.shape]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        items = [_plain(v, arrays) for v in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {"dict": {name: _plain(v, arrays) for name, v in value.items()}}
    return value


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
