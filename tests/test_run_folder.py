"""scripts/support/run_folder.py: one process at a time in a folder of one run, a run that is resumed with its own
settings only, and errors without tracebacks."""
import contextlib
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minilm import checkpoint
from minilm.checkpoint import CheckpointError

pytest.importorskip("fcntl", reason="the scripts need a POSIX system")
pytest.importorskip("safetensors")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
_spec = importlib.util.spec_from_file_location("run_folder", SCRIPTS / "support" / "run_folder.py")
run_folder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_folder)
AS_A_SCRIPT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])}
RunFolder, StopRequest, UsageError = run_folder.RunFolder, run_folder.StopRequest, run_folder.UsageError

SETTINGS = {"seed": 1, "size": "small"}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def enter(path, resume=False, fingerprint=SETTINGS):
    with RunFolder(path, resume, fingerprint):
        pass


def start(code, *arguments, **options):
    """A process that runs code with the scripts' folder on its path, as a script has."""
    return subprocess.Popen([sys.executable, "-u", "-c", code, *map(str, arguments)], env=AS_A_SCRIPT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# Starting and resuming.

@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
@pytest.mark.parametrize("name", ["", "missing", "missing/deep"])
def test_a_run_starts_in_a_missing_or_empty_folder_whether_to_resume_or_not(tmp_path, name, resume):
    with RunFolder(tmp_path / name, resume, SETTINGS) as run:
        assert not run.finished and not run.resumed and run.load_state("model") is None
        assert run.path("samples.txt") == tmp_path / name / "samples.txt"
    assert json.loads((tmp_path / name / "run.json").read_text())["settings"] == SETTINGS


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_that_holds_a_run_needs_resume(tmp_path, finished):
    with RunFolder(tmp_path, False, SETTINGS) as run:
        run.save_state("model", {}, {"step": 3})
        if finished:
            run.finish({"loss": 1.5})
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="already holds a run. Pass --resume .* or choose another --out"):
        enter(tmp_path)
    assert contents(tmp_path) == before
    with RunFolder(tmp_path, True, SETTINGS) as run:
        assert run.finished == finished and run.resumed
        assert run.load_state("model") == ({}, {"step": 3}) and run.load_state("optimizer") is None


def test_states_are_checkpoints_in_the_folder_and_damage_is_reported(tmp_path):
    with RunFolder(tmp_path, False, SETTINGS) as run:
        run.save_state("model", {"weight": np.arange(3.0)}, {"step": 3})
        arrays, metadata = run.load_state("model")
        np.testing.assert_array_equal(arrays["weight"], np.arange(3.0))
        assert metadata == checkpoint.load(tmp_path / "model.safetensors")[1] == {"step": 3}
        run.path("model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match="empty"):
            run.load_state("model")


def test_results_mark_the_run_as_finished(tmp_path):
    with RunFolder(tmp_path, False, SETTINGS) as run:
        run.finish({"loss": 1.5})
        assert run.finished
    assert json.loads((tmp_path / "results.json").read_text()) == {"loss": 1.5}


def test_other_settings_are_an_error_with_names_and_both_values(tmp_path):
    enter(tmp_path, fingerprint={"seed": 1, "size": "small", "threads": 2, "text": "ab12"})
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught:
        enter(tmp_path, resume=True, fingerprint={"seed": 2, "size": "small", "text": "ab12", "scale": 0.5})
    assert ("other settings: scale was absent and is now 0.5, seed was 1 and is now 2, "
            "threads was 2 and is now absent.") in str(caught.value)
    assert contents(tmp_path) == before


SETTING_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
                           st.tuples(st.floats()))


@settings(deadline=None, max_examples=30)
@given(fingerprint=st.dictionaries(st.text(max_size=4), SETTING_VALUES, max_size=4))
def test_any_settings_equal_themselves_after_json(tmp_path_factory, fingerprint):
    folder = tmp_path_factory.mktemp("run")
    enter(folder, fingerprint=fingerprint)
    enter(folder, resume=True, fingerprint=dict(reversed(fingerprint.items())))
    with pytest.raises(UsageError, match="other settings"):
        enter(folder, resume=True, fingerprint={**fingerprint, "one more": 1})


