"""All claims of the lecture, each tested by its row in this folder, and one page that shows what came out

    python scripts/lecture/all.py                       every row
    python scripts/lecture/all.py --quick               ... in minutes, to see that they run
    python scripts/lecture/all.py --rows dpo,rlhf --out runs/two
    python scripts/lecture/all.py --table runs/claims   the README's table of what a run left, in Markdown
    python scripts/lecture/all.py --readme runs/claims  the README's figures of it, into scripts/lecture/figures

Leaves claims.json, claims.md and index.html in the folder --out, written anew after every row, beside what the rows
leave there.
"""

import argparse
import ast
import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import page
from common.experiment import STYLES, first_sentence, read

from minilm import checkpoint
from minilm.fast import workers
from support.run_folder import RunFolder, StopRequest, UsageError, command_to_resume, main_guard, require

HERE = Path(__file__).resolve().parent
STAGES = {
    "Stage 1. Pretraining, and learning in context":
        ("pretrain", "in_context", "context_limit", "needs_gradient", "encoder_vs_decoder", "cot_few_shot",
         "cot_zero_shot"),
    "Stage 2. Instruction finetuning":
        ("instruct", "unseen_tasks", "multiple_choice", "demo_cost", "uniform_penalty"),
    "Stage 3. Optimising for human preference":
        ("sampling", "reward_model", "unlabelled", "few_labels", "pairwise", "rlhf", "kl_penalty", "rl_is_hard",
         "imperfect_preference", "dpo", "rlhf_vs_dpo"),
}
ROWS = tuple(row for rows in STAGES.values() for row in rows)
README_FIGURES = HERE / "figures"
README_BYTES = 60_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="default",
                      help="see that the rows run; proves nothing")
    size.add_argument("--full", dest="size", action="store_const", const="full",
                      help="longer, where a row has more to show")
    parser.add_argument("--rows", help="some rows only, by name, with commas between")
    parser.add_argument("--out", default="runs/claims", help="folder for the results")
    parser.add_argument("--resume", action="store_true",
                        help="go on in a folder that holds a run, with the rows it lacks")
    parser.add_argument("--workers", type=int, default=workers.available_cores(),
                        help="processes that share the seeds of a row")
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--table", metavar="DIR", help="print the table of the run in this folder, and run nothing")
    made.add_argument("--readme", metavar="DIR",
                      help="write the README's figures from the run in this folder, and run nothing")
    arguments = parser.parse_args()
    require("matplotlib", "safetensors", "PIL")
    if arguments.table:
        print(table(recorded(arguments.table)[1]), end="")
        return 0
    if arguments.readme:
        return readme_figures(arguments.readme)
    rows = chosen(arguments.rows)
    with RunFolder(arguments.out, arguments.resume, {"size": arguments.size}) as run, StopRequest() as stop:
        return run_rows(rows, arguments.size, run.folder, arguments.workers, stop)


def chosen(names):
    """The rows asked for, in the order of the lecture."""
    wanted = [name.strip().replace("-", "_") for name in names.split(",")] if names is not None else ROWS
    if unknown := [name for name in wanted if name not in ROWS]:
        raise UsageError(f"no row is called {', '.join(map(repr, unknown))}; there are {', '.join(ROWS)}")
    if missing := [f"{row}.py" for row in wanted if not script(row).exists()]:
        raise UsageError(f"{HERE} lacks {', '.join(missing)}")
    return [row for row in ROWS if row in wanted]


def script(row):
    return HERE / f"{row}.py"


def sizes(row):
    """The names of a row's sizes, read from its file."""
    for node in ast.parse(script(row).read_text("utf-8")).body:
        if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SIZES"
                and isinstance(node.value, ast.Dict)):
            return [ast.literal_eval(key) for key in node.value.keys]
    raise UsageError(f"{script(row)} has no SIZES = {{...}}")


def size_of(row, size):
    """The size at which a row runs; not every row has more to show when it is run for longer."""
    return "default" if size == "full" and "full" not in sizes(row) else size


# Running.

