"""Early stopping: run a stage to its end and keep the weights with the lowest held-out loss.

Tests: tests/test_early_stopping.py.
"""

from collections.abc import Callable, Iterable

import numpy as np

from minilm import checks
from minilm.model import RewardModel, Transformer


def keep_best(stage: Iterable[dict], model: Transformer | RewardModel, held_out_loss: Callable[[], float],
              every: int = 20) -> tuple[float, int]:
    """Run a stage that trains `model`, then restore the weights that had the lowest held_out_loss().

    stage          a generator of metrics, one per step, like those of minilm.stages
    held_out_loss  is called every `every` steps and after the last one
    Returns the lowest loss and its step (0 for a stage without steps, which changes nothing).
    """
    checks.integer("keep_best", "every", every, at_least=1)
    lowest = np.inf
    best_step = 0
    step = 0
    weights = {}

    def check():
        nonlocal lowest, best_step
        if (loss := held_out_loss()) < lowest:
            lowest = loss
            best_step = step
            weights.update({name: p.data.copy() for name, p in model.parameters().items()})

    for step, _ in enumerate(stage, 1):
        if step % every == 0:
            check()
    if step % every:
        check()
    for name, p in model.parameters().items():
        p.assign(weights.get(name, p.data))
    return lowest, best_step
