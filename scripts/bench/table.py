"""Runs all benchmarks and prints the table of this folder's README: every measured ratio beside its goal.

    python scripts/bench/table.py FOLDER [--print] [--figure FILE]

Runs train, objectives, generate, gemm and scaling, each with all its sizes and peers, one after the other (about 40
minutes on an idle machine). Results go to FOLDER; a benchmark whose results are there is not run again. --print runs
nothing and prints the results in FOLDER.
"""

import csv
import io
import subprocess
import sys
from pathlib import Path

import measuring
from minilm import checkpoint
from support.command_line import Parser, output_file, read_text, relying_on
from support.run_folder import UsageError, main_guard

SCRIPTS = Path(__file__).resolve().parent
RUNS = {"train": ("train", "--rounds", "7"), "generate": ("generate", "--rounds", "7"),
        "objectives": ("objectives", "--sizes", "8M", "--rounds", "7"), "gemm": ("gemm", "--rounds", "7"),
        "scaling": ("scaling",), "objectives-135M": ("objectives", "--sizes", "135M", "--rounds", "3")}

# work, against, {size: (time, memory)}: the goal is a ratio ours/theirs of at most this.
GOALS = [
    ("training step", "torch", {"XS": (0.8, 0.6), "S": (1.0, 0.6), "M": (1.0, 0.6), "G": (1.0, 0.6)}),
    ("training step", "compile", dict.fromkeys(["XS", "S", "M", "G"], (1.0, 0.6))),
    ("training step", "autograd", dict.fromkeys(["XS", "S", "M", "G"], (0.3, 0.4))),
    ("training step", "autograd-tuned", dict.fromkeys(["XS", "S", "M", "G"], (0.55, 0.4))),
    ("training step", "its products alone", dict.fromkeys(["M", "G"], (1 / 0.75, None))),
    ("SFT step", "trl", dict.fromkeys(["8M", "135M"], (0.5, 0.4))),
    ("SFT step", "trl-best", dict.fromkeys(["8M", "135M"], (0.9, 0.5))),
    ("DPO step", "trl", dict.fromkeys(["8M", "135M"], (0.4, 0.4))),
    ("DPO step", "trl-best", dict.fromkeys(["8M", "135M"], (0.7, 0.4))),
    ("RLOO step", "trl", dict.fromkeys(["8M", "135M"], (0.35, 0.4))),
    ("RLOO step", "trl-best", dict.fromkeys(["8M", "135M"], (0.5, 0.4))),
    ("sampling", "hf", {"B1": (0.2, 0.5), "B32": (0.35, 0.5), "B128": (0.5, 0.5)}),
    ("sampling", "torch", {"B1": (0.6, None), "B32": (0.8, None), "B128": (0.9, None)}),
]
RUN_AGAIN = "Delete that file and call this script again, without --print."
EXPONENTS = {"time_exponent": 1.5, "memory_exponent": 1.0}      # in T, at a fixed number of tokens


def run(folder):
    """Run the benchmarks whose results are not in the folder; each writes its file when it has finished."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "transformers", "trl", "autograd")
    checkpoint.write_text(folder / "machine.txt", measuring.machine(*packages))
    for name, (script, *options) in RUNS.items():
        if not (folder / f"{name}.csv").exists():
            print(f"bench/{script}.py {' '.join(options)}", flush=True)
            ended = subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *options,
                                    "--csv", folder / f"{name}.csv"])
            if ended.returncode:
                print(f"bench/{script}.py ended with exit status {ended.returncode}; its rows are empty")


def read(path):
    """The rows of a CSV file; [] if there is no file."""
    return list(csv.DictReader(io.StringIO(read_text(path, RUN_AGAIN), newline=""))) if path.exists() else []


def measured(folder):
    """{(work, size, peer): row} of all comparisons, with numbers as floats."""
    rows = [row for name in RUNS if name != "scaling" for row in read(folder / f"{name}.csv")]
    for row in rows:
        row.update({key: float(row[key]) for key in measuring.HEADER[3:]})
    return {(row["work"], row["size"], row["peer"]): row for row in rows}


def verdict(value, goal):
    return "" if goal is None else "yes" if value <= goal else "**no**"


def table(found, scaling):
    lines = ["| work | size | against | time, ours/theirs (lower is better) [quartiles] | goal | met "
             "| memory, ours/theirs | goal | met |",
             "|---" * 9 + "|"]
    for work, peer, sizes in GOALS:
        for size, (time, memory) in sizes.items():
            row = found.get((work, size, peer))
            if row is None:
                lines.append(f"| {work} | {size} | {peer} | not measured | {time:.2f} | | | | |")
                continue
            of_memory = "" if memory is None else f"{row['memory_ratio']:.2f}"
            lines.append(
                f"| {work} | {size} | {peer} | {row['time_ratio']:.2f} [{row['time_ratio_low']:.2f}, "
                f"{row['time_ratio_high']:.2f}] | {time:.2f} | {verdict(row['time_ratio'], time)} | {of_memory} "
                f"| {'' if memory is None else memory} | {verdict(row['memory_ratio'], memory)} |")
    for row in [row for row in scaling if row["variable"] == "T"][-1:]:
        for key, goal in EXPONENTS.items():
            what = key.partition("_")[0]
            value = float(row[key])
            lines.append(f"| {what} of a step of 8192 tokens | T to {row['value']} | | T^{value:.2f} | T^{goal:.1f} "
                         f"| {verdict(value, goal)} | | | |")
    return "\n".join(lines)


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--print", action="store_true", help="run nothing; print the results in the folder")
    parser.add_argument("--figure", metavar="FILE", type=output_file, help="draw the comparisons into a PNG file")
    asked = parser.parse_args()
    if not asked.print:
        run(asked.folder)
    with relying_on(asked.folder, RUN_AGAIN):
        found = measured(asked.folder)
        if not found:
            raise UsageError(f"{asked.folder} has no results; call it without --print to run the benchmarks")
        print("\n" + table(found, read(asked.folder / "scaling.csv")) + "\n")
        machine = asked.folder / "machine.txt"
        print(read_text(machine, RUN_AGAIN) if machine.exists() else "The machine was not recorded.")
        if asked.figure:
            measuring.draw(asked.figure, list(found.values()), "minilm against its peers")


if __name__ == "__main__":
    sys.exit(main_guard(main))
