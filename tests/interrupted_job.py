"""scripts/assistant.py at a tiny size in a forked process, with an accident at a chosen moment.

The parent has imported everything, so a run takes a second, and an accident falls into the work. Used by
tests/test_interrupted.py.
"""
import contextlib
import errno
import io
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import assistant
from minilm.fast import workers
from support import figures, job, terminal

pyplot.figure().savefig(io.BytesIO())       # loads the fonts, once and not in every child
pyplot.close()

SCRIPT = str(Path(assistant.__file__))
SECONDS = 120           # a run that takes longer hangs
TINY = {"STEPS": dict(dict.fromkeys(assistant.STEPS, 2000), pretraining=3000), "MAX_NEW_TOKENS": 3, "BEST_OF": 2,
        "RLHF_BETAS": (assistant.MAIN_BETA,), "DPO_BETAS": (assistant.MAIN_BETA,), "COMPARISONS": 300, "HELD_OUT": 200,
        "DOCUMENTS": 4000, "DEMONSTRATIONS": 1000, "UNLABELLED": 400, "VOCABULARY": 300, "WINDOWS": 4, "LENGTH": 32}
# Each call of these is a moment at which an accident can be planned: steps, samples, files, figures.
TICKS = [(os, "fsync"), (os, "replace"), (job, "generate"), (assistant, "prepare"), (job, "save_model"),
         (figures, "training_curves"), (figures, "reward_against_kl"), (terminal, "brief"),
         (workers.ProcessGroup, "__enter__"), (workers.ProcessGroup, "__exit__")]
DISK = [(os, "fsync"), (os, "replace")]
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "disk", "memory")


class Ended:
    """A finished run: status (negative: a signal), stdout, stderr, seconds, and the processes that it left."""

    def __init__(self, process, status, folder, seconds):
        self.status = status
        self.seconds = seconds
        self.stdout, self.stderr = ((folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))
        self.left = _left_by(process)

    def command(self):
        """The words of the command that it printed to go on, or None."""
        _, found, rest = self.stdout.rpartition("Continue with:\n")
        return shlex.split(rest.splitlines()[0]) if found else None


def run(folder, options, accident=None, moment=0, group=False, save_every=-1.0):
    """Runs the job in a forked process. folder: for its output; options: of assistant.py.

    accident: None, or one of KINDS; moment: a number of ticks (int), or seconds (float), except for a full disk, where
    it limits the size of a file. group: a signal goes to the workers too, as Ctrl-C in a terminal does; memory ends in
    that a worker is killed, as the kernel does.
    """
    folder.mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    for name in ("stdout", "stderr"):
        (folder / name).write_text("")      # a process may end before it opens them
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        _child(folder, options, accident, moment, group, save_every)
    sent = accident in (None, "disk") or isinstance(moment, int) or (accident == "memory" and not group)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return Ended(process, os.waitstatus_to_exitcode(status), folder, time.monotonic() - began)
        if not sent and time.monotonic() - began >= moment:
            sent = _kill_a_worker(process) if accident == "memory" else _send(process, getattr(signal, accident), group)
        if time.monotonic() - began > SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError(f"no end after {SECONDS} s: {(folder / 'stdout').read_text()}")
        time.sleep(0.002)


def _send(process, number, group):
    with contextlib.suppress(ProcessLookupError):
        if group and os.getpgid(process) == process:
            os.killpg(process, number)
        else:
            os.kill(process, number)
    return True


def _kill_a_worker(process):
    """False if there is none at this moment."""
    for worker in _children(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
            return True
    return False


def _children(process):
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _left_by(leader):
    """The processes of the session that this process led and that still run after ten seconds."""
    for _ in range(500):
        running = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state != "Z":
                    running.append(int(entry))
        if not running:
            return []
        time.sleep(0.02)
    for process in running:
        os.kill(process, signal.SIGKILL)
    return running


def _child(folder, options, accident, moment, group, save_every):
    """The process of the job. Does not return."""
    status = 1
    try:
        os.setsid()
        # As the script does while there is nothing to save.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        tempfile.tempdir = str(folder / "tmp")
        sys.argv = [SCRIPT, *options]
        sys.orig_argv = [sys.executable, *sys.argv]
        for name, value in TINY.items():
            setattr(assistant, name, value)
        pyplot.rcParams["savefig.dpi"] = 20     # a fifth of the time
        assistant.SIZES["small"] = {"width": 16, "layers": 1}
        job.SAVE_EVERY = save_every
        _plan(accident, moment, group)
        status = assistant.main_guard(assistant.main, workers.WorkerFailed)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _plan(accident, moment, group):
    """Makes every function of TICKS count, and plans the accident."""
    ticks = 0
    home = os.getpid()

    def wrap(owner, name):
        function = getattr(owner, name)

        def wrapped(*arguments, **options):
            nonlocal ticks
            ticks += 1
            if accident and isinstance(moment, int):
                if accident == "disk" and (owner, name) in DISK and ticks >= moment:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))     # and so from now on
                ends = name == "__exit__" and os.getpid() != home       # a worker process, which ends in this call
                if ticks == moment and not (ends and accident == "memory"):
                    _cause(accident, home, group)
            result = function(*arguments, **options)
            if os.environ.get("TICKS") and os.getpid() == home:
                Path(os.environ["TICKS"]).write_text(str(ticks))
            return result
        setattr(owner, name, wrapped)

    for owner, name in TICKS:
        wrap(owner, name)
    if accident == "disk" and isinstance(moment, float):
        size = int(20_000 + moment * 10 ** 4)                       # bytes of a file: a part of a file is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if accident == "memory" and isinstance(moment, float) and not group:
        def scarce(*_):
            with open("/proc/self/statm") as file:
                mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            # Without the last megabytes CPython itself ends in "SystemError: error return without exception set".
            left = mapped + 2 * 2 ** 20
            resource.setrlimit(resource.RLIMIT_AS, (left, left))
        signal.signal(signal.SIGALRM, scarce)
        signal.setitimer(signal.ITIMER_REAL, max(moment, 1e-3))


def _cause(accident, home, group):
    if accident == "memory" and not (group and _kill_a_worker(os.getpid())):
        raise MemoryError
    if accident.startswith("SIG") and os.getpid() == home:      # every rank comes to this moment
        _send(home, getattr(signal, accident), group)
