"""scripts/assistant.py with other numbers of ranks, and under mpiexec: the same models, one voice, nothing lost."""
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from minilm import checkpoint
from test_assistant import SCRIPTS, SMALL, assert_same_run, contents, environment, folder, run, start, stopped, whole
from test_mpi import MPIEXEC, needs_mpi

assert folder and stopped and whole       # fixtures


def under_mpiexec(size):
    return [MPIEXEC, "-n", str(size), *SMALL]


def assert_equal_to_rounding(folder, other):
    """The weights of the base model, whose training was continued; later stages sample, and may draw another token."""
    arrays, others = (checkpoint.load(f / "base.safetensors")[0] for f in (folder, other))
    for name, a in arrays.items():
        np.testing.assert_allclose(a, others[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_is_resumed_with_another_number_of_workers(folder, whole, workers):
    done = run(SMALL, "--out", folder, "--resume", "--workers", workers)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads((folder / "results.json").read_text())["workers"] == workers
    assert_equal_to_rounding(folder, whole[0])


@needs_mpi
def test_a_run_under_mpiexec_is_the_run_of_two_workers_bit_for_bit(whole, tmp_path):
    done = run(under_mpiexec(2), "--out", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("reward_model: step 2/2") == whole[1].stdout.count("reward_model: step 2/2")
    assert_same_run(tmp_path / "run", whole[0])


@needs_mpi
@pytest.mark.parametrize("size", [2, 3])
def test_a_run_of_two_workers_is_resumed_under_mpiexec(folder, whole, size):
    done = run(under_mpiexec(size), "--out", folder, "--resume")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    if size == 2:
        assert_same_run(folder, whole[0])
    else:
        assert_equal_to_rounding(folder, whole[0])


@needs_mpi
def test_ctrl_c_under_mpiexec_saves_and_the_run_is_resumed_by_workers(whole, tmp_path):
    """The terminal sends the signal to mpiexec and to all ranks."""
    process = start(under_mpiexec(2), "--out", tmp_path / "run", env=environment(SLOW="1"), start_new_session=True)
    while not (tmp_path / "run" / "base-state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; everything saved so far is in" in out, (out, err)
    assert "mpiexec -n 2" in out and "--resume" in out
    assert not (tmp_path / "run" / "results.json").exists()
    assert run(SMALL, "--out", tmp_path / "run", "--resume").returncode == 0
    assert_same_run(tmp_path / "run", whole[0])


@needs_mpi
@pytest.mark.parametrize("accident", ["9", "25"])
def test_a_killed_rank_under_mpiexec_ends_the_run_which_is_resumed(whole, tmp_path, accident):
    done = run(under_mpiexec(2), "--out", tmp_path / "run", ACCIDENT=f"{accident} {signal.SIGKILL:d}")
    assert done.returncode != 0
    assert run(SMALL, "--out", tmp_path / "run", "--resume").returncode == 0
    assert_same_run(tmp_path / "run", whole[0])


@needs_mpi
@pytest.mark.parametrize("options, words", [(["--scale", "0"], "--scale 0"), (["--nonsense"], "--nonsense"),
                                            ([], "already holds a run"), (["--resume", "--seed", "1"], "settings")])
def test_an_error_under_mpiexec_is_one_line_of_rank_0(folder, options, words):
    before = contents(folder)
    done = run(under_mpiexec(3), "--out", folder, *options)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and words in lines[0]
    assert contents(folder) == before


@needs_mpi
def test_a_full_disk_under_mpiexec_is_one_line_of_rank_0(folder, whole):
    done = run(under_mpiexec(2), "--out", folder, "--resume", FULL="9")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "base-state.safetensors: not saved" in done.stderr and "File too large" in done.stderr
    assert run(SMALL, "--out", folder, "--resume").returncode == 0
    assert_same_run(folder, whole[0])


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_alone_ends_all_with_its_words(tmp_path, rank):
    began = time.monotonic()
    done = run(under_mpiexec(3), "--out", tmp_path / "run", LONE=str(rank))
    assert done.returncode != 0 and "UsageError: matplotlib is not on this host" in done.stderr, done.stderr
    assert time.monotonic() - began < 60 and not (tmp_path / "run").exists()


@needs_mpi
def test_a_script_for_one_process_refuses_mpiexec_in_one_line():
    done = run([MPIEXEC, "-n", "3", sys.executable, str(SCRIPTS / "chat.py"), "nowhere"])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and "start it without mpiexec" in lines[0], done.stderr