def run_rows(rows, size, folder, workers, stop):
    """The exit status: 0 if every row is done, 1 if one failed, 130 if stopped before the last."""
    done = results(folder, size)
    todo = [row for row in rows if row not in done]
    if len(todo) < len(rows):
        print(f"{len(rows) - len(todo)} of {len(rows)} rows are done already")
    print("Ctrl-C stops after the row that is running, a second one at once; --resume goes on.", flush=True)
    began, failed = time.monotonic(), {}
    publish(folder, size, done)
    for i, row in enumerate(todo):
        if stop.requested:
            break
        title = script(row).read_text("utf-8").partition("\n\n")[0].strip('"')
        print(f"[{i + 1}/{len(todo)}] {row}: {' '.join(title.split())}", flush=True)
        status, last = run_row(row, size_of(row, size), folder, workers)
        done = results(folder, size)
        if status or row not in done:
            failed[row] = [*last, f"exit status {status}" if status else "it left no results"]
        publish(folder, size, done)
        outcome, elapsed = "failed" if row in failed else done[row]["outcome"], time.monotonic() - began
        print(f"[{i + 1}/{len(todo)}] {row}: {outcome}; {elapsed:.0f} s so far, "
              f"about {elapsed / (i + 1) * (len(todo) - i - 1):.0f} s left", flush=True)
    print(f"\n{len(done)} of {len(ROWS)} claims: {folder / 'index.html'}, claims.json, claims.md", flush=True)
    for row, last in failed.items():
        print(f"\n{row} failed:", *last, sep="\n    ", file=sys.stderr)
    if set(todo) - done.keys() - failed.keys():
        print(f"stopped; go on with {command_to_resume()}")
        return 130
    return 1 if failed else 0


def run_row(row, size, folder, workers):
    """The exit status of a row's script, and its last lines; what it prints is passed on."""
    command = [sys.executable, "-u", str(script(row)), "--out", str(folder), "--workers", str(workers)]
    if size != "default":
        command.append(f"--{size}")
    # In a session of its own: the terminal's Ctrl-C is for this process alone, which lets the row finish.
    with subprocess.Popen(command, start_new_session=True, text=True, encoding="utf-8", errors="replace",
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
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


# What came out.

def results(folder, size):
    """{row: what it left behind}, of the rows that are done in that size, in the order of the lecture."""
    found = {row: read(folder / f"{row}.json") for row in ROWS if (folder / f"{row}.json").exists()}
    return {row: result for row, result in found.items() if result["size"] == size_of(row, size)}


def recorded(folder):
    """The size and the results of a run that is there."""
    size = RunFolder.recorded(folder).get("size")
    if size is None:
        raise UsageError(f"{folder} holds no run of this script")
    return size, results(Path(folder), size)


def publish(folder, size, done):
    """claims.json, claims.md and index.html, of the rows that are done."""
    kept = ("outcome", "comparisons", "conditions", "numbers", "seeds")
    claims = {row: {"rule": first_sentence(result["Rule"]), "figure": f"{row}.png",
                    **{name: result[name] for name in kept}} for row, result in done.items()}
    pictures = {row: [page.compact((folder / f"{row}{style}.png").read_bytes()) for style in STYLES] for row in done}
    checkpoint.write_text(folder / "claims.json", json.dumps(claims, indent=1) + "\n")
    checkpoint.write_text(folder / "claims.md", table(done))
    checkpoint.write_text(folder / "index.html", page.html(STAGES, done, pictures, size))


def table(done):
    """In Markdown, with links from the root of the repository."""
    lines = []
    for title, rows in STAGES.items():
        if rows := [row for row in rows if row in done]:
            lines += [f"**{title}**", "", "| claim | rule that was tested | outcome | measured | |", "|---|---|---|---|---|"]
        for row in rows:
            claim, came_out = map(as_markdown, (done[row]["Claim"], first_sentence(done[row]["words"])))
            rule = as_markdown(first_sentence(done[row]["Rule"]))
            outcome = done[row]["outcome"] if done[row]["outcome"] == "shown" else f"**{done[row]['outcome']}**"
            lines.append(f"| {claim} | {rule} | {outcome} | {came_out} | [{row}.py](scripts/lecture/{row}.py), "
                         f"[figure](scripts/lecture/figures/{row}.png) |")
        lines += [""] * bool(rows)
    return "\n".join(lines)


def as_markdown(text):
    """Text that stays text, in a cell."""
    return re.sub(r"([|<*\\])", r"\\\1", text)


def readme_figures(folder):
    """The light figures of a run, small enough to be kept with the sources."""
    size, done = recorded(folder)
    if size == "quick":
        raise UsageError(f"{folder} holds a quick run, which proves nothing; the README shows none of it")
    README_FIGURES.mkdir(parents=True, exist_ok=True)
    large = []
    for row in done:
        png = (Path(folder) / f"{row}.png").read_bytes()
        attempts = (page.compact(png, colours, scale) for scale in (1, 0.75, 0.6, 0.5) for colours in (256, 64))
        small = next((p for p in attempts if len(p) < README_BYTES), None)
        if small is None:
            large.append(f"{row}.png")
        else:
            (README_FIGURES / f"{row}.png").write_bytes(small)
    print(f"{README_FIGURES}: {len(done) - len(large)} figures")
    if large:
        raise UsageError(f"even reduced these have more than {README_BYTES} bytes: {', '.join(large)}; "
                         "draw them smaller")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
