"""The growth of a training step's time and memory with T, B, V and D.

    python scripts/bench/scaling.py [--variables T,V] [--quick] [--csv FILE] [--figure FILE]

A tiny model (D 64, L 2, H 4, V 256; 16 windows of 128 tokens) in which one number changes at a time. When T changes, B
changes too, so that a step always has 8192 tokens. A step is forward, backward, clipping and AdamW, in float32 on one
worker, so that only the work grows. Each point is measured in a process of its own; its peak memory is counted without
the imports. Exponents are from least squares on the logarithms.
"""

import csv
import io
import sys
from pathlib import Path

import numpy as np

import library_process
import measuring
from minilm import checkpoint
from support import figures
from support.command_line import Parser, names, whole
from support.run_folder import main_guard

BASE = {"T": 128, "B": 16, "V": 256, "D": 64}
POINTS = {"T": [128, 256, 512, 1024, 2048, 4096, 8192], "B": [1, 2, 4, 8, 16, 32, 64],
          "V": [256, 1024, 4096, 16384], "D": [64, 128, 256, 512]}
TOKENS = 8192           # of a step when T changes
ALLOWED = 1024          # MiB at the longest T; attention that stores T x T scores takes several times as much
HEADER = ["variable", "value", "time_ms", "peak_mb", "time_exponent", "memory_exponent"]


def shape(variable, value):
    """V, D, L, H, T, B of a point."""
    numbers = {**BASE, variable: value, **({"B": TOKENS // value} if variable == "T" else {})}
    return numbers["V"], numbers["D"], 2, 4, numbers["T"], numbers["B"]


def exponent(values, measured):
    """The exponent p of the power law c value^p with the least squared error in the logarithms."""
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])


def measure(variable, values, rounds):
    """A row for each value, with the exponents over all values."""
    rows = []
    for value in values:
        print(f"{variable} = {value}", file=sys.stderr, flush=True)
        seconds, peak = measuring.alone("minilm", {"shape": shape(variable, value), "workers": 1},
                                          measuring.blas_threads(1), rounds)
        rows.append({"variable": variable, "value": value, "time_ms": 1e3 * seconds, "peak_mb": peak / 2**20})
    time, memory = (exponent(values, [row[key] for row in rows]) for key in ("time_ms", "peak_mb"))
    return [{**row, "time_exponent": time, "memory_exponent": memory} for row in rows]


def table(rows):
    lines = ["| variable | value | time | peak memory |", "|---|---|---|---|"]
    lines += [f"| {r['variable']} | {r['value']} | {r['time_ms']:.1f} ms | {r['peak_mb']:.0f} MiB |" for r in rows]
    lines += ["", "| with | time grows as | memory as | time, last two points | memory, last two |",
              "|---|---|---|---|---|"]
    for variable in dict.fromkeys(row["variable"] for row in rows):
        mine = [row for row in rows if row["variable"] == variable]
        powers = [mine[0]["time_exponent"], mine[0]["memory_exponent"]]
        for key in ("time_ms", "peak_mb"):
            powers.append(exponent([row["value"] for row in mine[-2:]], [row[key] for row in mine[-2:]]))
        lines.append(f"| {variable} | " + " | ".join(f"{variable}^{power:.2f}" for power in powers) + " |")
    return "\n".join(lines)


def verdict(row):
    """Whether the memory of a row is at most ALLOWED, in words."""
    return (f"{row['variable']} = {row['value']}: {row['peak_mb']:.0f} MiB at the peak, "
            f"{'under' if row['peak_mb'] < ALLOWED else 'NOT UNDER'} the {ALLOWED} MiB allowed")


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{key: f"{row[key]:.4f}" for key in HEADER[2:]}} for row in rows)
    checkpoint.write_text(Path(path), text.getvalue())


def draw(path, rows):
    """Time and memory on logarithmic axes, a panel for each variable."""
    from matplotlib.figure import Figure
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    figure = Figure(figsize=(3 * len(variables), 3.2), layout="constrained")
    for axes, variable in zip(figure.subplots(1, len(variables), squeeze=False, sharey=True)[0], variables):
        mine = [row for row in rows if row["variable"] == variable]
        for key, power, colour, unit in (("time_ms", "time_exponent", "#0b5fa5", "time (ms)"),
                                         ("peak_mb", "memory_exponent", "#c4570c", "peak memory (MiB)")):
            axes.loglog([row["value"] for row in mine], [row[key] for row in mine], "o-", color=colour,
                        label=rf"{unit} ~ ${variable}^{{{mine[0][power]:.2f}}}$")
        axes.set_xticks([row["value"] for row in mine], [row["value"] for row in mine], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(variable + (f", at {TOKENS} tokens" if variable == "T" else ""))
        axes.legend(fontsize=7)
    figures.save(figure, path, dpi=150)


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--variables", type=names("variable", POINTS), default=",".join(POINTS),
                        help="with commas (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the first three values of each")
    parser.add_argument("--rounds", type=whole(1, measuring.MOST_ROUNDS), default=5,
                        help="of each point (default: %(default)s)")
    measuring.output_options(parser, "the points")
    asked = parser.parse_args()
    variables = asked.variables
    print(measuring.machine())
    rows = []
    for variable in variables:
        rows += measure(variable, POINTS[variable][:3 if asked.quick else None], asked.rounds)
    print("\n" + table(rows))
    if "T" in variables:
        print("\n" + verdict([row for row in rows if row["variable"] == "T"][-1]))
    if asked.csv:
        write_csv(asked.csv, rows)
    if asked.figure:
        draw(asked.figure, rows)


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, {"minilm": measuring.load_step})))
