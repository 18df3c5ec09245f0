"""All claims of the lecture, each tested by its experiment in this folder, and one page with the results

    all.py                       every experiment
    all.py --quick               a trial of every experiment: it runs, and decides nothing
    all.py --rows dpo,rlhf --out runs/two
    all.py --rounding float64,coretype,workers       are the outcomes the same under other roundings?
    all.py --readme runs/claims  write the run in this folder into scripts/lecture/README.md, and its figures
    all.py --table runs/claims   print what --readme would write
    all.py --seconds runs/claims write the times of this run to scripts/lecture/seconds.json

Writes claims.json, claims.md and index.html to the folder --out, anew after every experiment, beside the
files of the experiments. With --rounding every experiment runs once more per rounding, in
OUT/rounding/NAME, and rounding.md compares the outcomes: float64 models; another matrix kernel of OpenBLAS
(OPENBLAS_CORETYPE); another number of workers, which must change nothing.
"""

import ast
import collections
import contextlib
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
from minilm import checkpoint
from minilm.checks import ordinary_file
from minilm.fast import workers
from support.command_line import MOST_WORKERS, Parser, relying_on, whole
from support.json_files import read_shaped
from support.run_folder import RunFolder, StopRequest, UsageError, command_to_resume, main_guard, require

HERE = Path(__file__).resolve().parent
STAGES = {
    "Stage 1. Pretraining, and learning in context":
        ("pretrain", "in_context", "context_limit", "needs_gradient", "encoder_vs_decoder", "cot_few_shot",
         "cot_zero_shot"),
    "Stage 2. Instruction finetuning":
        ("instruct", "unseen_tasks", "multiple_choice", "demo_cost", "uniform_penalty"),
    "Stage 3. Optimising for human preference":
        ("sampling", "reward_model", "unlabelled", "few_labels", "pairwise", "rlhf", "kl_penalty",
         "rl_is_hard", "imperfect_preference", "dpo", "rlhf_vs_dpo"),
}
EXPERIMENTS = tuple(name for names in STAGES.values() for name in names)
FIGURE_BYTES = 60_000
SECONDS = {str: {"seconds": {str: float}, "workers": int, "date": str, "machine": str}}     # of seconds.json, by size
RUN_FIRST = "Give the folder of a run of this script, or run the experiments again in another --out."
# Options and environment of an experiment under another rounding; "workers" is worked out from --workers.
ROUNDINGS = {"float64": (["--dtype", "float64"], {}),
             "coretype": ([], {"OPENBLAS_CORETYPE": "Nehalem"}),
             "workers": ([], {})}


def main():
    arguments = parsed()
    require("matplotlib", "safetensors", "PIL")
    for folder, write in ((arguments.table, write_table), (arguments.readme, write_readme),
                          (arguments.seconds, write_seconds)):
        if folder is not None:
            with relying_on(folder, RUN_FIRST):
                return write(folder)
    names = chosen(arguments.rows)
    roundings = chosen_roundings(arguments.rounding)
    with (RunFolder(arguments.out, arguments.resume, {"size": arguments.size}) as run, StopRequest() as stop,
          relying_on(arguments.out, RUN_FIRST)):
        status = run_all(names, arguments.size, run.folder, arguments.workers, stop)
        for rounding in roundings:
            if status == 0:
                print(f"\nrounding {rounding}", flush=True)
                folder = run.folder / "rounding" / rounding
                status = run_all(names, arguments.size, folder, arguments.workers, stop, rounding)
        if roundings:
            compare_roundings(run.folder, arguments.size)
        return status


def parsed():
    parser = Parser(__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="default",
                      help="a trial: shows that the experiments run, decides nothing")
    size.add_argument("--full", dest="size", action="store_const", const="full",
                      help="longer, for the experiments that have more to show")
    parser.add_argument("--rows", help="some experiments only, by name, separated by commas")
    parser.add_argument("--out", default="runs/claims", help="folder for the results")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in a folder, with the experiments that are missing")
    parser.add_argument("--workers", type=whole(1, MOST_WORKERS), default=min(workers.available_cores(), MOST_WORKERS),
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


def chosen(names):
    """The experiments asked for, in the order of the lecture."""
    wanted = EXPERIMENTS
    if names is not None:
        wanted = [name.strip().replace("-", "_") for name in names.split(",")]
    if unknown := [name for name in wanted if name not in EXPERIMENTS]:
        raise UsageError(f"no experiment is called {', '.join(map(repr, unknown))}; "
                         f"there are {', '.join(EXPERIMENTS)}")
    if missing := [f"{name}.py" for name in wanted if not script(name).exists()]:
        raise UsageError(f"{HERE} lacks {', '.join(missing)}")
    return [name for name in EXPERIMENTS if name in wanted]


def chosen_roundings(names):
    wanted = [name.strip() for name in names.split(",")] if names is not None else []
    if unknown := [name for name in wanted if name not in ROUNDINGS]:
        raise UsageError(f"no rounding is called {', '.join(map(repr, unknown))}; "
                         f"there are {', '.join(ROUNDINGS)}")
    return wanted


def script(name):
    return HERE / f"{name}.py"


def sizes(name):
    """The names of an experiment's sizes, read from its file."""
    for node in ast.parse(script(name).read_text("utf-8")).body:
        if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SIZES"
                and isinstance(node.value, ast.Dict)):
            return [ast.literal_eval(key) for key in node.value.keys]
    raise UsageError(f"{script(name)} has no SIZES = {{...}}")


