"""How all benchmarks measure time and memory; shared by the scripts of this folder.

Each library runs in a process of its own, on the same weights and the same tokens. First their results are
compared; a wrong result stops the benchmark. Then the libraries take turns, round after round, forwards and
backwards. A turn is a number of steps that takes about the same time for every library, and its median counts.
A round in which another process used the machine is dropped. The result is ours / theirs within a round: the
median over the rounds, and the quartiles. Below 1, minilm is faster.

Memory is the peak resident memory (VmHWM of Linux) minus the memory after the import, plus the private
memory of forked processes.

The same script, started with `--worker`, does the work of one library (library_process.py). What differs on a GPU is in
benchmark.py and gpu_process.py.
"""

import argparse
import contextlib
import csv
import functools
import io
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from minilm import checkpoint
from minilm.objectives.sft import sft_loss
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, shards, stage

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from library_process import Worker  # noqa: E402
from support import figures  # noqa: E402
from support.command_line import Parser, names, output_file, whole  # noqa: E402
from support.machine import installed, machine  # noqa: E402, F401
from support.run_folder import UsageError  # noqa: E402

HEADER = ["work", "size", "peer", "time_ratio", "time_ratio_low", "time_ratio_high", "memory_ratio"]
TURN = 0.6              # seconds of a turn, about
MOST_ROUNDS = 1000      # of a benchmark
NO_GRADIENTS = ["reference"]    # arrays with other names, when two precisions are compared by norm, are gradients
OTHERS = 0.1            # a round counts if other processes take at most this share of all cores in each turn
# Settings with which glibc keeps freed memory, as minilm sets them for itself: fair for libraries that allocate much.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 26),
               "MALLOC_ARENA_MAX": "1"}


def blas_threads(count):
    """The environment in which NumPy's BLAS has `count` threads; 1 for minilm, whose workers are processes."""
    return dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), str(count))


# The training step that several scripts time.

#        V, D, L, H, T, B
SIZES = {"XS": (128, 64, 2, 4, 64, 16), "S": (512, 128, 4, 4, 128, 16), "M": (4096, 384, 6, 6, 256, 4),
         "G": (50257, 768, 12, 12, 256, 2), "tiny": (64, 64, 2, 2, 16, 2), "G8x1024": (50257, 768, 12, 12, 1024, 8)}
UNASKED = ["tiny", "G8x1024"]      # run only if named: for the tests, and as large as a GPU needs
SMOLLM2 = {"vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "ffn_width": 1536,
           "rope_base": 1e5, "norm_eps": 1e-5}          # the Config of SmolLM2-135M


@stage
def training_steps(training, tokens, learning_rate=1e-3, clip=1.0):
    """Endless training steps of minilm on windows of tokens (B,T+1). Yields the metrics; on a GPU they are not read."""
    parts = [tokens[part] for part in shards(len(tokens), training.workers)]
    total = tokens[:, 1:].size

    def loss(model, part):
        return sft_loss(model.log_probs(part), np.ones(part[:, 1:].shape), total=total), None

    while True:
        yield train_step(training, loss, parts, learning_rate, "benchmark", clip)


def load_step():
    """For serve(): the training step alone, of random weights and tokens; spec: "shape" (as in SIZES), "workers"."""
    from minilm.fast.malloc import keep_freed_memory
    from minilm.model import Config, Transformer
    keep_freed_memory()

    def make(spec):
        V, D, L, H, T, B = spec["shape"]
        rng = np.random.default_rng(0)
        model = Transformer(Config(vocab_size=V, width=D, layers=L, heads=H, context=T), rng)
        training = TrainState(model, rng, spec["workers"])
        tokens = rng.integers(V, size=(B, T + 1))
        return (functools.partial(next, training_steps(training, tokens)),
                lambda: {"loss": next(training_steps(training, tokens, learning_rate=0.0))["loss"]})
    return make


# Taking turns.

def busy_ticks():
    """(busy, all) of all cores since the system started, in ticks; (0, 0) if the system does not report them."""
    try:
        with open("/proc/stat") as stat:
            ticks = [int(n) for n in stat.readline().split()[1:9]]
    except OSError:
        return 0, 0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def wait_until_quiet(patience=3.0):
    """Wait until the cores are free: threads of BLAS and OpenMP spin for a while after a turn has ended."""
    deadline = time.monotonic() + patience
    share = 1.0
    while share > OTHERS and time.monotonic() < deadline:
        busy, everything = busy_ticks()
        time.sleep(0.05)
        busy, everything = (now - then for now, then in zip(busy_ticks(), (busy, everything)))
        share = busy / max(1, everything)


def turn_of(worker, steps, quiet=True):
    """The median time of a step in seconds, and the share of all cores that other processes took meanwhile.

    quiet: wait for idle cores first.
    """
    if quiet:
        wait_until_quiet()
    busy, everything = busy_ticks()
    own = worker.ticks()
    seconds = statistics.median(worker.run(steps))
    own = worker.ticks() - own
    busy_now, everything_now = busy_ticks()
    return seconds, (busy_now - busy - own) / max(1, everything_now - everything)


