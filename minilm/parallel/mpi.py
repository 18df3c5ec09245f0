"""Ranks that mpiexec started, on one machine or on several.

    mpiexec -n 4 python program.py

A rank that waits for the others sleeps, because a blocking MPI call would use a whole core. Nothing waits for ever: a
rank that leaves the block alone ends all (MpiRanks.__exit__), and so does one that is lost (heartbeat.py).
Needs mpi4py and an MPI: pip install -e '.[mpi]'. Nothing is unpickled: messages are those of workers.py.
Tests: tests/test_mpi.py, tests/test_network.py.
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
from minilm.parallel.heartbeat import Heartbeat
from minilm.ranks import END, Ranks, WorkersDisagree

TRIES = 200             # of a waiting rank before it sleeps between them
LONGEST_SLEEP = 2e-3    # seconds
GRACE = 2.0             # seconds in which the others may leave by an error too, before a rank ends them
# How mpich (also Intel MPI), Open MPI, MVAPICH and srun with PMIx tell a process its rank and the number of ranks.
VARIABLES = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
             ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"), ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"))


def launched() -> tuple[int, int]:
    """(rank, size) that mpiexec gave to this process; (0, 1) if it did not start it. It needs no MPI."""
    for rank, size in VARIABLES:
        if os.environ.get(rank, "").isdigit() and os.environ.get(size, "").isdigit():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


class MpiRanks(Ranks):
    """The ranks of this program. Make one, on all ranks.

    Raises ImportError without mpi4py or an MPI, RuntimeError if mpiexec and mpi4py use different MPIs.
    """

    _blocks = 0             # that are open in this process: main_guard of a script may have one around another

    def __init__(self):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:        # RuntimeError: mpi4py finds no MPI
            raise ImportError(f"ranks of mpiexec need mpi4py: pip install -e '.[mpi]' ({error})") from error
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self._farewell = MPI.COMM_WORLD.Dup()       # its own, because the others may be waiting in another call
        self._heart = Heartbeat(MPI)
        self.rank = self._comm.rank
        self.size = self._comm.size
        if self.size != launched()[1]:
            raise RuntimeError(f"mpiexec started {launched()[1]} processes, and mpi4py sees {self.size}: mpi4py uses "
                               f"{MPI.get_vendor()[0]}, and this mpiexec is of another MPI")

    def __enter__(self):
        MpiRanks._blocks += 1
        self._heart.start()
        return self

    def __exit__(self, kind, error, trace):
        """If all ranks leave by an error, the error and the exit status are those of rank 0. If one leaves alone, the
        others would wait for it for ever: it reports the error and ends them."""
        disagree = None
        try:
            if _exit_status(error) == 0:
                self._meet(END)
        except WorkersDisagree as met:
            disagree = error = met
        status = _exit_status(error)
        if status and not self._wait(self._farewell.Ibarrier(), GRACE):
            _report(self.rank, error)
            self._comm.Abort(status)
        self._heart.stop()
        MpiRanks._blocks -= 1
        if status and self.rank and MpiRanks._blocks == 0:
            sys.exit(0)
        if disagree:
            raise disagree

    def zeros(self, count: int, dtype: Any, xp: Any = np) -> np.ndarray:
        if xp is not np:
            raise ValueError("these ranks share arrays on the CPU; for models on GPUs use parallel.world(device='gpu')")
        return np.zeros(count, dtype)

    def _exchange(self, message):
        sent = np.frombuffer(encode(message), np.uint8)
        lengths = np.empty(self.size, int)
        self._wait(self._comm.Iallgather(np.array([len(sent)]), lengths))
        everything = np.empty(lengths.sum(), np.uint8)
        self._wait(self._comm.Iallgatherv(sent, [everything, lengths]))
        ends = np.cumsum(lengths)
        return [decode(everything[end - length:end].tobytes()) for end, length in zip(ends, lengths)]

    def add_up(self, flat: np.ndarray, others: Sequence[np.ndarray] = ()) -> None:
        stretch = self.stretch(flat.size)
        own = np.empty(stretch.stop - stretch.start, flat.dtype)
        self._meet(f"add_up of {flat.size} {flat.dtype}")
        self._comm.Reduce_scatter(flat, own, self._counts(flat.size))
        flat[stretch] = own

    def share(self, flat: np.ndarray) -> None:
        self._meet(f"share of {flat.size} {flat.dtype}")
        self._comm.Allgatherv(self._mpi.IN_PLACE, [flat, self._counts(flat.size)])

    def _counts(self, count):
        stretches = [self.stretch(count, rank) for rank in range(self.size)]
        return [stretch.stop - stretch.start for stretch in stretches]

    def _wait(self, request, seconds=None):
        """Until the others have come: True; or for so many seconds: False."""
        end = seconds and time.monotonic() + seconds
        tries = 0
        while not request.Test():
            tries += 1
            if tries > TRIES:
                if end and time.monotonic() > end:
                    return False
                time.sleep(min(LONGEST_SLEEP, 1e-5 * (tries - TRIES)))
        return True


def _exit_status(error):
    """Of a process that ends by this exception, or None."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return 0 if error is None else 1
    return error.code if isinstance(error.code, int) else 0 if error.code is None else 1


def _report(rank, error):
    """On the stderr of the process, also if sys.stderr is another file now."""
    if isinstance(error, KeyboardInterrupt):
        words = f"rank {rank}: interrupted\n"
    elif isinstance(error, SystemExit):
        words = f"rank {rank}: {f'exit status {error}' if isinstance(error.code, int) else error}\n"
    else:
        words = f"rank {rank} ends by an exception:\n{''.join(traceback.format_exception(error))}"
    stream = sys.__stderr__ or sys.stderr
    stream.write(words)
    stream.flush()
