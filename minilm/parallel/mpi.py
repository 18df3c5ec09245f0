"""Ranks that mpiexec started, on one machine or on several.

    mpiexec -n 4 python -m mpi4py program.py

A rank that waits for the others sleeps, because a blocking MPI call would use a whole core.
Needs mpi4py and an MPI: pip install -e '.[mpi]'. Nothing is unpickled: messages are those of workers.py.
Tests: tests/test_mpi.py.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from minilm.fast.workers import decode, encode
from minilm.parallel.ranks import Ranks

TRIES = 200             # of a waiting rank before it sleeps between them
LONGEST_SLEEP = 2e-3    # seconds
# How mpich (also Intel MPI), Open MPI and MVAPICH tell a process the number of ranks.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def started_by_mpiexec() -> bool:
    """Whether mpiexec started this process as one of several."""
    return any(os.environ.get(name, "1") not in ("", "1") for name in SIZES)


class MpiRanks(Ranks):
    """The ranks of this program. Make one, on all ranks. Raises ImportError without mpi4py or an MPI.

    As a context manager it ends all ranks when one of them leaves the block by an exception: the others would wait for
    it for ever.
    """

    def __init__(self):
        from mpi4py import MPI
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank = self._comm.rank
        self.size = self._comm.size

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or (kind is SystemExit and error.code in (None, 0)):
            return
        if kind is SystemExit:
            print(f"rank {self.rank}: {error.code}", file=sys.stderr)
        else:
            traceback.print_exception(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(error.code if kind is SystemExit and isinstance(error.code, int) else 1)

    def zeros(self, count: int, dtype: Any, xp: Any = np) -> np.ndarray:
        return xp.zeros(count, dtype)

    def all_gather(self, value: Any) -> list:
        message = np.frombuffer(encode(value), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._wait(self._comm.Iallgather(np.array([len(message)]), lengths))
        everything = np.empty(lengths.sum(), np.uint8)
        self._wait(self._comm.Iallgatherv(message, [everything, lengths]))
        ends = np.cumsum(lengths)
        return [decode(everything[end - length:end].tobytes()) for end, length in zip(ends, lengths)]

    def add_up(self, flat: np.ndarray, others: Sequence[np.ndarray] = ()) -> None:
        stretch = self.stretch(flat.size)
        own = np.empty(stretch.stop - stretch.start, flat.dtype)
        self._wait(self._comm.Ibarrier())
        self._comm.Reduce_scatter(flat, own, self._counts(flat.size))
        flat[stretch] = own

    def share(self, flat: np.ndarray) -> None:
        self._wait(self._comm.Ibarrier())
        self._comm.Allgatherv(self._mpi.IN_PLACE, [flat, self._counts(flat.size)])

    def _counts(self, count):
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return [stop - start for start, stop in zip(ends, ends[1:])]

    def _wait(self, request):
        """Until the others have come."""
        tries = 0
        while not request.Test():
            tries += 1
            if tries > TRIES:
                time.sleep(min(LONGEST_SLEEP, 1e-5 * (tries - TRIES)))
