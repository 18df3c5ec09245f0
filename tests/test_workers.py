"""minilm.fast.workers: what the workers of a team share, exchange, and do when one of them fails or is gone."""
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from helpers import has_ended
from minilm.fast.workers import ProcessGroup, WorkerFailed, parallel_map


@pytest.fixture
def nobody_is_left(monkeypatch):
    """A function that asserts: every process forked since the test began has ended and has been waited for."""
    fork, forked = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: forked.append(fork()) or forked[-1])

    def check():
        for process in forked:
            with pytest.raises(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        assert forked
    return check


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_parts(workers, count):
    def work(part):
        time.sleep(0.01 * (part % 2))
        return part, np.arange(part)

    results = parallel_map(work, list(range(count)), workers)
    assert [part for part, _ in results] == list(range(count))
    assert all(array.tolist() == list(range(part)) for part, array in results)


def test_the_parts_are_worked_on_by_processes_of_their_own_at_the_same_time():
    def work(part):
        deadline = time.monotonic() + 20
        arrived[part] = os.getpid()
        while not arrived.all() and time.monotonic() < deadline:      # both are here before either goes on
            time.sleep(0.001)
        return os.getpid()

    team = ProcessGroup(2)
    arrived = team.zeros(2, np.int64)
    with team:
        processes = team.map(work, [0, 1])
    assert processes == arrived.tolist() and processes[0] == os.getpid() != processes[1]


def test_every_worker_runs_the_same_code_and_knows_its_rank():
    team = ProcessGroup(3)
    seen = team.zeros(3, np.int64)
    with team:
        assert team.active_size == 3
        seen[team.rank] = 10 + team.rank
        assert team.all_gather(team.rank) == [0, 1, 2]
    assert seen.tolist() == [10, 11, 12] and (team.rank, team.active_size) == (0, 1)
    assert team.all_gather("alone") == ["alone"]


@pytest.mark.parametrize("value", [
    None, True, 3, 2 ** 80, -0.0, 1e-300, "ä\n", (), [], {}, (1, [2.5, {"array": None}], ("tuple",)),
    {"nested": [({"deep": (1,)},)]}], ids=repr)
def test_what_is_exchanged_is_what_was_given(value):
    with ProcessGroup(2) as team:
        given = team.all_gather(value)
    assert given == [value, value] and [type(v) for v in given] == [type(value)] * 2


@pytest.mark.parametrize("array", [
    np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.float32([1, np.nan, -np.inf]), np.zeros((0, 4)),
    np.array(3.5), np.array([True, False]), np.arange(10)[::3]], ids=lambda a: f"{a.dtype} {a.shape}")
def test_arrays_keep_dtype_shape_and_bits_and_can_be_written(array):
    with ProcessGroup(2) as team:
        for given in team.all_gather({"it": array}):
            given = given["it"]
            assert (given.dtype, given.shape) == (array.dtype, array.shape)
            assert given.tobytes() == array.tobytes() and given.flags.writeable


def test_numbers_of_numpy_arrive_as_pythons():
    with ProcessGroup(2) as team:
        assert [type(x) for x in team.all_gather((np.float32(0.5), np.int64(2)))[1]] == [float, int]


def test_more_than_a_pipe_holds_is_exchanged():
    with ProcessGroup(3) as team:
        given = team.all_gather(np.full(1 << 18, team.rank))
    assert [a[0] for a in given] == [0, 1, 2] and all((a == a[0]).all() for a in given)


def test_what_has_a_state_is_done_once_and_known_to_all():
    calls = []
    with ProcessGroup(2) as team:
        answers = [team.broadcast(lambda: (calls.append(1), len(calls))[1]) for _ in range(3)]
        assert team.all_gather(answers) == [[1, 2, 3]] * 2
        assert team.all_gather(len(calls)) == [3, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_shared_memory_starts_at_zero_and_is_written_by_all(dtype, count):
    team = ProcessGroup(2)
    shared = team.zeros(count, dtype)
    assert shared.dtype == dtype and shared.shape == (count,) and not shared.any()
    with team:
        shared[team.rank::2] = team.rank + 1
        team.all_gather(None)
    assert (shared[0::2] == 1).all() and (shared[1::2] == 2).all()


def test_what_a_team_of_one_has_is_ordinary_memory_and_no_process_is_forked(monkeypatch):
    monkeypatch.setattr(os, "fork", None)
    with ProcessGroup(1) as team:
        assert team.zeros(3, np.float32).base is None
        assert team.map(lambda part: part + 1, [1, 2]) == [2, 3]


# Failures.

@pytest.mark.parametrize("part", range(4))
def test_an_error_in_any_part_is_raised_here_as_it_is(part, nobody_is_left):
    def work(i):
        if i == part:
            raise ZeroDivisionError(f"in part {i}")
        return i

    with pytest.raises(ZeroDivisionError, match=f"in part {part}"):
        parallel_map(work, range(4), 3)
    nobody_is_left()


def test_an_error_that_only_a_helper_meets_is_told_with_its_traceback(nobody_is_left):
    def work(part):
        if os.getpid() != here:
            raise MemoryError("there was none left")

    here = os.getpid()
    with pytest.raises(WorkerFailed, match="part 1 failed in another worker"):
        parallel_map(work, range(2), 2)
    with pytest.raises(WorkerFailed, match="(?s)worker 1 raised an error.*there was none left"):
        with ProcessGroup(2) as team:
            work(None)
            team.all_gather(None)
    nobody_is_left()


def test_a_worker_that_was_killed_is_missed_at_the_next_exchange(nobody_is_left):
    with pytest.raises(WorkerFailed, match="a worker process has ended"):
        with ProcessGroup(2) as team:
            if team.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            team.all_gather(None)
    nobody_is_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_nobody_works_on_after_worker_0_has_left(error, nobody_is_left):
    team = ProcessGroup(2)
    progress = team.zeros(1, np.int64)
    with pytest.raises(error):
        with team:
            if team.rank == 0:
                while progress[0] == 0:
                    time.sleep(0.001)
                raise error
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                progress[0] += 1
    nobody_is_left()
    before = progress[0]
    time.sleep(0.05)
    assert progress[0] == before


def test_a_team_at_work_cannot_begin_again():
    with ProcessGroup(2) as team:
        with pytest.raises(RuntimeError, match="running already"):
            team.__enter__()
    with team:
        assert team.all_gather(team.rank) == [0, 1]


def test_a_fork_that_fails_leaves_no_helper_and_a_team_that_can_begin_again(monkeypatch, nobody_is_left):
    fork, left = os.fork, [True, False]

    def failing():
        if left and not left.pop(0):
            raise BlockingIOError("no more processes")
        return fork()
    team = ProcessGroup(3)
    monkeypatch.setattr(os, "fork", failing)
    with pytest.raises(BlockingIOError):
        team.__enter__()
    assert team.active_size == 1
    nobody_is_left()
    with team:
        assert team.all_gather(team.rank) == [0, 1, 2]


def test_without_fork_more_than_one_worker_is_refused(monkeypatch):
    monkeypatch.delattr(os, "fork")
    ProcessGroup(1)
    with pytest.raises(ValueError, match="3 workers.*ask for 1"):
        ProcessGroup(3)


def test_a_helper_holds_no_file_and_no_lock_and_no_ctrl_c(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with ProcessGroup(2) as team:
            if team.rank:
                with pytest.raises(OSError):
                    os.fstat(file.fileno())
                os.kill(os.getpid(), signal.SIGINT)
            assert team.all_gather(team.rank) == [0, 1]


def test_helpers_end_with_a_worker_0_that_is_killed(tmp_path):
    program = textwrap.dedent("""
        import os, signal, time
        from minilm.fast.workers import ProcessGroup
        with ProcessGroup(2) as team:
            if team.rank == 0:
                print(team.all_gather(0)[1], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            team.all_gather(os.getpid())
            team.all_gather(None)
    """)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL and run.stderr == ""
    helper, deadline = int(run.stdout), time.monotonic() + 20
    while not has_ended(helper) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended(helper)
