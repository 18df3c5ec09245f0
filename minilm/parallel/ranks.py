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

from minilm.fast.workers import WorkerFailed


class Ranks:
    """The ranks of this program. rank: the number of this one, size: how many there are.

    An engine has in addition:
    all_gather(value)       the values of all ranks, in the order of the ranks; every rank waits for the slowest. A
                            value is of the kinds that ProcessGroup.all_gather takes
    zeros(count, dtype)     a flat array, which add_up and share then take
    add_up(flat)            this rank's stretch of flat becomes the sum over the ranks (reduce-scatter)
    share(flat)             the other stretches of flat become those of the other ranks (all-gather)
    As a context manager it ends all ranks when one of them leaves the block by an exception.
    """

    everyone = True         # all ranks come back to the caller between two steps of a stage
    rank: int
    size: int

    @property
    def active_size(self) -> int:
        """The number of ranks, as for a ProcessGroup."""
        return self.size

    def once(self, work: Callable[[], Any]) -> Any:
        """The result of work(), called by rank 0 alone. Its error is raised in all ranks."""
        return self._same([lambda: work() if self.rank == 0 else None])[0][0][0]

    def each(self, work: Callable, parts: Sequence, then: Callable[[], Any] = lambda: None) -> tuple[list, list]:
        """([work(part) for part in parts], [then() of rank 0, 1, ..]) for every rank.

        Part i is computed by rank i mod size. An error in any part is raised in all ranks.
        """
        own = [lambda i=i: work(parts[i]) for i in range(self.rank, len(parts), self.size)]
        given = self._same([*own, then])
        return ([given[i % self.size][0][i // self.size] for i in range(len(parts))],
                [results[-1] for results, _ in given])

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

    def stretch(self, count: int) -> slice:
        """The part of flat arrays (count,) that this rank updates."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)
