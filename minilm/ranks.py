"""Ranks: processes that each run the whole program (SPMD), as under torchrun or mpiexec.

Every rank has memory of its own and draws the same random numbers. It computes its shards of a batch. The gradients are
added up, and the update is made, by stretches of the flat arrays, one for each rank; then the new parameters are given
to all (ZeRO stage 1: Rajbhandari et al. 2020, arXiv:1910.02054). So each parameter is computed once, and is the same
bit for bit in every rank. Rank 0 prints and writes. A result that depends on a clock, a signal, the disk or chance goes
through once().
Tests: tests/test_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

END = "the end of the block"


class WorkerFailed(RuntimeError):
    """A rank ended, or raised an error that this one did not."""


class WorkersDisagree(RuntimeError):
    """A rank has another state than rank 0, or makes another call."""


class Ranks:
    """The ranks of this program. rank: the number of this one, size: how many there are.

    As a context manager it ends all ranks when one of them leaves the block by an exception; at the end of the block it
    waits for the others. An engine has the methods that raise NotImplementedError here.
    """

    everyone = True         # all ranks come back to the caller between two steps of a stage
    rank: int
    size: int

    @property
    def active_size(self) -> int:
        """The number of ranks that there are now."""
        return self.size

    def __enter__(self) -> Ranks:
        raise NotImplementedError

    def __exit__(self, kind, error, trace) -> None:
        raise NotImplementedError

    # Small values.

    def all_gather(self, value: Any) -> list:
        """The values of all ranks, in the order of the ranks. Every rank waits here for the slowest.

        A value is None, bool, int, float, str, an array, or a tuple, list or dict (with str keys) of these; an array on
        a GPU arrives as NumPy's. Raises TypeError for another one, WorkersDisagree if a rank makes another call.
        """
        return self._meet("all_gather", value)

    def _meet(self, call, value=None):
        """The values of all ranks. Every call in which the ranks meet is this one."""
        if self.active_size == 1:
            return [value]
        given = self._exchange((call, value))
        calls = [theirs for theirs, _ in given]
        if len(set(calls)) > 1:
            shown = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(calls))
            raise WorkersDisagree(f"all ranks must make the same calls, and they are at {shown}")
        return [value for _, value in given]

    def _exchange(self, message):
        """The messages of all ranks."""
        raise NotImplementedError

    def once(self, work: Callable[[], Any]) -> Any:
        """The result of work(), called by rank 0 alone. Its error is raised in rank 0, WorkerFailed in the others."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as met:
                error = met
        result, words = self._meet("once", (result, error and _in_words(error)))[0]
        if error:
            raise error
        if words:
            raise WorkerFailed(f"rank 0 raised an error: {words}")
        return result

    def each(self, work: Callable, parts: Sequence, then: Callable[[], Any] = lambda: None) -> tuple[list, list]:
        """([work(part) for part in parts], [then() of rank 0, 1, ..]) for every rank.

        Part i is computed by rank i mod size. then() is called by every rank after the last of its parts. An error in
        any part is raised in all ranks: the others repeat that part.
        """
        results: list = []
        error: Any = None
        failed = None
        for i in range(self.rank, len(parts), self.active_size):
            try:
                results.append(work(parts[i]))
            except Exception as met:
                error, failed = met, i
                break
        given = self._meet("each", (results, error and [failed, _in_words(error)], None if error else then()))
        for rank, (_, fault, _) in enumerate(given):
            if fault is not None:
                if rank != self.rank:
                    error = WorkerFailed(f"rank {rank} raised an error that rank {self.rank} did not: {fault[1]}")
                    try:
                        work(parts[fault[0]])           # again: so the same error is raised in every rank
                    except Exception as met:
                        error = met
                self._meet("an error of each")          # every rank has it before one leaves
                raise error
        return ([given[i % self.active_size][0][i // self.active_size] for i in range(len(parts))],
                [then for _, _, then in given])

    # Flat arrays: an optimiser's step.

    def zeros(self, count: int, dtype: Any, xp: Any = np) -> np.ndarray:
        """A flat array of zeros, which belongs to this rank. All ranks call it."""
        raise NotImplementedError

    def add_up(self, flat: np.ndarray, others: Sequence[np.ndarray] = ()) -> None:
        """This rank's stretch of flat, an array of zeros(), becomes the sum over the ranks (reduce-scatter). The other
        stretches stay as they are, and nobody writes to flat before the ranks have met again. others: the arrays of the
        other ranks, if they are in the memory of this one."""
        raise NotImplementedError

    def share(self, flat: np.ndarray) -> None:
        """After every rank has written its stretch of flat: the other stretches become theirs (all-gather)."""
        raise NotImplementedError

    def stretch(self, count: int, rank: int | None = None) -> slice:
        """The part of flat arrays (count,) that a rank, or this one, updates."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.active_size, count * (rank + 1) // self.active_size)


def _in_words(error):
    return f"{type(error).__name__}: {error}"