def test_the_order_of_nested_settings_and_the_type_of_keys_make_no_difference(tmp_path):
    enter(tmp_path, fingerprint={"model": {"width": 8, "depth": 2}, 1: 2})
    enter(tmp_path, resume=True, fingerprint={"model": {"depth": 2, "width": 8}, "1": 2})
    enter(tmp_path, resume=True, fingerprint={"model": {"width": 8, "depth": 2}, 1: 2})


def test_settings_that_json_cannot_hold_are_an_error_before_the_folder_is_made(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        enter(tmp_path / "run", fingerprint={"generator": np.random.default_rng()})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
@pytest.mark.parametrize("name, content", [
    ("thesis.tex", "years of work"), (".hidden", ""), ("results.json", "{}"),
    ("run.json", "{}"), ("run.json", "[1]"), ("run.json", "not JSON"),
    ("run.json", '{"format": "another", "settings": {}}'),
    ("run.json", '{"format": "minilm run"}'), ("run.json", '{"format": "minilm run", "settings": 1}')])
def test_a_folder_with_other_files_is_an_error_and_stays_unchanged(tmp_path, name, content, resume):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="holds no run|not a file of minilm"):
        enter(tmp_path, resume)
    assert contents(tmp_path) == {name: content.encode()}


def test_partial_files_of_a_killed_run_are_deleted(tmp_path):
    leftover = tmp_path / f".run.json.1234{checkpoint.TEMPORARY_SUFFIX}"
    leftover.write_text("{")
    enter(tmp_path)    # a partial file does not count as a file of another program
    leftover.write_text("{")
    enter(tmp_path, resume=True)
    assert sorted(contents(tmp_path)) == [".lock", "run.json"]


