"""Grades a function: the first number that is wrong, finite differences, and the mistake that gives this number.

A function is called in every case of its task, on copies of the arguments. What a call does is an Outcome. Two
functions with the same Outcomes in all cases make the same mistake: that is how one of task.mistakes is recognised.
"""

import dataclasses
import itertools
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm.exercises import golden
from minilm.exercises.task import Mistake, Task, cases, copies, variant

TOLERANCE = 1e-9        # for |a - b|, of the largest number of a result
STEP = 6e-6             # of finite differences, as in gradcheck
SHOWN = 12              # an argument with at most so many numbers is printed


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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """begun: the hole has been filled. text: what the student reads; its first line alone says what is wrong."""

    solved: bool
    text: str
    begun: bool = True


def observe(task: Task, function: Callable, arguments: tuple, path: str = "") -> Outcome:
    """Call the function on copies of the arguments. path: the student's file, for the line of an error."""
    given = copies(arguments)
    with warnings.catch_warnings(record=True) as caught, np.errstate(divide="warn", over="warn", invalid="warn"):
        warnings.simplefilter("always")
        try:
            result = function(*given)
        except (Exception, SystemExit) as error:
            return Outcome(None, f"it raises {_of_error(error, path)}", type(error).__name__)
    changed = tuple(name for name, x, y in zip(task.arguments, given, arguments)
                    if isinstance(x, np.ndarray) and not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))
    noted = tuple(dict.fromkeys(f"{w.message} (line {w.lineno})" if w.filename == path else f"{w.message}"
                                for w in caught))
    results, problem = _arrays(task, result)
    return Outcome(results, problem, changed=changed, warnings=noted)


def _of_error(error, path):
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


# Comparing.

def _close(task, a, b):
    """Entry by entry: equal, both NaN, or within the tolerance of the largest finite number of b."""
    finite = np.abs(b[np.isfinite(b)]) if b.dtype.kind == "f" else np.abs(b.astype(float))
    scale = max(finite.max(initial=0.0), task.smallest)
    with np.errstate(invalid="ignore", over="ignore"):
        return (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a.astype(float) - b.astype(float)) <= TOLERANCE * scale)


def same(task: Task, a: Outcome, b: Outcome) -> bool:
    """Whether two calls did the same, up to TOLERANCE."""
    if a.results is None or b.results is None:
        return (a.results is b.results) and a.raised == b.raised
    return a.changed == b.changed and all(x.shape == y.shape and bool(_close(task, x, y).all())
                                          for x, y in zip(a.results, b.results))


def as_arrays(results: Any) -> tuple[np.ndarray, ...]:
    """The results of a function that returns one array or a tuple."""
    return tuple(map(np.asarray, results)) if isinstance(results, tuple) else (np.asarray(results),)


def _problem(task, outcome, expected, arguments):
    """What is wrong with an outcome, in words; None if it is right."""
    if outcome.results is None:
        return outcome.problem
    for i, (name, got, right) in enumerate(zip(task.returns, outcome.results, expected)):
        if got.shape != right.shape:
            return f"{name} has shape {got.shape}; it must be {right.shape}"
        if right.dtype.kind in "iu" and got.dtype.kind not in "iu":
            return f"{name} holds {got.dtype}; it must hold integers"
        wrong = ~_close(task, got, right)
        if wrong.any():
            place = tuple(map(int, np.argwhere(wrong)[0]))
            return _wrong_number(task, i, place, got, right, arguments) + _of_dtype(got, right)
    if outcome.changed:
        names = " and ".join(outcome.changed)
        return (f"the numbers are right, but your function changed its argument {names}: the caller still needs it. "
                "Look for an operation in place (-=, *=, out=, an assignment to a part) and work on a new array")
    return None


def _wrong_number(task, i, place, got, right, arguments):
    name = task.returns[i]
    where = f"number [{', '.join(map(str, place))}] of {name}" if place else name
    text = f"{where} is {got[place].item()!r}; expected {right[place].item()!r}"
    if task.scalar is not None:
        slope = _difference(task.scalar, arguments, task.arguments.index(task.wrt[i]), place)
        text += f". Finite differences in {task.wrt[i]}: {slope:.8g}"
    return text


def _of_dtype(got, right):
    if right.dtype == np.float64 and got.dtype in (np.float32, np.float16):
        return f". It holds {got.dtype}, which rounds; compute in float64"
    if right.dtype == np.float64 and got.dtype.kind == "i" and right.size:
        return ". It holds integers: was it made of integers, and so rounded?"
    return ""


def _difference(scalar, arguments, index, place):
    """d scalar / d arguments[index][place], by a central difference."""
    values = []
    x = np.asarray(arguments[index])[place]
    h = STEP * max(1.0, abs(x))
    for sign in (1, -1):
        moved = [*copies(arguments)]
        moved[index] = np.array(moved[index], float)
        moved[index][place] = x + sign * h
        values.append(float(scalar(*moved)))
    return (values[0] - values[1]) / (2 * h)


def difference_error(task: Task, arguments: tuple, results: tuple[np.ndarray, ...]) -> float:
    """max|result - finite differences| / max(max|finite differences|, 1e-3), over all results of a task with scalar."""
    worst = 0.0
    for name, result in zip(task.wrt, results):
        index = task.arguments.index(name)
        slopes = np.array([_difference(task.scalar, arguments, index, place) for place in np.ndindex(result.shape)])
        error = np.abs(slopes.reshape(result.shape) - result).max(initial=0)
        worst = max(worst, float(error / max(np.abs(slopes).max(initial=0), 1e-3)))
    return worst


