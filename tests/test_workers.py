"""minilm.fast.workers: shared memory and messages of the workers of a group, and failures of a worker."""
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback

import numpy as np
import pytest

from helpers import has_ended
from minilm.fast.workers import ProcessGroup, WorkerFailed, in_shared_memory, parallel_map


@pytest.fixture
def no_process_is_left(monkeypatch):
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


def test_the_parts_are_computed_by_separate_processes_at_the_same_time():
    def work(part):
        deadline = time.monotonic() + 20
        arrived[part] = os.getpid()
        while not arrived.all() and time.monotonic() < deadline:      # each waits until both have arrived
            time.sleep(0.001)
        return os.getpid()

    group = ProcessGroup(2)
    arrived = group.zeros(2, np.int64)
    with group:
        processes = group.each(work, [0, 1])[0]
    assert processes == arrived.tolist() and processes[0] == os.getpid() != processes[1]


def test_every_worker_runs_the_same_code_and_knows_its_rank():
    group = ProcessGroup(3)
    seen = group.zeros(3, np.int64)
    with group:
        assert group.active_size == 3
        seen[group.rank] = 10 + group.rank
        assert group.all_gather(group.rank) == [0, 1, 2]
    assert seen.tolist() == [10, 11, 12] and (group.rank, group.active_size) == (0, 1)
    assert group.all_gather("alone") == ["alone"]


@pytest.mark.parametrize("value", [
    None, True, 3, 2 ** 80, -0.0, 1e-300, "ä\n", (), [], {}, (1, [2.5, {"array": None}], ("tuple",)),
    {"nested": [({"deep": (1,)},)]}], ids=repr)
def test_values_arrive_unchanged(value):
    with ProcessGroup(2) as group:
        given = group.all_gather(value)
    assert given == [value, value] and [type(v) for v in given] == [type(value)] * 2


@pytest.mark.parametrize("array", [
    np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.float32([1, np.nan, -np.inf]), np.zeros((0, 4)),
    np.array(3.5), np.array([True, False]), np.arange(10)[::3]], ids=lambda a: f"{a.dtype} {a.shape}")
def test_arrays_keep_dtype_shape_and_bits_and_can_be_written(array):
    with ProcessGroup(2) as group:
        for given in group.all_gather({"it": array}):
            given = given["it"]
            assert (given.dtype, given.shape) == (array.dtype, array.shape)
            assert given.tobytes() == array.tobytes() and given.flags.writeable


def test_numpy_scalars_arrive_as_python_numbers():
    with ProcessGroup(2) as group:
        assert [type(x) for x in group.all_gather((np.float32(0.5), np.int64(2)))[1]] == [float, int]


def test_messages_larger_than_a_pipe_arrive():
    with ProcessGroup(3) as group:
        given = group.all_gather(np.full(1 << 18, group.rank))
    assert [a[0] for a in given] == [0, 1, 2] and all((a == a[0]).all() for a in given)


