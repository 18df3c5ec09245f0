"""What the experiments share: a command line, seeds, trained models, the outcome, and the output files.

An experiment is one claim of the lecture and one file: a measurement with one seed, the conclusion from
all seeds, and the figure.

    def measure(experiment, seed, steps):     plain numbers by name; each seed in a process of its own
    def conclude(seeds, size):                a Conclusion, from the list of what measure returned
    def draw(figure, seeds, size):            on a matplotlib Figure
    SIZES = {"quick": {"seeds": 3, "steps": 10}, "default": {"seeds": 6, "steps": 400}}

    if __name__ == "__main__":
        sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))

The docstring of an experiment has a title and six paragraphs: Claim, Test, Rule, Limits, Source, Figure.
The title names the topic; it does not state the claim, because it stands above every outcome. "Figure" is
one sentence, the alternative text of the figure: the axes and the lines, and nothing measured. The first
sentence of "Rule" is printed beside every outcome, so it must be readable alone and say what was
tested ("DPO has more gold reward than the reference at a lower temperature, at 0.5 nat of KL."). The
other sentences give margins and conditions.

A rule in code is a list of comparisons (intervals.py): one effect per seed, and a margin. conclude states it:

    lead = [s["dpo"] - s["reference"] for s in seeds]
    return Conclusion([Comparison("lead of DPO at 0.5 nat (gold reward)", lead, above=0)],
                      words="DPO leads by 0.01 at half a nat.", numbers={"lead": spread(lead)}, table=[...])

- above=, below=, or both (two models are equal within 0.05: above=-0.05, below=0.05).
- An order is a comparison too: smallest_step(accuracies) of each seed, above=0. A count of conditions
  that hold is one as well. An effect that may be infinite (labels that are needed) is given by its
  reciprocal.
- Where differences can be 0 (an accuracy at its ceiling), the margin is larger than a rounding error, say
  0.01.
- conditions=[...] are comparisons that must be shown before the rule says anything (the model has learned
  the task); if one is not, the outcome is "undecided".
- findings=[...] are further comparisons, each with an interval and an outcome of its own. They do not
  decide the outcome of the claim: a stricter comparison than the claim makes, a negative result, an
  exception.
- at_least=k asks for k of the comparisons instead of all of them.
- words: one or two sentences with about three numbers. All other numbers go to `numbers` and to the table.

New models are made by experiment.transformer(rng, **config), which follows the option --dtype; a function
that makes them elsewhere takes dtype=experiment.dtype. With --quick the outcome is "a trial", whatever
was measured.

An experiment writes NAME.json, NAME.png and NAME-dark.png to the folder --out, each whole or not at all.
Import this module before NumPy: it limits BLAS to one thread, because the seeds run in parallel.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import contextlib
import dataclasses
import datetime
import hashlib
import inspect
import io
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

import minilm
from common.intervals import OUTCOMES, TRIAL, Comparison, as_number, outcome, smallest_step  # noqa: F401
from common.text import report, tables
from minilm import checkpoint
from minilm.fast import workers
from minilm.model import Config, Transformer

sys.path.append(str(Path(__file__).resolve().parents[2]))
from common.written import PARAGRAPHS, RUN_FIRST, read  # noqa: E402
from support.command_line import MOST_WORKERS, Parser, relying_on, whole  # noqa: E402
from support.machine import processor  # noqa: E402
from support.run_folder import main_guard, require  # noqa: E402

# Legible on white and on black.
COLOURS = ("#2f7ed8", "#d9792b", "#3f9b5f", "#b65fc0", "#c94f4f", "#8a8a8a")
STYLES = {"": {"text": "#1d1d1f", "faint": "#b4b4b8", "ground": "#ffffff"},
          "-dark": {"text": "#e6e6e8", "faint": "#5c5c62", "ground": "#16171a"}}


@dataclasses.dataclass
class Conclusion:
    """comparisons, conditions, findings: as above; words: what was measured, in one or two sentences;
    numbers: {name: spread(...)}; table: the header and the rows, lists of strings; legend: the words of the table;
    details: a second table."""

    comparisons: list[Comparison]
    words: str
    numbers: dict
    table: list[list[str]]
    conditions: list[Comparison] = ()
    findings: list[Comparison] = ()
    at_least: int | None = None
    legend: str = ""
    details: list[list[str]] = ()

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        return outcome(self.comparisons, self.conditions, self.at_least)

    def summary(self) -> dict:
        """Plain values for JSON."""
        rules = {"comparisons": self.comparisons, "conditions": self.conditions, "findings": self.findings}
        return {"outcome": self.outcome, "words": self.words, "numbers": self.numbers, "table": self.table,
                "at_least": self.at_least, "legend": self.legend, "details": list(self.details),
                **{name: [c.summary() for c in comparisons] for name, comparisons in rules.items()}}


# Numbers over the seeds.

def spread(values: Iterable[float]) -> dict:
    """What to keep of one number per seed."""
    values = [float(v) for v in values]
    return {"mean": float(np.mean(values)), "least": min(values), "greatest": max(values), "by_seed": values}


def mean_range(values: Sequence[float], digits: int = 2) -> str:
    """0.97 [0.95, 0.99]: the mean over the seeds, the least and the greatest."""
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def mean(values: Sequence[float], digits: int = 2) -> str:
    """0.97: the mean over the seeds, for words."""
    return f"{np.mean(values):.{digits}f}"


# Drawing.

def curve(axis, x: Sequence[float], by_seed: Sequence, label: str, colour: str, marker: str = "o",
          **style) -> None:
    """One faint line per seed, fainter if they are many, and their mean: by_seed (seeds, len(x))."""
    for y in by_seed:
        axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.35 * min(1, 12 / len(by_seed)))
    axis.plot(x, np.mean(by_seed, axis=0), color=colour, marker=marker, markersize=4, linewidth=1.8,
              label=label, **style)


def level(axis, y: float, label: str, side: str = "right", below: bool = False) -> None:
    """A dotted line across the axis, and its label: chance, a bound, an optimum.

    side: "left" or "right", above or below the line; "outside", beside the axis, where no curve crosses the label.
    """
    faint = STYLES["-dark" if axis.figure.get_facecolor()[0] < 0.5 else ""]["faint"]
    axis.axhline(y, color=faint, linestyle=":", linewidth=1.2, zorder=0)
    x, shift, ha = {"left": (0, 2, "left"), "right": (1, -2, "right"), "outside": (1, 3, "left")}[side]
    va = "top" if below else "center" if side == "outside" else "bottom"
    axis.annotate(label, (x, y), xycoords=("axes fraction", "data"),
                  xytext=(shift, {"top": -2, "center": 0, "bottom": 2}[va]), textcoords="offset points",
                  ha=ha, va=va, fontsize=8, alpha=0.75, annotation_clip=True)


def fit_axes(figure) -> None:
    """Gives up the limits of every axis that its curves do not lie within; images keep theirs."""
    for axis in figure.axes:
        if axis.images or not axis.lines:
            continue
        limits_of = {"x": axis.get_xlim(), "y": axis.get_ylim()}
        axis.relim()
        data_of = {"x": axis.dataLim.intervalx, "y": axis.dataLim.intervaly}
        for of, limits in limits_of.items():
            low, high = data_of[of]
            if np.isfinite([low, high]).all() and (low < min(limits) or high > max(limits)):
                axis.autoscale(axis=of)


def picture(draw: Callable, suffix: str, size: tuple[float, float] = (7.2, 4.0),
            trial: bool = False) -> bytes:
    """The bytes of a PNG: draw(figure) in that style. A trial says so, and its axes fit its data."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    style = STYLES[suffix]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                            "legend.frameon": False,
                            "figure.facecolor": style["ground"], "axes.facecolor": style["ground"],
                            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color",
                                             "axes.edgecolor"), style["text"])}):
        figure = pyplot.figure(figsize=size, dpi=140, layout="constrained")
        draw(figure)
        if trial:
            fit_axes(figure)
            figure.text(0.5, 0.5, "a trial: hardly trained", fontsize=24, rotation=20, alpha=0.25,
                        ha="center", va="center")
        file = io.BytesIO()
        figure.savefig(file, format="png", facecolor=style["ground"])
        pyplot.close(figure)
    return file.getvalue()