# Recognising a mistake.

def recognise(task: Task, outcomes: dict[str, Outcome], arguments: dict[str, tuple], failed: str) -> str:
    """The hint of the mistake that gives these outcomes, or of two mistakes; "" if there is none.

    failed: the case in which the first wrong number was. A mistake that gives the same numbers there, though not in all
    cases, is named last, as a possibility.
    """
    def outcomes_of(*mistakes):
        function = variant(task, *mistakes)
        return {words: observe(task, function, values) for words, values in arguments.items()}

    if all(outcome.results is None for outcome in outcomes.values()):
        return ""
    single = {mistake: outcomes_of(mistake) for mistake in task.mistakes}
    for mistake, theirs in single.items():
        if _all_same(task, outcomes, theirs):
            return f"Hint: {mistake.hint}"
    for two in itertools.combinations(task.mistakes, 2):
        if _fit(task, *two) and _all_same(task, outcomes, outcomes_of(*two)):
            return "Hint: two mistakes at once.\n" + "\n".join(f"  - {mistake.hint}" for mistake in two)
    likely = [mistake.hint for mistake, theirs in single.items()
              if outcomes[failed].results is not None and same(task, outcomes[failed], theirs[failed])]
    return f"Perhaps, because it gives the same numbers in this case: {likely[0]}" if len(likely) == 1 else ""


def _all_same(task, a, b):
    return all(same(task, a[words], b[words]) for words in a)


def _fit(task, one: Mistake, other: Mistake):
    """Whether two replacements do not touch each other."""
    try:
        variant(task, one, other)
        variant(task, other, one)
    except (ValueError, SyntaxError):
        return False
    return True


# Grading.

def _inputs(task, arguments):
    """The arguments of a case in words: small ones by value."""
    parts = []
    for name, x in zip(task.arguments, arguments):
        if not isinstance(x, np.ndarray):
            parts.append(f"{name} = {x!r}")
        elif x.size <= SHOWN:
            parts.append(f"{name} = {np.array2string(x, separator=', ', precision=4)}".replace("\n", ""))
        else:
            parts.append(f"{name} {x.shape}")
    return ", ".join(parts)


def grade(task: Task, function: Callable, path: str = "", at: Callable[[str], None] = lambda words: None,
          found: Callable[[Verdict], None] = lambda verdict: None) -> Verdict:
    """The verdict on a function.

    at     is told in words what is being computed, before each call
    found  is told a first verdict, before the search for the mistake
    """
    arguments = {**cases(task), **golden.cases(task)}
    outcomes = {}
    error = 0.0
    for words, values in arguments.items():
        at(f'in the case "{words}"')
        expected = golden.expected(task) if words in golden.cases(task) else as_arrays(task.expected(*copies(values)))
        outcomes[words] = outcome = observe(task, function, values, path)
        if outcome.raised == "NotImplementedError":
            return Verdict(False, "not begun: the function still has its hole", begun=False)
        if (problem := _problem(task, outcome, expected, values)) is not None:
            return _wrong(task, function, path, arguments, words, outcomes, problem, found)
        if task.scalar is not None:
            error = max(error, difference_error(task, values, expected))
    at("when the properties are computed, after all cases")
    try:
        parts = list(task.properties(function)) if task.properties else []
    except (Exception, SystemExit) as raised:
        return Verdict(False, f"right in all cases; computing a property, it raises {_of_error(raised, path)}")
    for part in parts:
        if (text := _broken(part)):
            return Verdict(False, text)
    return Verdict(True, _praise(task, len(arguments), error, [part.statement for part in parts]))


def _wrong(task, function, path, arguments, words, outcomes, problem, found):
    outcome = outcomes[words]
    lines = [f'wrong in the case "{words}": {problem}', *(f"NumPy warned: {text}" for text in outcome.warnings)]
    names = ", ".join(task.arguments) + "," * (len(task.arguments) == 1)
    end = [f"The inputs: {_inputs(task, arguments[words])}",
           f'To try it: from minilm.exercises import inputs; {names} = inputs("{task.name}", "{words}")']
    found(Verdict(False, "\n".join(lines + end)))
    for other, values in arguments.items():
        if other not in outcomes:
            outcomes[other] = observe(task, function, values, path)
    hint = recognise(task, outcomes, arguments, words)
    return Verdict(False, "\n".join(lines + [hint] * bool(hint) + end))


def _broken(part):
    """What is wrong with a Property, or "" """
    got = np.asarray(part.got, float)
    expected = np.asarray(part.expected, float)
    scale = max(np.abs(expected).max(initial=0), 1.0)
    wrong = ~(np.abs(got - expected) <= part.tolerance * scale)
    if not wrong.any():
        return ""
    place = tuple(map(int, np.argwhere(wrong)[0]))
    where = f"number [{', '.join(map(str, place))}]" if place else "it"
    return (f"all numbers are right, but this does not hold: {part.statement}. {where} is {got[place].item()!r}; "
            f"expected {expected[place].item()!r}")


def _praise(task, count, error, statements):
    lines = [f"solved: right in {count} cases"]
    if task.scalar is not None:
        lines[0] += f", and equal to finite differences (largest error {error:.0e})"
    lines += [f"It holds: {statement}" for statement in statements]
    return "\n".join([*lines, f"In minilm: {task.read}"])
