"""Is every rank still there? MPI notices neither a lost network nor a process that is stopped.

A thread of each rank sends an empty message to its peers every few seconds: rank 0 to all, the others to rank 0 and to
their neighbours. If a peer has sent none for SILENCE ticks, the job ends. A rank that computes, or waits, sends as
before, as long as its C code does not hold the lock of the Python interpreter.
Tests: tests/test_mpi.py, tests/test_network.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

TICK = 1.0              # seconds between two looks
BEAT = 5                # ticks between two messages
SILENCE = 30            # ticks without a message: of this process, so that none passes while all of them are stopped
LAUNCHER_ENDS = 10      # seconds
LAUNCHERS = ("mpiexec", "mpirun", "hydra", "orte", "prte")      # beginnings of the names of their processes


class Heartbeat:
    """Between start() and stop(), on all ranks. mpi: the module mpi4py.MPI.

    With an MPI that cannot be called by several threads it does nothing but say so.
    """

    def __init__(self, mpi: Any):
        self._comm = mpi.COMM_WORLD.Dup()
        self._possible = mpi.Query_thread() == mpi.THREAD_MULTIPLE
        rank = self._comm.rank
        self._peers = [peer for peer in range(self._comm.size)
                       if peer != rank and (0 in (peer, rank) or abs(peer - rank) == 1)]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self._possible and self._peers:
            self._thread.start()
        elif self._peers and self._comm.rank == 0:
            print("this MPI allows no calls by several threads: a lost network will not be noticed", file=sys.stderr)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self):
        try:
            self._watch()
        except Exception as error:
            self._end(f"MPI fails between it and the others ({error})")

    def _watch(self):
        silent = dict.fromkeys(self._peers, 0)
        sent = {}
        tick = 0
        while not self._stopped.wait(TICK):
            for peer in self._peers:
                # A message that has not left yet is not followed by another one.
                if tick % BEAT == 0 and (peer not in sent or sent[peer].Test()):
                    sent[peer] = self._comm.Isend(b"", peer)
                silent[peer] += 1
                while self._comm.Iprobe(peer):
                    self._comm.Recv(bytearray(), peer)
                    silent[peer] = 0
                if silent[peer] > SILENCE:
                    self._end(f"rank {peer} has sent nothing for {SILENCE * TICK:.0f} s: its network or its machine "
                              "has failed, or its process is stopped or holds Python's lock")
            tick += 1

    def _end(self, words):
        print(f"rank {self._comm.rank}: {words}. All ranks end.", file=sys.__stderr__ or sys.stderr, flush=True)
        # mpiexec ends the ranks that it can reach, and waits for a host that it cannot reach: it gets some seconds.
        subprocess.Popen(["sh", "-c", f"sleep {LAUNCHER_ENDS}; kill {' '.join(_launchers())}"], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os._exit(1)         # not MPI's Abort, which would wait for the call that another thread is in


def _launchers():
    """The processes of mpiexec on this machine, above this one and above what it was started by (a shell, numactl)."""
    found = []
    process = os.getppid()
    with contextlib.suppress(OSError):                  # no /proc: no such process is found
        while process > 1:
            head, _, rest = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")
            is_launcher = head.partition("(")[2].startswith(LAUNCHERS)
            if found and not is_launcher:
                break
            if is_launcher:
                found.append(str(process))
            process = int(rest.split()[1])
    return found
