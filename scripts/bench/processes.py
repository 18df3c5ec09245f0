"""A training step by two processes: its time, CPU time and bytes sent, a model of its cost, and what that predicts.

    python scripts/bench/processes.py [--sizes small] [--works sft,dpo] [--rate 1000] [--quick] [--csv FILE]
    python scripts/bench/processes.py --predict

    one       one process
    forked    2 ranks, forked on this machine
    mpi       2 ranks that mpiexec started on this machine
    network   2 ranks that mpiexec started on two hosts, with a link of `--rate` Mbit/s between them: network
              namespaces of this machine (support/network.py)

All have the same model, data and random numbers; their gradients are compared before anything is timed. They take
turns (measuring.py). An engine that is not in its turn waits for a line in a pipe, and uses no CPU. A step is that of
a stage: SFT, DPO, RLHF with sampling; `exchange` is add_up and share alone. --predict measures nothing.
Results: processes.md.
"""

import contextlib
import csv
import datetime
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import library_process
import measuring
from minilm import checkpoint, parallel
from minilm.fast.malloc import keep_freed_memory
from minilm.fast.workers import can_fork
from minilm.model import Config, Transformer
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from support import network
from support.command_line import Parser, names, output_file, whole
from support.run_folder import main_guard

V = 640
SIZES = {"small": {"width": 64, "layers": 3, "heads": 4}, "middle": {"width": 384, "layers": 6, "heads": 6}}
ROWS = {"small": 64, "middle": 32}              # of a step: dialogues, responses of pairs, samples
WORKS = ["exchange", "sft", "dpo", "rlhf"]
PROMPT, RESPONSE = 8, 24                        # tokens
TOLERANCE = 5e-3                                # of gradients in float32, relative to the largest entry
TURN = 1.5                                      # seconds
HEADER = ["size", "work", "engine", "ms", "low", "high", "cpu_ms", "sent", "numbers", "calls", "disturbed",
          "model_ms"]
ENDS = contextlib.ExitStack()                   # of the ranks, in a process that the benchmark started


# The model.

COLLECTIVES = 2         # of MPI in each call of all_gather, add_up and share
FREE = (math.inf, 0.0)  # shared memory: no bytes are sent


def exchanged(numbers, n):
    """The bytes that each of n ranks sends in a step: a reduce-scatter of gradients, an all-gather of parameters, both
    float32, each by (n-1)/n of them."""
    return (n - 1) / n * numbers * (4 + 4)


def communication(numbers, n, calls, link):
    """Seconds of a step. link: (bytes a second each way, seconds of latency); a collective takes log2(n) messages."""
    bandwidth, latency = link
    return exchanged(numbers, n) / bandwidth + COLLECTIVES * calls * math.ceil(math.log2(n)) * latency


# What it predicts: floating-point operations a second, tokens of a step; bytes a second each way, seconds of latency.
WORKERS = {"H100": (400e12, 16384), "CPU": (1.5e12, 4096)}
LINKS = {"10 GbE": (1.1e9, 40e-6), "100 GbE": (11e9, 20e-6), "NVLink 4": (370e9, 8e-6)}
MODELS = {"135M": 135e6, "1B": 1e9, "70B": 70e9}
RANKS = (2, 8, 64, 1024)
CALLS = 6               # of all_gather, add_up and share in a step of SFT or DPO, as counted
BATCHES = (200_000, 2_000_000)                  # useful tokens of a step, at most: alignment, pretraining


