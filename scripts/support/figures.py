"""What the main job shows: progress while it runs, its table, its two figures.

    python scripts/support/figures.py runs/assistant       draws and prints those of a finished run again
    python scripts/support/figures.py runs/a runs/b ...    the table of several seeds, in Markdown
"""

import contextlib
import json
import pathlib
import shutil
import sys
import time

import numpy as np

from support.run_folder import UsageError, main_guard

NAMES = {"base": "base", "instructed": "instructed", "best_of_n": "best of n", "rlhf": "RLHF", "dpo": "DPO"}
COLUMNS = {"task_accuracy": "task accuracy", "gold_reward": "gold reward", "learned_reward": "learned reward",
           "win_rate": "win rate", "kl_sequence": "KL (nats)"}
WIDTH = 8             # steps averaged over in the figure of drift
# Legends go under the axes: where the curves run differs from seed to seed.
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 4, "fontsize": 8, "columnspacing": 1.2}
COLOURS = {"rlhf": "#0b5fa5", "dpo": "#c4570c", "best_of_n": "#2c7a3f", "learned": "#8a8a8a"}


@contextlib.contextmanager
def progress(title, steps, done):
    """A bar with the time left in a terminal, a plain line every tenth of the way otherwise.

    Yields advance(metrics), to be called after each step.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm
        # Not as tqdm finds them: where a terminal claims to have no columns and rows, it shows nothing.
        columns, rows = shutil.get_terminal_size()
        with tqdm(total=steps, initial=done, desc=f"{title:>16}", unit="step", ncols=columns, nrows=rows) as bar:
            def advance(metrics):
                bar.set_postfix_str(_brief(metrics), refresh=False)
                bar.update()
            yield advance
        return

    began, first = time.monotonic(), done

    def advance(metrics):
        nonlocal done
        done += 1
        if done == steps or done % max(1, steps // 10) == 0:
            elapsed = time.monotonic() - began
            left = elapsed / (done - first) * (steps - done)
            print(f"{title}: step {done}/{steps}, {elapsed:.0f} s, {left:.0f} s left, {_brief(metrics)}", flush=True)
    yield advance


def _brief(metrics):
    kept = ("loss", "accuracy", "reward", "kl_sequence", "rewards/accuracies")
    return ", ".join(f"{name} {metrics[name]:.3g}" for name in kept if name in metrics)


def summary(results):
    """The table and the same questions answered by each stage, as text."""
    lines = ["", f"{'':<12}" + "".join(f"{title:>20}" for title in COLUMNS.values())]
    for row in results["rows"]:
        cells = "".join(f"{'≤ ' if row.get('kl_is_upper_bound') and c == 'kl_sequence' else ''}{row[c]:.3f}".rjust(11)
                        + f" ± {row[c + '_se']:<6.3f}" for c in COLUMNS)
        lines.append(f"{NAMES[row['stage']]:<12}{cells}")
    lines += ["", f"One sampled answer (temperature 1) to each of {results['held_out_questions']} questions "
              f"({results['distinct_questions']} different ones) that no stage was trained to answer; ± is a standard error.",
              "Learned reward, win rate and KL are against the instructed model.",
              f"Reward model: ranks {results['reward_model_accuracy']:.3f} ± {results['reward_model_accuracy_se']:.3f} of pairs "
              "as the gold reward does.",
              f"Base, given the same questions as statements to complete (\"The last word of cat sun is\"): accuracy "
              f"{results['base_completion_accuracy']:.3f} ± {results['base_completion_accuracy_se']:.3f}.", ""]
    for example in results["examples"]:
        lines.append(f"{example['question']}    (right: {example['answer']})")
        lines += [f"    {NAMES[stage]:<12}{example[stage]}" for stage in NAMES if stage in example]
    total = sum(results["seconds"].values())
    lines += ["", f"{results['parameters']:,} parameters, seed {results['seed']}, {results['workers']} workers, "
              f"{total:.0f} s: " + ", ".join(f"{name} {s:.0f}" for name, s in results["seconds"].items())]
    return "\n".join(lines)


def across_seeds(runs):
    """A Markdown table of several results: the mean over the seeds, and in brackets the least and the greatest."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for stage, name in NAMES.items():
        rows = [next(row for row in run["rows"] if row["stage"] == stage) for run in runs]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows]
            bound = "≤ " if rows[0].get("kl_is_upper_bound") and column == "kl_sequence" else ""
            cells.append(f"{bound}{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    completed = [run["base_completion_accuracy"] for run in runs]
    seconds = [sum(run["seconds"].values()) for run in runs]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines += ["", f"Seeds {seeds}: mean [least, greatest]. Base, given statements to complete: accuracy "
              f"{np.mean(completed):.2f} [{min(completed):.2f}, {max(completed):.2f}]. {runs[0]['parameters']:,} parameters, "
              f"{runs[0]['workers']} workers, {min(seconds):.0f} to {max(seconds):.0f} s a run."]
    for stage, other, column in (("instructed", "base", "task_accuracy"), ("instructed", "base", "gold_reward"),
                                 ("rlhf", "instructed", "gold_reward"), ("rlhf", "instructed", "win_rate"),
                                 ("dpo", "instructed", "gold_reward"), ("dpo", "instructed", "win_rate")):
        gaps = []
        for run in runs:
            rows = {row["stage"]: row for row in run["rows"]}
            error = np.hypot(rows[stage][column + "_se"], rows[other][column + "_se"])
            gaps.append((rows[stage][column] - rows[other][column]) / max(error, 1e-9))
        lines.append(f"{NAMES[stage]} above {NAMES[other]} in {COLUMNS[column]}, in standard errors, by seed: "
                     + ", ".join(f"{gap:.1f}" for gap in gaps) + ".")
    points = [run["turning_point"] for run in runs]
    lines.append("Without a penalty the gold reward turns down at a KL of "
                 + ", ".join(f"{p['kl_sequence']:.1f}" if p["turned_down"] else "(it does not)" for p in points)
                 + " nats, by seed, and falls from " + ", ".join(f"{p['gold_reward']:.2f} to {p['last_gold_reward']:.2f}"
                                                                 for p in points) + ".")
    return "\n".join(lines)


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                            "legend.frameon": False, "figure.dpi": 130})
    return pyplot


