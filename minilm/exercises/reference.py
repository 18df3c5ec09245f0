"""What our own code computes for a task: the numbers that a student's function is compared with.

The student's file runs in the same process and may change NumPy (np.exp = ...). So process.py asks for all parts before
it runs the file.
"""

import functools
import itertools

import numpy as np

from minilm.exercises import golden
from minilm.exercises.differences import slopes
from minilm.exercises.outcome import Outcome, as_arrays, observe
from minilm.exercises.task import Mistake, Task, cases, copies, variant

Arrays = tuple[np.ndarray, ...]


class Reference:
    """The cases of a task by their words, the right results, and what its mistakes give in each case.

    A part is computed when it is first needed, and kept.
    """

    def __init__(self, task: Task):
        self.task = task

    @functools.cached_property
    def arguments(self) -> dict[str, tuple]:
        """The arguments of each case; the last one is the golden vector, if there is one."""
        return {**cases(self.task), **golden.cases(self.task)}

    @functools.cached_property
    def expected(self) -> dict[str, Arrays]:
        """The right results of each case."""
        found = {words: as_arrays(self.task.expected(*copies(values))) for words, values in cases(self.task).items()}
        return {**found, **{words: golden.expected(self.task) for words in golden.cases(self.task)}}

    @functools.cached_property
    def slopes(self) -> dict[str, Arrays]:
        """The results of each case by finite differences of the task's scalar. Empty without a scalar."""
        if self.task.scalar is None:
            return {}
        return {words: slopes(self.task, values, self.expected[words]) for words, values in self.arguments.items()}

    @functools.cached_property
    def single(self) -> dict[Mistake, dict[str, Outcome]]:
        """What each mistake gives in each case."""
        return {mistake: self._outcomes(mistake) for mistake in self.task.mistakes}

    @functools.cached_property
    def double(self) -> dict[tuple[Mistake, Mistake], dict[str, Outcome]]:
        """What two mistakes at once give, for all pairs that fit together."""
        pairs = itertools.combinations(self.task.mistakes, 2)
        return {two: self._outcomes(*two) for two in pairs if fit(self.task, *two)}

    def _outcomes(self, *mistakes):
        function = variant(self.task, *mistakes)
        return {words: observe(self.task, function, values) for words, values in self.arguments.items()}

    def complete(self) -> "Reference":
        """The same, with all parts computed."""
        for name in ("arguments", "expected", "slopes", "single", "double"):
            getattr(self, name)
        return self


def fit(task: Task, one: Mistake, other: Mistake) -> bool:
    """Whether two replacements do not touch each other."""
    try:
        variant(task, one, other)
        variant(task, other, one)
    except (ValueError, SyntaxError):
        return False
    return True
