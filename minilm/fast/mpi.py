"""Ranks that mpiexec started, on one machine or on several: the interface of workers.ProcessGroup over MPI.

    mpiexec -n 4 python -m mpi4py program.py

Every rank runs the whole program, with memory of its own: all of them come back to the caller between two steps
(SPMD). A gradient is added up, and an update made, by stretches of the flat arrays, one for each rank; then the new
parameters are given to all (ZeRO stage 1: Rajbhandari et al. 2020, arXiv:1910.02054). So each parameter is computed
once, and is the same bit for bit in every rank.
A rank that waits for the others sleeps, because a blocking MPI call would use a whole core.
Needs mpi4py and an MPI: pip install -e '.[mpi]'. Nothing is unpickled: messages are those of workers.py.
Tests: tests/test_mpi.py.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilm.fast.workers import WorkerFailed, decode, encode

TRIES = 200             # of a waiting rank before it sleeps between them
LONGEST_SLEEP = 2e-3    # seconds
# How mpich (also Intel MPI), Open MPI and MVAPICH tell a process the number of ranks.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def started_by_mpiexec() -> bool:
    """Whether mpiexec started this process as one of several."""
    return any(os.environ.get(name, "1") not in ("", "1") for name in SIZES)


class MpiRanks:
    """The ranks of this program. Make one, on all ranks. Raises ImportError without mpi4py or an MPI.

    As a context manager it ends all ranks when one of them leaves the block by an exception: the others would wait for
    it for ever.
    """

    everyone = True

    def __init__(self):
        from mpi4py import MPI
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank = self._comm.rank
        self.size = self._comm.size
        self.active_size = self.size

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
        """A flat array of zeros, in memory of this rank."""
        return xp.zeros(count, dtype)

    # Small values.

    def all_gather(self, value: Any) -> list:
        """The values of all ranks, in the order of the ranks; of the kinds that ProcessGroup.all_gather takes."""
        message = np.frombuffer(encode(value), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._wait(self._comm.Iallgather(np.array([len(message)]), lengths))
        everything = np.empty(lengths.sum(), np.uint8)
        self._wait(self._comm.Iallgatherv(message, [everything, lengths]))
        ends = np.cumsum(lengths)
        return [decode(everything[end - length:end].tobytes()) for end, length in zip(ends, lengths)]

    def once(self, work: Callable[[], Any]) -> Any:
        """The result of work(), called by rank 0 alone. Its error is raised in all ranks."""
        return self._same([lambda: work() if self.rank == 0 else None])[0][0][0]

    def each(self, work: Callable, parts: Sequence, then: Callable[[], Any] = lambda: None) -> tuple[list, list]:
        """([work(part) for part in parts], [then() of rank 0, 1, ..]) for every rank.

        Part i is computed by rank i mod size. An error in any part is raised in all ranks.
        """
        own = [lambda i=i: work(parts[i]) for i in range(self.rank, len(parts), self.size)]
        given = self._same([*own, then])
        return ([given[i % self.size][0][i // self.size] for i in range(len(parts))], [results[-1] for results, _ in given])

    def _same(self, calls):
        """[(results of these calls, None)] by rank. Raises in every rank if a call of one raises."""
        results, error = [], None
        try:
            results = [call() for call in calls]
        except Exception as met:
            error = met
        given = self.all_gather((results, error and f"{type(error).__name__}: {error}"))
        if error:
            raise error
        for rank, (_, text) in enumerate(given):
            if text:
                raise WorkerFailed(f"rank {rank} raised an error that rank {self.rank} did not: {text}")
        return given

    # Flat arrays: an optimiser's step.

    def stretch(self, count: int) -> slice:
        """The part of flat arrays (count,) that this rank updates."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add_up(self, flat: np.ndarray, others: Sequence[np.ndarray]) -> None:
        """This rank's stretch of flat becomes the sum over the ranks. The rest is of no more use. others: ()"""
        stretch = self.stretch(flat.size)
        own = np.empty(stretch.stop - stretch.start, flat.dtype)
        self._wait(self._comm.Ibarrier())
        self._comm.Reduce_scatter(flat, own, self._counts(flat.size))
        flat[stretch] = own

    def share(self, flat: np.ndarray) -> None:
        """After every rank has written its stretch of flat: give it to the others."""
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
