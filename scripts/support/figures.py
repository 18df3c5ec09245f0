"""The two figures of assistant.py.

    python scripts/support/figures.py runs/assistant       draws and prints the results of a finished run again
    python scripts/support/figures.py runs/a runs/b ...    the table of several seeds, in Markdown
"""

import io
import sys
from pathlib import Path

import numpy as np

from minilm import checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support.command_line import Parser, relying_on  # noqa: E402
from support.results import ADVICE, read_results  # noqa: E402
from support.run_folder import main_guard, require  # noqa: E402
from support.tables import NAMES, TEMPERATURE, across_seeds, summary  # noqa: E402

SMOOTHING = 8             # steps averaged over in the figure of drift
MARKED = 20               # curves of at most so many steps get a mark at each step
LABEL_SIZE = np.array([44, 15])     # pixels of "β=0.3", with a margin
COLOURS = {"rlhf": "#0b5fa5", "dpo": "#c4570c", "best_of_n": "#2c7a3f", "sft": "black", "proxy": "#8a8a8a",
           "sft_lower_temperature": "#8a8a8a"}
LABELS = {"sft": "SFT model", "sft_lower_temperature": f"SFT model, {TEMPERATURE}",
          "best_of_n": "best of {} (bound)"}
# Legends stand under the axes, because the curves differ from seed to seed.
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 5, "fontsize": 8, "columnspacing": 1.2}
KL_LABEL = "KL to the SFT model (nats per response"


def smoothed(values: list[float], width: int) -> np.ndarray:
    """Mean over the last `width` values (fewer at the start)."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(total))
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)


def turning_point(steps: list[dict]) -> dict:
    """The step of an RLHF run at which the smoothed gold reward is highest, from the metrics of its steps.

    turned_down: whether the last gold reward is lower by more than two standard errors of the difference.
    """
    gold = smoothed([m["gold_reward"] for m in steps], SMOOTHING)
    kl = smoothed([m["kl_sequence"] for m in steps], SMOOTHING)
    error = np.sqrt(smoothed([m["gold_reward_se"] ** 2 for m in steps], SMOOTHING) / SMOOTHING)
    peak = int(np.argmax(gold))
    return {"step": steps[peak]["step"], "kl_sequence": float(kl[peak]), "gold_reward": float(gold[peak]),
            "last_kl_sequence": float(kl[-1]), "last_gold_reward": float(gold[-1]),
            "turned_down": bool(gold[peak] - gold[-1] > 2 * np.hypot(error[peak], error[-1]))}


def training_curves(results: dict, path: Path) -> None:
    """One panel for each stage: the loss, accuracy, reward or KL at each step."""
    plt = pyplot()
    beta = results["main_beta"]
    rlhf = f"rlhf-beta-{beta}"
    panels = (("base", "pretraining: cross-entropy", "loss", "nats per token"),
              ("sft", "SFT: cross-entropy", "loss", "nats per response token"),
              ("reward_model", "reward model: accuracy", "accuracy", "accuracy (dotted: chance)"),
              (rlhf, f"RLHF, β = {beta}: proxy reward", "reward", "proxy reward"),
              (rlhf, f"RLHF, β = {beta}: KL to the SFT model", "kl_sequence", "nats per response"),
              (f"dpo-beta-{beta}", f"DPO, β = {beta}: loss", "loss", "loss (log 2 at the start)"))
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    for axis, (name, title, metric, label) in zip(axes.flat, panels):
        steps = [m["step"] for m in results["history"][name]]
        values = [m[metric] for m in results["history"][name]]
        curve(axis, steps, values)
        axis.set(title=title, xlabel="step", ylabel=label)
        widen(axis, "y", values)
        if metric == "accuracy":
            axis.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
    _mark_trial(figure, results)
    save(figure, path)
    plt.close(figure)


def curve(axis, steps, values):
    """Each step, and over it a running mean where there are enough steps for one."""
    if len(steps) <= MARKED:
        axis.plot(steps, values, color=COLOURS["rlhf"], linewidth=1.2, marker="o", markersize=3.5)
        axis.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    else:
        axis.plot(steps, values, color="#b9c7d6", linewidth=0.7)
        axis.plot(steps, smoothed(values, min(20, len(values) // 10)), color=COLOURS["rlhf"], linewidth=1.6)
    axis.xaxis.get_major_locator().set_params(integer=True)


def widen(axis, name, values):
    """Limits for an axis whose values hardly differ, in a trial run: rounding errors do not fill the axis."""
    if np.ptp(values) < 1e-4:
        axis.set(**{f"{name}lim": (np.mean(values) - 0.05, np.mean(values) + 0.05)})


def reward_against_kl(results: dict, path: Path) -> None:
    """Left: the end of each run, by beta. Right: one run without a KL penalty, and where its gold reward turns down."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    _frontier(left, results)
    _drift(right, results)
    _mark_trial(figure, results)
    figure.draw_without_rendering()         # the layout is final: distances in pixels are known
    _label_betas(left, results)
    save(figure, path)
    plt.close(figure)


