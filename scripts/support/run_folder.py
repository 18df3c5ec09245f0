"""Shared by the scripts: a folder for one long run, Ctrl-C that saves first, and errors without tracebacks.

    def main():
        arguments = parser.parse_args()
        settings = {"seed": arguments.seed}
        with RunFolder(arguments.out, arguments.resume, settings) as run, StopRequest() as stop:
            state = run.load_state("model")              # None until the first save
            for step in ...:
                ...
                if stop.requested:
                    run.save_state("model", arrays, {"step": step})
                    print("stopped; continue with --resume")
                    return
            run.finish(results)

    if __name__ == "__main__":
        sys.exit(main_guard(main))

RunFolder needs a POSIX system (flock). Checked in tests/test_run_folder.py.
"""
import contextlib
import errno
import importlib
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from minilm import checkpoint
from minilm.checks import distinct, ordinary_file
from minilm.parallel.forked import ForkedRanks
from minilm.parallel.mpi import MpiRanks, launched
from minilm.ranks import Ranks

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

RUN = "run.json"
RESULTS = "results.json"
LOCK = ".lock"
FORMAT = "minilm run"


class UsageError(Exception):
    """A request of the user is not possible. The message says why, and what to do instead."""


class RunFolder:
    """The output folder of one run, used by one run at a time: `with RunFolder(...) as run`.

    path         the folder; it is created if it does not exist
    resume       True continues the run in the folder. A missing or empty folder starts a new run in any case
    fingerprint  the settings that determine the results, a dictionary that JSON can hold. A run is resumed
                 only with the settings that it was started with
    ranks        of the program; all of them call the same methods, and rank 0 alone reads and writes files
    resumed      after entering: whether the folder already held this run

    Entering raises UsageError, and leaves the files as they are, if the path is not a folder or cannot be written
    to, if another run uses it, if it holds files but no run, if it holds a run and resume is False, or if it holds a
    run with other settings. Saving raises checkpoint.CheckpointError.
    """

    def __init__(self, path: str | Path, resume: bool, fingerprint: dict, ranks: Ranks | None = None):
        self.ranks = ranks or ForkedRanks(1)
        self.folder = Path(path)
        self.resume = resume
        self.resumed = False
        self.fingerprint = json.loads(json.dumps(fingerprint))    # as run.json returns it
        self._lock = None

    def __enter__(self):
        self.resumed = self.ranks.once(self._open)
        return self

    def _open(self):
        """Whether the folder already held this run."""
        if fcntl is None:
            raise UsageError("a run locks its folder with flock, which this system does not have: use Linux or macOS, "
                             "or Linux on Windows (WSL). The library itself, import minilm, needs no lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_for_other_files()
            self._take_lock()
            return self._start_or_resume()
        except BaseException as error:
            self._release()
            if not isinstance(error, OSError):
                raise
            cause = "not a folder" if isinstance(error, FileExistsError) else error.strerror
            raise UsageError(f"{self.folder} cannot be the folder of a run: {error.filename}: {cause}. "
                             "Choose another --out.") from error

    def __exit__(self, *exception):
        self._release()

    @classmethod
    def recorded(cls, path: str | Path) -> dict:
        """The settings of the run in a folder; an empty dictionary if there is none, or none that can be read."""
        try:
            return cls(path, True, {})._read_run() or {}
        except (OSError, UsageError):
            return {}       # entering the folder reports the error

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def finished(self) -> bool:
        return self.ranks.once(self.path(RESULTS).exists)

    def finish(self, results: dict) -> None:
        """Writes results.json from a dictionary that JSON can hold. From now on the run is finished."""
        self.write(RESULTS, lambda path: checkpoint.write_text(path, json.dumps(results, indent=2) + "\n"))

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        """writer(path of the file `name`), by rank 0."""
        def work():
            writer(self.path(name))
        self.ranks.once(work)

    def save_state(self, name: str, arrays: dict, metadata: dict) -> None:
        """Replaces <name>.safetensors. If the process is killed meanwhile, the previous file stays."""
        self.write(f"{name}.safetensors", lambda path: checkpoint.save(path, arrays, metadata))

    def load_state(self, name: str) -> tuple[dict, dict] | None:
        """(arrays, metadata) of <name>.safetensors, or None if there is no such file."""
        path = self.path(f"{name}.safetensors")
        return self.ranks.once(lambda: checkpoint.load(path) if path.exists() else None)

    def drop_state(self, name: str) -> None:
        """Deletes the file of save_state under this name, if there is one."""
        self.write(f"{name}.safetensors", lambda path: path.unlink(missing_ok=True))

    def _check_for_other_files(self):
        """Called before locking, so that a folder of other files does not even get a .lock."""
        others = [name for name in sorted(os.listdir(self.folder))
                  if name != LOCK and not name.endswith(checkpoint.TEMPORARY_SUFFIX)]
        if others and self._read_run() is None:    # read after the listing, because a run may be starting here
            raise UsageError(f"{self.folder} is not empty and holds no run (it has {others[0]}). "
                             "Choose another --out.")

    def _take_lock(self):
        """Locks the folder. The kernel frees the lock when the process ends, in any way.

        The file .lock is never deleted: otherwise two runs could lock two files of that name. Python opens it
        close-on-exec, so that programs started by the run do not keep the lock.
        """
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
                             "Pass --resume to continue it, or choose another --out.")
        else:
            self._check_settings(started)
        for leftover in self.folder.glob(f".*{checkpoint.TEMPORARY_SUFFIX}"):    # from a killed run
            leftover.unlink()
        return started is not None

    def _check_settings(self, started):
        def show(settings, name):
            return json.dumps(settings[name], sort_keys=True) if name in settings else "absent"
        differences = [f"{name:.80} was {show(started, name):.80} and is now {show(self.fingerprint, name):.80}"
                       for name in sorted(started.keys() | self.fingerprint.keys())
                       if show(started, name) != show(self.fingerprint, name)]
        if differences:
            shown = " ".join(", ".join(differences).split())      # names of a damaged file may hold newlines
            raise UsageError(f"{self.folder} holds a run with other settings: {shown}. "
                             "Resume it with the settings that it was started with, or choose another --out.")

    def _read_run(self):
        """The settings in run.json, or None if there is no such file."""
        path = self.path(RUN)
        try:
            content = json.loads(ordinary_file(path).read_text("utf-8"), object_pairs_hook=distinct)
            if content["format"] != FORMAT or not isinstance(content["settings"], dict):
                raise ValueError("another format")
            return content["settings"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path} is not a file of minilm, or is damaged. "
                             "Choose another --out.") from error

    def _release(self):
        if self._lock is not None:
            with contextlib.suppress(OSError):    # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_UN)    # closing alone leaves the lock to forked children
            os.close(self._lock)
            self._lock = None


