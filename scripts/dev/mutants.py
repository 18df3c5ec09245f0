"""Puts bugs into a copy of the project, one at a time, and checks that a test fails for each of them.

    python scripts/dev/mutants.py                       every bug of scripts/dev/mutants/
    python scripts/dev/mutants.py --only dpo --jobs 1   bugs with "dpo" in their words or in the name of their file
    python scripts/dev/mutants.py --list                print the bugs and run nothing
    python scripts/dev/mutants.py --csv scripts/dev/mutants/results.csv      remember which test finds which bug

A mutant (DeMillo, Lipton and Sayward 1978) is one bug: a description in plain words, the right lines, the wrong lines.
The test that failed in an earlier run (scripts/dev/mutants/results.csv) runs first, alone; if it passes, the test files
that most likely fail; then all others. A mutant can be declared with `survives: why` (the change is no bug, and no test
fails) or `hangs: why` (the tests do not end).
Exit status 0: every mutant was killed or behaved as declared; 1: not so; 2: tests fail without any bug, so nothing can
be concluded. Tests: tests/test_mutants.py.
"""
import contextlib
import csv
import dataclasses
import io
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minilm import checkpoint
from minilm.fast.workers import available_cores

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from mutants_table import find, mutated, place, read_tables  # noqa: E402
from mutants_tests import ALSO, LATE, WIDE  # noqa: E402
from support.command_line import (  # noqa: E402
    MOST_WORKERS,
    Parser,
    number,
    output_file,
    read_text,
    relying_on,
    whole,
)
from support.run_folder import UsageError, main_guard  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLES = Path(__file__).with_suffix("")      # a folder
RESULTS = TABLES / "results.csv"             # of an earlier run
HINT = "Name what an earlier run wrote with --csv."
COPIED = ("minilm", "kernels", "tests", "scripts", ".ci", ".github")     # folders; the files beside them are copied too
# The plugins that pytest loads; all installed ones would be imported hundreds of times.
PLUGIN = Path(__file__).with_name("mutants_plugin.py")
PLUGINS = ("-p", PLUGIN.stem, "-p", "hypothesispytest")


# Copies of the project, in which tests run.

@dataclasses.dataclass(frozen=True)
class Outcome:
    """verdict: passed, failed, hung or error; test: the first that failed; detail: the same with the number of others,
    or another message."""
    verdict: str
    detail: str = ""
    seconds: float = 0.0
    test: str = ""