# One experiment.

class Experiment:
    """The first argument of measure: say() for progress, transformer() and trained() for models."""

    def __init__(self, name: str, folder: str | Path, dtype: type | str = np.float32):
        self.name = name
        self.folder = Path(folder)
        self.dtype = np.dtype(dtype)
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{self.name} {time.monotonic() - self.began:4.0f} s  {text}", flush=True)

    def transformer(self, rng: np.random.Generator, **config) -> Transformer:
        """A Transformer of this config with new weights; the draws are the same for every dtype."""
        return Transformer(Config(**config), rng, self.dtype)

    def trained(self, name: str, seed: int, config: dict, train: Callable,
                **recipe) -> tuple[Transformer, object]:
        """(model, history): a Transformer of this config after history = train(model, rng, **recipe).

        Kept in the folder, under a name that changes with the recipe, the source of train, and minilm
        itself; so a model that two experiments use is trained once. Everything else that train depends on
        must be in the recipe. history: plain values that JSON can hold.
        """
        described = [seed, config, recipe, self.dtype.name, inspect.getsource(train), _sources()]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "models" / f"{name}-{seed}-{digest}.safetensors"
        rng = np.random.default_rng([seed, *name.encode()])
        model = self.transformer(rng, **config)
        if path.exists():
            arrays, metadata = checkpoint.load(path)
            checkpoint.load_into(model.parameters(), arrays, path)
            return model, metadata["history"]
        history = train(model, rng, **recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, {name: p.data for name, p in model.parameters().items()}, {"history": history})
        return model, history