class StopRequest:
    """Ctrl-C or SIGTERM as a request: `with StopRequest() as stop`, and the loop polls `stop.requested`.

    The first signal sets the flag, so that the loop can finish its step and save. The second raises
    KeyboardInterrupt. A signal that was ignored before (as SIGINT in the `&` jobs of a shell script) stays ignored.
    Leaving restores the handlers. Outside the main thread this does nothing, because Python sets no handlers there.
    ranks: of the program; the others ignore the signals, and learn of the flag of rank 0 through ranks.once().
    """

    def __init__(self, ranks: Ranks | None = None):
        self.requested = False
        self._handler = signal.SIG_IGN if ranks and ranks.rank else self._handle
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):    # None: set from C, cannot be restored
                    self._previous[number] = previous
                    signal.signal(number, self._handler)
        return self

    def __exit__(self, *exception):
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may arrive during a print, and stderr cannot be re-entered.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; press again to stop at once\n")


def require(*modules: str) -> None:
    """Raises UsageError if a module of the extra [run] cannot be imported. Call it before the work starts."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"this needs {name}, which cannot be imported ({error}): pip install -e "
                             "'.[run]'") from error


def command_to_resume() -> str:
    """The command line of this process with --resume, quoted for a shell."""
    typed = sys.orig_argv
    size = launched()[1]
    mpiexec = ["mpiexec", "-n", str(size)] if size > 1 else []
    return shlex.join([*mpiexec, *typed] if "--resume" in typed else [*mpiexec, *typed, "--resume"])


def main_guard(main: Callable[[], int | None], *user_errors: type[Exception], ranks: bool = False) -> int:
    """Runs main() and returns the exit status. ranks: whether main() may run in several processes, under mpiexec.

    main's result (None is 0); 2 after one line `error: ...` on stderr, for UsageError, CheckpointError, the given
    exception classes, OSError (a full disk, for example) and out_of_memory; 130 for Ctrl-C; 141 if the reader of the
    output has closed it (`| head -1`). Any other exception is a bug and keeps its traceback.
    """
    _prepare_streams()
    rank, size = launched()
    if size == 1:
        return _guarded(main, user_errors)
    try:
        if not ranks:
            raise UsageError("this script runs in one process: start it without mpiexec")
        world = MpiRanks()
    except (UsageError, ImportError, RuntimeError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    with world:             # a rank that fails alone ends the others, with the words that it has not printed
        if status := _guarded(main, user_errors):
            sys.exit(sys.stderr.getvalue() if rank else status)
    return 0


def _guarded(main, user_errors):
    try:
        status = main() or 0
        sys.stdout.flush()    # here a failure can still be reported
        return status
    except (UsageError, checkpoint.CheckpointError, *user_errors) as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:
        _discard_output()
        return 141    # the status that a shell reports for SIGPIPE
    except OSError as error:
        if error.strerror is None:              # not of the operating system: an image that is damaged, for example
            print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
            return 2
        if error.errno == errno.ENOMEM:         # a process that cannot be forked
            print("error: not enough memory. Ask for less.", file=sys.stderr)
            return 2
        print(f"error: {error.filename or 'the output'}: {error.strerror}. Check that disk and folder.",
              file=sys.stderr)
        if error.filename is None:
            _discard_output()
        return 2
    except (MemoryError, SystemError) as error:
        if not out_of_memory(error):
            raise
        words = str(error).splitlines() if isinstance(error, MemoryError) else []
        print("error: not enough memory.", *words, "Ask for less.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def out_of_memory(error: BaseException) -> bool:
    """Whether memory has ended: MemoryError, or CPython's SystemError if C code could not allocate an exception."""
    return isinstance(error, MemoryError) or (
        isinstance(error, SystemError) and ("without exception set" in str(error)
                                            or "without setting an exception" in str(error)))


def _prepare_streams():
    """The null device for a stream that was closed (`>&-`): otherwise the next file that is opened gets its number. A
    character that the encoding of the output lacks is escaped: it must not end a run."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))      # noqa: SIM115  (until the process ends)
    if launched()[0]:                                       # under mpiexec
        print_nothing()
    if hasattr(sys.stdout, "reconfigure"):                  # a test may have put another object there
        sys.stdout.reconfigure(errors="backslashreplace")


def print_nothing() -> None:
    """From now on, nothing that this process writes to sys.stdout and sys.stderr is seen: rank 0 prints for all."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")    # noqa: SIM115  (until the process ends)
    sys.stderr = io.StringIO()


def _discard_output():
    """Drops the buffered output, which cannot be written. Otherwise Python tries again at exit, and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
