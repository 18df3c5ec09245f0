"""results.json: what README.md of the lecture shows of every experiment, and its outcomes under other roundings.

An experiment that ran again replaces its own row; the rows of the others stay. Tests: tests/test_lecture.py.
"""

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path

from common import experiment, markdown  # experiment: it also makes support importable
from common.text import first_sentence
from minilm import checkpoint
from support.json_files import read_shaped
from support.run_folder import UsageError

ROW = {**dict.fromkeys(("claim", "rule", "outcome", "measured", "size", "date", "machine"), str),
       "seeds": int, "seconds": float}
SHAPE = {"rows": {str: ROW}, "roundings": {str: {str: {"outcome": str, "equal": bool}}}}
EMPTY = {"rows": {}, "roundings": {}}
COSTS = "seconds", "memory"         # among the numbers of an experiment: they differ from run to run
HINT = "Take the file of the repository again."


def row(result: dict) -> dict:
    """What the table shows of the file that an experiment wrote (written.read)."""
    return {"claim": result["Claim"], "rule": first_sentence(result["Rule"]), "outcome": result["outcome"],
            "measured": f"{first_sentence(result['words'])} {markdown.decided_by(result)}",
            "seeds": len(result["seeds"]), **{key: result[key] for key in ("size", "seconds", "date", "machine")}}


def of_run(by_rounding: dict) -> dict:
    """The record of one run, from {rounding: {name: what it wrote}}; the first rounding is the run as it is.

    "equal": whether every number, COSTS apart, is the same as in the run as it is.
    """
    (_, done), *others = by_rounding.items()
    roundings = {rounding: {name: {"outcome": again[name]["outcome"],
                                   "equal": _numbers(again[name]) == _numbers(done[name])}
                            for name in done if name in again} for rounding, again in others}
    return {"rows": {name: row(result) for name, result in done.items()}, "roundings": roundings}


def _numbers(result):
    return [{name: value for name, value in seed.items() if name not in COSTS} if isinstance(seed, dict) else seed
            for seed in result["by_seed"]]


def updated(record: dict, new: dict, names: Sequence[str]) -> dict:
    """The record with every row of the new one in place of its own, and that row's outcomes under other roundings.

    names: the experiments that there are, in their order; rows of others are left out.
    """
    rows = record["rows"] | new["rows"]
    roundings = {}
    for rounding in {**record["roundings"], **new["roundings"]}:
        kept = {name: found for name, found in record["roundings"].get(rounding, {}).items() if name not in new["rows"]}
        found = kept | new["roundings"].get(rounding, {})
        roundings[rounding] = {name: found[name] for name in names if name in found}
    return {"rows": {name: rows[name] for name in names if name in rows},
            "roundings": {rounding: found for rounding, found in roundings.items() if found}}


def read(path: Path) -> dict:
    """The record in a file; an empty one if there is none. Raises UsageError if the file is damaged."""
    if not path.exists():
        return EMPTY
    record = read_shaped(path, SHAPE, HINT)
    for found in (record["rows"], *record["roundings"].values()):
        for name, one in found.items():
            if one["outcome"] not in (*experiment.OUTCOMES, experiment.TRIAL):
                what = f"the outcome of {reprlib.repr(name)} is {reprlib.repr(one['outcome'])}"
                raise UsageError(f"{path}: damaged: {what}. {HINT}")
    return record


def write(path: Path, record: dict) -> None:
    checkpoint.write_text(path, json.dumps(record, indent=1) + "\n")