def _frontier(axis, results):
    for method, rows in results["frontier"].items():
        rows = sorted(rows, key=lambda row: row["kl_sequence"])
        penalised = [row for row in rows if row["beta"] > 0]
        free = [row for row in rows if row["beta"] == 0]
        # Dashed to the run without a penalty, because no beta was tried between.
        for part, style, label in ((penalised, "-", NAMES[method]), (penalised[-1:] * bool(free) + free, "--", None)):
            axis.errorbar([row["kl_sequence"] for row in part], [row["gold_reward"] for row in part],
                          xerr=[2 * row["kl_sequence_se"] for row in part],
                          yerr=[2 * row["gold_reward_se"] for row in part],
                          color=COLOURS[method], marker="o", markersize=4, linewidth=1.2, capsize=2, linestyle=style,
                          label=label)
    for row in results["rows"]:
        if row["stage"] in LABELS:
            axis.errorbar(row["kl_sequence"], row["gold_reward"], yerr=2 * row["gold_reward_se"],
                          color=COLOURS[row["stage"]], marker="s", markersize=5, capsize=2, linestyle="none",
                          clip_on=False, label=LABELS[row["stage"]].format(row.get("n")))
    axis.set(title="Held-out questions: gold reward and distance", ylabel="gold reward (± 2 standard errors)",
             xlabel=f"{KL_LABEL}; square-root axis)")
    # Square root, as in Gao et al. 2022, arXiv:2210.10760, because the interesting part is near 0.
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_xticks([tick for tick in (0, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= 1.3 * axis.dataLim.x1])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlim(left=0)
    axis.legend(**BELOW)


def _label_betas(axis, results):
    """A label at each point, on the nearest of three rings of places that has a free one.

    Distances are in label sizes, the larger of the horizontal and the vertical one.
    """
    policies = [(row, method) for method, rows in results["frontier"].items() for row in rows]
    curves = _pixels_of_curves(axis, results)
    labels = []
    to_data = axis.transData.inverted().transform
    frame = axis.get_window_extent().padded(-LABEL_SIZE[0] / 2, -LABEL_SIZE[1] / 2)
    for (row, method), point in zip(policies, axis.transData.transform([_position(row) for row, _ in policies])):
        places = [point + ring * np.array([x, y]) * LABEL_SIZE for ring in (0.95, 1.7, 2.6)
                  for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)]
        inside = [place for place in places if frame.contains(*place)]
        free = [place for place in inside if _distance(place, curves) > 0.6 and _distance(place, labels) > 1]
        place = free[0] if free else max(inside or places, key=lambda p: _distance(p, [*curves, *labels]))
        labels.append(place)
        far = np.hypot(*(place - point)) > 1.5 * LABEL_SIZE[0]
        axis.annotate(f"β={row['beta']:g}", _position(row), xytext=to_data(place), textcoords="data", ha="center",
                      va="center", fontsize=7.5, color=COLOURS[method],
                      arrowprops={"arrowstyle": "-", "color": COLOURS[method], "linewidth": 0.4} if far else None)