def take_turns(workers, rounds, turn, quiet=True):
    """Medians (rounds, workers) in seconds, and which rounds were undisturbed (rounds,).

    Every second round goes backwards: the first place of a round costs about 1%. quiet: whether other processes on the
    cores disturb a round.
    """
    warm = [worker.run(2, watched=True) for worker in workers]
    steps = [max(1, round(turn / min(times))) for times in warm]
    medians = np.empty((rounds, len(workers)))
    undisturbed = np.ones(rounds, bool)
    for i in range(rounds):
        for j in range(len(workers))[::1 if i % 2 else -1]:
            medians[i, j], others = turn_of(workers[j], steps[j], quiet)
            undisturbed[i] &= not quiet or others <= OTHERS
        print(f"  round {i + 1}/{rounds}: " + ", ".join(
            f"{worker.name} {1e3 * t:.1f} ms" for worker, t in zip(workers, medians[i]))
            + ("" if undisturbed[i] else " (disturbed)"), file=sys.stderr, flush=True)
    return medians, undisturbed


def counted(medians, undisturbed):
    """The rounds that count: the undisturbed ones, unless they are too few."""
    enough = undisturbed.sum() >= 3
    if not undisturbed.all():
        print(f"  {undisturbed.sum()} of {len(undisturbed)} rounds undisturbed"
              + ("" if enough else "; fewer than 3, so all rounds are kept, and the ratios are uncertain"), flush=True)
    return medians[undisturbed] if enough else medians


def alone(name, spec, environment, rounds, turn=TURN):
    """The time of a step in seconds and the peak memory in bytes, without a comparison."""
    worker = Worker(name, spec, environment)
    try:
        medians, undisturbed = take_turns([worker], rounds, turn)
    finally:
        worker.close()
    return float(np.median(counted(medians, undisturbed))), worker.memory


def compare(work, size, spec, names, environments, tolerance, rounds, turn=None):
    """Rows of the table: the first of names, ours, is compared with each of the others.

    Two versions of minilm are started twice, in both orders, for half of the rounds each: of two processes with the
    same code, the one that is started first was 1 to 2% slower throughout (size M).
    """
    orders = [names, names[::-1]] if any(isinstance(name, Path) for name in names) else [names]
    turns = []
    for order in orders:
        with all_started(order, spec, environments) as by_name:
            workers = [by_name[name] for name in names]
            for worker in workers[1:]:
                check_results(workers[0], worker, tolerance)
            turns.append(take_turns(workers, math.ceil(rounds / len(orders)), turn or TURN,
                                    spec.get("device") != "gpu"))
    kept = counted(*map(np.concatenate, zip(*turns)))
    rows = [row_of(work, size, worker.name, kept[:, 0], kept[:, j], workers[0].memory, worker.memory)
            for j, worker in enumerate(workers[1:], start=1)]
    if rows or spec.get("device") != "gpu":
        return rows
    return [row_of(work, size, "-", kept[:, 0], np.full(len(kept), np.nan), workers[0].memory, np.nan)]


def row_of(work, size, peer, ours, theirs, our_memory, their_memory):
    """A row of the table. ours, theirs: seconds of a step by round; memory in bytes."""
    low, middle, high = np.quantile(ours / theirs, [0.25, 0.5, 0.75])
    return {"work": work, "size": size, "peer": peer, "time_ratio": float(middle), "time_ratio_low": float(low),
            "time_ratio_high": float(high), "memory_ratio": our_memory / their_memory if their_memory else math.nan,
            "ours_ms": 1e3 * float(np.median(ours)), "theirs_ms": 1e3 * float(np.median(theirs)),
            "ours_mb": our_memory / 2**20, "theirs_mb": their_memory / 2**20}


@contextlib.contextmanager
def all_started(names, spec, environments):
    """Within it, a process for each library, started in this order: {name: Worker}."""
    workers = {}
    try:
        for name in names:
            workers[name] = started(name, spec, environments)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def started(name, spec, environments):
    """The process of a library. A Path is the checkout of another version of minilm, which runs in the process."""
    if not isinstance(name, Path):
        return Worker(name, spec, environments.get(name, {}))
    script = name / "scripts" / "bench" / Path(sys.argv[0]).name
    return Worker(name.name, spec, {**environments["minilm"], "PYTHONPATH": str(name)}, script, "minilm")


def check_results(ours, theirs, tolerance):
    """Raises UsageError if an array differs by more than tolerance, relative to its largest entry.

    tolerance: a number; for bf16 two: of all gradients as one vector, by norm, and of everything else.
    """
    joint = isinstance(tolerance, tuple)
    squares = np.zeros(2)
    for name in sorted(ours.results.keys() | theirs.results.keys()):
        if name not in ours.results or name not in theirs.results:
            raise UsageError(f"{ours.name} and {theirs.name} do not compute the same: only one of them returns {name}")
        a = ours.results[name]
        b = theirs.results[name]
        if joint and a.ndim and name not in NO_GRADIENTS:
            squares += np.square(a - b, dtype=np.float64).sum(), np.square(b, dtype=np.float64).sum()
            continue
        error = np.abs(a - b).max() / np.abs(b).max()
        check_error(ours, theirs, f"{name} differs by {error:.1e} of its largest entry", error,
                    tolerance[1] if joint else tolerance)
    if squares.any():
        error = np.sqrt(squares[0] / squares[1])
        check_error(ours, theirs, f"their gradients differ by {error:.1e}, by norm", error, tolerance[0])


