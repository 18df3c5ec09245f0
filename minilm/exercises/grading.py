"""Grades a function: the first number that is wrong, finite differences, and the mistake that gives this number.

A function is called in every case of its task, on copies of the arguments. What a call does is an Outcome. Two
functions with the same Outcomes in all cases make the same mistake: that is how one of task.mistakes is recognised.
"""

import dataclasses
import shlex
import warnings
from collections.abc import Callable

import numpy as np

from minilm.exercises.differences import difference_error
from minilm.exercises.outcome import Outcome, close, in_words, observe
from minilm.exercises.recognise import recognise
from minilm.exercises.reference import Reference
from minilm.exercises.task import Property, Task

RIGHT_BUT = "the numbers are right, but"
SHOWN = 12              # an argument with at most so many numbers is printed


@dataclasses.dataclass(frozen=True)
class Verdict:
    """begun: the hole has been filled. text: what the student reads; its first line alone says what is wrong."""

    solved: bool
    text: str
    begun: bool = True


NOT_BEGUN = Verdict(False, "not begun: the function still has its hole", begun=False)


# One call.

def _problem(reference, words, outcome):
    """What is wrong with the outcome in a case, in words; None if it is right."""
    task = reference.task
    if outcome.results is None:
        return outcome.problem
    for i, (name, got, right) in enumerate(zip(task.returns, outcome.results, reference.expected[words])):
        if got.shape != right.shape:
            return f"{name} has shape {got.shape}; it must be {right.shape}"
        if right.dtype.kind in "iu" and got.dtype.kind not in "iu":
            return f"{name} holds {got.dtype}; it must hold integers"
        wrong = ~close(task, got, right)
        if wrong.any():
            place = tuple(map(int, np.argwhere(wrong)[0]))
            return _wrong_number(reference, words, i, place, got) + _of_dtype(got, right)
    if outcome.changed:
        names, them = _changed(outcome)
        return (f"{RIGHT_BUT} your function changed its {names}: the caller still needs {them}. "
                "Look for an operation in place (-=, *=, out=, an assignment to a part) and work on a new array")
    return None


def _wrong_number(reference, words, i, place, got):
    task = reference.task
    name = task.returns[i]
    where = f"number [{', '.join(map(str, place))}] of {name}" if place else name
    right = _positive_zero(reference.expected[words][i][place]).item()
    if got.dtype == bool and right in (0, 1):               # a mask of either kind
        right = bool(right)
    text = f"{where} is {_positive_zero(got[place]).item()!r}; expected {right!r}"
    if task.scalar is not None:
        slope = _positive_zero(reference.slopes[words][i][place])
        text += f". By finite differences, (L({task.wrt[i]} + h) - L({task.wrt[i]} - h)) / 2h, it is {slope:.8g}"
    return text


def _positive_zero(x):
    """Numbers to be printed: -0.0 as 0.0."""
    return np.where(x == 0, np.zeros_like(x), x)


def _changed(outcome):
    """The arguments that a function has overwritten, and their pronoun."""
    several = len(outcome.changed) > 1
    return f"argument{'s' * several} {' and '.join(outcome.changed)}", "them" if several else "it"


def _of_dtype(got, right):
    if right.dtype == np.float64 and got.dtype in (np.float32, np.float16):
        return f". It holds {got.dtype}, which rounds; compute in float64"
    if right.dtype == np.float64 and got.dtype.kind == "i" and right.size:
        return ". It holds integers: was it made of integers, and so rounded?"
    return ""


# Grading.

def _inputs(task, arguments):
    """The arguments of a case in words: small ones by value."""
    parts = []
    for name, x in zip(task.arguments, arguments):
        if not isinstance(x, np.ndarray):
            parts.append(f"{name} = {x!r}")
        elif x.size <= SHOWN:
            numbers = np.array2string(_positive_zero(x), separator=", ", precision=4)
            parts.append(f"{name} = {numbers}".replace("\n", ""))
        else:
            parts.append(f"{name} {x.shape}")
    return ", ".join(parts)


