"""Run by tests/test_mpi.py under mpiexec: mpi_program.py train STAGE DTYPE STEPS OUT, or another of the functions."""
import os
import signal
import sys
import time

import numpy as np

from minilm import parallel
from minilm.model import RewardModel
from minilm.parallel import heartbeat
from minilm.ranks import WorkerFailed
from minilm.stages.train_state import TrainState
from test_stages import run, transformer


def train(ranks, stage, dtype, steps, out):
    """Rank 0 writes the state after the steps."""
    model = transformer(dtype)
    if stage == "reward model":
        model = RewardModel(model, np.random.default_rng(5))
    state = TrainState(model, np.random.default_rng(4), group=ranks)
    metrics = ranks.all_gather(run(stage, state, int(steps)))
    arrays, _ = state.snapshot()
    assert all(given == metrics[0] for given in metrics)
    if ranks.rank == 0:
        np.savez(out, **arrays)


def end(ranks, how):
    """Rank 1 ends, and the others wait for it."""
    ranks.all_gather(None)
    if ranks.rank == 1:
        {"exception": lambda: 1 / 0, "sys.exit": lambda: sys.exit("it ends here"), "status 3": lambda: sys.exit(3),
         "_exit": lambda: os._exit(3), "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
         "returns": lambda: None}[how]()
    if ranks.rank != 1 or how != "returns":
        ranks.all_gather(None)
        print("went on")


def end_add_up(ranks):
    """Rank 1 leaves, and the others wait for it with their gradients."""
    if ranks.rank != 1:
        ranks.add_up(ranks.zeros(10, np.float64))
        print("went on")


def end_together(ranks, how):
    """All ranks end by the same error, or by one of rank 0."""
    {"exception": lambda: 1 / 0, "once": lambda: ranks.once(lambda: 1 / 0), "status 3": lambda: sys.exit(3)}[how]()


def silent(ranks, rank):
    """That rank is stopped, and the others wait for it. Without a rank: all work for longer than SILENCE."""
    if rank == "none":
        end = time.monotonic() + 2 * heartbeat.SILENCE * heartbeat.TICK
        while time.monotonic() < end:
            np.ones((200, 200)) @ np.ones((200, 200))
    elif ranks.rank == int(rank):
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.all_gather(None)
    print("went on")


def lost(ranks):
    """All wait for each other, again and again, until the network is lost."""
    ranks.all_gather(None)
    if ranks.rank == 0:
        print("ready")
    flat = ranks.zeros(100_000, np.float64)
    while True:
        ranks.add_up(flat)
        ranks.share(flat)


def wait(ranks):
    """The CPU seconds of rank 1 while it waits two seconds for rank 0."""
    ranks.all_gather(None)
    began = time.process_time()
    if ranks.rank == 0:
        time.sleep(2)
    ranks.all_gather(None)
    used = ranks.all_gather(time.process_time() - began)
    if ranks.rank == 0:
        print(used[1])


def calls(ranks):
    """once, each, add_up and share, and their errors."""
    assert ranks.once(lambda: ranks.rank) == 0
    assert ranks.each(lambda part: (part, ranks.rank), range(5), then=lambda: ranks.rank) == (
        [(i, i % 3) for i in range(5)], [0, 1, 2])
    for work, by in ((lambda: ranks.once(lambda: 1 / 0), [0]),
                     (lambda: ranks.each(lambda part: 1 / part, range(3)), [0, 1, 2]),
                     (lambda: ranks.each(lambda part: 1 / (ranks.rank - 1), range(3)), [1])):
        try:
            work()
        except (ZeroDivisionError, WorkerFailed) as error:
            assert isinstance(error, ZeroDivisionError) == (ranks.rank in by)
        else:
            raise AssertionError("no error")
    for count in (0, 1, 2, 7, 100_000):
        flat = ranks.zeros(count, np.float64)
        flat[:] = np.arange(count) + 1000 * ranks.rank
        ranks.add_up(flat)
        ranks.share(flat)
        assert (flat == 3 * np.arange(count) + 3000).all()
    if ranks.rank == 0:
        print("as expected")


if __name__ == "__main__":
    if sys.argv[1] in ("silent", "lost"):
        heartbeat.TICK = 0.05
    with parallel.world() as ranks:
        globals()[sys.argv[1]](ranks, *sys.argv[2:])
