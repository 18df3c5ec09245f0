"""Which mistake gives these numbers: one of the task's, two of them, or what the numbers alone show."""

from collections.abc import Callable

import numpy as np

from minilm.exercises.outcome import Outcome, close, observe, same
from minilm.exercises.reference import Reference

NEAR = 1e-5             # of the largest number: digits are lost, the formula is right

Pair = tuple[np.ndarray, np.ndarray]


def recognise(reference: Reference, function: Callable, outcomes: dict[str, Outcome], failed: str) -> str:
    """Why a wrong function gives these outcomes, in words; "" if nothing is known. The surest statement is taken.

    failed: the case in which the first wrong number was.
    """
    return (_known(reference, outcomes) or _unstable(reference, function, outcomes[failed], failed)
            or _in_every_case(reference, outcomes, failed) or _possible(reference, outcomes, failed)
            or _overflow(outcomes[failed]) or _in_this_case(reference, outcomes, failed))


# Mistakes of the task's list.

def _known(reference, outcomes):
    """The mistake, or the two mistakes, that give these outcomes in all cases."""
    if all(outcome.results is None for outcome in outcomes.values()):
        return ""
    task = reference.task
    for mistake, theirs in reference.single.items():
        if _all_same(task, outcomes, theirs):
            return f"Hint: {mistake.hint}"
    for two, theirs in reference.double.items():
        if _all_same(task, outcomes, theirs):
            return "Hint: two mistakes at once.\n" + "\n".join(f"  - {mistake.hint}" for mistake in two)
    return ""


def _all_same(task, a, b):
    return all(same(task, a[words], b[words]) for words in a)


def _possible(reference, outcomes, failed):
    """The mistakes that give the same numbers in the failed case, and are wrong in no case where these are right.

    Of several, those that give the same numbers in the most cases: at most three are named.
    """
    task = reference.task
    if outcomes[failed].results is None:
        return ""
    right = {words: Outcome(results) for words, results in reference.expected.items()}
    solved = [words for words in outcomes if same(task, outcomes[words], right[words])]
    likely: dict[str, int] = {}
    for mistake, theirs in reference.single.items():
        if same(task, outcomes[failed], theirs[failed]) and all(same(task, theirs[w], right[w]) for w in solved):
            cases = sum(same(task, outcomes[words], theirs[words]) for words in outcomes)
            likely[mistake.hint] = max(cases, likely.get(mistake.hint, 0))
    best = [hint for hint, cases in likely.items() if cases == max(likely.values())]
    if len(best) == 1:
        return f"Perhaps, because it gives the same numbers in this case: {best[0]}"
    if 2 <= len(best) <= 3:
        return "Perhaps one of these, which give the same numbers in this case:\n" + "\n".join(f"  - {h}" for h in best)
    return ""


# Without a list of mistakes.

def _unstable(reference, function, outcome, failed):
    if outcome.results is None or same(reference.task, outcome,
                                       observe(reference.task, function, reference.arguments[failed])):
        return ""
    return ("Two calls with the same arguments give different results: the function must have no randomness and no "
            "memory of earlier calls.")


def _overflow(outcome):
    if not any("overflow encountered in exp" in text for text in outcome.warnings):
        return ""
    return "exp of a number above 709 is infinite in float64. Change the formula so that exp gets none."


def _in_every_case(reference, outcomes, failed):
    """The relation of the first wrong result to the right one, if all cases have the same."""
    name, pairs = _pairs(reference, outcomes, failed)
    if not pairs or None in pairs.values() or sum(right.size for _, right in pairs.values()) < 2:
        return ""
    for relation in (_digits, _factor, _term):
        if found := relation(reference.task, name, list(pairs.values())):
            return f"In every case {found[0]}{found[1]}."
    return ""


def _in_this_case(reference, outcomes, failed):
    """The same of the failed case alone: numbers that happen to be proportional there. One number is no evidence."""
    name, pairs = _pairs(reference, outcomes, failed)
    if not pairs or pairs[failed] is None or pairs[failed][1].size < 2:
        return ""
    for relation in (_digits, _factor, _term):
        if found := relation(reference.task, name, [pairs[failed]]):
            for words, pair in pairs.items():
                if pair is None or not relation(reference.task, name, [pairs[failed], pair]):
                    return f'In this case {found[0]}, but not in the case "{words}".'
    return ""


def _pairs(reference, outcomes, failed):
    """The name of the result that is wrong first, and (its numbers, the right ones) in each case, flat; or None where
    they cannot be compared. ("", {}) if no result of the right shape is wrong."""
    task = reference.task
    for i, (name, right) in enumerate(zip(task.returns, reference.expected[failed])):
        got = (outcomes[failed].results or reference.expected[failed])[i]
        if got.shape == right.shape and not close(task, got, right).all():
            return name, {words: _flat(outcomes[words].results, results, i)
                          for words, results in reference.expected.items()}
    return "", {}


def _flat(results, expected, i):
    if results is None or results[i].shape != expected[i].shape or not np.isfinite((results[i], expected[i])).all():
        return None
    return results[i].ravel().astype(float), expected[i].ravel().astype(float)


def _digits(task, name, pairs):
    errors = [np.abs(got - right).max(initial=0) / (np.abs(right).max(initial=0) or 1) for got, right in pairs]
    if not 0 < max(errors) <= NEAR:
        return None
    return (f"{name} is right to about {-np.log10(max(errors)):.0f} digits", ". Digits are lost where nearly equal "
            "numbers are subtracted, in float32, or by a small constant such as 1e-8")


def _factor(task, name, pairs):
    square = sum(right @ right for _, right in pairs)
    factor = sum(got @ right for got, right in pairs) / (square or 1)
    if not factor or not all(close(task, got, factor * right).all() for got, right in pairs):
        return None
    return (f"{name} is {factor:.6g} times the right {name}",
            ": the sign is reversed" if abs(factor + 1) < 1e-9 else ": look for a factor")


def _term(task, name, pairs):
    term = np.concatenate([got - right for got, right in pairs]).mean()
    if not all(close(task, got, right + term).all() for got, right in pairs):
        return None
    return f"{name} is too {'large' if term > 0 else 'small'} by {abs(term):.6g}", ": look for a term"
