"""Which examples a step trains on, and at which rate: random ones after a warm-up, or those that the caller gives.

batches        for each step the places of its examples in the data set, or None: drawn at random, with replacement.
               In RLHF with several updates on a batch of samples, an entry is for `updates` steps: that of a step is
               batches[step // updates]
learning_rate  the peak of optim.warmup_cosine, or a function of the step (from 0) that gives its rate
Tests: tests/test_plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilm import checks
from minilm.optim import warmup_cosine

Rate = float | Callable[[int], float]


def check_batches(function: str, steps: int, batches: Sequence | None, count: int, updates: int = 1) -> None:
    """Raises ValueError, TypeError or IndexError for fewer batches than one for every `updates` steps, and for a
    batch, named by its place, that is empty or holds another place than 0 .. count - 1."""
    if batches is None:
        return
    needed = -(-steps // updates)                           # rounded up
    if isinstance(batches, (str, bytes)) or not hasattr(batches, "__getitem__") or len(batches) < needed:
        of = "steps" if updates == 1 else f"batches of samples, {updates} steps each"
        raise ValueError(f"{function}: batches is {checks.shown(batches)}; it must be a list of lists of places in the "
                         f"data set, one for each of {needed} {of}")
    for i, batch in enumerate(batches):
        if checks.indices(function, f"batches[{i}]", batch, count).ndim != 1 or len(batch) == 0:
            raise ValueError(f"{function}: batches[{i}] is {checks.shown(batch)}; it must be a list of at least one "
                             "place in the data set")


def examples(state: Any, batches: Sequence | None, count: int, size: int, updates: int = 1) -> np.ndarray:
    """The places of this step's examples: batches[step // updates], or `size` random ones out of count."""
    if batches is None:
        return state.rng.integers(count, size=size)
    return np.asarray(batches[state.step // updates])


def rate(state: Any, learning_rate: Rate, steps: int, warmup: int, floor: float = 0.1) -> float:
    """The learning rate of this step. The warm-up takes a tenth of the steps, at most `warmup`."""
    if callable(learning_rate):
        return learning_rate(state.step)
    return warmup_cosine(state.step, steps, learning_rate, min(warmup, steps // 10 + 1), floor)