def grade(task: Task, function: Callable, path: str = "", at: Callable[[str], None] = lambda words: None,
          found: Callable[[Verdict], None] = lambda verdict: None, reference: Reference | None = None) -> Verdict:
    """The verdict on a function.

    at         is told in words what is being computed, before each call
    found      is told a first verdict, before the search for the mistake
    reference  of the task; a new one by default
    """
    reference = reference or Reference(task)
    arguments = reference.arguments
    outcomes: dict[str, Outcome] = {}
    for words, values in arguments.items():
        at(f'in the case "{words}"')
        outcomes[words] = observe(task, function, values, path)
        if (problem := _problem(reference, words, outcomes[words])) is not None:
            first = Wrong(words, problem, path)
            found(first.verdict(task, outcomes[words], values))
            for other in [case for case in arguments if case not in outcomes]:
                outcomes[other] = observe(task, function, arguments[other], path)
            if all(outcome.raised == "NotImplementedError" for outcome in outcomes.values()):
                return Verdict(False, f"not begun: {problem}: this line of the hole is still reached. Delete it when "
                               "your code is written", begun=False)
            hint = recognise(reference, function, outcomes, words)
            return first.verdict(task, outcomes[words], values, hint)
    at("when the properties are computed, after all cases")
    return _properties(reference, function, path)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """The first case in which something is wrong, and what, in words."""

    case: str
    problem: str
    path: str

    def verdict(self, task: Task, outcome: Outcome, arguments: tuple, hint: str = "") -> Verdict:
        lines = [f'wrong in the case "{self.case}": {self.problem}']
        lines += [f"NumPy warned: {text}" for text in outcome.warnings]
        if outcome.changed and RIGHT_BUT not in self.problem:
            lines.append(f"It also changes its {_changed(outcome)[0]}, which the caller still needs.")
        end = [f"The inputs: {_inputs(task, arguments)}",
               f"To try it:\n    python -i {shlex.quote(self.path or 'FILE')}",
               "    from minilm.exercises import inputs", f'    {task.name}(*inputs("{task.name}", "{self.case}"))']
        return Verdict(False, "\n".join([*lines, *[hint] * bool(hint), *end]))


def _properties(reference, function, path):
    """The verdict on a function that is right in all cases."""
    task = reference.task
    try:
        with warnings.catch_warnings(), np.errstate():          # what the function sets ends here
            parts = list(task.properties(function)) if task.properties else []
    except BaseException as raised:
        return Verdict(False, f"right in all cases; computing a property, it raises {in_words(raised, path)}")
    for part in parts:
        if (text := broken(part)):
            return Verdict(False, text)
    lines = [f"solved: right in {len(reference.arguments)} cases"]
    if task.scalar is not None:
        error = max(difference_error(reference.slopes[words], results) for words, results in reference.expected.items())
        lines[0] += f", and equal to finite differences (largest error {error:.0e})"
    lines += [f"It holds: {part.statement}" for part in parts]
    return Verdict(True, "\n".join([*lines, f"In minilm: {task.read}"]))


def broken(part: Property) -> str:
    """What is wrong with a Property; "" if it holds."""
    got = np.asarray(part.got, float)
    expected = np.asarray(part.expected, float)
    scale = max(np.abs(expected).max(initial=0), 1.0)
    error = got - expected if part.at_most else np.abs(got - expected)
    wrong = ~(error <= part.tolerance * scale)
    if not wrong.any():
        return ""
    place = tuple(map(int, np.argwhere(wrong)[0]))
    where = f"number [{', '.join(map(str, place))}]" if place else part.quantity
    return (f"all numbers are right, but this does not hold: {part.statement}: {where} is {got[place].item()!r}, and "
            f"must be {'at most ' * part.at_most}{expected[place].item()!r}")
