"""Ranks with a GPU each train as one process does, on the mocks of CuPy and NCCL: nobody has run them on two GPUs.

The ranks run nccl_program.py under mpiexec. What the mocks cannot show: that NCCL starts on two GPUs, that its kernels
run after ours on one stream, what it does when a rank or the network fails, and how fast it is.
"""
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest

from helpers import assert_close
from minilm import parallel
from test_cupy_double import found_by, misfit, parameters, signature
from test_device import STAGES
from test_mpi import mpiexec, needs_mpi
from test_ranks import two_or_three

if importlib.util.find_spec("mpi4py"):
    import fake_nccl
    import nccl_program

PROGRAM = Path(__file__).with_name("nccl_program.py")
pytestmark = needs_mpi


def run(size, *words):
    return mpiexec(size, *words, program=PROGRAM)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The state after each stage, of so many ranks."""
    found = {}

    def of(size):
        if size not in found:
            file = tmp_path_factory.mktemp("nccl") / "states.npz"
            done = run(size, "train", file)
            assert done.returncode == 0, done.stderr
            found[size] = np.load(file)
        return found[size]
    return of


# Equality.

@pytest.mark.parametrize("stage", STAGES)
@two_or_three
def test_ranks_on_gpus_train_as_one_process_does(stage, size, states, emulated):
    """Rounding differs. Each rank has kernels launched on its own stretch of the flat arrays."""
    metrics, state = nccl_program.trained(stage)
    for name, a in state.snapshot()[0].items():
        assert_close(states(size)[f"{stage}/{name}"], a, 1e-12, name)
    assert_close(states(size)[f"{stage}/metrics"], np.array([list(step.values()) for step in metrics]), 1e-10)


@two_or_three
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_flat_arrays_of_any_length_are_added_up_and_shared(size, dtype, emulated):
    done = run(size, "flat", dtype)
    assert (done.returncode, done.stdout) == (0, "as expected\n"), done.stderr


# Mistakes are named.

@pytest.mark.parametrize("what, words", [
    ("call", "rank 0: add_up of 8 float64; rank 1: share of 8 float64; rank 2: add_up of 8 float64"),
    ("length", "rank 0: add_up of 8 float64; rank 1: add_up of 9 float64"),
    ("dtype", "rank 0: add_up of 8 float64; rank 1: add_up of 8 float32"),
    ("leaves", "rank 0: add_up of 8 float64; rank 1: the end of the block")])
def test_different_calls_of_the_ranks_are_named_before_nccl_is_called(what, words, emulated):
    done = run(3, "differ", what)
    assert done.returncode != 0 and f"make the same calls, and they are at {words}" in done.stderr, done.stderr
    assert "NCCL would hang" not in done.stderr and "went on" not in done.stdout


@pytest.mark.parametrize("what, words", [
    ("call", "NCCL would hang: the ranks call reduceScatter(count=6, datatype=8), allGather(count=6, datatype=8)"),
    ("count", "the ranks call reduceScatter(count=6, datatype=8), reduceScatter(count=5, datatype=8)"),
    ("datatype", "the ranks call reduceScatter(count=6, datatype=8), reduceScatter(count=6, datatype=7)"),
    ("nothing", "NCCL would hang: rank 0 calls reduceScatter, and another rank has called nothing"),
    ("operation", "reduceScatter with operation 1"), ("stream", "on another stream"),
    ("stretch", "the part of rank 1 is -8 bytes off"), ("memory", "are not within one array"),
    ("array", "the array is int64, and the call says float64")])
def test_the_mock_raises_where_nccl_would_hang_or_use_the_wrong_memory(what, words, emulated):
    done = run(2, "wrong", what)
    assert done.returncode != 0 and words in done.stderr and "went on" not in done.stdout, done.stderr


@pytest.mark.parametrize("how, words", [
    ("few GPUs", "ValueError: this machine has 2 ranks, and each sees 1 GPUs: start at most one rank per GPU"),
    ("no NCCL", "ImportError: ranks on GPUs need CuPy and NCCL: pip install -e '.[gpu,mpi]'"),
    ("no NCCL in rank 1", "rank 1 raised an error that rank 0 did not: ImportError: ranks on GPUs need CuPy and NCCL"),
    ("no memory in rank 1", "ZeroDivisionError"),
    ("one GPU twice", "Duplicate GPU detected"), ("two jobs", "the ranks have different identifiers")])
def test_a_start_that_cannot_work_raises_in_all_ranks(how, words, emulated):
    done = run(2, "start", how)
    assert done.returncode != 0 and words in done.stderr and "went on" not in done.stdout, done.stderr
    assert "has sent nothing for" not in done.stderr        # the heartbeat would end the other rank too, later


@pytest.mark.parametrize("how, words", [("error", "the network is down"), ("kernel", "cudaErrorIllegalAddress")])
def test_an_error_of_nccl_or_of_a_kernel_that_comes_late_is_raised_and_ends_all_ranks(how, words, emulated):
    done = run(3, "end", how)
    assert done.returncode != 0 and f"RuntimeError: {words}" in done.stderr and "abort" in done.stdout
    assert "destroy" not in done.stdout


def test_at_the_end_of_the_block_each_rank_gives_its_communicator_back(emulated):
    done = run(3, "end", "return")
    assert (done.returncode, done.stdout) == (0, 3 * "destroy\n"), done.stderr


def test_a_model_on_the_cpu_raises_and_says_what_to_do(emulated):
    done = run(2, "on_cpu")
    assert done.returncode != 0 and "ValueError: the ranks of world(device='gpu') share arrays on GPUs" in done.stderr


def test_without_mpiexec_one_rank_alone_can_be_on_a_gpu():
    assert type(parallel.world(1, device="gpu")) is parallel.ForkedRanks
    with pytest.raises(ValueError, match="2 workers are processes that share a CPU's memory; on a GPU ask for 1"):
        parallel.world(2, device="gpu")
    with pytest.raises(ValueError, match="device is 'cuda'; it must be 'cpu' or 'gpu'"):
        parallel.world(device="cuda")


# The real package.

PROBE = """
import json
from cupy import cuda
from cupy.cuda import nccl
found = {}
for prefix, owner in (("", nccl), ("NcclCommunicator.", getattr(nccl, "NcclCommunicator", None)), ("cuda.", cuda),
                      ("Device.", cuda.Device), ("runtime.", cuda.runtime)):
    for name in dir(owner):
        value = getattr(owner, name)
        found[prefix + name] = value if isinstance(value, int) else value.__doc__ or ""