@contextlib.contextmanager
def bound_by_permissions():
    """Gives up the rights of root for a while, because root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_path_that_is_no_folder_or_not_writable_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: not a folder"):
        enter(tmp_path / "file")
    with pytest.raises(UsageError, match="Not a directory"):
        enter(tmp_path / "file" / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o500)
    for path in (tmp_path / "mine", tmp_path / "mine" / "run"):
        with bound_by_permissions(), pytest.raises(UsageError, match="Permission denied. Choose another --out"):
            enter(path)


# One process at a time.

@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
def test_a_folder_in_use_is_an_error_and_is_free_afterwards(tmp_path, resume):
    with RunFolder(tmp_path, False, SETTINGS):
        with pytest.raises(UsageError, match="in use by another run"):
            enter(tmp_path, resume)
        with pytest.raises(UsageError, match="in use by another run"):
            enter(tmp_path, resume)    # the first error did not release the lock
    enter(tmp_path, resume=True)


def test_a_run_that_fails_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with RunFolder(tmp_path, False, SETTINGS):
            raise ZeroDivisionError
    enter(tmp_path, resume=True)


def test_every_descriptor_is_closed(tmp_path):
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    enter(tmp_path)
    with pytest.raises(UsageError):
        enter(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


def test_a_start_that_fails_frees_the_folder_and_leaves_no_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        failed = RunFolder(tmp_path, False, SETTINGS)
        with pytest.raises(CheckpointError, match="No space left"):
            failed.__enter__()
    enter(tmp_path)


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with pytest.raises(UsageError, match="cannot be locked: Operation not supported"):
        enter(tmp_path)


def test_a_killed_run_leaves_no_lock_while_a_program_that_it_started_still_runs(tmp_path):
    code = """if True:
        import subprocess, sys
        from support.run_folder import RunFolder
        with RunFolder(sys.argv[1], False, {"seed": 1, "size": "small"}) as run:
            child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                                     stdin=int(sys.argv[2]), close_fds=False)
            print("started")
            child.wait()"""
    reading, writing = os.pipe()    # the child lives until we close it
    os.set_inheritable(reading, True)
    holder = start(code, tmp_path, reading, pass_fds=[reading])
    try:
        assert holder.stdout.readline() == "started\n"
        with pytest.raises(UsageError, match="in use"):
            enter(tmp_path, resume=True)
        holder.kill()
        holder.wait()
        enter(tmp_path, resume=True)
    finally:
        holder.kill()
        os.close(reading)
        os.close(writing)
        holder.communicate()


def test_a_forked_child_does_not_hold_the_lock_on(tmp_path):
    reading, writing = os.pipe()
    with RunFolder(tmp_path, False, SETTINGS):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)    # until the parent closes its end
            os._exit(0)
    try:
        enter(tmp_path, resume=True)
    finally:
        os.close(reading)
        os.close(writing)
        os.waitpid(child, 0)


# Stopping.

@pytest.fixture
def usual_handlers():
    """SIGINT and SIGTERM as in a program started from a terminal, even if pytest was started differently."""
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_request_and_the_second_interrupts(usual_handlers, capfd, first, second):
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(first)
        assert stop.requested
        assert capfd.readouterr().err == "\nstopping after this step; press again to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


def test_handlers_are_restored_even_when_the_loop_fails(usual_handlers):
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert all(signal.getsignal(number) is not handler for number, handler in usual_handlers.items())
        raise ZeroDivisionError
    assert all(signal.getsignal(number) is handler for number, handler in usual_handlers.items())


def test_an_ignored_signal_stays_ignored(usual_handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_the_main_thread_the_handlers_stay(usual_handlers):
    seen = []

    def loop():
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert seen == [(False, signal.default_int_handler)]


JOB = """if True:
    import signal, sys, time
    import numpy as np
    from support.run_folder import RunFolder, StopRequest, main_guard
    signal.signal(signal.SIGINT, signal.default_int_handler)
    def main():
        folder, pause = sys.argv[1], float(sys.argv[2])
        generator, total, first = np.random.default_rng(0), np.zeros(3), 0
        with RunFolder(folder, True, {"seed": 0}) as run, StopRequest() as stop:
            if state := run.load_state("walk"):
                total, first = state[0]["total"], state[1]["step"]
                generator.bit_generator.state = state[1]["generator"]
            for step in range(first, 40):
                total += generator.standard_normal(3)
                print("step", step)
                time.sleep(pause)
                if stop.requested:
                    run.save_state("walk", {"total": total},
                                   {"step": step + 1, "generator": generator.bit_generator.state})
                    return 3
            run.finish({"total": total.tolist()})
    sys.exit(main_guard(main))"""


def test_a_stopped_and_resumed_job_gives_the_same_result_as_an_uninterrupted_one(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = start(JOB, whole, 0)
    job = start(JOB, stopped, 0.5)
    assert job.stdout.readline() == "step 0\n"
    job.send_signal(signal.SIGINT)
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 3 and errors == "\nstopping after this step; press again to stop at once\n"
    assert "step 39" not in output and not (stopped / "results.json").exists()
    resumed = start(JOB, stopped, 0)
    output, errors = resumed.communicate(timeout=120)
    assert (resumed.returncode, errors) == (0, "") and "step 0\n" not in output
    assert uninterrupted.communicate(timeout=120)[1] == ""
    assert (stopped / "results.json").read_bytes() == (whole / "results.json").read_bytes()


# Exit status and messages.

class FileFormatError(Exception):
    pass


@pytest.mark.parametrize("error", [UsageError("no such\nsize"), CheckpointError("no such\nsize"),
                                   FileFormatError("no such\nsize")], ids=lambda error: type(error).__name__)
def test_a_usage_error_is_one_line_and_status_2(capsys, error):
    def main():
        raise error
    assert run_folder.main_guard(main, FileFormatError) == 2
    assert capsys.readouterr() == ("", "error: no such size\n")


def test_a_stream_that_was_closed_is_the_null_device_and_its_number_is_given_to_no_file(tmp_path):
    code = f"""if True:
        import os, sys
        sys.path.insert(0, {str(Path(run_folder.__file__).parents[1])!r})
        from support.run_folder import RunFolder, main_guard
        def main():
            with RunFolder(sys.argv[1], False, {{}}) as run:
                assert run._lock > 2 and all(map(bool, (sys.stdin, sys.stdout, sys.stderr)))
                print("to nobody")
                os.write(2, b"to nobody")
                run.finish({{"read": sys.stdin.read()}})
        sys.exit(main_guard(main))"""
    for i in range(4):
        closed = range(3) if i == 3 else [i]
        subprocess.run([sys.executable, "-c", code, tmp_path / str(i)], stdin=subprocess.DEVNULL, check=True,
                       preexec_fn=lambda: [os.close(number) for number in closed])
        assert (tmp_path / str(i) / ".lock").read_bytes() == b""
        assert json.loads((tmp_path / str(i) / "results.json").read_text()) == {"read": ""}


def test_a_character_that_the_output_cannot_hold_is_escaped():
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(run_folder.__file__).parents[1])!r})
        from support.run_folder import main_guard
        sys.exit(main_guard(lambda: print("0.5 \u00b1 0.1")))"""
    for encoding, printed in (("ascii", b"0.5 \\xb1 0.1\n"), ("utf-8", "0.5 \u00b1 0.1\n".encode())):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60,
                              env={**os.environ, "PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")


