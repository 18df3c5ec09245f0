"""The page and the figure of two_preferences.py, from the results.json of its runs."""

import itertools
from pathlib import Path

import numpy as np

from minilm import evaluate
from support.figures import pyplot, save
from support.json_files import read_shaped

COLOURS = {"dpo": "#c4570c", "rlhf": "#0b5fa5"}
MARKS = ("o", "s", "^", "D", "v")
NUMBERS = ("win_rate", "reward", "tokens", "ended", "kl", "perplexity_elsewhere")
SHAPE = {"before": dict.fromkeys(NUMBERS, float), "after": dict.fromkeys(NUMBERS, float), "seconds": float,
         "examples": [{name: str for name in ("prompt", "before", "after")}]}
ADVICE = "Run scripts/two_preferences.py without --print first."
COLUMNS = ("preference", "method", "win rate before", "after", "gain [seeds]", "standard errors", "reward", "tokens",
           "ended", "KL, nats", "perplexity elsewhere", "minutes")


def read_runs(out: Path, rules: dict[str, str], methods: tuple[str, ...], seeds: list[int]) -> dict:
    """{(rule, method): the results of each seed}. Raises UsageError for a run that is not there or damaged."""
    return {(rule, method): [read_shaped(out / f"seed-{seed}" / f"{rule}-{method}" / "results.json", SHAPE, ADVICE)
                             for seed in seeds]
            for rule, method in itertools.product(rules, methods)}


def of(runs: list[dict], when: str, name: str) -> np.ndarray:
    """A number of each seed: (S,)."""
    return np.array([run[when][name] for run in runs], float)


def table(found: dict, rules: dict[str, str]) -> str:
    """A row for each preference and method: means over the seeds, before -> after."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for (rule, method), runs in found.items():
        gain = of(runs, "after", "win_rate") - of(runs, "before", "win_rate")
        mean, error = evaluate.mean_and_error(gain)
        means = {name: [of(runs, when, name).mean() for when in ("before", "after")] for name in NUMBERS}
        rates = [f"{x:.2f}" for x in means.pop("win_rate")]
        kl = means.pop("kl")[1]
        reward, tokens, ended, elsewhere = (f"{a:.{d}f} → {b:.{d}f}" for (a, b), d in zip(means.values(), (2, 0, 2, 1)))
        minutes = np.mean([run["seconds"] for run in runs]) / 60
        errors = mean / error if error else np.nan
        lines.append(f"| {rules[rule]} | {method.upper()} | {rates[0]} | {rates[1]} | {mean:+.2f} "
                     f"[{gain.min():+.2f}, {gain.max():+.2f}] | {errors:.1f} | {reward} | {tokens} | {ended} | "
                     f"{kl:.1f} | {elsewhere} | {minutes:.1f} |")
    return "\n".join(lines)


def answers(found: dict, rules: dict[str, str], count: int) -> str:
    """The first answers of the first seed, before and after, in Markdown."""
    parts = []
    for (rule, method), runs in found.items():
        parts.append(f"### {rules[rule]}, {method.upper()}\n")
        for example in runs[0]["examples"][:count]:
            before, after = (" ".join(example[when].split()) or "(nothing)" for when in ("before", "after"))
            parts.append(f"> **{example['prompt']}**  \n> *before:* {before}  \n> *after:* {after}\n")
    return "\n".join(parts).rstrip()


def figure(found: dict, rules: dict[str, str], path: Path) -> None:
    """A panel for each preference: the win rate before (grey) and after, against the KL, a mark for each seed."""
    plt = pyplot()
    drawn, axes = plt.subplots(1, len(rules), figsize=(3.8 * len(rules), 3.3), layout="constrained", squeeze=False,
                               sharey=True)
    for axis, rule in zip(axes[0], rules):
        methods = [method for r, method in found if r == rule]
        for method, runs in ((method, found[rule, method]) for method in methods):
            for i, (kl, before, after) in enumerate(zip(of(runs, "after", "kl"), of(runs, "before", "win_rate"),
                                                        of(runs, "after", "win_rate"))):
                axis.plot([0, kl], [before, after], color=COLOURS[method], alpha=0.25, linewidth=1)
                axis.plot(0, before, MARKS[i % 5], color="#8a8a8a", markersize=5)
                axis.plot(kl, after, MARKS[i % 5], color=COLOURS[method], markersize=6,
                          label=method.upper() if i == 0 else None)
        axis.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
        axis.set(title=rules[rule], xlabel="KL to the untrained model (nats per answer)", ylim=(0, 1.03))
        axis.legend(loc="lower right", fontsize=8)
    axes[0, 0].set_ylabel("win rate against it")
    save(drawn, path)
    plt.close(drawn)
