"""Which mistake gives these numbers: one of the task's, two of them, or what the numbers alone show."""

from collections.abc import Callable

import numpy as np

from minilm.exercises.outcome import Outcome, close, observe, same
from minilm.exercises.reference import Reference

NEAR = 1e-5             # of the largest number: digits are lost, the formula is right


def recognise(reference: Reference, outcomes: dict[str, Outcome], failed: str) -> str:
    """The hint of the mistake that gives these outcomes, or of two mistakes; "" if there is none.

    failed: the case in which the first wrong number was. A mistake that gives the same numbers there, though not in all
    cases, is named last, as a possibility.
    """
    task = reference.task
    if all(outcome.results is None for outcome in outcomes.values()):
        return ""
    for mistake, theirs in reference.single.items():
        if _all_same(task, outcomes, theirs):
            return f"Hint: {mistake.hint}"
    for two, theirs in reference.double.items():
        if _all_same(task, outcomes, theirs):
            return "Hint: two mistakes at once.\n" + "\n".join(f"  - {mistake.hint}" for mistake in two)
    likely = [mistake.hint for mistake, theirs in reference.single.items()
              if outcomes[failed].results is not None and same(task, outcomes[failed], theirs[failed])]
    return f"Perhaps, because it gives the same numbers in this case: {likely[0]}" if len(likely) == 1 else ""


def _all_same(task, a, b):
    return all(same(task, a[words], b[words]) for words in a)


# Without a list of mistakes.

def in_general(reference: Reference, function: Callable, outcomes: dict[str, Outcome], failed: str) -> list[str]:
    """What the numbers of a wrong function show by themselves, in sentences."""
    task = reference.task
    outcome = outcomes[failed]
    if outcome.results is None:
        return []
    if not same(task, outcome, observe(task, function, reference.arguments[failed])):
        return ["Two calls with the same arguments give different results: the function must have no randomness and no "
                "memory of earlier calls."]
    if any("overflow encountered in exp" in text for text in outcome.warnings):
        return ["exp of a number above 709 is infinite in float64. Change the formula so that exp gets none."]
    for i, (name, result, right) in enumerate(zip(task.returns, outcome.results, reference.expected[failed])):
        if result.shape == right.shape and not close(task, result, right).all():
            text = _relation(name, *_numbers(outcomes, reference.expected, i, failed))
            return [text] if text else []
    return []


def _numbers(outcomes, expected, i, failed):
    """Result i and what it must be, flat: of the failed case; of all cases, if it is one number."""
    cases = [failed] if expected[failed][i].size > 1 else [*outcomes]
    pairs = [(outcomes[words].results[i], expected[words][i]) for words in cases if outcomes[words].results is not None]
    pairs = [pair for pair in pairs if pair[0].shape == pair[1].shape and np.isfinite(pair).all()]
    flat = [np.concatenate([np.zeros(0), *(np.ravel(pair[side]) for pair in pairs)]) for side in (0, 1)]
    return flat[0], flat[1]


def _relation(name, got, right):
    """A sentence if all numbers are almost right, or wrong by one factor or one term; "" otherwise."""
    largest = np.abs(right).max(initial=0)
    error = np.abs(got - right).max(initial=0)
    if got.size < 2 or not error or not largest or not got.any():
        return ""
    if error <= NEAR * largest:
        return (f"All numbers of {name} are right to about {-np.log10(error / largest):.0f} digits. Digits are lost "
                "where nearly equal numbers are subtracted, in float32, or by a small constant such as 1e-8.")
    factor = (got @ right) / (right @ right)
    if np.abs(got - factor * right).max() <= 1e-9 * largest:
        sign = ": the sign is reversed" if abs(factor + 1) < 1e-9 else ": look for a factor"
        return f"All numbers of {name} are {factor:.6g} times the right ones{sign}."
    term = (got - right).mean()
    if np.abs(got - right - term).max() <= 1e-9 * largest:
        return f"All numbers of {name} are too large by {term:.6g}: look for a term."
    return ""
