"""What the experiments of this folder share: a command line, seeds, models that several need, and what is left behind.

A row is one claim of the lecture and one file, which says what is done with one seed, what follows from all of
them, and how it looks:

    def measure(row, seed, steps):            plain numbers, by name; every seed in a process of its own
    def conclude(seeds, size):                a Conclusion, from a list of what measure returned
    def draw(figure, seeds, size):            on a matplotlib Figure
    SIZES = {"quick": {"seeds": 3, "steps": 10}, "default": {"seeds": 4, "steps": 400}}

    if __name__ == "__main__":
        sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))

It leaves ROW.json, ROW.png and ROW-dark.png in the folder --out, each written whole or not at all.
Import this module before NumPy: it holds BLAS to one thread, for the seeds are what runs in parallel.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import dataclasses
import datetime
import hashlib
import inspect
import io
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np

import minilm
from minilm import checkpoint
from minilm.fast import workers
from minilm.model import Config, Transformer

sys.path.append(str(Path(__file__).resolve().parents[2]))
from support.run_folder import UsageError, main_guard, require  # noqa: E402

OUTCOMES = ("holds", "does not hold", "cannot be shown here")
SECTIONS = ("Claim", "Test", "Refuted", "Limits", "Source")
COLOURS = ("#2f7ed8", "#d9792b", "#3f9b5f", "#b65fc0", "#c94f4f", "#8a8a8a")     # legible on white and on black
STYLES = {"": {"text": "#1d1d1f", "faint": "#b4b4b8", "ground": "#ffffff"},
          "-dark": {"text": "#e6e6e8", "faint": "#5c5c62", "ground": "#16171a"}}


@dataclasses.dataclass
class Conclusion:
    """outcome: one of OUTCOMES; sentence: what came out, in figures; numbers: {name: spread(...)};
    table: the header and the rows, lists of strings."""

    outcome: str
    sentence: str
    numbers: dict
    table: list

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome is {self.outcome!r}; it must be one of {OUTCOMES}")


# Figures that say how sure they are.

def spread(values):
    """What to keep of one number a seed."""
    values = [float(v) for v in values]
    return {"mean": float(np.mean(values)), "least": min(values), "greatest": max(values), "by_seed": values}


def shown(values, digits=2):
    """0.97 [0.95, 0.99]: the mean over the seeds, the least and the greatest."""
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def verdict(holds):
    """The outcome of a row that can be tested here."""
    return OUTCOMES[0] if holds else OUTCOMES[1]


# Drawing.

def curve(axis, x, by_seed, label, colour, marker="o", **style):
    """One line a seed, faint, and their mean: by_seed (seeds, len(x))."""
    for y in by_seed:
        axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
    axis.plot(x, np.mean(by_seed, axis=0), color=colour, marker=marker, markersize=4, linewidth=1.8, label=label,
              **style)


def level(axis, y, label, side="right", below=False):
    """A dotted line across the axis, with its label above or below it at one side: chance, a bound, a floor."""
    faint = STYLES["-dark" if axis.figure.get_facecolor()[0] < 0.5 else ""]["faint"]
    axis.axhline(y, color=faint, linestyle=":", linewidth=1.2, zorder=0)
    axis.annotate(label, (float(side == "right"), y), xycoords=("axes fraction", "data"), fontsize=8, alpha=0.75,
                  annotation_clip=True,
                  xytext=(-2 if side == "right" else 2, -2 if below else 2), textcoords="offset points", ha=side,
                  va="top" if below else "bottom")


def picture(draw, suffix, size=(7.2, 4.0)):
    """draw(figure) on a Figure of that style: the bytes of a PNG."""
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
        file = io.BytesIO()
        figure.savefig(file, format="png", facecolor=style["ground"])
        pyplot.close(figure)
    return file.getvalue()


# One row.

class Row:
    """What measure is given: say() for progress, trained() for models that other rows want too."""

    def __init__(self, name, folder):
        self.name, self.folder, self.began = name, Path(folder), time.monotonic()

    def say(self, text):
        print(f"{self.name} {time.monotonic() - self.began:4.0f} s  {text}", flush=True)

    def trained(self, name, seed, config, train, **recipe):
        """(model, history): a Transformer of this config after history = train(model, rng, **recipe).

        Kept in the folder, under a name that changes with the recipe, the source of train, and minilm itself; so a
        model that two rows want is trained once. What else train depends on must be in the recipe. history: plain
        values that JSON can hold.
        """
        key = json.dumps([seed, config, recipe, inspect.getsource(train), _sources()], sort_keys=True)
        path = self.folder / "models" / f"{name}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        rng = np.random.default_rng([seed, *name.encode()])
        model = Transformer(Config(**config), rng)
        if path.exists():
            arrays, metadata = checkpoint.load(path)
            checkpoint.load_into(model.parameters(), arrays, path)
            return model, metadata["history"]
        history = train(model, rng, **recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, {name: p.data for name, p in model.parameters().items()}, {"history": history})
        return model, history


def paragraphs(doc):
    """The title of a row's docstring, and its paragraphs by section."""
    title, *rest = doc.strip().split("\n\n")
    found = {}
    for paragraph in rest:
        name, _, text = " ".join(paragraph.split()).partition(". ")
        found[name] = text.strip()
    if tuple(found) != SECTIONS:
        raise ValueError(f"the docstring of a row has a title and the paragraphs {', '.join(SECTIONS)}; "
                         f"this one has {list(found)}")
    return " ".join(title.split()), found


