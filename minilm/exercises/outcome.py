"""What one call of a function did, and whether two calls did the same."""

import dataclasses
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm.exercises.task import Task, copies

TOLERANCE = 1e-9        # for |a - b|, of the largest number of a result


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one call did.

    results   the arrays that were returned, or None
    problem   why results is None, in words
    raised    the name of the exception, if there was one
    changed   the names of the arguments that the function has overwritten
    warnings  of NumPy, in words
    """

    results: tuple[np.ndarray, ...] | None
    problem: str = ""
    raised: str = ""
    changed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def observe(task: Task, function: Callable, arguments: tuple, path: str = "") -> Outcome:
    """Call the function on copies of the arguments. path: the student's file, for the line of an error."""
    given = copies(arguments)
    with warnings.catch_warnings(record=True) as caught, np.errstate(divide="warn", over="warn", invalid="warn"):
        warnings.simplefilter("always")
        try:
            result = function(*given)
        except BaseException as error:              # SystemExit and KeyboardInterrupt, too: it is the student's
            return Outcome(None, f"it raises {in_words(error, path)}", type(error).__name__)
    changed = tuple(name for name, x, y in zip(task.arguments, given, arguments)
                    if isinstance(x, np.ndarray) and not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))
    noted = tuple(dict.fromkeys(f"{w.message} (line {w.lineno})" if w.filename == path else f"{w.message}"
                                for w in caught))
    results, problem = _arrays(task, result)
    return Outcome(results, problem, changed=changed, warnings=noted)


def in_words(error: BaseException, path: str) -> str:
    """An exception with the line of the student's file that it comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:300]}".rstrip(": ")


def _arrays(task, result):
    """(the results as arrays, "") or (None, the problem)."""
    names = task.returns
    if result is None:
        return None, "it returns None: is the return missing?"
    if len(names) > 1 and not (isinstance(result, (tuple, list)) and len(result) == len(names)):
        found = f"{len(result)} values" if isinstance(result, (tuple, list)) else f"one {type(result).__name__}"
        return None, f"it returns {found}; it must return the tuple ({', '.join(names)})"
    if len(names) == 1 and isinstance(result, tuple):
        return None, f"it returns a tuple of {len(result)}; it must return {names[0]} alone"
    arrays = []
    for name, value in zip(names, result if len(names) > 1 else (result,)):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError):
            return None, f"{name} is {type(value).__name__}; it must be an array of numbers"
        if array.dtype.kind not in "fiub":
            return None, f"{name} is {type(value).__name__} of {array.dtype}; it must be an array of real numbers"
        arrays.append(array)
    return tuple(arrays), ""


def close(task: Task, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Entry by entry: equal, both NaN, or within the tolerance of the largest finite number of b."""
    finite = np.abs(b[np.isfinite(b)]) if b.dtype.kind == "f" else np.abs(b.astype(float))
    scale = max(finite.max(initial=0.0), task.smallest)
    with np.errstate(invalid="ignore", over="ignore"):
        return (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a.astype(float) - b.astype(float)) <= TOLERANCE * scale)


def same(task: Task, a: Outcome, b: Outcome) -> bool:
    """Whether two calls did the same, up to TOLERANCE."""
    if a.results is None or b.results is None:
        return (a.results is b.results) and a.raised == b.raised
    return a.changed == b.changed and all(x.shape == y.shape and bool(close(task, x, y).all())
                                          for x, y in zip(a.results, b.results))


def as_arrays(results: Any) -> tuple[np.ndarray, ...]:
    """The results of a function that returns one array or a tuple."""
    return tuple(map(np.asarray, results)) if isinstance(results, tuple) else (np.asarray(results),)