class Copies:
    """`count` copies of a project, in which tests run at the same time. close() ends every running process."""

    def __init__(self, project, folder, count, seed, timeout):
        self.seed = seed
        self.timeout = timeout
        self._free = queue.SimpleQueue()
        self._running = set()
        self._lock = threading.Lock()
        self._closed = False
        first = Path(folder).resolve() / "0"
        first.mkdir()
        shutil.copy(PLUGIN, first.parent)
        for path in Path(project).iterdir():
            if path.is_dir() and path.name in COPIED:
                shutil.copytree(path, first / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy2(path, first)
        if (first / "kernels").is_dir():        # otherwise the installed one is imported, without bugs
            (first / "minilm" / "kernels").symlink_to(Path("..", "kernels"))
        # Bytecode with a hash of its source saves time, and is not used for a file with a bug.
        subprocess.run([sys.executable, "-m", "compileall", "-qq", "--invalidation-mode", "checked-hash", first])
        for i in range(count):
            copy = first.with_name(str(i))
            if i:
                shutil.copytree(first, copy, symlinks=True)
            self._check_that_it_is_imported(copy)
            self._free.put(copy)
        stems = {path.stem for path in first.glob("tests/test_*.py")} - {"test_mutants"}
        late = {stem: i for i, words in enumerate(LATE, start=1) for stem in stems if words in stem}
        self.tests = [f"tests/{stem}.py" for stem in sorted(stems, key=lambda stem: (late.get(stem, 0), stem))]

    def close(self):
        with self._lock:
            self._closed = True
            for process in self._running:
                self._end(process)

    def run(self, tests, mutant=None, all_of_them=False):
        """The Outcome of some test files, in a copy with the mutant's bug (None: without a bug)."""
        if not tests:
            return Outcome("passed")
        arguments = [*tests, *([] if all_of_them else ["-x"])]
        copy = self._free.get()
        try:
            if mutant is None:
                return self._pytest(copy, arguments, "")
            path = copy / mutant.file
            right = path.read_text("utf-8")
            path.write_text(mutated(right, mutant), "utf-8")
            outcome = self._pytest(copy, arguments, place(right, mutant))
            path.write_text(right, "utf-8")
            return outcome
        finally:
            self._free.put(copy)

    def _pytest(self, copy, arguments, words):
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "--color=no", "--no-header",
                   "-p", "no:cacheprovider", *PLUGINS, f"--hypothesis-seed={self.seed}", *arguments]
        with self._lock:
            if self._closed:
                return Outcome("error", "interrupted")
            process = subprocess.Popen(command, cwd=copy, env=self._environment(copy, words), start_new_session=True,
                                       text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT)
            self._running.add(process)
        try:
            output, _ = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return Outcome("hung", f"no end after {self.timeout:g} s", time.monotonic() - started)
        finally:
            self._end(process)
            process.communicate()
            with self._lock:
                self._running.discard(process)
        seconds = time.monotonic() - started
        lines = output.splitlines()
        failed = [line.removeprefix("FAILED ").partition(" - ")[0] for line in lines if line.startswith("FAILED ")]
        if failed:
            more = f" and {len(failed) - 1} more" * (len(failed) > 1)
            return Outcome("failed", failed[0] + more, seconds, failed[0])
        if process.returncode in (0, 5):            # 5: these files have no test that runs by default
            return Outcome("passed", "", seconds)
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        return Outcome("error", errors[0] if errors else f"pytest ended with status {process.returncode}", seconds)

    def _check_that_it_is_imported(self, copy):
        """Raises UsageError if another, installed minilm, or minilm.kernels, is imported in the copy."""
        for name in ("minilm", *["minilm.kernels"] * (copy / "kernels").is_dir()):
            command = [sys.executable, "-c", f"import {name}; print({name}.__file__)"]
            where = subprocess.run(command, cwd=copy, text=True, env=self._environment(copy), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT).stdout
            if Path(where.strip()).parent != copy / name.replace(".", os.sep):
                raise UsageError(f"the copy of {name} in {copy} is not the one that is imported there: "
                                 f"{where.strip()}")

    @staticmethod
    def _environment(copy, words=""):
        # One thread for BLAS, because several copies share the cores. No new bytecode: it could outlive its bug.
        return {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy.parent}", "PYTHONDONTWRITEBYTECODE": "1",
                "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OPENBLAS_NUM_THREADS": "1",
                "MUTANT_OF": words, "PATIENCE": "30"}

    @staticmethod
    def _end(process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def likely_tests(mutant, tests):
    """The test files with the name of the mutant's module or package, and those in ALSO."""
    path = Path(mutant.file)
    stems = [f"test_{path.stem}", f"test_{path.parent.name}", *ALSO.get(path.stem, ())]
    return [f"tests/{stem}.py" for stem in dict.fromkeys(stems) if f"tests/{stem}.py" in tests]


# The experiment.

def examine(mutants, copies, jobs, all_tests=False, report=lambda *result: None, earlier=None):
    """[(mutant, Outcome)] in order; calls report(mutant, outcome) as each becomes known. earlier: {str(mutant): the
    test that runs first, alone}. Raises UsageError if tests fail, or do not run, without any mutant."""
    def known(mutant):
        test = (earlier or {}).get(str(mutant), "")
        return [test] if test.partition("::")[0] in copies.tests and not all_tests else []

    def likely(mutant):
        return copies.tests if all_tests else likely_tests(mutant, copies.tests)

    def others(mutant):
        return sorted((test for test in copies.tests if test not in likely(mutant)),
                      key=lambda test: Path(test).stem not in WIDE)

    outcomes = {}
    alive = mutants
    healthy = set()
    with ThreadPoolExecutor(jobs) as pool, contextlib.closing(copies):
        def check(tests):
            """Raises UsageError unless these files, or single tests, pass without any bug."""
            files = {}
            for test in sorted(set(tests) - healthy):
                files.setdefault(test.partition("::")[0], []).append(test)
            needed = [files[file] for file in copies.tests if file in files and file not in healthy]
            for tests, found in zip(needed, pool.map(copies.run, needed)):
                if found.verdict != "passed":
                    raise UsageError(f"the tests do not pass without any bug: {tests[0].partition('::')[0]} "
                                     f"{found.verdict}, {found.detail}")
                healthy.update(tests)

        for tests in (known, likely, others):
            if tests is likely:
                check(test for mutant in alive for test in likely(mutant))
            for mutant, outcome in zip(alive, pool.map(lambda m: copies.run(tests(m), m, all_tests), alive)):
                if tests is known and outcome.verdict == "error":      # as when the test has another name today
                    outcome = dataclasses.replace(outcome, verdict="passed")
                before = outcomes[mutant].seconds if mutant in outcomes else 0.0
                outcomes[mutant] = dataclasses.replace(outcome, seconds=outcome.seconds + before)
                if outcome.verdict != "passed" or tests is others:
                    report(mutant, outcomes[mutant])
            alive = [mutant for mutant in alive if outcomes[mutant].verdict == "passed"]
        # Tests that killed a mutant must pass without it. If a mutant is alive, all tests must, which takes minutes.
        check(copies.tests if alive else [outcome.test for outcome in outcomes.values() if outcome.test])
    return [(mutant, outcomes[mutant]) for mutant in mutants]


def judge(mutant, outcome):
    """(whether the outcome is the declared one, the verdict in words)."""
    if outcome.verdict == "error":
        return False, f"ERROR: {outcome.detail}"
    declared = "passed" if mutant.survives else "hung" if mutant.hangs else "failed"
    well = outcome.verdict == declared
    words = {"passed": "survived" if well else "SURVIVED", "failed": f"killed by {outcome.detail}",
             "hung": "killed by hanging" if well else f"HANGS: {outcome.detail}"}[outcome.verdict]
    if not well and declared != "failed":
        words = f"DECLARED TO {'SURVIVE' if mutant.survives else 'HANG'}, but {words}"
    return well, words


def as_csv(results):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("file", "mutant", "outcome", "test", "seconds")]
        + [(m.file, m.words, o.verdict, o.test or o.detail, f"{o.seconds:.1f}") for m, o in results])
    return text.getvalue()


