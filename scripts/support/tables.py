"""The tables of assistant.py as text: of one run for a terminal, of several seeds in Markdown."""

from fractions import Fraction

import numpy as np

from minilm.world import tasks
from support.terminal import labelled, one_line, paragraph, trial_note

# The control without preferences: the SFT model at this temperature, which alone raises its gold reward.
LOWER_TEMPERATURE = 0.5
TEMPERATURE = f"T {Fraction(LOWER_TEMPERATURE)}"
NAMES = {"base": "base", "sft": "SFT model", "sft_lower_temperature": f"SFT, {TEMPERATURE}", "best_of_n": "best of n",
         "rlhf": "RLHF", "dpo": "DPO"}
COLUMNS = {"task_accuracy": "task accuracy", "gold_reward": "gold reward", "proxy_reward": "proxy reward",
           "win_rate": "win rate", "kl_sequence": "KL (nats)"}
COMPARED = (("sft", "base", ("task_accuracy", "gold_reward")),
            *((stage, "sft", ("gold_reward", "win_rate", "task_accuracy"))
              for stage in ("sft_lower_temperature", "best_of_n", "rlhf", "dpo")))


def summary(results: dict) -> str:
    """The table, the explanation of its columns, and the same questions answered by each stage."""
    lines = ["", f"{'':<10}" + "".join(f"{title:>14}" for title in COLUMNS.values())]
    for row in results["rows"]:
        lines.append(f"{NAMES[row['stage']]:<10}" + "".join(f"{_cell(row, column):>14}" for column in COLUMNS))
    lines += ["", paragraph(f"One sampled answer (temperature 1) to each of {results['held_out_questions']} questions "
                            f"({results['distinct_questions']} different ones) that no stage was trained on. "
                            "± is a standard error. Proxy reward, win rate and KL are relative to the SFT model. "
                            f"{NAMES['sft_lower_temperature']}: the SFT model at temperature {LOWER_TEMPERATURE}, "
                            "without any preferences. Best of n: "
                            f"of {_best_of(results)} answers of the SFT model, the one with the highest proxy reward."),
              paragraph(f"The reward model ranks {results['reward_model_accuracy']:.2f} ± "
                        f"{results['reward_model_accuracy_se']:.2f} of pairs of answers as the gold reward does."),
              paragraph("The base model, given the same questions as statements to complete (\"The last word of cat "
                        f"sun is\"): accuracy {results['base_completion_accuracy']:.2f} ± "
                        f"{results['base_completion_accuracy_se']:.2f}."), ""]
    for example in results["examples"]:
        lines.append(f"{example['question']}    (right: {example['answer']})")
        lines += [labelled(NAMES[stage], one_line(*example[stage]), 9) for stage in NAMES if stage in example]
    if results["trial"]:
        lines += ["", trial_note(results["scale"])]
    return "\n".join([*lines, "", paragraph(_settings(results)), "", tasks.guide()])


def _cell(row, column):
    """A mean and its standard error, in at most 13 characters."""
    digits = 2 if abs(row[column]) < 100 else 0
    if row.get("kl_is_upper_bound") and column == "kl_sequence":
        return f"≤ {row[column]:.{digits}f}"
    return f"{row[column]:.{digits}f} ± {row[column + '_se']:.{digits}f}"


def _best_of(results):
    return next(row["n"] for row in results["rows"] if row["stage"] == "best_of_n")


def _settings(results):
    seconds = results["seconds"]
    return (f"{results['parameters']:,} parameters, seed {results['seed']}, {results['workers']} workers, "
            f"{sum(seconds.values()):.0f} s: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()) + ".")


def across_seeds(runs: list[dict]) -> str:
    """Several results in Markdown: the mean over the seeds, and in brackets the least and the greatest."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for stage, name in NAMES.items():
        rows = [_row_of(run, stage) for run in runs]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows]
            bound = "≤ " if rows[0].get("kl_is_upper_bound") and column == "kl_sequence" else ""
            cells.append(f"{bound}{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    completed = [run["base_completion_accuracy"] for run in runs]
    seconds = [sum(run["seconds"].values()) for run in runs]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines += ["", f"Seeds {seeds}: mean [least, greatest]. Base model, given statements to complete: accuracy "
              f"{np.mean(completed):.2f} [{min(completed):.2f}, {max(completed):.2f}]. {runs[0]['parameters']:,} "
              f"parameters, {runs[0]['workers']} workers, {min(seconds):.0f} to {max(seconds):.0f} s a run.", ""]
    lines += [_comparison(runs, stage, other, column) for stage, other, columns in COMPARED for column in columns]
    return "\n".join([*lines, *_frontier(runs), _turning_points(runs)])


def _row_of(run, stage):
    return next(row for row in run["rows"] if row["stage"] == stage)


def _comparison(runs, stage, other, column):
    differences, in_errors = [], []
    for run in runs:
        row = _row_of(run, stage)
        other_row = _row_of(run, other)
        error = np.hypot(row[column + "_se"], other_row[column + "_se"])
        differences.append(row[column] - other_row[column])
        in_errors.append(differences[-1] / max(error, 1e-9))
    return (f"- {NAMES[stage]} minus {NAMES[other]}, {COLUMNS[column]}: {np.mean(differences):+.2f}; by seed "
            + ", ".join(f"{difference:+.2f}" for difference in differences)
            + "; in standard errors " + ", ".join(f"{number:.1f}" for number in in_errors) + ".")


def _frontier(runs):
    """A line for each policy that was trained: the means over the seeds."""
    for method, rows in runs[0]["frontier"].items():
        for beta in (row["beta"] for row in rows):
            same = [row for run in runs for row in run["frontier"][method] if row["beta"] == beta]
            gold, kl = (np.mean([row[column] for row in same]) for column in ("gold_reward", "kl_sequence"))
            yield f"- {NAMES[method]}, β = {beta:g}: gold reward {gold:.2f} at a KL of {kl:.2f} nats."


def _turning_points(runs):
    points = [run["turning_point"] for run in runs]
    at = ", ".join(f"{p['kl_sequence']:.1f}" if p["turned_down"] else "(it does not)" for p in points)
    falls = ", ".join(f"{p['gold_reward']:.2f} to {p['last_gold_reward']:.2f}" for p in points)
    return f"- Without a KL penalty the gold reward turns down at a KL of {at} nats, by seed, and falls from {falls}."
