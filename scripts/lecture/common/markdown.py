"""The results of the experiments in Markdown: the table of claims, README.md of the folder, and the
outcomes under other roundings. Links are relative to the folder. Tests: tests/test_lecture.py.
"""

import collections
import math
import re
import textwrap
from collections.abc import Iterable

from common.intervals import LEVEL, TRIAL, Comparison, as_number, confidence_interval, decider
from common.words import Words

ROUNDINGS = """
## Under other roundings

"""


def table(words: Words, stages: dict, rows: dict, titles: dict) -> str:
    """The claims that were tested: {stage: names}, {name: record.row}, {name: title} of those that it shows."""
    lines = []
    for title, names in stages.items():
        if names := [name for name in names if name in rows]:
            lines += [f"**{title}**", "",
                      f"| {words.claim} | the rule tested here | outcome | measured | |",
                      "|---|---|---|---|---|"]
        for name in names:
            cells = [as_cell(rows[name][key]) for key in ("claim", "rule", "outcome", "measured")]
            if name in titles:
                cells[0] = f"**{as_cell(titles[name])}** {cells[0]}"
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


def terms(words: Words) -> str:
    """The glossary of the table, in Markdown."""
    return "".join(textwrap.fill(f"- **{as_cell(term)}**: {as_cell(text)}", 110, subsequent_indent="  ") + "\n"
                   for term, text in words.terms.items())


def readme(words: Words, stages: dict, record: dict, titles: dict) -> str:
    """The text of the folder's README.md, from its record (record.py)."""
    claims = sum(map(len, stages.values()))
    rows = record["rows"]
    parts = [words.header.format(claims=claims), terms(words), "\n", table(words, stages, rows, titles), "\n",
             summary(claims, rows), "\n", words.reading.format(claims=claims), words.running]
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
