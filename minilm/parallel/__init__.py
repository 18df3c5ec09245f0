"""Several processes that each run the whole program: ranks, on one machine or on several.

    with parallel.world(2) as ranks:
        state = TrainState(model, rng, group=ranks)

minilm/ranks.py says what a rank does, and has all that is the same in the engines. forked.py: processes forked on this
machine, with NumPy alone. mpi.py: processes that mpiexec started. nccl.py: the same, with a GPU each. A notebook, which
cannot run in several processes, uses TrainState(model, rng, workers=2) instead: processes exist only within a stage
(fast/workers.py).

All ranks make the same calls in the same order, TrainState.snapshot() among them; rank 0 prints and writes. Set
OPENBLAS_NUM_THREADS=1 before NumPy is imported, because each rank has a part of the batch. On CPUs of one kind the
results are the same bit for bit for one number of ranks. A rank that ends, or makes another call, ends all with words.
A rank that is stopped, or lost with its machine, ends all after half a minute under mpiexec; forked ranks wait for it.
"""

from __future__ import annotations

from minilm.parallel.forked import ForkedRanks
from minilm.parallel.mpi import MpiRanks, launched
from minilm.parallel.nccl import NcclRanks
from minilm.ranks import Ranks

__all__ = ["ForkedRanks", "MpiRanks", "NcclRanks", "Ranks", "launched", "world"]


def world(workers: int = 1, device: str = "cpu") -> Ranks:
    """The ranks of this program, to be entered once: `with world(2) as ranks:`.

    If mpiexec started several processes, they are the ranks, and `workers` has no effect. Else there are `workers`
    ranks, forked at the start of the block. device: "cpu" or "gpu", where the models are that the ranks train.
    Raises ValueError for another device, for several workers on a GPU and as ForkedRanks and NcclRanks do, ImportError
    as MpiRanks and NcclRanks do.
    """
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device is {device!r}; it must be 'cpu' or 'gpu'")
    if launched()[1] > 1:
        return NcclRanks() if device == "gpu" else MpiRanks()
    if device == "gpu" and workers != 1:
        raise ValueError(f"{workers} workers are processes that share a CPU's memory; on a GPU ask for 1. For several "
                         "GPUs start the program with mpiexec, one rank for each")
    return ForkedRanks(workers)
