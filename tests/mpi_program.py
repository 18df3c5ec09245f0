"""Run by tests/test_mpi.py under mpiexec: rank 0 writes the state of a stage after some steps, and every rank its metrics.

    mpiexec -n 2 python -m mpi4py mpi_program.py STAGE DTYPE STEPS OUT
"""
import sys

import numpy as np

from minilm.fast.forked_ranks import ForkedRanks
from minilm.fast.mpi import MpiRanks, started_by_mpiexec
from minilm.model import RewardModel
from minilm.stages.train_state import TrainState
from test_stages import run, transformer

stage, dtype, steps, out, size = sys.argv[1:]
with MpiRanks() if started_by_mpiexec() else ForkedRanks(int(size)) as group:
    model = transformer(dtype)
    if stage == "reward model":
        model = RewardModel(model, np.random.default_rng(5))
    state = TrainState(model, np.random.default_rng(4), group=group)
    metrics = run(stage, state, int(steps))
    arrays, metadata = state.snapshot()
    losses = group.all_gather([step["loss"] for step in metrics])
    assert all(given == losses[0] for given in losses)
    if group.rank == 0:
        np.savez(out, **arrays, losses=losses[0])