def test_broadcast_calls_its_function_once_and_every_rank_gets_the_result():
    calls = []
    with ProcessGroup(2) as group:
        answers = [group.once(lambda: (calls.append(1), len(calls))[1]) for _ in range(3)]
        assert group.all_gather(answers) == [[1, 2, 3]] * 2
        assert group.all_gather(len(calls)) == [3, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_shared_memory_starts_at_zero_and_is_written_by_all(dtype, count):
    group = ProcessGroup(2)
    shared = group.zeros(count, dtype)
    assert shared.dtype == dtype and shared.shape == (count,) and not shared.any()
    with group:
        shared[group.rank::2] = group.rank + 1
        group.all_gather(None)
    assert (shared[0::2] == 1).all() and (shared[1::2] == 2).all()


def test_views_of_shared_memory_are_known_and_copies_are_not():
    shared = ProcessGroup(2).zeros(12, np.float32)
    assert all(map(in_shared_memory, (shared, shared[2:], shared.reshape(3, 4).T, shared[2:8].reshape(2, 3)[1:])))
    assert not any(map(in_shared_memory, (shared.copy(), shared + 1, np.zeros(3)[1:], ProcessGroup(1).zeros(3, float))))


@pytest.mark.parametrize("value", [{1: "one"}, {"deep": {None: 1}}, {1, 2}, b"bytes", object(), 1j, [len],
                                   np.array([None, 1])], ids=repr)
def test_values_that_would_arrive_changed_are_refused(value):
    with pytest.raises((TypeError, WorkerFailed), match="(?s)TypeError: all_gather: .* cannot be sent"):
        with ProcessGroup(2) as group:
            group.all_gather(value)


@pytest.mark.parametrize("size", [0, -1, 1.0, "2", None, True, np.nan])
def test_a_group_has_one_process_or_more(size):
    with pytest.raises(ValueError, match="ProcessGroup: size is .*; it must be an integer of at least 1"):
        ProcessGroup(size)


@pytest.mark.parametrize("workers", [0, -1, 1.5])
def test_parts_are_computed_by_one_worker_or_more(workers):
    with pytest.raises(ValueError, match="it must be an integer of at least 1"):
        parallel_map(lambda part: part, range(3), workers)


def test_a_group_of_one_has_ordinary_memory_and_forks_no_process(monkeypatch):
    monkeypatch.setattr(os, "fork", None)
    with ProcessGroup(1) as group:
        assert group.zeros(3, np.float32).base is None
        assert group.each(lambda part: part + 1, [1, 2]) == ([2, 3], [None])


# Failures.

@pytest.mark.parametrize("part", range(4))
def test_an_error_in_any_part_is_raised_unchanged_by_rank_0(part, no_process_is_left):
    def work(i):
        if i == part:
            raise ZeroDivisionError(f"in part {i}")
        return i

    with pytest.raises(ZeroDivisionError, match=f"in part {part}"):
        parallel_map(work, range(4), 3)
    no_process_is_left()


def test_an_error_of_another_rank_alone_is_raised_with_its_words(no_process_is_left):
    def work(part):
        if os.getpid() != here:
            raise MemoryError("no memory was left")

    here = os.getpid()
    with pytest.raises(WorkerFailed, match="rank 1 raised an error that rank 0 did not: MemoryError: no memory"):
        parallel_map(work, range(2), 2)
    with pytest.raises(WorkerFailed, match="(?s)worker 1 raised an error.*no memory was left"):
        with ProcessGroup(2) as group:
            work(None)
            group.all_gather(None)
    no_process_is_left()


def test_a_killed_worker_raises_worker_failed_at_the_next_all_gather(no_process_is_left):
    with pytest.raises(WorkerFailed, match="a worker process has ended"):
        with ProcessGroup(2) as group:
            if group.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            group.all_gather(None)
    no_process_is_left()


@pytest.mark.parametrize("owner, name", [(os, "closerange"), (traceback, "format_exception")])
def test_a_worker_whose_start_or_end_fails_ends_and_never_runs_the_rest_of_the_program(
        owner, name, monkeypatch, no_process_is_left):
    def fail(*_):
        raise MemoryError
    here = os.getpid()
    group = ProcessGroup(2)
    escaped = group.zeros(1, np.int64)
    monkeypatch.setattr(owner, name, fail)
    try:
        with pytest.raises(WorkerFailed, match="a worker process has ended"):
            with group:
                if group.rank:
                    raise ValueError("which format_exception would have told")
                group.all_gather(None)
    finally:
        if os.getpid() != here:
            escaped[0] = 1
            os._exit(3)
    no_process_is_left()
    assert escaped[0] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_the_other_ranks_end_when_rank_0_leaves_the_block(error, no_process_is_left):
    group = ProcessGroup(2)
    progress = group.zeros(1, np.int64)
    with pytest.raises(error):
        with group:
            if group.rank == 0:
                while progress[0] == 0:
                    time.sleep(0.001)
                raise error
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                progress[0] += 1
    no_process_is_left()
    before = progress[0]
    time.sleep(0.05)
    assert progress[0] == before


def test_starting_a_running_group_raises():
    with ProcessGroup(2) as group:
        with pytest.raises(RuntimeError, match="running already"):
            group.__enter__()
    with group:
        assert group.all_gather(group.rank) == [0, 1]


def test_after_a_failed_fork_no_process_is_left_and_the_group_can_start_again(monkeypatch, no_process_is_left):
    fork, left = os.fork, [True, False]

    def failing():
        if left and not left.pop(0):
            raise BlockingIOError("no more processes")
        return fork()
    group = ProcessGroup(3)
    monkeypatch.setattr(os, "fork", failing)
    with pytest.raises(BlockingIOError):
        group.__enter__()
    assert group.active_size == 1
    no_process_is_left()
    with group:
        assert group.all_gather(group.rank) == [0, 1, 2]


def test_without_fork_more_than_one_worker_raises(monkeypatch):
    monkeypatch.delattr(os, "fork")
    ProcessGroup(1)
    with pytest.raises(ValueError, match="3 workers.*ask for 1"):
        ProcessGroup(3)


def test_a_worker_process_holds_no_file_and_no_lock_and_ignores_ctrl_c(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with ProcessGroup(2) as group:
            if group.rank:
                with pytest.raises(OSError):
                    os.fstat(file.fileno())
                os.kill(os.getpid(), signal.SIGINT)
            assert group.all_gather(group.rank) == [0, 1]


def test_the_other_ranks_end_when_rank_0_is_killed(tmp_path):
    program = textwrap.dedent("""
        import os, signal, time
        from minilm.fast.workers import ProcessGroup
        with ProcessGroup(2) as group:
            if group.rank == 0:
                print(group.all_gather(0)[1], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            group.all_gather(os.getpid())
            group.all_gather(None)
    """)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL and run.stderr == ""
    other, deadline = int(run.stdout), time.monotonic() + 20
    while not has_ended(other) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended(other)
