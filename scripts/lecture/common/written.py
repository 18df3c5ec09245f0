"""The file that an experiment wrote, checked when it is read: the page and the tables show any file that passes.

Tests: tests/test_fuzz.py.
"""

import re
import reprlib
from pathlib import Path

from common.intervals import OUTCOMES, TRIAL
from support.json_files import fault, read_shaped
from support.run_folder import UsageError

RUN_FIRST = "Run it first, without --redraw."
SECTIONS = ("Claim", "Test", "Rule", "Limits", "Source")
PARAGRAPHS = (*SECTIONS, "Figure")      # of a docstring; results that were written earlier lack the last
SEVERAL = ([{"name": str, "mean": (float, None), "interval": [(float, None)], "asked": str, "outcome": str,
             "by_seed": ([(float, None)], [])}], [])
NUMBER = r"-?[0-9]{1,15}(\.[0-9]{1,15})?"
MARGIN = re.compile(rf"(above|below) {NUMBER}( and below {NUMBER})?")
TABLE = [[(str, float, None)]]
SHAPE = {**dict.fromkeys((*SECTIONS, "title", "outcome", "words", "date", "machine", "size"), str),
         "settings": {str: object}, "by_seed": ([object], []), "seeds": [int], "seconds": float, "workers": int,
         "table": TABLE, "comparisons": SEVERAL, "conditions": SEVERAL}


def read(path: str | Path) -> dict:
    """What an experiment wrote. Raises UsageError if it cannot be read, or is not of that experiment."""
    result = read_shaped(path, SHAPE, RUN_FIRST)
    if found := _fault(result, Path(path).stem):
        raise UsageError(f"{path}: damaged, or of another version: {found}. {RUN_FIRST}")
    return result


def _fault(result, name):
    """What does not fit together among values that each have their type, or None."""
    if result.get("experiment", name) != name:
        return f"it holds results of the experiment {reprlib.repr(result['experiment'])}"
    added = {"findings": SEVERAL, "Figure": str, "legend": str, "details": (TABLE, [])}
    none = {"findings": [], "Figure": "", "legend": "", "details": []}
    if found := fault(none | {name: result[name] for name in added if name in result}, added):
        return found
    compared = [c for kind in ("comparisons", "conditions", "findings") for c in result.get(kind, [])]
    at_least = result.get("at_least")
    if at_least is not None and (type(at_least) is not int or not 1 <= at_least <= len(result["comparisons"])):
        return f"at_least is {reprlib.repr(at_least)}, of {len(result['comparisons'])} comparisons"
    if any(len(c["interval"]) != 2 for c in compared):
        return "an interval has two ends"
    for comparison in compared:
        if comparison["outcome"] not in OUTCOMES or not MARGIN.fullmatch(comparison["asked"]):
            return f"a comparison asked {reprlib.repr(comparison['asked'])} is {reprlib.repr(comparison['outcome'])}"
    if result["outcome"] not in (*OUTCOMES, TRIAL):
        return f"the outcome is {reprlib.repr(result['outcome'])}"
    if any(len({len(line) for line in result.get(name, [])}) > 1 for name in ("table", "details")):
        return "the lines of its table have different lengths"
    return None
