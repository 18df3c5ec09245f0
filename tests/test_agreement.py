"""minilm.stages.agreement: a state that the caller changes in worker 0 alone is named; shared memory is not."""
import inspect
import re
import time

import numpy as np
import pytest

from helpers import small_transformer
from minilm.model import Config
from minilm.optim import AdamW
from minilm.stages.agreement import Agreement, WorkersDisagree, digest
from minilm.stages.dpo import train_dpo
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from test_stages import (
    EOS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    STAGES,
    VOCABULARY,
    assert_same_training,
    every_stage,
    everything,
    make_training,
    transformer,
)

ITSELF = {"pretraining": "pretrain_on_documents", "SFT": "train_sft", "reward model": "train_reward_model",
          "RLHF": "train_rlhf", "DPO": "train_dpo"}


def run(loop, change, at=1):
    """All metrics of a loop; change() is called once in it, after the step `at`."""
    metrics = []
    for step, m in enumerate(loop, 1):
        metrics.append(m)
        if step == at:
            change()
    return metrics


def restore_the_start(training):
    arrays, metadata = training.snapshot()
    start = {name: a.copy() for name, a in arrays.items()}, {**metadata, "step": 0}
    training.restore(*start)


# Changes of the state in the caller's loop, and the name of the fact.
CHANGES = {
    "a draw from the Generator": (lambda t: t.rng.random(), "the Generator's state"),
    "another Generator": (lambda t: setattr(t, "rng", np.random.default_rng(7)), "the Generator's state"),
    "a Generator of another kind": (lambda t: setattr(t, "rng", np.random.Generator(np.random.MT19937(4))),
                                    "the Generator's state"),
    "a seed set again": (lambda t: setattr(t.rng.bit_generator, "state", np.random.default_rng(4).bit_generator.state),
                         "the Generator's state"),
    "weight decay": (lambda t: setattr(t.optimizer, "weight_decay", 1.0), "AdamW's weight_decay: 0.01 there, 1.0"),
    "betas": (lambda t: setattr(t.optimizer, "betas", (0.5, 0.9)), "AdamW's betas: .*0.95.* there, .*0.5, 0.9.*"),
    "eps": (lambda t: setattr(t.optimizer, "eps", 1e-3), "AdamW's eps: 1e-08 there, 0.001 in worker 0"),
    "the learning rate of the optimiser": (lambda t: setattr(t.optimizer, "learning_rate", 1.0),
                                           "AdamW's learning_rate: 0.001 there, 1.0 in worker 0"),
    "one update count": (lambda t: t.optimizer.updates.__setitem__(0, 0), "AdamW's updates of each parameter"),
    "all update counts": (lambda t: t.optimizer.updates.__imul__(0), "AdamW's steps: 1 there, 0 in worker 0"),
    "the step": (lambda t: setattr(t, "step", 0), "the step: 1 there, 0 in worker 0"),
    "the number of workers": (lambda t: setattr(t, "workers", 3), "the number of workers: 2 there, 3 in worker 0"),
    "another array of moments": (lambda t: setattr(t.optimizer, "v", t.optimizer.v * 0.5),
                                 "whether AdamW's m and v are in shared memory: True there, False in worker 0"),
    "a restored state": (restore_the_start, "the step: 1 there, 0 in worker 0"),
}


@every_stage
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_loop_that_runs_a_stage_is_named_with_both_workers_and_both_values(stage, change):
    work, named = CHANGES[change]
    training = make_training(stage, workers=2)
    with pytest.raises(WorkersDisagree, match=f"^{ITSELF[stage]}, after step 1: worker 1 differs from worker 0 in "
                                              f".*{named}"):
        run(STAGES[stage](training, 4), lambda: work(training))


@pytest.mark.parametrize("change", CHANGES)
def test_one_worker_may_change_everything(change):
    training = make_training("SFT")
    run(STAGES["SFT"](training, 3), lambda: CHANGES[change][0](training))
    assert training.step == 3


@every_stage
def test_of_three_workers_the_first_that_differs_is_named_and_nothing_is_updated_afterwards(stage):
    training = make_training(stage, workers=3)
    loop = STAGES[stage](training, 4)
    next(loop)
    training.rng.random()
    before = everything(training)[0]
    with pytest.raises(WorkersDisagree, match="worker 1 differs"):
        next(loop)
    assert everything(training)[0] == before and training.group.active_size == 1