def test_a_bug_keeps_its_traceback():
    def main():
        raise FileFormatError    # not among the listed
    with pytest.raises(FileFormatError):
        run_folder.main_guard(main)


def test_an_interrupt_is_one_line_and_status_130(capsys):
    def main():
        raise KeyboardInterrupt
    assert run_folder.main_guard(main) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (3, 3)])
def test_the_result_of_main_is_the_exit_status(returned, status):
    assert run_folder.main_guard(lambda: returned) == status


def test_an_error_of_the_operating_system_is_one_line_and_status_2(capsys):
    def main():
        raise OSError(28, "No space left on device", "figure.png")
    assert run_folder.main_guard(main) == 2
    assert capsys.readouterr() == ("", "error: figure.png: No space left on device. Check that disk and folder.\n")


def test_a_process_that_cannot_be_forked_is_said_to_lack_memory(capsys):
    def main():
        raise OSError(12, "Cannot allocate memory")
    assert run_folder.main_guard(main) == 2
    assert capsys.readouterr() == ("", "error: not enough memory. Ask for less.\n")


@pytest.mark.parametrize("words", ["error return without exception set",
                                   "<built-in function score> returned NULL without setting an exception"])
def test_memory_that_ends_in_c_code_is_one_line(words, capsys):
    def main():
        raise SystemError(words)
    assert run_folder.main_guard(main) == 2
    assert capsys.readouterr() == ("", "error: not enough memory. Ask for less.\n")


def test_another_fault_of_c_code_keeps_its_traceback():
    def main():
        raise SystemError("bad argument to internal function")
    with pytest.raises(SystemError, match="bad argument"):
        run_folder.main_guard(main)


@pytest.mark.parametrize("typed, again", [
    (["python", "job.py", "--out", "it's mine"], """python job.py --out 'it'"'"'s mine' --resume"""),
    (["python", "job.py", "--resume", "--out", "a b"], "python job.py --resume --out 'a b'")])
def test_the_command_to_resume_is_the_command_line_quoted_for_a_shell(monkeypatch, typed, again):
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert run_folder.command_to_resume() == again


def test_a_module_that_is_missing_is_named_with_the_remedy():
    run_folder.require("json")
    with pytest.raises(UsageError, match=r"needs no_such_module, .*pip install -e '\.\[run\]'"):
        run_folder.require("json", "no_such_module")


def test_the_settings_of_a_run_can_be_read_before_it_is_entered(tmp_path):
    """A resumed run keeps the number of workers that it was started with."""
    with RunFolder(tmp_path / "run", False, {"threads": 3}):
        pass
    assert RunFolder.recorded(tmp_path / "run") == {"threads": 3}
    assert RunFolder.recorded(tmp_path / "none") == RunFolder.recorded(tmp_path / "run" / "run.json") == {}
    (tmp_path / "run" / "run.json").write_text("not ours")
    assert RunFolder.recorded(tmp_path / "run") == {}