print(json.dumps({**found, "Stream": dir(cuda.Stream.null)}))
"""


@pytest.fixture(scope="module")
def real():
    """{name: number or docstring} of the real cupy.cuda, from another process. Neither needs a GPU."""
    found = found_by(PROBE)
    if not found["available"]:
        pytest.skip("CuPy finds no library of NCCL (pip install nvidia-nccl-cu13)")
    return found


def test_nccl_has_every_constant_and_function_of_the_mock_with_these_arguments(real):
    constants = {name: value for name, value in vars(fake_nccl).items() if name.startswith("NCCL_")}
    assert constants and {name: real[name] for name in constants} == constants
    methods = {name: method for name, method in vars(fake_nccl.NcclCommunicator).items()
               if inspect.isfunction(method) and not name.startswith("_")}
    functions = {"get_unique_id": fake_nccl.get_unique_id, "NcclCommunicator": fake_nccl.NcclCommunicator.__init__,
                 **{f"NcclCommunicator.{name}": method for name, method in methods.items()}}
    for name, function in functions.items():
        theirs = parameters(real[name].split("\n")[0])
        assert (why := misfit(signature(function), theirs)) is None and len(signature(function)) == len(theirs), (
            f"{name}: {why}")
    assert "bytes commId" in real["NcclCommunicator"]


def test_cupy_has_the_devices_and_streams_of_the_mock(real):
    assert {"ptr", "synchronize"} <= set(real["Stream"]) and "cuda.get_current_stream" in real
    for name in ("Device.use", "runtime.getDeviceCount"):
        assert parameters(real[name].split("\n")[0]) == [], name
    assert len(parameters(real["runtime.streamQuery"].split("\n")[0])) == 1


def test_the_comparison_finds_a_call_that_the_real_package_does_not_have():
    theirs = parameters("NcclCommunicator.allGather(self, intptr_t sendbuf, intptr_t recvbuf, size_t count, "
                        "int datatype, intptr_t stream)")
    ours = signature(fake_nccl.NcclCommunicator.allGather)
    assert misfit(ours, theirs) is None
    assert misfit(ours, theirs[:-1]) == "stream has no place"