def check_error(ours, theirs, words, error, allowed):
    if not error <= allowed:
        raise UsageError(f"{ours.name} and {theirs.name} do not compute the same: {words} (allowed: {allowed:.0e}). "
                         "Nothing was timed.")


# Results.

def present(names, packages):
    """The peers whose package is installed. Prints the names of the others."""
    absent = [name for name in names if name in packages and not installed(packages[name])]
    for name in absent:
        print(f"{name}: not installed, skipped (pip install -e '.[bench]')")
    return [name for name in names if name not in absent]


def table(rows):
    """A Markdown table of the ratios."""
    lines = ["| work | size | against | time, ours/theirs | quartiles | memory, ours/theirs | ours | theirs |",
             "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = (r["work"], r["size"], r["peer"], f"{r['time_ratio']:.2f}",
                 f"{r['time_ratio_low']:.2f} to {r['time_ratio_high']:.2f}", f"{r['memory_ratio']:.2f}",
                 f"{r['ours_ms']:.1f} ms, {r['ours_mb']:.0f} MB", f"{r['theirs_ms']:.1f} ms, {r['theirs_mb']:.0f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{k: f"{row[k]:.4f}" for k in HEADER[3:]}} for row in rows)
    checkpoint.write_text(Path(path), text.getvalue())


def draw(path, rows, title):
    """The ratios, one row each, on a logarithmic axis; left of 1 minilm is faster."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, r in enumerate(reversed(rows)):
        colour = "#0b5fa5" if r["time_ratio"] <= 1 else "#c4570c"
        axes.plot([r["time_ratio_low"], r["time_ratio_high"]], [i, i], color=colour, linewidth=3, alpha=0.5)
        axes.plot(r["time_ratio"], i, "o", color=colour)
        axes.plot(r["memory_ratio"], i, "s", color="#8a8a8a", markerfacecolor="none")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if low < t < high]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    parts = ["work", "size", "peer"] if len({r["work"] for r in rows}) > 1 else ["size", "peer"]
    axes.set_yticks(range(len(rows)), [", ".join(r[part] for part in parts) for r in reversed(rows)])
    figure.supxlabel("ours/theirs, lower is better: time (filled; bar: quartiles), peak memory (square)", fontsize=10)
    axes.set_title(title, fontsize=10)
    figures.save(figure, path, dpi=150)


def finish(asked, rows, title):
    """Print the table; write the CSV and the figure if their options are given."""
    print("\nRatios are ours/theirs, lower is better.\n\n" + table(rows))
    if asked.csv:
        write_csv(asked.csv, rows)
    if asked.figure:
        draw(asked.figure, rows, title)


def arguments(description, sizes, peers, works=(), unasked=(), versions=False, gpu=()):
    """The options of a benchmark. unasked: sizes that run only if named; versions: whether it takes --other.

    gpu: the precisions of --compute, for a benchmark that takes --device. asked.usual: the sizes, peers and works that
    run if none are named.
    """
    parser = Parser(description)
    usual = [size for size in sizes if size not in unasked]
    for kind, known, default in (("work", works, works), ("size", sizes, usual), ("peer", peers, peers)):
        if known:
            parser.add_argument(f"--{kind}s", type=names(kind, known), default=",".join(default),
                                help="with commas (default: %(default)s)")
    if versions:
        parser.add_argument("--other", type=checkout, metavar="CHECKOUT",
                            help="compare with the version of minilm in this folder, instead of the peers")
    parser.add_argument("--rounds", type=whole(1, MOST_ROUNDS), default=9, help="of turns (default: %(default)s)")
    if gpu:
        gpu_options(parser, gpu)
    output_options(parser, "the ratios")
    asked = parser.parse_args()
    asked.usual = {"sizes": usual, "peers": [*peers], "works": [*works]}
    if versions and asked.other:
        asked.peers = [asked.other]
    return asked


def gpu_options(parser, compute):
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--compute", type=names("precision", compute), default=",".join(compute),
                        help="on a GPU, with commas (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write machine and results there")


def checkout(text):
    """The `type` of an option: the folder of another checkout of minilm, with this script in it."""
    folder = Path(text).resolve()
    script = folder / "scripts" / "bench" / Path(sys.argv[0]).name
    if not script.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no checkout of minilm: there is no {script}")
    if script.samefile(sys.argv[0]):
        raise argparse.ArgumentTypeError(f"{text!r} is this checkout; make another: git worktree add ../before COMMIT")
    return folder


def output_options(parser, what):
    """The options for the files that a benchmark writes at its end."""
    parser.add_argument("--csv", metavar="FILE", type=output_file, help=f"write {what} there")
    parser.add_argument("--figure", metavar="FILE", type=output_file, help="draw them there (PNG)")
