"""What the scripts share: a folder that holds one long run, stopping it politely, errors without tracebacks.

    def main():
        arguments = parser.parse_args()
        settings = {"seed": arguments.seed}
        with RunFolder(arguments.out, arguments.resume, settings) as run, StopRequest() as stop:
            state = run.load_state("model")              # None until the first save
            for step in ...:
                ...
                if stop.requested:
                    run.save_state("model", arrays, {"step": step})
                    print("stopped; go on with --resume")
                    return
            run.finish(results)

    if __name__ == "__main__":
        sys.exit(main_guard(main))

Needs a POSIX system (flock). Checked in tests/test_run_folder.py.
"""
import contextlib
import fcntl
import importlib
import json
import os
import shlex
import signal
import sys
import threading
from pathlib import Path

from minilm import checkpoint

RUN, RESULTS, LOCK = "run.json", "results.json", ".lock"
FORMAT = "minilm run"


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why, and what to do instead."""


class RunFolder:
    """The output folder of one run, held by one process at a time: `with RunFolder(...) as run`.

    path: the folder, created if need be.
    resume: whether a run that the folder already holds is to go on; an empty folder starts either way.
    fingerprint: a JSON-able dictionary of the settings that determine the results. A run is resumed
        under the settings it was started with, or not at all.

    Entering raises UsageError, and leaves the files as they are, if the path is no folder or cannot be
    written to, if it is in use by another run, if it holds files but no run, if it holds a run and
    resume is False, if it holds a run with other settings. Saving raises checkpoint.CheckpointError.
    """

    def __init__(self, path, resume, fingerprint):
        self.folder = Path(path)
        self.resume = resume
        self.fingerprint = json.loads(json.dumps(fingerprint))    # as run.json gives it back
        self._lock = None

    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers()
            self._take_lock()
            self._start_or_resume()
        except BaseException as error:
            self._release()
            if not isinstance(error, OSError):
                raise
            cause = "not a folder" if isinstance(error, FileExistsError) else error.strerror
            raise UsageError(f"{self.folder} cannot be the folder of a run: {error.filename}: {cause}. "
                             "Choose another --out.") from error
        return self

    def __exit__(self, *exception):
        self._release()

    @classmethod
    def recorded(cls, path):
        """The settings of the run that a folder holds; an empty dictionary if none can be read there."""
        try:
            return cls(path, True, {})._read_run() or {}
        except (OSError, UsageError):
            return {}       # entering it says what is wrong

    def path(self, name):
        return self.folder / name

    @property
    def finished(self):
        return self.path(RESULTS).exists()

    def finish(self, results):
        """Writes results.json from a JSON-able dictionary; from now on the run is finished."""
        checkpoint.write_text(self.path(RESULTS), json.dumps(results, indent=2) + "\n")

    def save_state(self, name, arrays, metadata):
        """Replaces <name>.safetensors; a run killed meanwhile keeps the previous one."""
        checkpoint.save(self._state_path(name), arrays, metadata)

    def load_state(self, name):
        """(arrays, metadata) as last saved under this name, or None if never."""
        path = self._state_path(name)
        return checkpoint.load(path) if path.exists() else None

    def drop_state(self, name):
        """Deletes what save_state wrote under this name, if anything."""
        self._state_path(name).unlink(missing_ok=True)

    def _state_path(self, name):
        return self.path(f"{name}.safetensors")

    def _refuse_strangers(self):
        """Before the lock, so that not even a .lock is left in a folder that is not ours."""
        strangers = [name for name in sorted(os.listdir(self.folder))
                     if name != LOCK and not name.endswith(checkpoint.TEMPORARY_SUFFIX)]
        if strangers and self._read_run() is None:    # read after listing: a run may be starting here
            raise UsageError(f"{self.folder} is not empty and holds no run (it has {strangers[0]}). "
                             "Choose another --out.")

    def _take_lock(self):
        """The kernel frees the lock when the process dies, however it dies. The file stays: were it
        unlinked, two runs could lock two files of that name. Python opens it close-on-exec, so that
        programs which the run starts do not hold the lock on."""
        self._lock = os.open(self.path(LOCK), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.folder} is in use by another run. "
                             "Wait for it to end, or choose another --out.") from None
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be locked: {error.strerror}. "
                             "Choose an --out on a local disk.") from error

    def _start_or_resume(self):
        started = self._read_run()
        if started is None:
            run = {"format": FORMAT, "settings": self.fingerprint}
            checkpoint.write_text(self.path(RUN), json.dumps(run, indent=2) + "\n")
        elif not self.resume:
            raise UsageError(f"{self.folder} already holds a run. "
                             "Pass --resume to go on with it, or choose another --out.")
        else:
            self._refuse_other_settings(started)
        for leftover in self.folder.glob(f".*{checkpoint.TEMPORARY_SUFFIX}"):    # of a killed run
            leftover.unlink()

    def _refuse_other_settings(self, started):
        def show(settings, name):
            return json.dumps(settings[name], sort_keys=True) if name in settings else "absent"
        differences = [f"{name} was {show(started, name)} and is now {show(self.fingerprint, name)}"
                       for name in sorted(started.keys() | self.fingerprint.keys())
                       if show(started, name) != show(self.fingerprint, name)]
        if differences:
            raise UsageError(f"{self.folder} holds a run with other settings: {', '.join(differences)}. "
                             "Resume it with those it had, or choose another --out.")

    def _read_run(self):
        """The settings in run.json, or None where there is none."""
        path = self.path(RUN)
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != FORMAT:
                raise ValueError("another format")
            return dict(content["settings"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not the work of minilm, or is damaged. "
                             "Choose another --out.") from error

    def _release(self):
        if self._lock is not None:
            with contextlib.suppress(OSError):    # of a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_UN)    # closing alone would leave it to forked children
            os.close(self._lock)
            self._lock = None


class StopRequest:
    """Ctrl-C or SIGTERM as a request: `with StopRequest() as stop`, and the loop polls `stop.requested`.

    The first signal only sets the flag, so that the loop can finish its step and save; the second
    raises KeyboardInterrupt. A signal that was ignored before (as SIGINT is in a shell script's `&` jobs)
    stays ignored. Leaving restores the handlers. Outside the main thread, where Python lets nobody set
    handlers, this does nothing.
    """

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):    # None: set from C, and could not be restored
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have arrived in the middle of one, and stderr cannot be re-entered.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; press again to stop at once\n")


def require(*modules):
    """Raises UsageError if one of the run extra's modules cannot be imported: at the start, not after the work."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"this needs {name}, which cannot be imported ({error}): pip install -e '.[run]'") from error


def command_to_resume():
    """The command line of this process, ready to be typed again, with --resume."""
    typed = sys.orig_argv
    return shlex.join(typed if "--resume" in typed else [*typed, "--resume"])


def main_guard(main, *user_errors):
    """Runs main() and returns the exit status: what main returns (None is 0), or 2 after one line
    `error: ...` on stderr for UsageError, CheckpointError, the given exception classes and what the
    system refuses (OSError: a full disk, say), or 130 when interrupted, or 141 when whoever read the
    output has gone. Any other exception is a bug and keeps its traceback."""
    try:
        status = main() or 0
        sys.stdout.flush()    # here, where a failure can still be reported
        return status
    except (UsageError, checkpoint.CheckpointError, *user_errors) as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:
        _discard_output()
        return 141    # as the shell reports a program that SIGPIPE ended
    except OSError as error:
        print(f"error: {error.filename or 'the output'}: {error.strerror}. Check that disk and folder.", file=sys.stderr)
        if error.filename is None:
            _discard_output()
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _discard_output():
    """What is still buffered for stdout cannot be written; Python would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