def predictions():
    """Three tables: a step, where data parallelism ends, memory."""
    pairs = [(worker, link) for worker in WORKERS for link in LINKS if (worker, link) != ("CPU", "NVLink 4")]
    steps = [line("worker", "parameters", "compute", "link", *(f"n = {n}" for n in RANKS)), "|---" * 8 + "|"]
    for (worker, link), (name, N) in itertools.product(pairs, MODELS.items()):
        speed, tokens = WORKERS[worker]
        compute = 6 * N * tokens / speed
        exposed = [communication(N, n, CALLS, LINKS[link]) for n in RANKS]
        steps.append(line(worker, name, duration(compute), link,
                          *(f"{duration(t)}, {compute / (compute + t):.0%}" for t in exposed)))
    ends = [line("worker", "link", "tokens b*", *(f"ranks at {D:,} tokens" for D in BATCHES)), "|---" * 5 + "|"]
    for worker, link in pairs:
        b = (4 + 4) * WORKERS[worker][0] / (6 * LINKS[link][0])
        ends.append(line(worker, link, f"{b:,.0f}", *(f"{D / b:,.0f}" if D > b else "none" for D in BATCHES)))
    memory = [line("parameters", "without ZeRO", "ZeRO-1, n = 8", "ZeRO-1, n = 1024", "ZeRO-3, n = 64"),
              "|---" * 5 + "|"]
    for name, N in MODELS.items():
        memory.append(line(name, *(f"{N * size / 1e9:,.2f} GB" for size in (16, 8 + 8 / 8, 8 + 8 / 1024, 16 / 64))))
    return "\n".join([*steps, "", *ends, "", *memory])


def line(*cells):
    return f"| {' | '.join(cells)} |"


def duration(seconds):
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{1e3 * seconds:,.0f} ms"


# One engine, in processes of its own.

def load_ranks():
    keep_freed_memory()

    def make(spec):
        ranks = ENDS.enter_context(parallel.world(spec["ranks"]))
        step, check = {"probe": probe, "exchange": exchange}.get(spec["work"], training)(ranks, spec)
        if ranks.rank == 0:
            return step, check
        check()                                 # the other ranks do here what serve() does in rank 0
        with open(Path(spec["commands"]) / str(ranks.rank)) as commands:
            for steps in commands:
                for _ in range(int(steps)):
                    step()
        ENDS.close()                            # together with rank 0, which leaves when the measurement ends
        sys.exit()
    return make


def probe(ranks, spec):
    """Both ranks send and receive as many numbers at once."""
    from mpi4py import MPI
    own, other = (np.ones(spec["numbers"], np.float32) for _ in range(2))
    peer = 1 - ranks.rank
    return lambda: MPI.COMM_WORLD.Sendrecv(own, peer, recvbuf=other, source=peer), lambda: {}


def exchange(ranks, spec):
    numbers = sum(p.size for p in model_of(spec["size"]).parameters().values())
    flat = ranks.zeros(numbers, np.float32)

    def step():
        ranks.add_up(flat)
        ranks.share(flat)

    def check():
        flat[:] = np.random.default_rng(0).normal(size=numbers) / ranks.size
        step()
        sums = flat.copy()
        flat[:] = 0
        return {"gradient": sums, "calls": 2}
    return step, check


def model_of(size):
    return Transformer(Config(vocab_size=V, **SIZES[size], key_smear=True), np.random.default_rng(0))


def training(ranks, spec):
    state = TrainState(model_of(spec["size"]), np.random.default_rng(1), group=ranks)
    calls = []

    def counted(call, *arguments):
        calls.append(call)
        return call(*arguments)

    for name in ("all_gather", "add_up", "share"):
        setattr(ranks, name, functools.partial(counted, getattr(ranks, name)))
    stage = stage_of(spec["work"], state, ROWS[spec["size"]])

    def check():
        next(stage)
        calls.clear()
        metrics = next(stage)
        count = len(calls)
        return {"norm": metrics["grad_norm"], "gradient": state.snapshot()[0]["optimizer.m"], "calls": count}
    return functools.partial(next, stage), check