def size_of(name, size):
    """The size at which an experiment runs; not every experiment has more to show when it runs for longer."""
    return "default" if size == "full" and "full" not in sizes(name) else size


# Running.

def run_all(names, size, folder, workers, stop, rounding=None):
    """The exit status: 0 if every experiment is done, 1 if one failed, 130 if stopped before the last."""
    folder.mkdir(parents=True, exist_ok=True)
    done = results(folder, size)
    todo = [name for name in names if name not in done]
    if len(todo) < len(names):
        print(f"{len(names) - len(todo)} of {len(names)} experiments are done already")
    if todo:
        print(expectation(todo, size))
    print("Ctrl-C stops after the experiment that is running, a second Ctrl-C at once; --resume continues.",
          flush=True)
    began = time.monotonic()
    failed = {}
    publish(folder, size, done)
    for i, name in enumerate(todo):
        if stop.requested:
            break
        title = script(name).read_text("utf-8").partition("\n\n")[0].strip('"')
        print(f"[{i + 1}/{len(todo)}] {name}: {' '.join(title.split())}", flush=True)
        status, last = run_one(name, size_of(name, size), folder, workers, rounding)
        done = results(folder, size)
        if status or name not in done:
            failed[name] = [*last, f"exit status {status}" if status else "it wrote no results"]
        publish(folder, size, done)
        elapsed = time.monotonic() - began
        left = elapsed * share_left(todo, i + 1, size)
        print(f"[{i + 1}/{len(todo)}] {name}: {'failed' if name in failed else done[name]['outcome']}; "
              f"{elapsed:.0f} s so far, about {left:.0f} s left", flush=True)
    print(f"\n{len(done)} of {len(EXPERIMENTS)} claims: {folder / 'index.html'}, claims.json, claims.md",
          flush=True)
    for name, last in failed.items():
        print(f"\n{name} failed:", *last, sep="\n    ", file=sys.stderr)
    if set(todo) - done.keys() - failed.keys():
        print(f"stopped; continue with {command_to_resume()}")
        return 130
    return 1 if failed else 0


def run_one(name, size, folder, workers, rounding=None):
    """The exit status of an experiment's script, and its last lines; its output is passed on."""
    options, environment = ROUNDINGS[rounding] if rounding else ([], {})
    if rounding == "workers":
        workers = 1 if workers > 1 else 2
    command = [sys.executable, "-u", str(script(name)), "--out", str(folder), "--workers", str(workers)]
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

def measured_seconds(size):
    """seconds.json of that size: {"seconds": {name: seconds}, "workers", "date", "machine"}, or empty."""
    path = HERE / "seconds.json"
    return read_shaped(path, SECONDS, "Delete it.").get(size, {}) if path.exists() else {}


def expected_seconds(names, size):
    """One number per name; an experiment that was never measured is taken for an average one."""
    known = measured_seconds("default" if size == "full" else size).get("seconds", {})
    average = sum(known.values()) / len(known) if known else 1.0
    return [max(1, known.get(name, average)) for name in names]


def expectation(names, size):
    """How long these experiments took where they were measured, in words."""
    measured = measured_seconds(size)
    if not measured:
        return f"{len(names)} experiments; how long they take at this size was not measured."
    seconds = sum(expected_seconds(names, size))
    duration = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    return (f"{len(names)} experiments took {duration} with {measured['workers']} workers on "
            f"{measured['machine']} ({measured['date']}).")


def share_left(todo, done, size):
    """The time of the experiments that are left, as a multiple of the time of those that are done."""
    expected = expected_seconds(todo, size)
    return sum(expected[done:]) / sum(expected[:done])


def write_table(folder):
    print(markdown.readme(STAGES, updated_record(*recorded(folder), folder)), end="")
    return 0


