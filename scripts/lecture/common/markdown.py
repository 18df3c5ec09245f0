"""The results of the experiments in Markdown: the table of claims, README.md of scripts/lecture, and the
outcomes under other roundings. Links are relative to scripts/lecture. Tests: tests/test_lecture.py.
"""

import collections
import math
import re
import textwrap
from collections.abc import Iterable

from common import glossary
from common.intervals import LEVEL, TRIAL, Comparison, as_number, confidence_interval, decider

HEADER = """# The lecture, claim by claim

minilm follows the lecture "Prompting, Instruction Finetuning, and RLHF" of Stanford CS224N (2023; 2024 with
DPO). Each of its {claims} claims is one experiment in this folder. In Korean, as a walkthrough:
[강의를 따라 읽는 minilm](README.ko.md). Words of the table:

"""
READING = """
## How to read it

The lecture's claim is a sentence about large models. The rule is the sentence that was tested here, on
models with 7,000 to 181,000 parameters in small invented worlds. The outcome is about the rule. "Not
shown" means that the rule fails in this experiment; the lecture's claim can still be true.

- **shown**: the 95% confidence interval over the seeds lies within the required range, for every comparison
  of the rule. In rl_is_hard, three of five comparisons must hold, each with its 99% interval.
- **not shown**: the interval of some comparison lies outside the required range. This interval is
  wider than a 95% interval: for a rule of n comparisons its level is 1 - 0.05/n.
- **undecided**: neither, or the model did not learn the task that the rule is about.
- **Decided by**: the comparison that determines the outcome: its mean over the seeds, [its interval], and the
  range that the rule requires. The level of the interval is 95% unless another one is given. If a rule has
  several comparisons, the one that is nearest to failing, or fails most clearly, decides: the distance of its
  mean from the nearest limit of the range, divided by half the width of the interval, is the smallest
  (outside the range the distance is negative). In rl_is_hard the third largest decides.

If the effects of the seeds are independent and normal, a false "shown" has a probability of at most 2.5%
(one side of a 95% interval) per experiment, and a false "not shown" of at most 5% (all comparisons of the
rule together). So one wrong outcome in {claims} would be no surprise. The statistics are in
[intervals.py](common/intervals.py). An experiment's docstring has the claim, the test, the rule with its
margins, the limits, and the paper.
"""
RUNNING = """
## How to run it

    python scripts/lecture/all.py                      # all experiments, and one page: runs/claims/index.html
    python scripts/lecture/all.py --quick              # a trial: every experiment runs, none decides anything
    python scripts/lecture/dpo.py --out runs/dpo       # one experiment: dpo.png, dpo.json, a table
    python scripts/lecture/all.py --readme runs/claims # this file and its figures, from a run

`all.py --rounding float64,coretype,workers` repeats every experiment with other rounding errors and
compares the outcomes: with models in float64; with another matrix kernel of OpenBLAS (OPENBLAS_CORETYPE);
and with another number of worker processes, which must change nothing. "Every number" is without times and
memory. How to write an experiment:
[experiment.py](common/experiment.py).
"""
ROUNDINGS = """
## Under other roundings

"""


def table(stages: dict, rows: dict) -> str:
    """The claims that were tested: {stage: names}, {name: record.row}."""
    lines = []
    for title, names in stages.items():
        if names := [name for name in names if name in rows]:
            lines += [f"**{title}**", "",
                      "| the lecture's claim | the rule tested here | outcome | measured | |",
                      "|---|---|---|---|---|"]
        for name in names:
            cells = map(as_cell, (rows[name][key] for key in ("claim", "rule", "outcome", "measured")))
            lines.append(f"| {' | '.join(cells)} | [{name}.py]({name}.py), [figure](figures/{name}.png) |")
        lines += [""] * bool(names)
    return "\n".join(lines)


def decided_by(result: dict) -> str:
    """The comparison that determines the outcome (intervals.decider), as a sentence: mean, interval, seeds, range."""
    if not result.get("comparisons"):
        return ""
    rule, conditions = ([_comparison(c) for c in result.get(kind, [])] for kind in ("comparisons", "conditions"))
    found, level = decider(rule, conditions, result.get("at_least"))
    low, high = confidence_interval(found.effects, level)
    interval = f"[{as_number(low)}, {as_number(high)}]" if math.isfinite(high - low) else "no interval"
    mean = as_number(sum(found.effects) / len(found.effects)) if found.effects else "none"
    label = "" if level == LEVEL else f" ({100 * level:.3g}% interval)"
    return (f"Decided by: {found.name}: {mean} {interval}{label} over {len(found.effects)} seeds; "
            f"required: {found.asked()}.")


