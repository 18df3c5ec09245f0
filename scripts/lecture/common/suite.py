"""A folder of experiments: all of them are run, and one page and one table are made of their results.

Tests: tests/test_lecture.py.
"""

import ast
import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import korean, markdown, page, record
from common.experiment import STYLES, read
from common.text import first_sentence
from common.words import Words
from minilm import checkpoint
from minilm.checks import ordinary_file
from minilm.fast import workers
from support.command_line import MOST_WORKERS, Parser, relying_on, whole
from support.json_files import read_shaped
from support.run_folder import RunFolder, StopRequest, UsageError, command_to_resume, require

FIGURE_BYTES = 60_000
SECONDS = {str: {"seconds": {str: float}, "workers": int, "date": str, "machine": str}}     # of seconds.json, by size
RUN_FIRST = "Give the folder of a run of this script, or run the experiments again in another --out."
# Options and environment of an experiment under another rounding; "workers" is worked out from --workers.
ROUNDINGS = {"float64": (["--dtype", "float64"], {}),
             "coretype": ([], {"OPENBLAS_CORETYPE": "Nehalem"}),
             "workers": ([], {})}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A folder of experiments.

    here     the folder
    stages   {title: names of experiments}, in order
    words    what its page and its table say of it
    doc      of its all.py, whose first line --help shows
    out      where a run goes, by default
    """

    here: Path
    stages: dict[str, tuple[str, ...]]
    words: Words
    doc: str
    out: str

    @property
    def experiments(self) -> tuple[str, ...]:
        return tuple(name for names in self.stages.values() for name in names)

    def main(self):
        arguments = self.parsed()
        require("matplotlib", "safetensors", "PIL")
        for folder, write in ((arguments.table, self.write_table), (arguments.readme, self.write_readme),
                              (arguments.seconds, self.write_seconds)):
            if folder is not None:
                with relying_on(folder, RUN_FIRST):
                    return write(folder)
        names = self.chosen(arguments.rows)
        roundings = chosen_roundings(arguments.rounding)
        with (RunFolder(arguments.out, arguments.resume, {"size": arguments.size}) as run, StopRequest() as stop,
              relying_on(arguments.out, RUN_FIRST)):
            status = self.run_all(names, arguments.size, run.folder, arguments.workers, stop)
            for rounding in roundings:
                if status == 0:
                    print(f"\nrounding {rounding}", flush=True)
                    folder = run.folder / "rounding" / rounding
                    status = self.run_all(names, arguments.size, folder, arguments.workers, stop, rounding)
            if roundings:
                self.compare_roundings(run.folder, arguments.size)
            return status

    def parsed(self):
        parser = Parser(self.doc.splitlines()[0])
        size = parser.add_mutually_exclusive_group()
        size.add_argument("--quick", dest="size", action="store_const", const="quick", default="default",
                          help="a trial: shows that the experiments run, decides nothing")
        size.add_argument("--full", dest="size", action="store_const", const="full",
                          help="longer, for the experiments that have more to show")
        parser.add_argument("--rows", help="some experiments only, by name, separated by commas")
        parser.add_argument("--out", default=self.out, help="folder for the results")
        parser.add_argument("--resume", action="store_true",
                            help="continue the run in a folder, with the experiments that are missing")
        parser.add_argument("--workers", type=whole(1, MOST_WORKERS),
                            default=min(workers.available_cores(), MOST_WORKERS),
                            help="processes that share the seeds of an experiment")
        parser.add_argument("--rounding", metavar="NAMES",
                            help=f"run everything again under other roundings, of {','.join(ROUNDINGS)}")
        output = parser.add_mutually_exclusive_group()
        output.add_argument("--table", metavar="DIR",
                            help="print README.md with the run in this folder; runs nothing")
        output.add_argument("--readme", metavar="DIR",
                            help="write the run in this folder into README.md, and its figures; runs nothing")
        output.add_argument("--seconds", metavar="DIR", help="write seconds.json, from which times are estimated")
        return parser.parse_args()

    def chosen(self, names):
        """The experiments asked for, in their order."""
        wanted = self.experiments
        if names is not None:
            wanted = [name.strip().replace("-", "_") for name in names.split(",")]
        if unknown := [name for name in wanted if name not in self.experiments]:
            raise UsageError(f"no experiment is called {', '.join(map(repr, unknown))}; "
                             f"there are {', '.join(self.experiments)}")
        if missing := [f"{name}.py" for name in wanted if not self.script(name).exists()]:
            raise UsageError(f"{self.here} lacks {', '.join(missing)}")
        return [name for name in self.experiments if name in wanted]

    def script(self, name):
        return self.here / f"{name}.py"

    def titles(self):
        """{name: title} of the experiments, from their files, if the table shows them."""
        documents = {name: ast.get_docstring(ast.parse(self.script(name).read_text("utf-8")))
                     for name in self.experiments if self.words.titles}
        return {name: " ".join(text.partition("\n\n")[0].split()) for name, text in documents.items()}

    def readme(self, found):
        """README.md of the folder, from its record."""
        return markdown.readme(self.words, self.stages, found, self.titles())

    def sizes(self, name):
        """The names of an experiment's sizes, read from its file."""
        for node in ast.parse(self.script(name).read_text("utf-8")).body:
            if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SIZES"
                    and isinstance(node.value, ast.Dict)):
                return [ast.literal_eval(key) for key in node.value.keys]
        raise UsageError(f"{self.script(name)} has no SIZES = {{...}}")

    def size_of(self, name, size):
        """The size at which an experiment runs; not every experiment has more to show when it runs for longer."""
        return "default" if size == "full" and "full" not in self.sizes(name) else size

    # Running.

    def run_all(self, names, size, folder, workers, stop, rounding=None):
        """The exit status: 0 if every experiment is done, 1 if one failed, 130 if stopped before the last."""
        folder.mkdir(parents=True, exist_ok=True)
        done = self.results(folder, size)
        todo = [name for name in names if name not in done]
        if len(todo) < len(names):
            print(f"{len(names) - len(todo)} of {len(names)} experiments are done already")
        if todo:
            print(self.expectation(todo, size))
        print("Ctrl-C stops after the experiment that is running, a second Ctrl-C at once; --resume continues.",
              flush=True)
        began = time.monotonic()
        failed = {}
        self.publish(folder, size, done)
        for i, name in enumerate(todo):
            if stop.requested:
                break
            title = self.script(name).read_text("utf-8").partition("\n\n")[0].strip('"')
            print(f"[{i + 1}/{len(todo)}] {name}: {' '.join(title.split())}", flush=True)
            status, last = self.run_one(name, self.size_of(name, size), folder, workers, rounding)
            done = self.results(folder, size)
            if status or name not in done:
                failed[name] = [*last, f"exit status {status}" if status else "it wrote no results"]
            self.publish(folder, size, done)
            elapsed = time.monotonic() - began
            left = elapsed * self.share_left(todo, i + 1, size)
            print(f"[{i + 1}/{len(todo)}] {name}: {'failed' if name in failed else done[name]['outcome']}; "
                  f"{elapsed:.0f} s so far, about {left:.0f} s left", flush=True)
        print(f"\n{len(done)} of {len(self.experiments)} claims: {folder / 'index.html'}, claims.json, claims.md",
              flush=True)
        for name, last in failed.items():
            print(f"\n{name} failed:", *last, sep="\n    ", file=sys.stderr)
        if set(todo) - done.keys() - failed.keys():
            print(f"stopped; continue with {command_to_resume()}")
            return 130
        return 1 if failed else 0

    def run_one(self, name, size, folder, workers, rounding=None):
        """The exit status of an experiment's script, and its last lines; its output is passed on."""
        options, environment = ROUNDINGS[rounding] if rounding else ([], {})
        if rounding == "workers":
            workers = 1 if workers > 1 else 2
        command = [sys.executable, "-u", str(self.script(name)), "--out", str(folder), "--workers", str(workers)]
        command += options
        if size != "default":
            command.append(f"--{size}")
        # In a session of its own: the terminal's Ctrl-C reaches this process only, which lets the experiment end.
        with subprocess.Popen(command, start_new_session=True, text=True, encoding="utf-8", errors="replace",
                              env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as process:
            last = collections.deque(maxlen=15)
            try:
                for line in map(str.rstrip, process.stdout):
                    print(f"    {line}".rstrip(), flush=True)
                    last.append(line)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)      # its workers too
                raise
        return process.returncode, last

    # How long it takes.

    def measured_seconds(self, size):
        """seconds.json of that size: {"seconds": {name: seconds}, "workers", "date", "machine"}, or empty."""
        path = self.here / "seconds.json"
        return read_shaped(path, SECONDS, "Delete it.").get(size, {}) if path.exists() else {}

    def expected_seconds(self, names, size):
        """One number per name; an experiment that was never measured is taken for an average one."""
        known = self.measured_seconds("default" if size == "full" else size).get("seconds", {})
        average = sum(known.values()) / len(known) if known else 1.0
        return [max(1, known.get(name, average)) for name in names]

    def expectation(self, names, size):
        """How long these experiments took where they were measured, in words."""
        measured = self.measured_seconds(size)
        if not measured:
            return f"{len(names)} experiments; how long they take at this size was not measured."
        seconds = sum(self.expected_seconds(names, size))
        duration = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
        return (f"{len(names)} experiments took {duration} with {measured['workers']} workers on "
                f"{measured['machine']} ({measured['date']}).")

    def share_left(self, todo, done, size):
        """The time of the experiments that are left, as a multiple of the time of those that are done."""
        expected = self.expected_seconds(todo, size)
        return sum(expected[done:]) / sum(expected[:done])

    def write_table(self, folder):
        print(self.readme(self.updated_record(*self.recorded(folder), folder)), end="")
        return 0

    def write_seconds(self, folder):
        size, done = self.recorded(folder)
        if not done:
            raise UsageError(f"{folder} holds no results yet")
        path = self.here / "seconds.json"
        kept = read_shaped(path, SECONDS, "Delete it.") if path.exists() else {}
        last = list(done.values())[-1]
        kept[size] = {name: last[name] for name in ("date", "machine", "workers")}
        kept[size]["seconds"] = {name: max(1, round(result["seconds"])) for name, result in done.items()}
        checkpoint.write_text(path, json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(f"{path}: {len(done)} experiments, {sum(kept[size]['seconds'].values())} s at size {size}")
        return 0

    # Results.

    def results(self, folder, size):
        """{name: what the experiment wrote}, of the experiments done in that size, in their order."""
        paths = {name: folder / f"{name}.json" for name in self.experiments}
        written = {name: read(path) for name, path in paths.items() if path.exists()}
        return {name: result for name, result in written.items() if result["size"] == self.size_of(name, size)}

    def recorded(self, folder):
        """The size and the results of a run that is there."""
        size = RunFolder.recorded(folder).get("size")
        if size is None:
            raise UsageError(f"{folder} holds no run of this script")
        return size, self.results(Path(folder), size)

    def publish(self, folder, size, done):
        """claims.json, claims.md and index.html, of the experiments that are done."""
        kept = ("outcome", "comparisons", "conditions", "findings", "numbers", "seeds")
        claims = {name: {"rule": first_sentence(result["Rule"]), "figure": f"{name}.png",
                         **{key: result.get(key, []) for key in kept}} for name, result in done.items()}
        pictures = {name: [picture(folder / f"{name}{style}.png") for style in STYLES] for name in done}
        checkpoint.write_text(folder / "claims.json", json.dumps(claims, indent=1) + "\n")
        rows = record.of_run({"as run": done})["rows"]
        checkpoint.write_text(folder / "claims.md", markdown.table(self.words, self.stages, rows, self.titles()))
        checkpoint.write_text(folder / "index.html", page.html(self.words, self.stages, done, pictures, size))

    def compare_roundings(self, folder, size):
        """rounding.md, and the same on the terminal: the outcome of every experiment under every rounding."""
        text = markdown.roundings(self.experiments, self.run_record(size, self.results(folder, size), folder))
        checkpoint.write_text(folder / "rounding.md", text)
        print(f"\n{text}\n{folder / 'rounding.md'}")

    def run_record(self, size, done, folder):
        """The record of a run (common/record.py), as it ran and under the roundings that have results."""
        again = {name: self.results(Path(folder) / "rounding" / name, size) for name in ROUNDINGS}
        return record.of_run({"as run": done} | {name: found for name, found in again.items() if found})

    def updated_record(self, size, done, folder):
        """results.json beside this script, with the rows of a run in place of its own, in their order."""
        here = record.read(self.here / "results.json")
        return record.updated(here, self.run_record(size, done, folder), self.experiments)

    def write_readme(self, folder):
        """results.json and README.md beside this script, and the light figures, small enough for the repository."""
        size, done = self.recorded(folder)
        if size == "quick":
            raise UsageError(f"{folder} holds a trial (--quick), which decides nothing; README.md shows none")
        new = self.updated_record(size, done, folder)
        figures = {name: small_picture(Path(folder) / f"{name}.png") for name in done}
        if large := [f"{name}.png" for name, small in figures.items() if small is None]:
            raise UsageError(f"even reduced these have more than {FIGURE_BYTES} bytes: {', '.join(large)}; "
                             "draw them smaller. Nothing was written")
        in_korean = korean.walkthrough(new) if new["rows"].keys() >= {*korean.CLAIMS} else None
        (self.here / "figures").mkdir(parents=True, exist_ok=True)
        for name, small in figures.items():
            checkpoint.write_bytes(self.here / "figures" / f"{name}.png", small)
        record.write(self.here / "results.json", new)
        checkpoint.write_text(self.here / "README.md", self.readme(new))
        if in_korean is not None:
            checkpoint.write_text(self.here / "README.ko.md", in_korean)
        written = ", ".join(str(self.here / name) for name in ("README.md", "results.json", "figures"))
        print(f"{written}: {len(done)} experiments")
        return 0


def chosen_roundings(names):
    wanted = [name.strip() for name in names.split(",")] if names is not None else []
    if unknown := [name for name in wanted if name not in ROUNDINGS]:
        raise UsageError(f"no rounding is called {', '.join(map(repr, unknown))}; "
                         f"there are {', '.join(ROUNDINGS)}")
    return wanted


def picture(path, *how):
    """page.compact of the figure in a file. Raises UsageError if it cannot be read."""
    try:
        return page.compact(ordinary_file(path).read_bytes(), *how)
    except OSError as error:
        cause = error.strerror or f"no picture, or damaged ({checkpoint.one_line(error)})"
        raise UsageError(f"{path}: {cause}. Draw it again with {path.stem.removesuffix('-dark')}.py --redraw --out "
                         f"{path.parent}") from error


def small_picture(path):
    """The figure in a file, reduced until it has fewer than FIGURE_BYTES; None if it cannot be."""
    attempts = (picture(path, colours, scale) for scale in (1, 0.75, 0.6, 0.5) for colours in (256, 64))
    return next((small for small in attempts if len(small) < FIGURE_BYTES), None)