def _save(figure, path):
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"{path}: not drawn: {error.strerror}. Make room on that disk, then try again.") from error


def _smooth(values, width):
    """Mean over the last `width` values (fewer at the start)."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(total))
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)


def turning_point(steps):
    """Where the gold reward of an RLHF run, smoothed, is highest, from the metrics of its steps.

    turned_down: whether it ends lower than that by more than two standard errors of the difference.
    """
    gold, kl = (_smooth([m[name] for m in steps], WIDTH) for name in ("gold_reward", "kl_sequence"))
    error = np.sqrt(_smooth([m["gold_reward_se"] ** 2 for m in steps], WIDTH) / WIDTH)
    peak = int(np.argmax(gold))
    return {"step": steps[peak]["step"], "kl_sequence": float(kl[peak]), "gold_reward": float(gold[peak]),
            "last_kl_sequence": float(kl[-1]), "last_gold_reward": float(gold[-1]),
            "turned_down": bool(gold[peak] - gold[-1] > 2 * np.hypot(error[peak], error[-1]))}


def training_curves(results, path):
    """One panel a stage: what it minimises or maximises, against its steps."""
    plt = _pyplot()
    history, beta = results["history"], results["main_beta"]
    panels = (("base", "pretraining", "loss", "cross-entropy (nats per token)", 20),
              ("instructed", "instruction tuning", "loss", "cross-entropy (nats per response token)", 20),
              ("reward_model", "reward model", "accuracy", "share of its comparisons predicted", 10),
              (f"rlhf-beta-{beta}", f"RLHF, beta = {beta}", "reward", "learned reward", 5),
              (f"rlhf-beta-{beta}", f"RLHF, beta = {beta}", "kl_sequence", "KL to the instructed model (nats)", 5),
              (f"dpo-beta-{beta}", f"DPO, beta = {beta}", "loss", "DPO loss (starts at log 2)", 10))
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    for axis, (name, title, metric, label, width) in zip(axes.flat, panels):
        steps = [m["step"] for m in history[name]]
        values = [m[metric] for m in history[name]]
        axis.plot(steps, values, color="#b9c7d6", linewidth=0.7)
        axis.plot(steps, _smooth(values, width), color=COLOURS["rlhf"], linewidth=1.6)
        axis.set(title=title, xlabel="step", ylabel=label)
        if metric == "accuracy":
            axis.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
    _save(figure, path)
    plt.close(figure)


def reward_against_kl(results, path):
    """Left: where each beta ends up. Right: one run without a penalty, and where its gold reward turns down."""
    plt = _pyplot()
    figure, (frontier, drift) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for method, rows in results["frontier"].items():
        rows = sorted(rows, key=lambda row: row["kl_sequence"])
        kl, gold = [r["kl_sequence"] for r in rows], [r["gold_reward"] for r in rows]
        bars = {"xerr": [2 * r["kl_sequence_se"] for r in rows], "yerr": [2 * r["gold_reward_se"] for r in rows]}
        frontier.errorbar(kl, gold, **bars, color=COLOURS[method], marker="o", markersize=4, linewidth=1.2, capsize=2,
                          label=NAMES[method])
        side, offset = ("right", (-5, 5)) if method == "rlhf" else ("left", (4, -12))
        for row, *point in zip(rows, kl, gold):
            frontier.annotate(f"β={row['beta']:g}", point, xytext=offset, ha=side, textcoords="offset points",
                              fontsize=7.5, color=COLOURS[method])
    for row in results["rows"]:
        if row["stage"] in ("instructed", "best_of_n"):
            colour = COLOURS.get(row["stage"], "black")
            label = f"best of {row['n']} (KL: upper bound)" if "n" in row else "instructed"
            frontier.errorbar(row["kl_sequence"], row["gold_reward"], yerr=2 * row["gold_reward_se"], color=colour,
                              marker="s", markersize=5, capsize=2, linestyle="none", clip_on=False,
                              label=label)
    frontier.set(title="Held-out questions: gold reward and distance", ylabel="gold reward (± 2 standard errors)",
                 xlabel="KL to the instructed model (nats per response)")
    # Over the square root, as in Gao et al. 2022, arXiv:2210.10760: the interesting part is near 0.
    frontier.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    frontier.set_xticks([tick for tick in (0, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= 1.3 * frontier.dataLim.x1])
    frontier.xaxis.set_major_formatter("{x:g}")
    frontier.set_xlim(left=0)
    frontier.legend(**BELOW)

    beta = min(row["beta"] for row in results["frontier"]["rlhf"])
    steps = results["history"][f"rlhf-beta-{beta}"]
    kl, gold, learned = (_smooth([m[name] for m in steps], WIDTH) for name in ("kl_sequence", "gold_reward", "reward"))
    drift.plot(kl, learned - learned[0], color=COLOURS["learned"], label="learned reward: what is maximised")
    drift.plot(kl, gold - gold[0], color=COLOURS["rlhf"], label="gold reward: what was meant")
    drift.legend(**BELOW)
    point = results["turning_point"]
    peak, turned = point["step"] - steps[0]["step"], point["turned_down"]
    drift.axvline(kl[peak], color=COLOURS["rlhf"], linestyle=":", linewidth=1)
    drift.annotate("gold turns down here" if turned else "gold at its highest", (kl[peak], 0.03),
                   xycoords=("data", "axes fraction"), xytext=(5, 0), textcoords="offset points", fontsize=8,
                   color=COLOURS["rlhf"])
    drift.set(title=f"One RLHF run with β = {beta:g}, step by step", ylabel="change since the first steps",
              xlabel="KL to the instructed model (nats per response)")
    _save(figure, path)
    plt.close(figure)


def main(folders):
    runs = [json.loads((pathlib.Path(folder) / "results.json").read_text()) for folder in folders]
    if len(runs) > 1:
        print(across_seeds(runs))
        return
    training_curves(runs[0], pathlib.Path(folders[0]) / "training_curves.png")
    reward_against_kl(runs[0], pathlib.Path(folders[0]) / "reward_against_kl.png")
    print(summary(runs[0]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python scripts/support/figures.py FOLDER ... (of finished runs of assistant.py)")
    sys.exit(main_guard(lambda: main(sys.argv[1:])))
