"""Run by tests/test_nccl.py under mpiexec: nccl_program.py FUNCTION ARGUMENT ..., on the mocks of CuPy and NCCL."""
import functools
import os
import sys

import numpy as np
from mpi4py import MPI

import fake_nccl
from fake_nccl import NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM, STREAM, as_nccl
from minilm import parallel
from minilm.model import RewardModel
from minilm.parallel.nccl import NcclRanks
from minilm.stages.train_state import TrainState
from test_device import STAGES, model_for, on_gpu


def trained(stage, group=None):
    """The metrics of a stage on the GPU, and its state."""
    model = on_gpu(model_for(stage, np.random.default_rng(1)))
    reference = None if isinstance(model, RewardModel) else model.copy()
    state = TrainState(model, np.random.default_rng(2), group=group, weight_decay=0.1)
    return list(STAGES[stage](state, reference)), state


def train(ranks, out):
    """Rank 0 writes the state after every stage. The metrics and the parameters are the same in all ranks."""
    arrays = {}
    for stage in STAGES:
        metrics, state = trained(stage, ranks)
        found = state.snapshot()[0]
        everyone = ranks.all_gather((metrics, found))
        for theirs, state_there in everyone:
            assert theirs == metrics
            assert all((a == found[name]).all() for name, a in state_there.items())
        arrays.update({f"{stage}/{name}": a for name, a in found.items()},
                      **{f"{stage}/metrics": [list(step.values()) for step in metrics]})
    if ranks.rank == 0:
        np.savez(out, **arrays)


def flat(ranks, dtype):
    """zeros, add_up and share for lengths that are multiples of the number of ranks and others."""
    import cupy
    for count in (0, 1, 2, 7, 12, 100_000):
        a = ranks.zeros(count, dtype, cupy)
        mine = np.arange(count, dtype=dtype) + 1000 * ranks.rank
        a[...] = cupy.asarray(mine)
        ranks.add_up(a)
        assert count == 0 or fake_nccl.CURRENT.waited       # for the GPU
        own = ranks.stretch(count)
        assert (a.shape, a.dtype) == ((count,), dtype)
        outside = np.ones(count, bool)
        outside[own] = False
        assert (a.get()[outside] == mine[outside]).all()
        ranks.share(a)
        assert (a.get() == ranks.size * np.arange(count) + 1000 * sum(range(ranks.size))).all()
        assert (a.base[count:].get() == 0).all()
        stretches = ranks.all_gather([own.start, own.stop])
        assert [i for start, stop in stretches for i in range(start, stop)] == list(range(count))
    if ranks.rank == 0:
        print("as expected")


def differ(ranks, what):
    """Rank 1 makes another call than the others."""
    import cupy
    a = ranks.zeros(8, "float64", cupy)
    other = {"call": lambda: ranks.share(a), "length": lambda: ranks.add_up(ranks.zeros(9, "float64", cupy)),
             "dtype": lambda: ranks.add_up(ranks.zeros(8, "float32", cupy)), "leaves": lambda: None}[what]
    (other if ranks.rank == 1 else lambda: ranks.add_up(a))()
    if what != "leaves":
        print("went on")


def wrong(ranks, what):
    """Rank 1 calls NCCL itself, as it must not."""
    import cupy
    count = 6
    arrays = [cupy.zeros(count * ranks.size, dtype) for dtype in ("float64", "int64")]
    whole, integers = (a.data.ptr for a in arrays)
    here = 8 * count * ranks.rank
    right = {"sendbuf": whole, "recvbuf": whole + here, "recvcount": count, "datatype": NCCL_FLOAT64, "op": NCCL_SUM,
             "stream": STREAM}
    changed = {"count": {"recvcount": count - 1}, "datatype": {"datatype": NCCL_FLOAT32}, "operation": {"op": 1},
               "stream": {"stream": 0}, "stretch": {"recvbuf": whole + here - 8},
               "memory": {"sendbuf": whole + 8, "recvbuf": whole + here + 8},
               "array": {"sendbuf": integers, "recvbuf": integers + here}}
    if ranks.rank != 1:
        ranks._communicator.reduceScatter(**right)
    elif what == "call":
        ranks._communicator.allGather(whole + here, whole, count, NCCL_FLOAT64, STREAM)
    elif what != "nothing":
        ranks._communicator.reduceScatter(**{**right, **changed[what]})
    ranks.all_gather(None)
    print("went on")


def end(ranks, how):
    """NCCL reports an error to rank 1 late, or all ranks leave at the end of the block."""
    import cupy
    for name in ("abort", "destroy"):
        setattr(ranks._communicator, name, functools.partial(os.write, 1, f"{name}\n".encode()))
    if how == "error" and ranks.rank == 1:
        ranks._communicator.failure = RuntimeError("the network is down")
    if how == "kernel" and ranks.rank == 1:
        fake_nccl.CURRENT.failed = True
    ranks.add_up(ranks.zeros(5, "float32", cupy))
    ranks.all_gather(None)


def on_cpu(ranks):
    TrainState(model_for("SFT", np.random.default_rng(1)), np.random.default_rng(2), group=ranks)


def start(ranks, how):
    print("went on")


def mistake(how):
    """The options of as_nccl. Some mistakes are made here."""
    if how == "one GPU twice":
        fake_nccl.Device.use = lambda self: vars(fake_nccl).update(_device=0)
    if how == "two jobs":
        NcclRanks.each = lambda self, work, parts: ([[work(i), another_job()][self.rank] for i in parts], [])
    if how == "no memory in rank 1" and MPI.COMM_WORLD.rank == 1:
        fake_nccl.NcclCommunicator.__init__ = lambda *_: 1 / 0
    return {"few GPUs": {"gpus": 1}, "no NCCL": {"installed": False},
            "no NCCL in rank 1": {"installed": MPI.COMM_WORLD.rank != 1}}.get(how, {})


def another_job():
    return np.frombuffer(fake_nccl.get_unique_id(), np.uint8)


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    with as_nccl(**mistake(arguments[0] if name == "start" else None)), parallel.world(device="gpu") as ranks:
        globals()[name](ranks, *arguments)
