"""JSON files that a script wrote earlier, checked when they are read, so that whatever uses them can rely on them.

Checked by tests/test_fuzz.py.
"""

import reprlib
from pathlib import Path
from typing import Any

from support.command_line import read_json
from support.run_folder import UsageError

LARGEST = 1e15      # a number of a result beyond this is damage: figures and tables cannot show it


def read_shaped(path: str | Path, shape: dict, hint: str) -> dict:
    """The object in a file of JSON. Raises UsageError, with the first fault and the hint, if it has another shape."""
    value = read_json(path, hint)
    if found := fault(value, shape):
        raise UsageError(f"{path}: damaged, or of another version: {found}. {hint}")
    return value


def fault(value: Any, shape: Any, place: str = "") -> str | None:
    """The first place at which a value of JSON has not the shape, in words, or None.

    A shape is str, bool, int or float (a finite number), None, object (any value), an object of JSON with at least
    these names {name: shape} or with any names {str: shape}, a list of at least one [shape], the empty list [], or a
    tuple of alternatives.
    """
    if isinstance(shape, tuple):
        faults = [fault(value, one, place) for one in shape]
        return None if None in faults else faults[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        names = value if str in shape else shape
        if missing := [name for name in names if name not in value]:
            return f"{place or 'it'} lacks {missing[0]!r}"
        return _first(fault(value[name], shape.get(name, shape.get(str)), f"{place}.{name}".lstrip("."))
                      for name in names)
    if isinstance(shape, list) and isinstance(value, list) and bool(shape) == bool(value):
        return _first(fault(entry, shape[0], f"{place}[{i}]") for i, entry in enumerate(value))
    if shape is object or shape is None and value is None or shape is bool and isinstance(value, bool):
        return None
    if shape is str and isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
        return None
    numbers = {int: int, float: (int, float)}.get(shape) if isinstance(shape, type) else None
    if numbers and isinstance(value, numbers) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return None
    return f"{reprlib.repr(place)} is {reprlib.repr(value)}" if place else f"it is {reprlib.repr(value)}"


def _first(faults):
    return next((found for found in faults if found), None)
