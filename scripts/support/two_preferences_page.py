"""The page and the figure of two_preferences.py, from the results.json and the answers.json of its runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lecture.common.intervals import confidence_interval
from support import rules
from support.figures import pyplot, save
from support.json_files import read_shaped
from support.run_folder import UsageError

COLOURS = {"dpo": "#c4570c", "rlhf": "#0b5fa5"}
MARKS = ("o", "s", "^", "D", "v")
SHOWN = 2               # questions, with their answers, of each seed
NUMBERS = ("tokens", "ended", "kl", "perplexity_elsewhere")
SHAPE = {"before": dict.fromkeys(NUMBERS, float), "after": dict.fromkeys(NUMBERS, float), "seconds": float,
         "held_out": int, "steps": int, "machine": str,
         "examples": [{name: str for name in ("prompt", "before", "after")}]}
ANSWERS = {"answers": [[str]]}
ADVICE = "Run scripts/two_preferences.py without --print first."
COLUMNS = ("preference", "method", "steps", "win rate", "gain over 1/2 [95% interval]", "tokens", "ended", "KL, nats",
           "perplexity elsewhere", "minutes")


def page(paths: dict, names: dict[str, str], seeds: Sequence[int], folder: Path) -> str:
    """The generated part of two_preferences.md, from {(rule, method): its results.json by seed}; draws the figure.

    names: {rule: its name on the page}. Raises UsageError for a file that is not there or damaged.
    """
    if not seeds:
        raise UsageError(f"{folder} holds no run of a seed. {ADVICE}")
    untrained = read_shaped(folder / "answers.json", ANSWERS, ADVICE)["answers"]
    found = {key: [read_shaped(path, SHAPE, ADVICE) for path in some] for key, some in paths.items()}
    for key, runs in found.items():
        for run, path in zip(runs, paths[key]):
            own = read_shaped(path.with_name("answers.json"), ANSWERS, ADVICE)["answers"]
            run["win_rate"] = win_rate(key[0], own, untrained)
    figure(found, names, folder / "two_preferences.png")
    runs = [run for some in found.values() for run in some]
    return "\n".join([
        f"{'; '.join(sorted({run['machine'] for run in runs}))}. {len(seeds)} seeds, {runs[0]['held_out']} held-out "
        f"questions; {len(runs)} runs, {sum(run['seconds'] for run in runs) / 60:.0f} minutes in all.\n",
        table(found, names),
        f"\n## Answers\n\nThe first {SHOWN} held-out questions, at temperature 1; the answers before and after have "
        "the same random numbers.\n",
        answers(found, names, seeds)])


def win_rate(rule: str, own: list[list[str]], others: list[list[str]]) -> float:
    """How often an answer has more reward than one of the others to the same question; ties count 1/2.

    All pairs are compared, so two independent samples of one model have 1/2 in expectation.
    """
    def rewards(texts):
        return np.array([getattr(rules, rule)([""] * len(some), some) for some in texts])
    difference = rewards(own)[:, :, None] - rewards(others)[:, None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def of(runs: list[dict], when: str, name: str) -> np.ndarray:
    """A number of each seed: (S,)."""
    return np.array([run[when][name] for run in runs], float)


def table(found: dict, names: dict[str, str]) -> str:
    """A row for each preference and method: means over the seeds, before → after."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for (rule, method), runs in found.items():
        rate = np.array([run["win_rate"] for run in runs])
        gain = rate - 0.5
        low, high = confidence_interval(gain.tolist())
        interval = f"[{low:+.2f}, {high:+.2f}]" if np.isfinite(high - low) else "no interval"
        steps = "/".join(map(str, sorted({run["steps"] for run in runs})))
        tokens, ended, elsewhere = (
            " → ".join(f"{of(runs, when, name).mean():.{digits}f}" for when in ("before", "after"))
            for name, digits in (("tokens", 0), ("ended", 2), ("perplexity_elsewhere", 1)))
        minutes = np.mean([run["seconds"] for run in runs]) / 60
        lines.append(f"| {names[rule]} | {method.upper()} | {steps} | {rate.mean():.2f} | {gain.mean():+.2f} "
                     f"{interval} | {tokens} | {ended} | "
                     f"{of(runs, 'after', 'kl').mean():.1f} | {elsewhere} | {minutes:.1f} |")
    return "\n".join(lines)


def answers(found: dict, names: dict[str, str], seeds: Sequence[int]) -> str:
    """The first answers of every seed, before and after, in Markdown."""
    parts = []
    for (rule, method), runs in found.items():
        parts.append(f"### {names[rule].capitalize()}, {method.upper()}\n")
        for seed, run in zip(seeds, runs):
            for example in run["examples"][:SHOWN]:
                question, before, after = (" ".join(example[name].split()) or "(nothing)"
                                           for name in ("prompt", "before", "after"))
                parts.append(f"> **{question}** (seed {seed})  \n> *before:* {before}  \n> *after:* {after}\n")
    return "\n".join(parts).rstrip()


def figure(found: dict, names: dict[str, str], path: Path) -> None:
    """A panel for each preference: the win rate against the KL, a mark for each seed; lines begin at 1/2."""
    plt = pyplot()
    drawn, axes = plt.subplots(1, len(names), figsize=(3.8 * len(names), 3.3), layout="constrained", squeeze=False,
                               sharey=True)
    for axis, rule in zip(axes[0], names):
        for method, runs in ((method, runs) for (one, method), runs in found.items() if one == rule):
            for i, (kl, run) in enumerate(zip(of(runs, "after", "kl"), runs)):
                rate = run["win_rate"]
                axis.plot([0, kl], [0.5, rate], color=COLOURS[method], alpha=0.25, linewidth=1)
                axis.plot(kl, rate, MARKS[i % 5], color=COLOURS[method], markersize=6,
                          label=method.upper() if i == 0 else None)
        axis.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
        axis.set(title=names[rule], xlabel="KL from the untrained model (nats per answer)", ylim=(0, 1.03))
        axis.legend(loc="lower right", fontsize=8)
    axes[0, 0].set_ylabel("win rate against it")
    save(drawn, path)
    plt.close(drawn)
