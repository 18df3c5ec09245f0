"""Ranks of MPI train as forked ranks do, bit for bit, and end together whatever happens. They run mpi_program.py."""
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import assert_close
from test_ranks import STEPS, every_stage, trained

PATIENCE = float(os.environ.get("PATIENCE", 120))       # seconds for what hangs; scripts/dev/mutants.py sets fewer
PROGRAM = Path(__file__).parent / "mpi_program.py"
MPIEXEC = next((str(path) for path in (Path(sys.executable).with_name("mpiexec"), shutil.which("mpiexec"))
                if path and Path(path).exists()), None)
needs_mpi = pytest.mark.skipif(MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
                               reason="needs mpi4py and mpiexec: pip install -e '.[mpi]'")


def mpiexec(size, *words, program=PROGRAM):
    command = [MPIEXEC, "-n", str(size), sys.executable, str(program), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@needs_mpi
def test_results_errors_and_flat_arrays_of_mpi_are_those_of_forked_ranks():
    done = mpiexec(3, "calls")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "as expected\n"


@needs_mpi
def test_an_mpiexec_of_another_mpi_is_named():
    """Of Open MPI, say, while mpi4py has mpich: each program would be alone, and train the whole of the data."""
    code = "from minilm.parallel.mpi import MpiRanks; MpiRanks()"
    environment = {**os.environ, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert "mpiexec started 2 processes, and mpi4py sees 1" in done.stderr


@needs_mpi
@pytest.mark.parametrize("end, words", [("exception", "ZeroDivisionError"), ("sys.exit", "rank 1: it ends here"),
                                        ("status 3", "rank 1: exit status 3"), ("_exit", ""), ("SIGKILL", ""),
                                        ("returns", "rank 0: all_gather; rank 1: the end of the block")])
def test_a_rank_of_mpi_that_ends_ends_all_with_its_words(end, words):
    began = time.monotonic()
    done = mpiexec(3, "end", end)
    assert done.returncode != 0 and words in done.stderr
    assert time.monotonic() - began < 60 and "went on" not in done.stdout


@needs_mpi
def test_a_rank_of_mpi_that_leaves_while_the_others_add_up_ends_all():
    done = mpiexec(3, "end_add_up")
    assert done.returncode != 0 and "rank 1: the end of the block" in done.stderr and "went on" not in done.stdout


@needs_mpi
@pytest.mark.parametrize("how, count", [("exception", 1), ("once", 1), ("status 3", 0)])
def test_an_error_of_all_ranks_of_mpi_is_reported_by_rank_0_alone(how, count):
    done = mpiexec(3, "end_together", how)
    assert done.stderr.count("ZeroDivisionError: division by zero") == count and "Abort" not in done.stderr
    assert done.returncode == (3 if how == "status 3" else 1), done.stderr


@needs_mpi
def test_a_rank_of_mpi_that_waits_uses_little_of_its_core():
    done = mpiexec(2, "wait")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1           # CPU seconds of 2 s; measured: 0.05


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_mpi_that_is_stopped_ends_all_after_the_silence(rank):
    done = mpiexec(3, "silent", rank)
    assert done.returncode != 0 and f"rank {rank} has sent nothing for" in done.stderr and "went on" not in done.stdout


@needs_mpi
def test_ranks_of_mpi_that_work_for_longer_than_the_silence_are_not_taken_for_lost():
    done = mpiexec(3, "silent", "none")
    # mpiexec merges the outputs of the ranks, and may mix two lines.
    assert (done.returncode, done.stderr, done.stdout.count("went on"), len(done.stdout)) == (0, "", 3, 3 * 8)


@needs_mpi
@every_stage
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_ranks_of_mpi_are_two_forked_ranks_bit_for_bit(stage, dtype, tmp_path):
    done = mpiexec(2, "train", stage, dtype, STEPS, tmp_path / "mpi.npz")
    assert done.returncode == 0, done.stderr
    for name, a in trained(stage, 2, np.dtype(dtype))[1].items():
        assert np.load(tmp_path / "mpi.npz")[name].tobytes() == a.tobytes(), name


@needs_mpi
@every_stage
def test_three_ranks_of_mpi_train_as_one_process_does(stage, tmp_path):
    """Some have fewer rows, or none."""
    done = mpiexec(3, "train", stage, "float64", STEPS, tmp_path / "mpi.npz")
    assert done.returncode == 0, done.stderr
    for name, a in trained(stage, 1)[1].items():
        assert_close(np.load(tmp_path / "mpi.npz")[name], a, 1e-12, name)
