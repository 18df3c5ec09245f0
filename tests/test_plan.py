"""minilm/stages/plan.py: each step has the caller's examples and rate, in every stage, also after a resume."""
import numpy as np
import pytest

from helpers import small_transformer
from minilm.model import RewardModel
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState

N = 6
PROMPTS = [[1, i] for i in range(N)]
CHOSEN = [[2, i, 3] for i in range(N)]
REJECTED = [[4, i] for i in range(N)]
BATCHES = [[0, 5, 2], [1, 3, 4], [2], [5, 5]]


def state_of(stage):
    model = small_transformer(np.random.default_rng(0))
    if stage == "reward model":
        model = RewardModel(model, np.random.default_rng(1))
    return TrainState(model, np.random.default_rng(2), betas=(0.9, 0.999), weight_decay=0.0)


def start(stage, state, steps=4, rows=range(N), **options):
    """A stage on the examples at these places."""
    prompts, chosen, rejected = ([side[i] for i in rows] for side in (PROMPTS, CHOSEN, REJECTED))
    if stage == "SFT":
        return train_sft(state, prompts, chosen, steps, 3, **options)
    if stage == "reward model":
        return train_reward_model(state, prompts, chosen, rejected, steps, 3, **options)
    reference = small_transformer(np.random.default_rng(0))
    if stage == "RLHF":
        return train_rlhf(state, reference, lambda prompts, responses: [p[1] + len(r) / 7 for p, r in zip(
            prompts, responses)], prompts, steps, 3, 2, 3, 0, **options)
    sides = [reference_log_probs(reference, prompts, side) for side in (chosen, rejected)]
    return train_dpo(state, prompts, chosen, rejected, *sides, steps, 3, **options)


every_stage = pytest.mark.parametrize("stage", ["SFT", "reward model", "DPO", "RLHF"])


def weights(state):
    return np.concatenate([p.data.reshape(-1) for p in state.model.parameters().values()])


@every_stage
def test_each_step_trains_on_the_examples_of_its_batch(stage):
    state = state_of(stage)
    assert len(list(start(stage, state, learning_rate=lambda step: 0.01, batches=BATCHES))) == 4
    other = state_of(stage)
    for batch in BATCHES:               # the same examples as a data set of their own
        other.step = 0
        places = list(range(len(batch)))
        list(start(stage, other, 1, batch, learning_rate=lambda step: 0.01, batches=[places]))
    np.testing.assert_allclose(weights(state), weights(other), rtol=1e-12, atol=1e-14)
    assert abs(weights(state) - weights(state_of(stage))).max() > 1e-3


@every_stage
def test_the_rate_of_each_step_is_what_the_function_gives(stage):
    steps = start(stage, state_of(stage), learning_rate=lambda step: 0.1 / 2 ** step)
    assert [metrics["learning_rate"] for metrics in steps] == [0.1, 0.05, 0.025, 0.0125]


@every_stage
def test_a_stage_that_goes_on_takes_the_batches_that_are_left(stage):
    def part(state, steps):
        stages = start(stage, state, learning_rate=lambda step: 0.01 / (1 + step), batches=BATCHES)
        return [next(stages) for _ in range(steps)]
    whole = state_of(stage)
    part(whole, 4)
    halves = state_of(stage)
    part(halves, 2)
    part(halves, 2)
    assert (weights(whole) == weights(halves)).all()


@every_stage
def test_a_batch_of_several_shards_is_the_whole_batch(stage):
    results = []
    for microbatches in (1, 2, 5):
        state = state_of(stage)
        losses = [metrics["loss"] for metrics in start(stage, state, microbatches=microbatches, batches=BATCHES)]
        results.append([*losses, *weights(state)])
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-9, atol=1e-12)


@every_stage
@pytest.mark.parametrize("batches, error, message", [
    (BATCHES[:3], ValueError, "one for each of 4 steps"), ("0123", ValueError, "one for each of 4 steps"),
    ([*BATCHES[:3], []], (TypeError, ValueError), r"batches\[3\]"),
    ([*BATCHES[:3], [6]], IndexError, r"batches\[3\] holds 6; it must hold integers from 0 to 5"),
    ([*BATCHES[:3], [0.5]], TypeError, r"batches\[3\]"), ([*BATCHES[:3], 2], (TypeError, ValueError), r"batches\[3\]")])
def test_other_batches_raise_before_the_first_step(stage, batches, error, message):
    with pytest.raises(error, match=message):
        start(stage, state_of(stage), batches=batches)


@every_stage
def test_a_rate_below_0_or_nan_raises_with_its_step(stage):
    for bad in (-1.0, float("nan"), "fast"):
        with pytest.raises((TypeError, ValueError), match="step 2: learning_rate"):
            list(start(stage, state_of(stage), learning_rate=lambda step: 0.1 if step == 0 else bad))


# Several updates on each batch of samples.

def prompts_asked(*calls, updates, batches):
    """The last tokens of the prompts that the reward function gets, draw by draw, in calls of RLHF one after another
    that end after these steps; and the state."""
    state, asked = state_of("RLHF"), []
    reference = small_transformer(np.random.default_rng(0))

    def reward(prompts, responses):
        asked.append([prompt[1] for prompt in prompts[::2]])
        return [float(len(response)) for response in responses]
    for steps in calls:
        list(train_rlhf(state, reference, reward, PROMPTS, steps, 3, 2, 3, 0, updates=updates, batches=batches))
    return asked, state


@pytest.mark.parametrize("updates, steps", [(1, 4), (2, 7), (2, 8), (3, 10)])
def test_with_several_updates_there_is_one_batch_for_each_batch_of_samples(updates, steps):
    asked, state = prompts_asked(steps, updates=updates, batches=BATCHES)
    assert asked == BATCHES and state.step == steps
    with pytest.raises(ValueError, match="one for each of 4 " + ("steps" if updates == 1 else
                                                               f"batches of samples, {updates} steps each")):
        prompts_asked(steps, updates=updates, batches=BATCHES[:3])


def test_a_call_that_starts_between_two_batches_of_samples_draws_for_the_steps_that_are_left():
    """The first call ends after one of the three updates on the second batch: the next call draws to its prompts."""
    asked, state = prompts_asked(4, 10, updates=3, batches=BATCHES)
    assert asked == [BATCHES[0], BATCHES[1], BATCHES[1], BATCHES[2], BATCHES[3]] and state.step == 10


def test_a_call_that_starts_at_a_batch_of_samples_continues_bit_for_bit():
    _, whole = prompts_asked(6, updates=2, batches=None)
    state = state_of("RLHF")
    reference = small_transformer(np.random.default_rng(0))
    for _ in range(3):
        next(train_rlhf(state, reference, lambda p, responses: [float(len(r)) for r in responses], PROMPTS, 6, 3, 2, 3,
                        0, updates=2))
    assert state.step == 6 and (weights(state) == weights(whole)).all()