def stage_of(work, state, rows):
    """Endless steps of a stage; in each, `rows` responses, all of one length."""
    rng = np.random.default_rng(2)
    prompts = rng.integers(2, V, size=(rows, PROMPT)).tolist()
    chosen, rejected = rng.integers(2, V, size=(2, rows, RESPONSE)).tolist()
    if work == "sft":
        return train_sft(state, prompts, chosen, 10**9, rows)
    if work == "dpo":
        references = [reference_log_probs(state.model, prompts, side) for side in (chosen, rejected)]
        return train_dpo(state, prompts, chosen, rejected, *references, 10**9, rows // 2)

    def reward(_, responses):
        return [float(np.mean(np.array(response) < V // 2)) for response in responses]
    return train_rlhf(state, state.model.copy(), reward, prompts, 10**9, prompts_per_step=rows // 4,
                      samples_per_prompt=4, max_new_tokens=RESPONSE, eos=None)


class Engine(library_process.Worker):
    """The ranks of one engine. costs: (CPU seconds of a rank, bytes sent by a rank), of a step of each turn."""

    def __init__(self, name, spec, link=None):
        self.size = 1 if name == "one" else 2
        self.link = link if name == "network" else None
        self.folder = tempfile.TemporaryDirectory()
        self.commands = []                      # rank 0 has the standard input, and the others each a pipe
        for rank in range(1, self.size):
            os.mkfifo(path := Path(self.folder.name) / str(rank))
            self.commands.append(os.open(path, os.O_RDWR))
        prefix = {"network": self.link and self.link.mpiexec(), "mpi": [network.mpiexec(), "-n", "2"]}.get(name, [])
        environment = {**measuring.blas_threads(1), **(network.Link.environment if self.link else {})}
        self.costs = []
        super().__init__(name, {**spec, "ranks": self.size, "commands": self.folder.name}, environment,
                         library="ranks", prefix=prefix)
        self.calls = int(self.results.pop("calls", 0))          # one process needs fewer

    def run(self, steps, watched=False):
        before = np.array([self.ticks() / os.sysconf("SC_CLK_TCK"), self.sent()])
        for pipe in self.commands:
            os.write(pipe, f"{steps}\n".encode())
        times = super().run(steps, watched)
        after = np.array([self.ticks() / os.sysconf("SC_CLK_TCK"), self.sent()])
        self.costs.append((after - before) / steps / self.size)
        return times

    def sent(self):
        return self.link.sent(0) + self.link.sent(1) if self.link else 0

    def close(self):
        for pipe in self.commands:
            os.close(pipe)
        super().close()
        self.folder.cleanup()


# The measurement.

def speed_of(engine, link):
    """(bytes a second each way, seconds of latency) between the two ranks of an engine, while both send."""
    seconds = []
    for numbers, steps in ((1, 500), (1 << 22, 15)):
        ranks = Engine(engine, {"work": "probe", "numbers": numbers}, link)
        ranks.run(steps // 5)
        seconds.append(float(np.median(ranks.run(steps))))
        ranks.close()
    return 4 * (1 << 22) / (seconds[1] - seconds[0]), seconds[0]


def measure(size, work, engines, speeds, link, rounds, turn):
    """A row for each engine."""
    print(f"{size}, {work}", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        found = []
        for name in engines[work == "exchange":]:               # one process has nothing to exchange
            found.append(Engine(name, {"size": size, "work": work}, link))
            stack.callback(found[-1].close)
            measuring.check_results(found[0], found[-1], TOLERANCE)
        times, undisturbed = measuring.take_turns(found, rounds, turn)
        costs = np.array([engine.costs[1:] for engine in found])                        # (engines, rounds, 2)
    with contextlib.redirect_stdout(sys.stderr):
        kept = measuring.counted(np.concatenate([times[:, :, None], costs.swapaxes(0, 1)], axis=2), undisturbed)
    low, middle, high = np.quantile(kept, [0.25, 0.5, 0.75], axis=0)                    # (engines, 3) each
    compute = 0 if work == "exchange" else middle[0, 0]
    numbers = found[0].results["gradient"].size
    return [{"size": size, "work": work, "engine": engine.name, "ms": 1e3 * middle[i, 0], "low": 1e3 * low[i, 0],
             "high": 1e3 * high[i, 0], "cpu_ms": 1e3 * middle[i, 1], "sent": middle[i, 2], "numbers": numbers,
             "calls": engine.calls, "disturbed": int((~undisturbed).sum()), "model_ms": 1e3 * (compute / engine.size + (
                 communication(numbers, 2, engine.calls, speeds[engine.name]) if engine.size > 1 else 0))}
            for i, engine in enumerate(found)]


def table(rows):
    lines = ["| parameters | step | engine | time, ms [quartiles] | of one | CPU a rank, ms | sent a rank, MB | of 4N "
             "| model, ms | error |", "|---" * 10 + "|"]
    of_one = {(row["size"], row["work"]): row["ms"] for row in rows if row["engine"] == "one"}
    for row in rows:
        one = of_one.get((row["size"], row["work"]))
        basis = row["engine"] == "one"
        cells = (f"{row['numbers']:,}", row["work"], row["engine"],
                 f"{row['ms']:.1f} [{row['low']:.1f}, {row['high']:.1f}]", f"{row['ms'] / one:.2f}" if one else "",
                 f"{row['cpu_ms']:.1f}", f"{row['sent'] / 1e6:.2f}" if row["sent"] else "",
                 f"{row['sent'] / exchanged(row['numbers'], 2):.3f}" if row["sent"] else "",
                 "" if basis else f"{row['model_ms']:.1f}",
                 "" if basis else f"{row['model_ms'] / row['ms'] - 1:+.0%}")
        lines.append(line(*cells))
    return "\n".join(lines)


def present():
    """The engines that can run here; the reasons for the others are printed."""
    engines = ["one"]
    reasons = {"forked": "" if can_fork() else "this system cannot fork processes",
               "mpi": "" if importlib.util.find_spec("mpi4py") and network.mpiexec() else
                      "needs mpi4py and mpiexec: pip install -e '.[mpi]'"}
    reasons["network"] = reasons["mpi"] or network.available()
    for engine, reason in reasons.items():
        if reason:
            print(f"{engine}: skipped, {reason}\n")
        else:
            engines.append(engine)
    return engines


def measured(asked):
    """Measure, and print the conditions and the table."""
    mpich = "".join(f", mpich {found.version}" for found in importlib.metadata.distributions(name="mpich"))
    print(f"{measuring.machine('mpi4py')}{mpich}, {datetime.date.today():%d %B %Y}.\n")
    engines = present()
    with network.Link(asked.rate) if "network" in engines else contextlib.nullcontext() as link:
        speeds = {"forked": FREE, **{name: speed_of(name, link) for name in engines if name in ("mpi", "network")}}
        for name, (bandwidth, latency) in speeds.items():
            if name != "forked":
                print(f"Between the ranks of `{name}`: {bandwidth / 1e6:,.0f} MB/s each way, {1e6 * latency:.0f} µs"
                      f"{f' (a link of {asked.rate} Mbit/s)' if name == 'network' else ''}.\n")
        rows = []
        for size, work in itertools.product(["small"] if asked.quick else asked.sizes, asked.works):
            rows += measure(size, work, engines, speeds, link, *((1, 0.2) if asked.quick else (asked.rounds, TURN)))
    print(table(rows))
    if disturbed := [row for row in rows if row["disturbed"]]:
        print(f"\nOther processes used the machine in rounds of {len(disturbed)} of {len(rows)} rows.")
    if asked.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        checkpoint.write_text(asked.csv, text.getvalue())


def main():
    parser = Parser(__doc__.partition("\n")[0])
    for kind, known in (("size", SIZES), ("work", WORKS)):
        parser.add_argument(f"--{kind}s", type=names(kind, known), default=",".join(known),
                            help="with commas (default: %(default)s)")
    parser.add_argument("--rate", type=whole(1, 100_000), default=1000,
                        help="of the link between two hosts, in Mbit/s (default: %(default)s)")
    parser.add_argument("--rounds", type=whole(1, measuring.MOST_ROUNDS), default=5,
                        help="of turns (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of short turns, of the small model")
    parser.add_argument("--csv", metavar="FILE", type=output_file, help="write the rows there")
    parser.add_argument("--predict", action="store_true", help="print what the model predicts; nothing is measured")
    asked = parser.parse_args()
    if asked.predict:
        print(predictions())
    else:
        measured(asked)


def in_ranks(role):
    """role(), and then the end of the ranks, which an error in one of them must reach."""
    def run():
        with ENDS:
            return role()
    return run


if __name__ == "__main__":
    sys.exit(main_guard(in_ranks(library_process.role(main, {"ranks": load_ranks})), network.NoNetwork, ranks=True))
