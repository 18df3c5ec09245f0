"""Several processes that each run the whole program: ranks, on one machine or on several.

    with parallel.world(2) as ranks:
        state = TrainState(model, rng, group=ranks)

minilm/ranks.py says what a rank does, and has all that is the same in both engines. forked.py: processes forked on this
machine, with NumPy alone. mpi.py: processes that mpiexec started. A notebook, which cannot run in several processes,
uses TrainState(model, rng, workers=2) instead: processes exist only within a stage (fast/workers.py).
"""

from __future__ import annotations

from minilm.parallel.forked import ForkedRanks
from minilm.parallel.mpi import MpiRanks, launched
from minilm.ranks import Ranks


def world(workers: int = 1) -> Ranks:
    """The ranks of this program, to be entered once: `with world(2) as ranks:`.

    If mpiexec started several processes, they are the ranks, and `workers` has no effect. Else there are `workers`
    ranks, forked at the start of the block. Raises ValueError as ForkedRanks does, ImportError as MpiRanks does.
    """
    return MpiRanks() if launched()[1] > 1 else ForkedRanks(workers)
