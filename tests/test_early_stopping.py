"""Early stopping: the weights with the lowest held-out loss are restored."""
import types

import numpy as np
import pytest

from common.early_stopping import keep_best
from minilm.tensor import Tensor


def counting(steps):
    """A model whose one weight is the number of steps taken, and the stage that takes them."""
    weight = Tensor(np.zeros(2), requires_grad=True)

    def stage():
        for _ in range(steps):
            weight.data += 1
            yield {}

    return types.SimpleNamespace(parameters=lambda: {"weight": weight}), stage(), weight


@pytest.mark.parametrize("steps, every, where_least, kept",
                         [(10, 2, 4, 4), (10, 2, 5, 6), (10, 3, 99, 10), (10, 3, 0, 3), (7, 20, 0, 7)])
def test_the_weights_of_the_lowest_checked_loss_are_restored_including_the_last_step(steps, every, where_least, kept):
    model, stage, weight = counting(steps)
    least, step = keep_best(stage, model, lambda: (weight.data[0] - where_least - 0.1) ** 2, every)
    assert step == kept and (weight.data == kept).all()
    assert least == (kept - where_least - 0.1) ** 2


def test_the_loss_is_checked_every_n_steps_and_once_at_the_end():
    model, stage, weight = counting(50)
    seen = []
    keep_best(stage, model, lambda: seen.append(int(weight.data[0])) or 1.0, every=20)
    assert seen == [20, 40, 50] and (weight.data == 20).all()          # the first of equal losses


def test_a_stage_without_steps_or_with_nan_losses_restores_nothing():
    for steps in 0, 3:
        model, stage, weight = counting(steps)
        assert keep_best(stage, model, lambda: float("nan"), 1) == (np.inf, 0)
        assert (weight.data == steps).all()