def run(file, doc, measure, conclude, draw, sizes, figure_size=(7.2, 4.0)):
    """The command line of a row: the exit status."""
    return main_guard(lambda: _run(Path(file).stem, doc, measure, conclude, draw, sizes, figure_size))


def _run(name, doc, measure, conclude, draw, sizes, figure_size):
    title, sections = paragraphs(doc)
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--out", default="runs/lecture", help="folder for the results")
    size = parser.add_mutually_exclusive_group()
    for other in sorted(sizes.keys() - {"default"}):
        size.add_argument(f"--{other}", dest="size", action="store_const", const=other, default="default",
                          help={"quick": "see that it works; proves nothing", "full": "longer, to see more"}[other])
    parser.add_argument("--workers", type=int, default=workers.available_cores(), help="processes that share the seeds")
    parser.add_argument("--redraw", action="store_true", help="conclude and draw again from the numbers in the folder")
    arguments = parser.parse_args()
    require("matplotlib", "safetensors")
    folder, settings = Path(arguments.out), dict(sizes[arguments.size])
    seeds = list(range(settings.pop("seeds")))
    path = folder / f"{name}.json"
    if arguments.redraw:
        result = read(path)
        settings, seeds = result["settings"], result["seeds"]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        row = Row(name, folder)

        def one(seed):
            numbers = measure(row, seed, **settings)
            row.say(f"seed {seed} done")
            return json.dumps(numbers, default=_plain, allow_nan=False)

        measured = [json.loads(text) for text in workers.parallel_map(one, seeds, arguments.workers)]
        result = {"row": name, "size": arguments.size, "settings": settings, "seeds": seeds,
                  "seconds": round(time.monotonic() - row.began, 1), "workers": arguments.workers,
                  "date": datetime.date.today().isoformat(), "machine": _machine(), "by_seed": measured}
    conclusion = conclude(result["by_seed"], settings)
    result |= {"title": title, **sections, **dataclasses.asdict(conclusion)}
    for suffix in STYLES:
        drawn = picture(lambda figure: draw(figure, result["by_seed"], settings), suffix, figure_size)
        _write(folder / f"{name}{suffix}.png", drawn)
    # Last, for with it the row is done.
    checkpoint.write_text(path, json.dumps(result, indent=1, default=_plain, allow_nan=False) + "\n")
    print(f"\n{as_text(conclusion.table)}\n\n{name}: {conclusion.outcome}. {conclusion.sentence}\n"
          f"{len(seeds)} seeds, {result['seconds']:.0f} s; {path}, {name}.png")


def read(path):
    """What a row left behind. Raises UsageError if there is no such thing."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no results of a row ({error}); run it first, without --redraw") from error


def as_text(table):
    """A table in columns."""
    widths = [max(len(str(line[i])) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def _write(path, data):
    """Bytes to a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{checkpoint.TEMPORARY_SUFFIX}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


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
    model = platform.processor() or platform.machine()
    try:
        model = next(line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{workers.available_cores()} cores, {model}, Python {platform.python_version()}, NumPy {np.__version__}"