def tests_of(path):
    """{mutant: the test that failed} of a file that as_csv wrote."""
    rows = csv.DictReader(io.StringIO(read_text(path, HINT)))
    with relying_on(path, HINT):
        return {f"{row['file']}: {row['mutant']}": row["test"] for row in rows if row["outcome"] == "failed"}


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="WORDS", default="", help="mutants with WORDS in their words or file")
    parser.add_argument("--jobs", type=whole(1, MOST_WORKERS), default=available_cores(), metavar="N",
                        help="copies in which tests run at the same time (%(default)s: one for each core)")
    parser.add_argument("--all-tests", action="store_true",
                        help="run every test on every mutant, and count those that fail")
    parser.add_argument("--list", action="store_true", help="print the mutants and do nothing")
    parser.add_argument("--csv", type=output_file, metavar="FILE", help="also write the results to a file")
    parser.add_argument("--earlier", type=Path, default=RESULTS, metavar="FILE",
                        help="results of an earlier run (--csv): its tests run first")
    parser.add_argument("--seed", type=whole(0), default=0,
                        help="of hypothesis: the same seed gives the same examples")
    parser.add_argument("--timeout", type=number(0.001, 1e6), default=900, metavar="SECONDS",
                        help="of one run (%(default)s)")
    parser.add_argument("--table", type=Path, default=TABLES, help="another table, or folder of tables")
    parser.add_argument("--project", type=Path, default=ROOT, help="another folder of a minilm and its tests")
    arguments = parser.parse_args()

    earlier = tests_of(arguments.earlier)
    mutants = [m for m in read_tables(arguments.table)
               if arguments.only.lower() in str(m).lower()]
    if not mutants:
        raise UsageError(f"no mutant has {arguments.only!r} in its words")
    for m in mutants:
        find(read_text(arguments.project / m.file, "Name the folder of a minilm with --project."), m)
    if arguments.list:
        return print(*mutants, sep="\n")

    started = time.monotonic()
    done = itertools.count(1)

    def report(mutant, outcome):
        _, words = judge(mutant, outcome)
        print(f"[{next(done)}/{len(mutants)}] {mutant}\n    {words}, in {outcome.seconds:.1f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="minilm-mutants-") as folder:
        copies = Copies(arguments.project, folder, arguments.jobs, arguments.seed, arguments.timeout)
        results = examine(mutants, copies, arguments.jobs, arguments.all_tests, report, earlier)
    if arguments.csv:
        checkpoint.write_text(arguments.csv, as_csv(results))
    bad = [(mutant, judge(mutant, outcome)[1]) for mutant, outcome in results if not judge(mutant, outcome)[0]]
    print(f"\n{len(mutants) - len(bad)} of {len(mutants)} mutants were noticed or did as declared, "
          f"in {time.monotonic() - started:.0f} s, seed {arguments.seed}.")
    for mutant, words in bad:
        print(f"  {mutant}\n    {words}")
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)    # ends the children, which have sessions of their own
    sys.exit(main_guard(main))
