"""The result of an experiment as text: its outcome, its rule and its table, within COLUMNS columns.

Tests: tests/test_lecture.py.
"""

import re
import textwrap

from common.intervals import TRIAL, as_number

COLUMNS = 100
DECIDES_NOTHING = ", which decides nothing: the models are hardly trained"


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!]) (?=[A-Z(])", " ".join(text.split()))[0]


def report(result: dict) -> str:
    """The outcome of an experiment, its rule and its comparisons, as text of at most COLUMNS columns."""
    def wrapped(label, text):
        return textwrap.fill(" ".join(text.split()), COLUMNS, initial_indent=f"  {label:<10}",
                             subsequent_indent=" " * 12)

    trial = result["outcome"] == TRIAL
    lines = [f"{result['experiment']}: {result['outcome']}{DECIDES_NOTHING if trial else ''}",
             wrapped("rule", first_sentence(result["Rule"])),
             wrapped("measured", result["words"])]
    for label, kind in (("condition", "conditions"), ("compared", "comparisons")):
        lines += [wrapped(label, compared_as_text(comparison)) for comparison in result[kind]]
    lines += [wrapped("finding", f"{compared_as_text(finding)}: {TRIAL if trial else finding['outcome']}")
              for finding in result.get("findings", [])]
    lines.append(wrapped("run", f"{len(result['seeds'])} seeds, {result['seconds']:.0f} s"))
    return "\n".join(lines)


def compared_as_text(comparison: dict) -> str:
    """lead of DPO (gold reward): 0.08 [0.05, 0.11], required: above 0"""
    low, high = comparison["interval"]
    interval = "no interval" if low is None else f"95% interval {as_number(low)} to {as_number(high)}"
    return f"{comparison['name']}: {as_number(comparison['mean'])} ({interval}); required: {comparison['asked']}"


def tables(result: dict) -> str:
    """The tables of an experiment as text, with the legend under the first."""
    parts = [as_text(result["table"])]
    if result.get("legend"):
        parts.append(textwrap.fill(result["legend"], COLUMNS))
    if result.get("details"):
        parts.append(as_text(result["details"]))
    return "\n\n".join(parts)


def as_text(table: list[list], columns: int = COLUMNS) -> str:
    """A table as text: heads of columns are wrapped; columns that do not fit stand in a further block."""
    head, *body = [[str(cell) for cell in line] for line in table]
    heads, widths = [], []
    for i, title in enumerate(head):
        widest = max([12, *(len(line[i]) for line in body)])
        heads.append(textwrap.wrap(title, widest, break_long_words=False) or [""])
        widths.append(max(map(len, [*heads[-1], *(line[i] for line in body)])))
    blocks = [[0]]
    for i in range(1, len(head)):
        if len(blocks[-1]) > 1 and sum(widths[k] + 2 for k in [*blocks[-1], i]) > columns + 2:
            blocks.append([0])
        blocks[-1].append(i)
    return "\n\n".join(_block(heads, body, widths, block) for block in blocks)


def _block(heads, body, widths, block):
    """The columns of one block; the last lines of the heads stand side by side."""
    height = max(len(heads[i]) for i in block)
    padded = [[""] * (height - len(title)) + title for title in heads]
    lines = [[title[k] for title in padded] for k in range(height)] + body
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in block).rstrip() for line in lines)
