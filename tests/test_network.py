"""Two ranks of MPI on two hosts, with a network between them: they train as one process does.

The hosts are network namespaces of this machine (scripts/support/network.py). Skipped where they cannot be made.
"""
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import assert_close
from support import network
from test_mpi import PROGRAM, needs_mpi
from test_ranks import STEPS, numbers
from test_stages import make_training, run

RATE = 1000             # Mbit/s


@pytest.fixture
def link():
    """A network of two hosts; link.down() takes it down."""
    if reason := network.available():
        pytest.skip(reason)
    with network.Link(RATE) as link:
        yield link


def start(link, *words):
    """mpi_program.py with these words: rank 0 on one host, rank 1 on the other."""
    return subprocess.Popen(link.mpiexec(sys.executable, "-u", str(PROGRAM), *map(str, words)), text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **link.environment, "OPENBLAS_NUM_THREADS": "1",
                                 "PYTHONPATH": os.pathsep.join(sys.path)})


@needs_mpi
def test_two_hosts_train_as_one_process_does_and_gradients_and_parameters_go_over_the_link(link, tmp_path):
    with start(link, "train", "SFT", "float64", STEPS, tmp_path / "mpi.npz") as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    one = make_training("SFT", dtype=np.float64)
    run("SFT", one, STEPS)
    for name, a in numbers(one).items():
        assert_close(np.load(tmp_path / "mpi.npz")[name], a, 1e-12, name)
    # Of two ranks each sends the gradient of one half of the parameters, and the other half as updated.
    of_a_step = 8 * one.optimizer.flat.size
    assert min(link.sent(0), link.sent(1)) >= STEPS * of_a_step


@needs_mpi
def test_a_network_that_is_lost_ends_all_ranks_with_words(link):
    began = time.monotonic()
    with start(link, "lost") as process:
        assert process.stdout.readline() == "ready\n"
        link.down()
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode != 0 and "went on" not in out
    assert "has sent nothing for" in err and time.monotonic() - began < 60


@needs_mpi
def test_the_hosts_and_their_processes_are_removed_after_an_error():
    if reason := network.available():
        pytest.skip(reason)
    with pytest.raises(ZeroDivisionError), network.Link(RATE) as link:
        waiting = subprocess.Popen(["ip", "netns", "exec", link.namespaces[1], "sleep", "60"])
        while str(waiting.pid) not in subprocess.run(["ip", "netns", "pids", link.namespaces[1]], capture_output=True,
                                                     text=True).stdout.split():
            assert waiting.poll() is None
        raise ZeroDivisionError
    assert waiting.wait(timeout=60) < 0
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in left for name in link.namespaces)
