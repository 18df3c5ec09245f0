"""Ranks with a GPU each: NCCL adds up gradients and copies parameters between the GPUs; small values go over MPI.

    mpiexec -n 4 python program.py          # a program that says parallel.world(device="gpu")

NCCL cuts an array into parts of one length. So zeros() rounds the length up to a multiple of the number of ranks, and
returns a view of the first `count` numbers. The last stretch may be shorter than the others, or empty.
If the ranks call NCCL with different arguments, it waits for ever. Therefore the ranks compare their calls over MPI
first. After a call the CPU waits for the GPU and asks NCCL for errors of the network. It loses little: the optimiser
reads a norm after add_up, and a stage compares the parameters after share.
Needs CuPy, NCCL, mpi4py and an MPI: pip install -e '.[gpu,mpi]'. **Nothing here has run on two GPUs.**
NCCL user guide, "Collective Operations", "In-place Operations" and "Fault Tolerance".
Tests: tests/test_nccl.py, on CPUs with a mock of cupy.cuda.nccl (tests/fake_nccl.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilm.parallel.mpi import MpiRanks

NOT_READY = 600         # cudaErrorNotReady


class NcclRanks(MpiRanks):
    """The ranks of this program on GPUs. Make one, on all ranks, before there is an array on a GPU.

    Of the ranks of a machine, rank i takes GPU i. Raises ImportError without CuPy, NCCL, mpi4py or an MPI, and
    ValueError if a machine has more ranks than GPUs.
    """

    def __init__(self):
        super().__init__()
        here = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        # An error of one rank is raised in all: NCCL would wait for that rank.
        self._job = self.each(lambda _: self._prepare(here.rank, here.size), range(self.size))[0][0]

    def _prepare(self, local_rank, local_size):
        """Take a GPU. Returns NCCL's identifier of the job, bytes as an array (128,), in rank 0."""
        self._cuda, self._nccl = _libraries()
        gpus = self._cuda.runtime.getDeviceCount()
        if local_size > gpus:
            raise ValueError(f"this machine has {local_size} ranks, and each sees {gpus} GPUs: start at most one rank "
                             "per GPU (mpiexec -ppn), and let every rank see all GPUs (CUDA_VISIBLE_DEVICES)")
        self._cuda.Device(local_rank).use()
        return np.frombuffer(self._nccl.get_unique_id(), np.uint8) if self.rank == 0 else None

    def __enter__(self):
        super().__enter__()
        try:
            self._communicator = self._nccl.NcclCommunicator(self.size, self._job.tobytes(), self.rank)
        except BaseException:
            super().__exit__(*sys.exc_info())       # the others wait in NCCL
            raise
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            self._communicator.abort()      # a kernel of NCCL that waits for another rank would keep the GPU busy
        super().__exit__(kind, error, trace)
        self._communicator.destroy()

    def zeros(self, count: int, dtype: Any, xp: Any = np) -> Any:
        if xp is np:
            raise ValueError("the ranks of world(device='gpu') share arrays on GPUs, and this one is on the CPU: move "
                             "the model with model.to_device('gpu'), or use world(device='cpu')")
        return xp.zeros(self._part(count) * self.size, dtype)[:count]

    def stretch(self, count: int, rank: int | None = None) -> slice:
        part = self._part(count)
        rank = self.rank if rank is None else rank
        return slice(min(count, part * rank), min(count, part * (rank + 1)))

    def add_up(self, flat: Any, others: Sequence = ()) -> None:
        whole, part, dtype, stream = self._meet_with("add_up", flat)
        if part.size:
            self._communicator.reduceScatter(whole.data.ptr, part.data.ptr, part.size, dtype, self._nccl.NCCL_SUM,
                                             stream.ptr)
            self._finish(stream)

    def share(self, flat: Any) -> None:
        whole, part, dtype, stream = self._meet_with("share", flat)
        if part.size:
            self._communicator.allGather(part.data.ptr, whole.data.ptr, part.size, dtype, stream.ptr)
            self._finish(stream)

    def _part(self, count):
        return -(-count // self.size)

    def _meet_with(self, call, flat):
        """Wait for all ranks. Returns the whole array behind flat, this rank's part of it, its dtype as a constant of
        NCCL, and the current stream."""
        self._meet(f"{call} of {flat.size} {flat.dtype}")
        whole = flat.base
        part = self._part(flat.size)
        return (whole, whole[part * self.rank:part * (self.rank + 1)],
                getattr(self._nccl, f"NCCL_{flat.dtype.name.upper()}"), self._cuda.get_current_stream())

    def _finish(self, stream):
        """Wait for the GPU. Raises NcclError if NCCL reports an error meanwhile, CUDARuntimeError if a kernel fails."""
        def done():
            self._communicator.check_async_error()
            status = self._cuda.runtime.streamQuery(stream.ptr)
            if status not in (0, NOT_READY):
                stream.synchronize()        # raises the error
            return status == 0
        self._wait(SimpleNamespace(Test=done))


def _libraries():
    """The modules cupy.cuda and cupy.cuda.nccl."""
    try:
        from cupy import cuda
        from cupy.cuda import nccl
        if not nccl.available:
            raise ImportError("CuPy finds no library of NCCL")
    except ImportError as error:
        raise ImportError(f"ranks on GPUs need CuPy and NCCL: pip install -e '.[gpu,mpi]' ({error})") from error
    return cuda, nccl