@every_stage
def test_a_stage_can_be_started_again_after_workers_disagreed(stage):
    training = make_training(stage, workers=2)
    with pytest.raises(WorkersDisagree):
        run(STAGES[stage](training, 4), training.rng.random)
    assert len(list(STAGES[stage](training, 4))) == 3 and training.step == 4


@every_stage
def test_a_change_between_two_stages_reaches_every_worker(stage):
    """The stage ends, the caller changes the state, the stage starts again: workers are forked again."""
    trainings = [make_training(stage, workers, np.float64) for workers in (1, 2)]
    metrics = []
    for training in trainings:
        first = next(STAGES[stage](training, 4))
        training.rng.random()
        training.optimizer.weight_decay = 0.5
        metrics.append([first, *STAGES[stage](training, 4)])
    assert_same_training(trainings, metrics)


@every_stage
def test_the_caller_may_read_save_and_write_parameters_and_moments(stage):
    trainings = [make_training(stage, workers, np.float64) for workers in (1, 2)]

    def look(training):
        training.snapshot()
        training.model.parameters()["final_norm"].data[...] *= 0.9
        training.optimizer.m[...] *= 0.5
        np.random.default_rng(3).random()
        np.random.random()
    metrics = [run(STAGES[stage](training, 4), lambda: look(training)) for training in trainings]
    assert_same_training(trainings, metrics)


# Data.

def lists():
    return [[list(tokens) for tokens in side] for side in (PROMPTS, RESPONSES, REJECTED)]


@pytest.mark.parametrize("side", range(2))
def test_examples_that_are_added_in_the_loop_are_named_by_the_length_of_their_list(side):
    training, data = make_training("SFT", workers=2), lists()[:2]
    name = ("prompts", "responses")[side]
    with pytest.raises(WorkersDisagree, match=f"the length of {name}: 7 there, 8 in worker 0"):
        run(train_sft(training, *data, 4, 5), lambda: data[side].append([3, 3]))


@pytest.mark.parametrize("side", range(2))
@pytest.mark.parametrize("how", ["another list", "the same list"])
def test_an_example_that_is_replaced_in_the_loop_is_noticed_at_its_next_draw(side, how):
    training, data = make_training("SFT", workers=2), lists()[:2]

    def replace():
        for i, tokens in enumerate(data[side]):
            if how == "another list":
                data[side][i] = [3, *tokens[1:]]
            else:
                tokens[0] = 3 if tokens[0] != 3 else 4
    with pytest.raises(WorkersDisagree, match="after step 2: .*the batch that was drawn"):
        run(train_sft(training, *data, 4, 5), replace)


def test_arrays_of_tokens_that_change_in_the_loop_are_noticed():
    prompts = np.array([[1, 3, 4], [1, 5, 6]])
    with pytest.raises(WorkersDisagree, match="the batch that was drawn"):
        run(train_sft(make_training("SFT", workers=2), prompts, prompts, 4, 5), lambda: prompts[:, 1].__iadd__(1))


@pytest.mark.parametrize("side", [0, 1])
def test_reference_log_probs_that_change_in_the_loop_are_noticed(side):
    references = [np.full(len(PROMPTS), value, np.float32) for value in (-5, -6)]
    with pytest.raises(WorkersDisagree, match="the batch that was drawn"):
        run(train_dpo(make_training("DPO", workers=2), PROMPTS, RESPONSES, REJECTED, *references, 4, 5),
            lambda: references[side].__imul__(0.5))


@pytest.mark.parametrize("what", ["tokens", "mask"])
def test_a_draw_with_random_numbers_of_its_own_that_the_loop_draws_too_is_noticed(what):
    own = np.random.default_rng(5)

    def draw(rng, count):
        tokens = (own if what == "tokens" else rng).integers(VOCABULARY, size=(count, 6))
        return tokens, np.ones(tokens.shape) if what == "tokens" else own.random(tokens.shape) < 0.8
    training = make_training("pretraining", workers=2)
    with pytest.raises(WorkersDisagree, match="pretrain_on_documents, after step 2: .*the batch that was drawn"):
        run(pretrain_on_documents(training, draw, 4, 5), lambda: draw(np.random.default_rng(0), 5))
    list(pretrain_on_documents(make_training("pretraining", workers=2), draw, 3, 5))      # without the loop's draw


# Models.

def rlhf(training, reference, reward=lambda prompts, answers: [a.count(5) for a in answers]):
    return train_rlhf(training, reference, reward, PROMPTS, 4, 3, 2, 4, EOS)


