"""Ranks on one machine: processes forked from this one, with NumPy alone.

Flat arrays are in memory that all ranks see: a row for each rank, of which a rank writes its own row alone between two
meetings. add_up and share read the others' rows. The memory has no name: rank 0 makes a file that exists only while it
is open, and passes the open file to the others. So nothing is left when a process is killed.
Tests: tests/test_ranks.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from mmap import mmap
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np

from minilm.fast.workers import ProcessGroup
from minilm.ranks import END, Ranks

BLOCK = 1 << 15         # numbers that stay in the cache of one core


class ForkedRanks(Ranks):
    """`size` ranks within its `with` block: rank 0 is the calling process, the others are forked at the start of the
    block and end with it. Raises ValueError as ProcessGroup does."""

    def __init__(self, size: int):
        self._group = ProcessGroup(size, whole_program=True)
        self.size = size
        self.rank = 0

    def __enter__(self):
        _flush()                                    # otherwise each process would print what is waiting
        self._group.__enter__()
        self.rank = self._group.rank
        return self

    def __exit__(self, kind, error, trace):
        _flush()
        try:
            if error is None:
                self._meet(END)
        except BaseException as met:
            self._group.__exit__(type(met), met, met.__traceback__)
            raise
        self._group.__exit__(kind, error, trace)

    def _exchange(self, message):
        if not self._group.lines:
            raise RuntimeError(f"these {self.size} ranks exist only within their block, `with parallel.world(..)`")
        return self._group._exchange(message)

    def zeros(self, count: int, dtype: Any, xp: Any = np) -> np.ndarray:
        dtype = np.dtype(dtype)
        if self.size == 1 or count == 0:
            return xp.zeros(count, dtype)
        if xp is not np:
            raise ValueError(f"{self.size} ranks are processes that share a CPU's memory; on a GPU, ask for 1")
        self._meet(f"zeros of {count} {dtype}")
        file = self._open_file(self.size * count * dtype.itemsize)
        rows = np.frombuffer(mmap(file, self.size * count * dtype.itemsize), dtype).reshape(self.size, count)
        os.close(file)
        return rows[self.rank]

    def _open_file(self, size):
        if self.rank:
            return recv_handle(self._group.lines[0])
        file = os.memfd_create("minilm") if hasattr(os, "memfd_create") else os.dup(tempfile.TemporaryFile().fileno())
        os.truncate(file, size)
        for line, process in zip(self._group.lines, self._group.processes):
            send_handle(line, file, process)
        return file

    def add_up(self, flat: np.ndarray, others: Any = ()) -> None:
        rows = self._rows(flat)
        if rows is None:
            return
        self._meet(f"add_up of {flat.size} {flat.dtype}")       # every rank has written its row
        stretch = self.stretch(flat.size)
        for i in range(stretch.start, stretch.stop, BLOCK):
            block = slice(i, min(i + BLOCK, stretch.stop))
            flat[block] = sum(rows[1:, block], start=rows[0, block])

    def share(self, flat: np.ndarray) -> None:
        rows = self._rows(flat)
        if rows is None:
            return
        self._meet(f"share of {flat.size} {flat.dtype}")
        for rank in range(self.size):
            if rank != self.rank:
                stretch = self.stretch(flat.size, rank)
                flat[stretch] = rows[rank, stretch]
        self._meet("the end of share")              # nobody changes a row that another one still copies

    def _rows(self, flat):
        return None if self.size == 1 or flat.size == 0 else flat.base.reshape(self.size, -1)


def _flush():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