def write_seconds(folder):
    size, done = recorded(folder)
    if not done:
        raise UsageError(f"{folder} holds no results yet")
    path = HERE / "seconds.json"
    kept = read_shaped(path, SECONDS, "Delete it.") if path.exists() else {}
    last = list(done.values())[-1]
    kept[size] = {name: last[name] for name in ("date", "machine", "workers")}
    kept[size]["seconds"] = {name: max(1, round(result["seconds"])) for name, result in done.items()}
    checkpoint.write_text(path, json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(f"{path}: {len(done)} experiments, {sum(kept[size]['seconds'].values())} s at size {size}")
    return 0


# Results.

def results(folder, size):
    """{name: what the experiment wrote}, of the experiments done in that size, in the order of the lecture."""
    paths = {name: folder / f"{name}.json" for name in EXPERIMENTS}
    written = {name: read(path) for name, path in paths.items() if path.exists()}
    return {name: result for name, result in written.items() if result["size"] == size_of(name, size)}


def recorded(folder):
    """The size and the results of a run that is there."""
    size = RunFolder.recorded(folder).get("size")
    if size is None:
        raise UsageError(f"{folder} holds no run of this script")
    return size, results(Path(folder), size)


def publish(folder, size, done):
    """claims.json, claims.md and index.html, of the experiments that are done."""
    kept = ("outcome", "comparisons", "conditions", "findings", "numbers", "seeds")
    claims = {name: {"rule": first_sentence(result["Rule"]), "figure": f"{name}.png",
                     **{key: result.get(key, []) for key in kept}} for name, result in done.items()}
    pictures = {name: [picture(folder / f"{name}{style}.png") for style in STYLES] for name in done}
    checkpoint.write_text(folder / "claims.json", json.dumps(claims, indent=1) + "\n")
    checkpoint.write_text(folder / "claims.md", markdown.table(STAGES, record.of_run({"as run": done})["rows"]))
    checkpoint.write_text(folder / "index.html", page.html(STAGES, done, pictures, size))


def picture(path, *how):
    """page.compact of the figure in a file. Raises UsageError if it cannot be read."""
    try:
        return page.compact(ordinary_file(path).read_bytes(), *how)
    except OSError as error:
        cause = error.strerror or f"no picture, or damaged ({checkpoint.one_line(error)})"
        raise UsageError(f"{path}: {cause}. Draw it again with {path.stem.removesuffix('-dark')}.py --redraw --out "
                         f"{path.parent}") from error


def compare_roundings(folder, size):
    """rounding.md, and the same on the terminal: the outcome of every experiment under every rounding."""
    text = markdown.roundings(EXPERIMENTS, run_record(size, results(folder, size), folder))
    checkpoint.write_text(folder / "rounding.md", text)
    print(f"\n{text}\n{folder / 'rounding.md'}")


def run_record(size, done, folder):
    """The record of a run (common/record.py), as it ran and under the roundings that have results."""
    again = {name: results(Path(folder) / "rounding" / name, size) for name in ROUNDINGS}
    return record.of_run({"as run": done} | {name: found for name, found in again.items() if found})


def updated_record(size, done, folder):
    """results.json beside this script, with the rows of a run in place of its own, in the order of the lecture."""
    return record.updated(record.read(HERE / "results.json"), run_record(size, done, folder), EXPERIMENTS)


def write_readme(folder):
    """results.json and README.md beside this script, and the light figures, small enough for the repository."""
    size, done = recorded(folder)
    if size == "quick":
        raise UsageError(f"{folder} holds a trial (--quick), which decides nothing; README.md shows none")
    new = updated_record(size, done, folder)
    figures = {name: small_picture(Path(folder) / f"{name}.png") for name in done}
    if large := [f"{name}.png" for name, small in figures.items() if small is None]:
        raise UsageError(f"even reduced these have more than {FIGURE_BYTES} bytes: {', '.join(large)}; "
                         "draw them smaller. Nothing was written")
    in_korean = korean.walkthrough(new) if korean.CLAIMS.keys() <= new["rows"].keys() else None
    (HERE / "figures").mkdir(parents=True, exist_ok=True)
    for name, small in figures.items():
        checkpoint.write_bytes(HERE / "figures" / f"{name}.png", small)
    record.write(HERE / "results.json", new)
    checkpoint.write_text(HERE / "README.md", markdown.readme(STAGES, new))
    if in_korean is not None:
        checkpoint.write_text(HERE / "README.ko.md", in_korean)
    print(f"{HERE / 'README.md'}, {HERE / 'results.json'}, {HERE / 'figures'}: {len(done)} experiments")
    return 0


def small_picture(path):
    """The figure in a file, reduced until it has fewer than FIGURE_BYTES; None if it cannot be."""
    attempts = (picture(path, colours, scale) for scale in (1, 0.75, 0.6, 0.5) for colours in (256, 64))
    return next((small for small in attempts if len(small) < FIGURE_BYTES), None)


if __name__ == "__main__":
    sys.exit(main_guard(main))
