"""A mock of cupy.cuda for ranks on CPUs: NCCL carried out by MPI, on the arrays of the emulator.

    with as_nccl():                     # inside, cupy is the emulator's mock, and cupy.cuda is this one
        with parallel.world(device="gpu") as ranks:

It has what minilm/parallel/nccl.py uses, with CuPy's names and arguments; tests/test_nccl.py compares them with the
real package. It is stricter than NCCL. It raises RuntimeError where NCCL would wait for ever: the ranks make different
calls, or one of them makes none. It also raises where NCCL would use the wrong memory: a pointer outside of every array
that exists, an array of another dtype, a part that is not this rank's stretch of the whole, another stream than the
current. It does not imitate that a GPU works beside the CPU: the result is there when the call returns.
"""
import contextlib
import os
import socket
import sys
import time
import types

import numpy as np
from mpi4py import MPI

from minilm.kernels.emulator import arrays, as_cupy, stream

SECONDS = 5.0                   # that a rank waits for the others' calls
STREAM = 0x5EED                 # the current stream's pointer

available = True
NCCL_SUM = 0
NCCL_FLOAT32 = 7
NCCL_FLOAT64 = 8
_DTYPES = {NCCL_FLOAT32: np.dtype(np.float32), NCCL_FLOAT64: np.dtype(np.float64)}
_made = []                      # identifiers of get_unique_id in this rank
_device = None


def get_unique_id():
    _made.append(os.urandom(128))
    return _made[-1]


class NcclCommunicator:
    def __init__(self, ndev, commId, rank, config=None):
        self._comm = MPI.COMM_WORLD.Dup()
        self.ended = None               # "destroy" or "abort"
        self.failure = None             # an exception that check_async_error raises
        _require((ndev, rank) == (self._comm.size, self._comm.rank), f"rank {rank} of {ndev}")
        _require(isinstance(commId, bytes) and len(commId) == 128, "the identifier is not 128 bytes")
        given = self._comm.allgather((commId, commId in _made, (socket.gethostname(), _device)))
        ids, made, devices = zip(*given)
        _require(len(set(ids)) == 1 and any(made), "NCCL would hang: the ranks have different identifiers, or none of "
                                                   "get_unique_id")
        _require(_device is not None and len(set(devices)) == len(devices), f"Duplicate GPU detected: {devices}")

    def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
        self._meet("reduceScatter", recvcount, datatype, stream, op)
        whole, part = self._arrays(sendbuf, recvbuf, recvcount, datatype)
        self._comm.Reduce_scatter_block(whole.copy(), part)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self._meet("allGather", count, datatype, stream)
        whole, part = self._arrays(recvbuf, sendbuf, count, datatype)
        self._comm.Allgather(part.copy(), whole)

    def check_async_error(self):
        _require(self.ended is None, f"check_async_error after {self.ended}")
        if self.failure:
            raise self.failure

    def abort(self):
        self.ended = self.ended or "abort"

    def destroy(self):
        self.ended = self.ended or "destroy"

    def _meet(self, name, count, datatype, stream, op=NCCL_SUM):
        _require(self.ended is None, f"{name} after {self.ended}")
        _require(stream == STREAM, f"{name} on another stream than the current one, without an event between them")
        _require(count > 0, f"{name} of no numbers, whose pointer may be null")
        _require(op == NCCL_SUM, f"{name} with operation {op}; NcclRanks adds")
        request = self._comm.Ibarrier()
        end = time.monotonic() + SECONDS
        while not request.Test():
            _require(time.monotonic() < end, f"NCCL would hang: rank {self._comm.rank} calls {name}, and another rank "
                                             f"has called nothing for {SECONDS:.0f} s")
            time.sleep(1e-4)
        calls = self._comm.allgather(f"{name}(count={count}, datatype={datatype})")
        _require(len(set(calls)) == 1, f"NCCL would hang: the ranks call {', '.join(calls)}")
        CURRENT.busy = 2

    def _arrays(self, whole, part, count, datatype):
        """The arrays (size * count,) and (count,) at these pointers."""
        own = whole + self._comm.rank * count * _DTYPES[datatype].itemsize
        _require(part == own, f"the part of rank {self._comm.rank} is {part - own} bytes off its stretch of the whole")
        return _at(whole, count * self._comm.size, datatype), _at(part, count, datatype)


def _at(pointer, count, datatype):
    """The array (count,) at a pointer: within one array of the mock whose address was asked for."""
    dtype = _DTYPES[datatype]
    for start, owner in arrays.ADDRESSES.items():
        if start <= pointer and pointer + count * dtype.itemsize <= start + owner.nbytes:
            _require(owner.dtype == dtype, f"the array is {owner.dtype}, and the call says {dtype}")
            return owner.reshape(-1)[(pointer - start) // dtype.itemsize:][:count]
    raise RuntimeError(f"{count} numbers of {dtype.itemsize} bytes from {pointer:#x} on are not within one array")


def _require(condition, words):
    if not condition:
        raise RuntimeError(words)


# The rest of cupy.cuda.

class Stream:
    """busy: how often the stream is not ready yet. A call of NCCL makes it 2. failed: whether a kernel has failed."""

    ptr = STREAM
    busy = 0
    failed = False

    @property
    def waited(self):
        return self.busy < 0

    def synchronize(self):
        if self.failed:
            raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")


CURRENT = Stream()


def stream_query(stream):
    _require(stream == STREAM, "another stream")
    CURRENT.busy -= 1
    return 700 if CURRENT.failed else 0 if CURRENT.waited else 600


def get_current_stream():
    return CURRENT


class Device(stream.Device):
    def __init__(self, device=None):
        self.id = device

    def use(self):
        global _device
        _device = self.id


@contextlib.contextmanager
def as_nccl(gpus=8, installed=True):
    """as_cupy(), with cupy.cuda: so many GPUs, and the library of NCCL installed or not."""
    with as_cupy() as cupy:
        emulators = cupy.cuda
        cupy.cuda = sys.modules["cupy.cuda"] = types.SimpleNamespace(
            **{name: value for name, value in vars(emulators).items() if name != "Device" and not name.startswith("_")},
            Device=Device, Stream=Stream, get_current_stream=get_current_stream,
            nccl=sys.modules[__name__] if installed else types.SimpleNamespace(available=False),
            runtime=types.SimpleNamespace(getDeviceCount=lambda: gpus, streamQuery=stream_query))
        try:
            yield cupy
        finally:
            cupy.cuda = emulators