@pytest.mark.parametrize("name", ["embedding", "blocks.0.gate_up", "final_norm"])
def test_a_reference_that_is_changed_in_the_loop_is_named(name):
    reference = transformer(np.float32)
    with pytest.raises(WorkersDisagree, match="the parameters of reference"):
        run(rlhf(make_training("RLHF", workers=2), reference), lambda: reference.parameters()[name].data.__imul__(0.9))


def test_a_reference_in_memory_that_workers_share_may_be_changed_in_the_loop():
    """The reference was trained with two workers: all of them see the change, so nothing differs."""
    trainings, metrics = [], []
    for workers in (1, 2):
        reference = transformer(np.float64)
        TrainState(reference, np.random.default_rng(0), workers=workers)
        training = make_training("RLHF", workers, np.float64)

        def change():
            time.sleep(0.05)                    # the other worker has listed its facts
            reference.parameters()["embedding"].data[...] *= 0.9
        metrics.append(run(rlhf(training, reference), change))
        trainings.append(training)
    assert_same_training(trainings, metrics)


def test_a_config_that_is_exchanged_in_the_loop_is_named():
    training = make_training("SFT", workers=2)
    config = training.model.config
    changed = Config(**{**vars(config), "norm_eps": 0.1})
    with pytest.raises(WorkersDisagree, match="the model's Config: .*norm_eps=1e-06.* there, .*norm_eps=0.1.* in w"):
        run(STAGES["SFT"](training, 4), lambda: setattr(training.model, "config", changed))


# The reward function runs in worker 0 alone.

def noisy(rng):
    return lambda prompts, answers: rng.random(len(answers))


def test_a_reward_that_draws_from_the_generator_of_the_state_is_named():
    training = make_training("RLHF", workers=2)
    with pytest.raises(WorkersDisagree, match="train_rlhf, after step 1: .*the Generator's state"):
        list(rlhf(training, transformer(np.float32), noisy(training.rng)))


def test_a_reward_with_a_generator_of_its_own_is_the_same_with_one_and_two_workers():
    trainings = [make_training("RLHF", workers, np.float64) for workers in (1, 2)]
    metrics = [list(rlhf(t, transformer(np.float64), noisy(np.random.default_rng(8)))) for t in trainings]
    assert_same_training(trainings, metrics)


# The comparison itself.

def test_the_message_says_what_to_do():
    training = make_training("SFT", workers=2)
    with pytest.raises(WorkersDisagree, match="Use a Generator of your own there, end the stage before a change and "
                                              "start it again after it, or train with workers=1$"):
        run(STAGES["SFT"](training, 4), training.rng.random)


def test_one_message_more_is_sent_only_where_workers_disagree(monkeypatch):
    training = make_training("SFT", workers=2)
    sent, all_gather = [], training.group.all_gather
    monkeypatch.setattr(training.group, "all_gather", lambda value: sent.append(value) or all_gather(value))
    loop = STAGES["SFT"](training, 5)
    next(loop)
    in_a_step = []
    for change in (lambda: None, lambda: None, training.rng.random):
        before = len(sent)
        change()
        try:
            next(loop)
        except WorkersDisagree:
            assert isinstance(sent[-1], dict) and len(sent) == before + 2
        else:
            in_a_step.append(len(sent) - before)
    assert in_a_step[0] == in_a_step[1] and [type(value) for value in sent].count(dict) == 1


@pytest.mark.parametrize("one, other", [
    ([[1, 2], [3]], [[1], [2, 3]]), ([[1, 2]], [[2, 1]]), ([np.arange(3)], [np.arange(1, 4)]),
    ([np.array([True, False])], [np.array([True, True])]), ([np.zeros(2)], [np.zeros(3)]), ([[0]], [[0, 0]]),
], ids=str)
def test_digests_of_different_batches_differ_and_of_equal_ones_agree(one, other):
    assert digest(one) != digest(other)
    assert digest(one) == digest([x.copy() for x in one])


def test_the_digest_of_a_view_is_that_of_its_numbers():
    tokens = np.arange(12).reshape(3, 4)
    for view in (tokens.T, tokens[:, ::2], tokens[::-1]):
        assert digest([view]) == digest([view.copy()])


def test_every_setting_of_adamw_is_compared():
    """A new setting of AdamW must be among the facts."""
    model = small_transformer(np.random.default_rng(0), vocab_size=VOCABULARY)
    facts = " ".join(Agreement("here", TrainState(model, np.random.default_rng(0)), {}).facts())
    for name in set(inspect.signature(AdamW).parameters) - {"parameters", "group"}:
        assert re.search(rf"AdamW's {name}\b", facts), name