def paragraphs(doc: str) -> tuple[str, dict[str, str]]:
    """The title of an experiment's docstring, and its paragraphs by section."""
    title, *rest = doc.strip().split("\n\n")
    found = {}
    for paragraph in rest:
        name, _, text = " ".join(paragraph.split()).partition(". ")
        found[name] = text.strip()
    if tuple(found) != PARAGRAPHS:
        raise ValueError(f"the docstring of an experiment has a title and the paragraphs "
                         f"{', '.join(PARAGRAPHS)}; this one has {list(found)}")
    return " ".join(title.split()), found


def run(file: str, doc: str, measure: Callable, conclude: Callable, draw: Callable, sizes: dict,
        figure_size: tuple[float, float] = (7.2, 4.0)) -> int:
    """The command line of an experiment: the exit status."""
    return main_guard(lambda: _run(Path(file).stem, doc, measure, conclude, draw, sizes, figure_size))


def _arguments(title, sizes):
    parser = Parser(title)
    parser.add_argument("--out", default="runs/lecture", help="folder for the results")
    size = parser.add_mutually_exclusive_group()
    for other in sorted(sizes.keys() - {"default"}):
        size.add_argument(f"--{other}", dest="size", action="store_const", const=other, default="default",
                          help={"quick": "a trial: shows that it runs, decides nothing",
                                "full": "longer, to see more"}[other])
    parser.add_argument("--workers", type=whole(1, MOST_WORKERS), default=min(workers.available_cores(), MOST_WORKERS),
                        help="processes that share the seeds")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32",
                        help="of the models; float64 shows whether an outcome depends on rounding")
    parser.add_argument("--redraw", action="store_true",
                        help="conclude and draw again from the numbers in the folder")
    return parser.parse_args()


def _run(name, doc, measure, conclude, draw, sizes, figure_size):
    title, sections = paragraphs(doc)
    arguments = _arguments(title, sizes)
    require("matplotlib", "safetensors")
    folder = Path(arguments.out)
    path = folder / f"{name}.json"
    if arguments.redraw:
        result = read(path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(sizes[arguments.size])
        seeds = list(range(settings.pop("seeds")))
        experiment = Experiment(name, folder, arguments.dtype)
        result = _measured(experiment, measure, seeds, settings, arguments.workers)
        result["size"] = arguments.size
    with relying_on(path, RUN_FIRST) if arguments.redraw else contextlib.nullcontext():
        settings = result["settings"]
        trial = result["size"] == "quick"
        result |= {"title": title, **sections, **conclude(result["by_seed"], settings).summary()}
        if trial:
            result["outcome"] = TRIAL
        for suffix in STYLES:
            drawn = picture(lambda figure: draw(figure, result["by_seed"], settings), suffix, figure_size, trial)
            checkpoint.write_bytes(folder / f"{name}{suffix}.png", drawn)
        text = f"{tables(result)}\n\n{report(result)}"
    # Last, because this file marks the experiment as done.
    checkpoint.write_text(path, json.dumps(result, indent=1, default=_plain, allow_nan=False) + "\n")
    print(f"\n{text}\n{path}, {name}.png")


def _measured(experiment, measure, seeds, settings, processes):
    """What measure returned for every seed, and under which circumstances."""
    def one(seed):
        numbers = measure(experiment, seed, **settings)
        experiment.say(f"seed {seed} done")
        return json.dumps(numbers, default=_plain, allow_nan=False)

    measured = [json.loads(text) for text in workers.parallel_map(one, seeds, processes)]
    return {"experiment": experiment.name, "settings": settings, "seeds": seeds,
            "seconds": round(time.monotonic() - experiment.began, 1), "workers": processes,
            "dtype": experiment.dtype.name, "date": datetime.date.today().isoformat(), "machine": _machine(),
            "by_seed": measured}


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value: {value!r}")


def _sources():
    digest = hashlib.sha256()
    for path in sorted(Path(minilm.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _machine():
    return (f"{workers.available_cores()} cores, {processor()}, Python {platform.python_version()}, "
            f"NumPy {np.__version__}")
