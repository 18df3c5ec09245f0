"""The page and the figure of two_preferences.py, from the results.json of its runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lecture.common.intervals import confidence_interval
from support.figures import pyplot, save
from support.json_files import read_shaped
from support.run_folder import UsageError

COLOURS = {"dpo": "#c4570c", "rlhf": "#0b5fa5"}
MARKS = ("o", "s", "^", "D", "v")
SHOWN = 2               # questions, with their answers, of each seed
NUMBERS = ("win_rate", "tokens", "ended", "kl", "perplexity_elsewhere")
SHAPE = {"before": dict.fromkeys(NUMBERS, float), "after": dict.fromkeys(NUMBERS, float), "seconds": float,
         "held_out": int, "steps": int, "machine": str,
         "examples": [{name: str for name in ("prompt", "before", "after")}]}
ADVICE = "Run scripts/two_preferences.py without --print first."
COLUMNS = ("preference", "method", "steps", "win rate", "gain [95% interval]", "tokens", "ended", "KL, nats",
           "perplexity elsewhere", "minutes")


def page(paths: dict, rules: dict[str, str], seeds: Sequence[int], picture: Path) -> str:
    """The generated part of two_preferences.md, from {(rule, method): its results.json by seed}; draws the figure.

    Raises UsageError for a file that is not there or damaged.
    """
    if not seeds:
        raise UsageError(f"{picture.parent} holds no run of a seed. {ADVICE}")
    found = {key: [read_shaped(path, SHAPE, ADVICE) for path in some] for key, some in paths.items()}
    figure(found, rules, picture)
    runs = [run for some in found.values() for run in some]
    return "\n".join([
        f"{'; '.join(sorted({run['machine'] for run in runs}))}. {len(seeds)} seeds, {runs[0]['held_out']} held-out "
        f"questions; {len(runs)} runs, {sum(run['seconds'] for run in runs) / 60:.0f} minutes in all.\n",
        table(found, rules),
        f"\n## Answers\n\nThe first {SHOWN} held-out questions, at temperature 1; the answers before and after have "
        "the same random numbers.\n",
        answers(found, rules, seeds)])


def of(runs: list[dict], when: str, name: str) -> np.ndarray:
    """A number of each seed: (S,)."""
    return np.array([run[when][name] for run in runs], float)


def table(found: dict, rules: dict[str, str]) -> str:
    """A row for each preference and method: means over the seeds, before → after."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for (rule, method), runs in found.items():
        gain = of(runs, "after", "win_rate") - of(runs, "before", "win_rate")
        low, high = confidence_interval(gain.tolist())
        interval = f"[{low:+.2f}, {high:+.2f}]" if np.isfinite(high - low) else "no interval"
        steps = "/".join(map(str, sorted({run["steps"] for run in runs})))
        rate, tokens, ended, elsewhere = (
            " → ".join(f"{of(runs, when, name).mean():.{digits}f}" for when in ("before", "after"))
            for name, digits in (("win_rate", 2), ("tokens", 0), ("ended", 2), ("perplexity_elsewhere", 1)))
        minutes = np.mean([run["seconds"] for run in runs]) / 60
        lines.append(f"| {rules[rule]} | {method.upper()} | {steps} | {rate} | {gain.mean():+.2f} {interval} | "
                     f"{tokens} | {ended} | "
                     f"{of(runs, 'after', 'kl').mean():.1f} | {elsewhere} | {minutes:.1f} |")
    return "\n".join(lines)


def answers(found: dict, rules: dict[str, str], seeds: Sequence[int]) -> str:
    """The first answers of every seed, before and after, in Markdown."""
    parts = []
    for (rule, method), runs in found.items():
        parts.append(f"### {rules[rule].capitalize()}, {method.upper()}\n")
        for seed, run in zip(seeds, runs):
            for example in run["examples"][:SHOWN]:
                question, before, after = (" ".join(example[name].split()) or "(nothing)"
                                           for name in ("prompt", "before", "after"))
                parts.append(f"> **{question}** (seed {seed})  \n> *before:* {before}  \n> *after:* {after}\n")
    return "\n".join(parts).rstrip()


def figure(found: dict, rules: dict[str, str], path: Path) -> None:
    """A panel for each preference: the win rate before (grey) and after, against the KL, a mark for each seed."""
    plt = pyplot()
    drawn, axes = plt.subplots(1, len(rules), figsize=(3.8 * len(rules), 3.3), layout="constrained", squeeze=False,
                               sharey=True)
    for axis, rule in zip(axes[0], rules):
        for method, runs in ((method, runs) for (one, method), runs in found.items() if one == rule):
            for i, (kl, before, after) in enumerate(zip(of(runs, "after", "kl"), of(runs, "before", "win_rate"),
                                                        of(runs, "after", "win_rate"))):
                axis.plot([0, kl], [before, after], color=COLOURS[method], alpha=0.25, linewidth=1)
                axis.plot(0, before, MARKS[i % 5], color="#8a8a8a", markersize=5)
                axis.plot(kl, after, MARKS[i % 5], color=COLOURS[method], markersize=6,
                          label=method.upper() if i == 0 else None)
        axis.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
        axis.set(title=rules[rule], xlabel="KL from the untrained model (nats per answer)", ylim=(0, 1.03))
        axis.legend(loc="lower right", fontsize=8)
    axes[0, 0].set_ylabel("win rate against it")
    save(drawn, path)
    plt.close(drawn)
