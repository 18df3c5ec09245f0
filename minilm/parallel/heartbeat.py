"""Is every rank still there? MPI notices neither a lost network nor a process that is stopped.

A thread of each rank sends an empty message to rank 0 every few seconds, and rank 0 to each of them. If none has come
for SILENCE seconds, the job ends. A rank that computes, or waits, sends as before, because this thread is another.
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

    It does nothing with an MPI that cannot be called by several threads.
    """

    def __init__(self, mpi: Any):
        self._comm = mpi.COMM_WORLD.Dup()
        self._possible = mpi.Query_thread() == mpi.THREAD_MULTIPLE
        self._peers = [rank for rank in range(self._comm.size) if 0 in (rank, self._comm.rank) and
                       rank != self._comm.rank]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self._possible and self._peers:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self):
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
                    self._end(peer)
            tick += 1

    def _end(self, peer):
        print(f"rank {self._comm.rank}: rank {peer} has sent nothing for {SILENCE * TICK:.0f} s: its network or its "
              "machine has failed, or its process is stopped. All ranks end; --resume continues.",
              file=sys.__stderr__ or sys.stderr, flush=True)
        # mpiexec ends the ranks that it can reach, and waits for a host that it cannot reach: it gets some seconds.
        subprocess.Popen(["sh", "-c", f"sleep {LAUNCHER_ENDS}; kill {' '.join(_launchers())}"], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os._exit(1)         # not MPI's Abort, which would wait for the call that another thread is in


def _launchers():
    """The processes of mpiexec on this machine, from the parent of this one upwards."""
    found = []
    process = os.getppid()
    with contextlib.suppress(OSError):                  # no /proc: no such process is found
        while True:
            head, _, rest = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")
            if not head.partition("(")[2].startswith(LAUNCHERS):
                break
            found.append(str(process))
            process = int(rest.split()[1])
    return found