def _position(row):
    return row["kl_sequence"], row["gold_reward"]


def _distance(place, points):
    """From a label to the nearest of the points, in label sizes."""
    return min((np.abs((place - point) / LABEL_SIZE).max() for point in points), default=np.inf)


def _pixels_of_curves(axis, results):
    """Points along the lines and the error bars of the left panel, in pixels."""
    segments = []
    for rows in results["frontier"].values():
        positions = [_position(row) for row in sorted(rows, key=lambda row: row["kl_sequence"])]
        segments += zip(positions, positions[1:])
    for row in [*results["rows"], *results["frontier"]["rlhf"], *results["frontier"]["dpo"]]:
        if row["stage"] != "base":
            kl, gold = _position(row)
            segments += [((kl, gold - 2 * row["gold_reward_se"]), (kl, gold + 2 * row["gold_reward_se"])),
                         ((kl - 2 * row["kl_sequence_se"], gold), (kl + 2 * row["kl_sequence_se"], gold))]
    ends = axis.transData.transform(np.reshape(segments, (-1, 2))).reshape(-1, 2, 2)
    return [start + (stop - start) * t for start, stop in ends for t in np.linspace(0, 1, 20)]


def _drift(axis, results):
    beta = min(row["beta"] for row in results["frontier"]["rlhf"])
    steps = results["history"][f"rlhf-beta-{beta}"]
    kl = smoothed([m["kl_sequence"] for m in steps], SMOOTHING)
    proxy = smoothed([m["reward"] for m in steps], SMOOTHING)
    gold = smoothed([m["gold_reward"] for m in steps], SMOOTHING)
    marker = {"marker": "o", "markersize": 3.5} if len(steps) <= MARKED else {}
    axis.plot(kl, proxy - proxy[0], color=COLOURS["proxy"], label="proxy reward (maximised)", **marker)
    axis.plot(kl, gold - gold[0], color=COLOURS["rlhf"], label="gold reward (intended)", **marker)
    axis.legend(**BELOW)
    widen(axis, "x", kl)
    point = results["turning_point"]
    peak = point["step"] - steps[0]["step"]
    on_the_right = kl[peak] > (kl.min() + kl.max()) / 2
    axis.axvline(kl[peak], color=COLOURS["rlhf"], linestyle=":", linewidth=1)
    axis.annotate("gold reward is highest here", (kl[peak], 0.03), xycoords=("data", "axes fraction"),
                  xytext=(-5 if on_the_right else 5, 0), textcoords="offset points",
                  ha="right" if on_the_right else "left", fontsize=8, color=COLOURS["rlhf"])
    axis.set(title=f"RLHF with β = {beta:g}: samples during training, smoothed", ylabel="change since the first steps",
             xlabel=f"{KL_LABEL})")


def _mark_trial(figure, results):
    if results["trial"]:
        figure.suptitle("A trial run: the models have not learned the tasks", color="#8a8a8a", fontsize=10)


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                            "legend.frameon": False, "figure.dpi": 130})
    return pyplot


def save(figure, path: Path | str, **options) -> None:
    """Writes a figure of matplotlib as PNG, completely or not at all: the figure that was there before stays if the
    disk is full. Raises CheckpointError."""
    file = io.BytesIO()
    figure.savefig(file, format="png", **options)
    checkpoint.write_bytes(path, file.getvalue())


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="of a finished run of scripts/assistant.py")
    folders = [Path(folder) for folder in parser.parse_args(arguments).folders]
    runs = {folder / "results.json": read_results(folder / "results.json") for folder in folders}
    if len(folders) > 1:
        print(across_seeds(list(runs.values())))
        return
    require("matplotlib")
    for path, run in runs.items():
        with relying_on(path, ADVICE):
            text = summary(run)
            training_curves(run, path.parent / "training_curves.png")
            reward_against_kl(run, path.parent / "reward_against_kl.png")
        print(text)


if __name__ == "__main__":
    sys.exit(main_guard(main))
