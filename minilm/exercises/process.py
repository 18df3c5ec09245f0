"""Runs a student's file in a process of its own: it may loop for ever, end the process, or write to any array.

The child writes one line of JSON into a file before each call, and one for each verdict. The parent reads them when the
child has ended, or when its time is over.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from minilm import checks
from minilm.exercises import tasks
from minilm.exercises.grading import NOT_BEGUN, Verdict, grade
from minilm.exercises.outcome import in_words
from minilm.exercises.reference import Reference
from minilm.exercises.task import Task, is_untouched, run_text

SECONDS = 20.0
PRINTED = 2000          # characters of what a function prints
# sys.path of the parent, then the arguments of child. A file json.py beside the student's is not found this way.
CODE = "import sys; sys.path[:] = sys.argv[4:]; from minilm.exercises import process; process.child(*sys.argv[1:4])"


def check(task: Task, path: Path, seconds: float = SECONDS) -> Verdict:
    """The verdict on a file. Raises OSError for a file that cannot be read."""
    checks.ordinary_file(path)
    text = path.read_bytes()
    if is_untouched(task, text):
        return NOT_BEGUN
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        words = [sys.executable, "-c", CODE, task.name, str(path), str(report), *sys.path]
        try:
            done = subprocess.run(words, input=text, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  timeout=seconds, env={**os.environ, "PYTHONBREAKPOINT": "0"})
        except subprocess.TimeoutExpired:
            return _read(report, f"it has not ended after {seconds:g} seconds. Is there a loop without an end? "
                                 "(--seconds gives it more time)")
        error = done.stderr.decode(errors="replace").strip()[-500:]
        return _read(report, f"the process ended with status {done.returncode}" + f": {error}" * bool(error))


def _read(report, otherwise):
    """The last verdict in the report. Without one: `otherwise`, and what was being computed."""
    lines = [json.loads(line) for line in report.read_text("utf-8").splitlines()] if report.exists() else []
    verdicts = [line for line in lines if "solved" in line]
    if verdicts:
        return Verdict(**verdicts[-1])
    at = f"{lines[-1]['at']}: " if lines else ""
    return Verdict(False, f"wrong {at}{otherwise}")


# In the child.

class _First(io.StringIO):
    """Keeps the first PRINTED characters that are written."""

    def write(self, text: str) -> int:
        super().write(text[:max(0, PRINTED - self.tell())])
        return len(text)


def child(name: str, path: str, report: str) -> None:
    """Grade the text of stdin, which is the content of `path`."""
    task = tasks.load(name)
    text = sys.stdin.buffer.read()
    sys.path.append(str(Path(path).resolve().parent))
    sys.dont_write_bytecode = True
    with open(report, "a", encoding="utf-8") as file:
        def write(**line):
            file.write(json.dumps(line) + "\n")
            file.flush()

        def write_verdict(verdict):
            out = printed.getvalue()
            more = f"\nIt printed:\n{out.rstrip()}" if out.strip() else ""
            write(solved=verdict.solved, text=verdict.text + more, begun=verdict.begun)

        with contextlib.redirect_stdout(_First()) as printed:
            write_verdict(_verdict(task, text, path, lambda words: write(at=words), write_verdict))


def _verdict(task, text, path, at, found):
    reference = Reference(task).complete()              # before the file runs, which may change NumPy
    at("when the file is loaded")
    try:
        with warnings.catch_warnings(), np.errstate():          # what the file sets ends here
            module = run_text(f"_minilm_{Path(path).stem}", text.decode("utf-8"), path)
    except SyntaxError as error:
        return Verdict(False, f"Python cannot read the file: line {error.lineno}: {error.msg}: "
                              f"{(error.text or '').strip()}")
    except BaseException as error:                  # SystemExit and KeyboardInterrupt, too: it is the student's
        return Verdict(False, f"the file cannot be loaded: {in_words(error, path)}")
    function = getattr(module, task.name, None)
    if not callable(function):
        return Verdict(False, f"the file has no function {task.name}; `start` writes one with the right name")
    try:
        return grade(task, function, path, at, found, reference)
    except BaseException as error:
        return Verdict(False, f"the grader fails: {in_words(error, path)}. Does the file change NumPy or minilm?")