def _comparison(written):
    """The comparison that an experiment wrote; an effect that is not finite is written as None."""
    margins = {word: float(number) for word, number in re.findall(r"(above|below) (-?[0-9.]+)", written["asked"])}
    effects = [math.inf if effect is None else effect for effect in written["by_seed"]]
    return Comparison(written["name"], effects, **margins)


def words() -> str:
    """The glossary of the table, in Markdown."""
    return "".join(textwrap.fill(f"- **{as_cell(term)}**: {as_cell(text)}", 110, subsequent_indent="  ") + "\n"
                   for term, text in glossary.IN_THE_TABLE.items())


def readme(stages: dict, record: dict) -> str:
    """The text of scripts/lecture/README.md, from its record (record.py)."""
    claims = sum(map(len, stages.values()))
    rows = record["rows"]
    parts = [HEADER.format(claims=claims), words(), "\n", table(stages, rows), "\n", summary(claims, rows), "\n",
             READING.format(claims=claims), RUNNING]
    if record["roundings"]:
        parts += [ROUNDINGS, textwrap.indent(agreement(record), "- ")]
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))


def summary(claims: int, rows: dict) -> str:
    """How many claims have which outcome, and where and when that was measured."""
    count = collections.Counter(row["outcome"] for row in rows.values())
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in count.most_common())
    lines = [f"{len(rows)} of {claims} claims tested: {outcomes or 'none'}."]
    if rows:
        dates, machines, sizes, seeds = (sorted({row[key] for row in rows.values()})
                                         for key in ("date", "machine", "size", "seeds"))
        minutes = sum(row["seconds"] for row in rows.values()) / 60
        lines.append(f"{_range(dates)}, size {' and '.join(sizes)}, {_range(seeds)} seeds per experiment, "
                     f"{minutes:.0f} minutes in all on {'; '.join(machines)}.")
    return "\n\n".join(lines) + "\n"


def _range(values):
    return " to ".join(map(str, dict.fromkeys((values[0], values[-1]))))


def roundings(names: Iterable[str], record: dict) -> str:
    """The outcomes of the experiments, as they ran and under every rounding, and whether they agree."""
    columns = {"as run": record["rows"], **record["roundings"]}
    lines = [f"| experiment | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        cells = [found[name]["outcome"] if name in found else "not run" for found in columns.values()]
        run = [cell for cell in cells if cell != "not run"]
        if run:
            same = "the same" if len(set(run)) == 1 else "**differs**"
            lines.append(f"| {name} | {' | '.join(cells)} | {same if len(run) > 1 else ''} |")
    return "\n".join([*lines, "", agreement(record)])


def agreement(record: dict) -> str:
    """How many outcomes, and how many experiments with all their numbers, are those as run; for each rounding."""
    then = {name: row["outcome"] for name, row in record["rows"].items()}
    sentences = []
    for rounding, again in record["roundings"].items():
        now = {name: again[name]["outcome"] for name in then if name in again}
        decided = [name for name in now if TRIAL not in (then[name], now[name])]
        differ = [f"{name} ({now[name]} instead of {then[name]})" for name in decided if now[name] != then[name]]
        which = f" (not {', '.join(differ)})" if differ else ""
        missing = f" Not run: {', '.join(name for name in then if name not in again)}." if len(now) < len(then) else ""
        outcomes = f"{len(decided) - len(differ)} of {len(decided)} outcomes are the same{which}"
        equal = sum(again[name]["equal"] for name in now)
        sentences.append(f"{rounding}: {outcomes if decided else 'trials have no outcomes to compare'}. "
                         f"In {equal} of {len(now)} experiments every number is the same.{missing}\n")
    return "".join(sentences)


def as_cell(text: str) -> str:
    """Text that stays text, in a cell of a table."""
    return re.sub(r"([|<*\\])", r"\\\1", " ".join(text.split()))
