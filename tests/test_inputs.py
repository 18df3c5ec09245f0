"""minilm.stages.inputs: a stage raises for arguments that it cannot train on, when it is called and before a fork."""
import copy
import functools
import inspect
import itertools
import os
import pickle
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import rngs, small_transformer
from minilm import ops
from minilm.data import check_dialogues
from minilm.evaluate import predicted_rewards
from minilm.model import RewardModel, Transformer
from minilm.objectives import dpo
from minilm.optim import AdamW
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.inputs import checked_rewards
from minilm.stages.pretraining import pretrain, pretrain_on_documents
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, shards, stage
from minilm.tensor import Tensor
from test_stages import (
    EOS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    STREAM,
    VOCABULARY,
    every_stage,
    everything,
    fives,
    make_training,
    one_or_two_workers,
    transformer,
)

CONTEXT = 16
REFERENCES = [np.full(len(PROMPTS), value, np.float32) for value in (-5, -6)]


def draw(rng, count):
    return rng.integers(VOCABULARY, size=(count, 6)), np.ones((count, 6))


def stage_of(name, training, **changed):
    """A stage of 2 steps, with some of its arguments changed; a call of it checks them."""
    data = {"prompts": PROMPTS}
    function, arguments = {
        "pretraining": (pretrain, {"stream": STREAM, "batch_size": 5, "length": 6}),
        "documents": (pretrain_on_documents, {"draw": draw, "batch_size": 5}),
        "SFT": (train_sft, {**data, "responses": RESPONSES, "batch_size": 5}),
        "reward model": (train_reward_model, {**data, "chosen": RESPONSES, "rejected": REJECTED, "batch_size": 5}),
        "RLHF": (train_rlhf, {**data, "reference": transformer(np.float32), "reward": fives, "prompts_per_step": 3,
                              "samples_per_prompt": 2, "max_new_tokens": 4, "eos": EOS}),
        "DPO": (train_dpo, {**data, "chosen": RESPONSES, "rejected": REJECTED, "batch_size": 5,
                            "reference_chosen": REFERENCES[0], "reference_rejected": REFERENCES[1]}),
    }[name]
    return function(training, **{"steps": 2, **arguments, **changed})


NAMES = {"pretraining": "pretrain", "documents": "pretrain_on_documents", "SFT": "train_sft",
         "reward model": "train_reward_model", "RLHF": "train_rlhf", "DPO": "train_dpo"}


def refused(name, message, workers=1, error=(TypeError, ValueError, IndexError), **changed):
    """The stage raises when it is called: nothing is drawn, nothing is updated, no process is forked."""
    training = make_training(name, workers)
    before = everything(training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", lambda: pytest.fail("a worker was forked"))
        with pytest.raises(error, match=f"^{NAMES[name]}: {message}"):
            stage_of(name, training, **changed)
    assert everything(training) == before


# Settings.

def settings(name):
    """{setting of a stage: values that are out of range}"""
    counts = [0, -1, 2.0, True, None, "3", np.nan]
    rates = [-0.1, np.nan, np.inf, "1", None, True]
    return {"steps": [-1, 2.0, True, None, np.inf], "learning_rate": rates, "microbatches": [0, -1, 2.0, "1", True],
            **{
                "pretraining": {"batch_size": counts, "length": [*counts, CONTEXT + 1]},
                "documents": {"batch_size": counts},
                "SFT": {"batch_size": counts},
                "reward model": {"batch_size": counts, "centering": rates},
                "RLHF": {"prompts_per_step": counts, "samples_per_prompt": counts, "max_new_tokens": counts,
                         "updates": counts,
                         "beta": rates, "temperature": [0, -1, np.nan, np.inf, 1e-40, "1", None],
                         "eos": [-1, VOCABULARY, 2.0, "eos", [], [2, 99], True]},
                "DPO": {"batch_size": counts, "beta": [*rates, 0]},
            }[name]}


CASES = [(name, setting, value) for name in NAMES for setting, values in settings(name).items() for value in values]


@pytest.mark.parametrize("name, setting, value", CASES, ids=str)
def test_a_setting_out_of_range_is_named_with_its_value_before_the_first_step(name, setting, value):
    refused(name, setting, **{setting: value})


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_settings_has_every_setting_of_the_stage(name):
    """A new setting needs a check."""
    function = {"pretraining": pretrain, "documents": pretrain_on_documents, "SFT": train_sft, "RLHF": train_rlhf,
                "reward model": train_reward_model, "DPO": train_dpo}[name]
    others = {"state", "prompts", "responses", "chosen", "rejected", "reference", "reward", "draw", "stream", "loss",
              "reference_chosen", "reference_rejected", "baseline", "batches",          # batches: test_plan.py
              "token_mean", "epsilon", "epsilon_high", "level"}                         # of the loss: test_stages.py
    assert set(inspect.signature(function).parameters) - others == set(settings(name))


@pytest.mark.parametrize("name", NAMES)
def test_settings_at_the_edge_of_their_range_train(name):
    """No step, a learning rate of 0, NumPy's integers, one example a step."""
    assert list(stage_of(name, make_training(name), steps=0)) == []
    one = {} if name == "RLHF" else {"batch_size": np.int64(1)}
    metrics = list(stage_of(name, make_training(name), learning_rate=0, microbatches=np.int32(9), **one))
    assert len(metrics) == 2


@pytest.mark.parametrize("baseline, samples", [("leave_one_out", 1), ("group", 1), ("mean", 1), ("median", 2),
(None, 2)])
def test_a_baseline_that_these_samples_cannot_have_is_refused_before_the_first_step(baseline, samples):
    training = make_training("RLHF")
    with pytest.raises(ValueError, match="baseline"):
        stage_of("RLHF", training, baseline=baseline, samples_per_prompt=samples)
    assert training.step == 0


@pytest.mark.parametrize("workers", [0, -1, 1.0, "2", None, True])
def test_a_state_needs_one_worker_or_more(workers):
    with pytest.raises((TypeError, ValueError), match="^TrainState: workers is "):
        TrainState(transformer(np.float32), np.random.default_rng(0), workers)


@pytest.mark.parametrize("rng", [0, None, np.random, np.random.RandomState(0), np.random.PCG64(0)], ids=repr)
def test_a_seed_in_place_of_a_generator_is_refused(rng):
    with pytest.raises(TypeError, match="^TrainState: rng is .*it must be a numpy Generator"):
        TrainState(transformer(np.float32), rng)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_a_batch_is_split_into_one_shard_or_more(n):
    with pytest.raises((TypeError, ValueError), match="shards: n is "):
        shards(5, n)


# Models.

@pytest.mark.parametrize("model", [None, 3, "model", Transformer, {"weight": Tensor(np.ones(2))}], ids=repr)
def test_a_model_that_is_none_is_refused(model):
    with pytest.raises(TypeError, match="^TrainState: model is "):
        TrainState(model, np.random.default_rng(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_without_a_state_is_refused(name):
    with pytest.raises(TypeError, match=rf"^{NAMES[name]}\w*: state is .*; it must be a TrainState"):
        stage_of(name, transformer(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_other_kind_is_refused(name):
    training = make_training("SFT" if name == "reward model" else "reward model")
    kind = "RewardModel" if name == "reward model" else "Transformer"
    with pytest.raises(TypeError, match=f"^{NAMES[name]}: the model is .*; it must be a {kind}$"):
        stage_of(name, training)


@pytest.mark.parametrize("name", NAMES)
def test_a_bidirectional_model_is_refused(name):
    model = small_transformer(np.random.default_rng(0), np.float32, vocab_size=VOCABULARY, causal=False)
    model = RewardModel(model, np.random.default_rng(0)) if name == "reward model" else model
    with pytest.raises(ValueError, match=f"^{NAMES[name]}: the model is bidirectional"):
        stage_of(name, TrainState(model, np.random.default_rng(0)))


@every_stage
@one_or_two_workers
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named_before_the_first_step(stage, workers, bad):
    training = make_training(stage, workers)
    training.model.parameters()["blocks.0.gate_up"].data[1, 2] = bad
    before = everything(training)
    with pytest.raises(ValueError, match=rf"the parameter blocks.0.gate_up of the model, entry \(1, 2\), is {bad}"):
        stage_of(stage, training)
    assert everything(training) == before


# An optimiser and a model that belong together.

EXCHANGED = {
    "the model": lambda t: setattr(t, "model", copy.deepcopy(t.model)),
    "the optimiser": lambda t: setattr(t, "optimizer", AdamW(copy.deepcopy(t.model).parameters())),
    "the head": lambda t: setattr(t.model, "head", copy.deepcopy(t.model.head)),
    "the body": lambda t: setattr(t.model, "transformer", t.model.transformer.copy()),
}


@one_or_two_workers
@pytest.mark.parametrize("name, part", [*((name, part) for name in NAMES for part in ("the model", "the optimiser")),
                                        ("reward model", "the head"), ("reward model", "the body")])
def test_a_model_that_the_optimiser_does_not_own_is_refused_instead_of_not_trained(name, part, workers):
    training = make_training("pretraining" if name == "documents" else name, workers)
    EXCHANGED[part](training)
    with pytest.raises(RuntimeError, match="TrainState: the optimiser has another parameter '.*' than this state"):
        list(stage_of(name, training))


def test_an_optimiser_whose_memory_the_workers_do_not_share_is_refused():
    for workers, group in ((1, False), (2, False), (2, True)):
        training = make_training("SFT", workers)
        training.optimizer = AdamW(training.model.parameters(), group=training.group if group else None)
        if workers == 1 or group:
            assert len(list(stage_of("SFT", training))) == 2
        else:
            with pytest.raises(RuntimeError, match="TrainState: the optimiser has another group than this state"):
                list(stage_of("SFT", training))


@pytest.mark.parametrize("again", [copy.deepcopy, pickle.dumps], ids=["copy", "pickle"])
def test_an_optimiser_and_a_training_cannot_be_copied_because_the_copy_would_train_nothing(again):
    training = make_training("SFT")
    for thing in (training, training.optimizer, (training.model, training.optimizer)):
        with pytest.raises(TypeError, match="an optimiser cannot be copied or pickled"):
            again(thing)


@one_or_two_workers
def test_a_loss_that_reaches_no_parameter_of_the_model_is_refused(workers):
    training, other = make_training("DPO", workers), Tensor(np.ones(2), requires_grad=True)
    before = everything(training)[0]
    with pytest.raises(ValueError, match="DPO, step 1: no parameter of the model has a gradient"):
        next(stage_of("DPO", training, loss=lambda policy_chosen: ops.sum(other)))
    assert everything(training)[0] == before


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_would_end_before_it_begins_is_refused(name):
    """Its state has done more steps: of another stage, or of a longer run. One that has done as many is complete."""
    training = make_training("pretraining" if name == "documents" else name)
    list(stage_of(name, training, steps=2))
    assert list(stage_of(name, training, steps=2)) == []
    with pytest.raises(ValueError, match="the state has done 2 steps, and this stage ends after 1 in all"):
        stage_of(name, training, steps=1)


def test_a_learning_rate_that_no_step_would_use_is_refused():
    with pytest.raises(TypeError, match="TrainState: learning_rate has no effect here.*give it to the stage"):
        TrainState(transformer(np.float32), np.random.default_rng(0), learning_rate=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_whose_generator_was_exchanged_for_a_seed_is_refused(name):
    training = make_training("pretraining" if name == "documents" else name)
    training.rng = 0
    with pytest.raises(TypeError, match=f"^{NAMES[name]}\\w*: rng is 0 .*it must be a numpy Generator"):
        stage_of(name, training)


def test_a_stage_of_ones_own_has_these_checks_too():
    @stage
    def mine(state, other):
        yield {}

    training, other = make_training("SFT"), transformer(np.float32)
    with pytest.raises(TypeError, match="^mine: state is .*; it must be a TrainState"):
        mine(other, other)
    assert list(mine(training, other)) == [{}]
    other.parameters()["final_norm"].data[0] = np.nan
    with pytest.raises(ValueError, match="^mine: the parameter final_norm of other, entry 0, is nan"):
        mine(training, other)


@pytest.mark.parametrize("name, bad", [*itertools.product(["model.blocks.0.qkv", "optimizer.m", "optimizer.v"],
                                                          [np.nan, np.inf]),
                                       ("optimizer.v", -1.0), ("optimizer.steps", -1)])
def test_a_snapshot_with_numbers_that_are_not_finite_is_refused_and_changes_nothing(name, bad):
    training = make_training("SFT")
    arrays, metadata = training.snapshot()
    arrays = {n: a.copy() for n, a in arrays.items()}
    arrays[name].flat[1] = bad
    before = everything(training)
    with pytest.raises(ValueError, match=f"TrainState.restore: the checkpoint's tensor '{name}', entry .*, is {bad}"):
        training.restore(arrays, metadata)
    assert everything(training) == before


# Two roles, one set of arrays.

def sharing(model):
    """Models that share memory with a model, in several ways."""
    parameters = model.parameters()
    return {"the model itself": model, "over the same Tensors": model.over(parameters),
            "over the same arrays": model.over({n: Tensor(p.data) for n, p in parameters.items()}),
            "one array": model.copy().over({**model.copy().parameters(), "blocks.0.qkv": parameters["blocks.0.qkv"]}),
            "a view": model.over({n: Tensor(p.data[:]) for n, p in parameters.items()})}


@one_or_two_workers
@pytest.mark.parametrize("kind", sharing(transformer(np.float32)))
def test_a_reference_that_shares_parameters_with_the_policy_is_refused(kind, workers):
    training = make_training("RLHF", workers)
    with pytest.raises(ValueError, match=r"^train_rlhf: reference has the parameter \S+ in the same memory"):
        stage_of("RLHF", training, reference=sharing(training.model)[kind])
    list(stage_of("RLHF", training, reference=training.model.copy()))


def helper_with(judge):
    def score(prompts, answers):
        return predicted_rewards(judge, prompts, answers)
    return score


def rewards_with(judge):
    """Reward functions that use this reward model, in several ways."""
    class Judge:
        def __init__(self):
            self.model = judge

        def __call__(self, prompts, answers):
            return predicted_rewards(self.model, prompts, answers)

    def named(prompts, answers, model=None):
        return predicted_rewards(model, prompts, answers)
    def by_name(prompts, answers, *, model=judge):
        return predicted_rewards(model, prompts, answers)

    holder, models, score = Judge(), {"reward": [judge]}, helper_with(judge)
    return {"a closure": lambda prompts, answers: predicted_rewards(judge, prompts, answers),
            "an object": Judge(), "a partial function": functools.partial(named, model=judge),
            "partial of partial": functools.partial(functools.partial(named), model=judge),
            "a method": holder.__call__, "a default by name": by_name,
            "a default": lambda prompts, answers, model=judge: predicted_rewards(model, prompts, answers),
            "an object in a closure": lambda prompts, answers: holder(prompts, answers),
            "a container": lambda p, answers: predicted_rewards(models["reward"][0], p, answers),
            "another function": lambda prompts, answers: score(prompts, answers)}


@pytest.mark.parametrize("kind", rewards_with(None))
def test_a_reward_model_with_the_body_of_the_policy_is_refused_and_one_with_a_copy_is_not(kind):
    training, rng = make_training("RLHF"), np.random.default_rng(0)
    with pytest.raises(ValueError, match="^train_rlhf: the reward model has the parameter embedding in "):
        stage_of("RLHF", training, reward=rewards_with(RewardModel(training.model, rng))[kind])
    list(stage_of("RLHF", training, reward=rewards_with(RewardModel(training.model.copy(), rng))[kind]))


class Anything:
    """An object that has every attribute: a remote procedure, or a mock object."""
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *arguments):
        return [0.0] * len(arguments[0]) if arguments else []


class Table:
    """Like pandas.DataFrame: head, keys, shape and an index by labels; a comparison of it has no truth value."""
    shape = (3, 1)

    def head(self, count=5):
        return self

    def keys(self):
        return ["score"]

    def __len__(self):
        return 3

    def __getitem__(self, label):
        raise KeyError(label)

    def __eq__(self, other):
        raise ValueError("The truth value of a DataFrame is ambiguous")

    __hash__ = None


class Judge:
    """A user's judge, with attributes of names that functools.partial, models and tables have, too."""
    def __init__(self, args, keywords):
        self.args = args
        self.keywords = keywords
        self.func = None
        self.parameters = 7
        self.head = Table()

    def __call__(self, prompts, answers):
        return [float(len(a)) for a in answers]


web = types.ModuleType("web")           # like requests: web.head(url) is a function
web.head = lambda url: url
table = Table()


def scored_by_globals(prompts, answers):
    return [float(len(table) + len(web.head("judge"))) for _ in answers]


def scored_by_a_closure(web, table):
    return lambda prompts, answers: [float(len(table) + len(web.head("judge"))) for _ in answers]


def scored_by_what_comes_later():
    def reward(prompts, answers):
        return judge(answers) if len(answers) < 0 else [0.0] * len(answers)
    if reward is None:
        judge = sum
    return reward


@pytest.mark.parametrize("reward", [
    scored_by_globals, scored_by_a_closure(web, Table()), functools.partial(Judge(web, table), answers=None).func,
    functools.partial(lambda judge, prompts, answers: [0.0] * len(answers), table), Anything(), Anything().score,
    Judge(None, ["a"]), Judge(Anything(), Table()), Judge(7, {"a": 1}).__call__, scored_by_what_comes_later(),
    Judge(ValueError("has args, and no func"), None),
], ids=["globals", "closure", "object", "partial", "anything", "attribute", "args", "attributes", "method", "no value",
        "an error"])
def test_a_reward_function_may_use_any_object_of_another_library(reward):
    assert len(list(stage_of("RLHF", make_training("RLHF"), reward=reward))) == 2


@pytest.mark.parametrize("parameters", [lambda: 7, lambda: iter([]), Anything()],
                         ids=["gives a number", "gives an iterator", "anything"])
def test_a_model_of_another_library_is_refused(parameters):
    model = types.SimpleNamespace(parameters=parameters)
    with pytest.raises(TypeError, match="^TrainState: model is .*; it must be a Transformer or a RewardModel$"):
        TrainState(model, np.random.default_rng(0))


def test_a_table_whose_index_is_a_label_is_refused_as_a_data_set():
    refused("RLHF", "prompts is .*Table.*; it must be a list of token lists", prompts=Table())


@pytest.mark.parametrize("drawn", [{"tokens": 1, "mask": 2}, {1, 2}, "ab", Table()], ids=type)
def test_documents_drawn_as_another_kind_than_a_pair_are_refused(drawn):
    with pytest.raises(TypeError, match="^pretrain_on_documents: draw gave .*; it must give a pair, tokens and mask$"):
        list(stage_of("documents", make_training("documents"), draw=lambda rng, count: drawn))


@pytest.mark.parametrize("other", [{"vocab_size": VOCABULARY + 1}, {"context": 8}], ids=str)
def test_a_reference_for_other_tokens_is_refused(other):
    reference = small_transformer(np.random.default_rng(0), np.float32, **{"vocab_size": VOCABULARY, **other})
    refused("RLHF", "reference has vocab_size", reference=reference)


def test_a_reference_that_is_no_transformer_is_refused():
    for reference in (None, RewardModel(transformer(np.float32), np.random.default_rng(0)), fives, Transformer):
        refused("RLHF", "reference is .*; it must be a Transformer", reference=reference)


def test_a_reference_with_weights_that_are_not_finite_is_named():
    reference = transformer(np.float32)
    reference.parameters()["embedding"].data[0, 1] = np.nan
    refused("RLHF", r"the parameter embedding of reference, entry \(0, 1\), is nan", reference=reference)


# Data sets.

SIDES = {"SFT": ["prompts", "responses"], "reward model": ["prompts", "chosen", "rejected"], "RLHF": ["prompts"],
         "DPO": ["prompts", "chosen", "rejected"]}
EXAMPLES = {         # a bad example, and the error
    "empty": ([], r"is \[\]"), "too long": ([3] * (CONTEXT + 1), "tokens and the context is 16"),
    "outside the vocabulary": ([1, VOCABULARY], f"holds {VOCABULARY}, which is not in the vocabulary"),
    "negative": ([1, -1], "holds -1, which is not in the vocabulary"), "floats": ([1.0, 2.0], "holds float64"),
    "halves": ([1, 2.5], "holds float64"), "text": ("1 2", "holds <U3"), "words": (["a", "b"], "holds <U1"),
    "None": (None, r"is None \(NoneType\); it must hold integers"),
    "None in it": ([1, None], r"is \[1, None\] \(list\); it must hold integers"), "a number": (3, "it must be a list"),
    "bools": ([True, False], "holds bool"), "two axes": ([[1, 2], [3, 4]], "it must be a list"),
    "ragged": ([[1], [2, 3]], ""), "an empty array": (np.zeros(0, int), "it must be a list"),
    "huge": ([1, 2 ** 70], ""), "minus 100": ([3, -100], "holds -100"),
}


@pytest.mark.parametrize("name, side", [(name, side) for name, sides in SIDES.items() for side in sides])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_bad_example_is_named_by_its_place_in_the_data_set_before_the_first_step(name, side, kind):
    example, message = EXAMPLES[kind]
    data = {**dict.fromkeys(SIDES[name], [[3, 4]] * 2000), "prompts": [[1, 2]] * 2000}
    data[side] = [*data[side][:1777], example, *data[side][1778:]]
    more = {"reference_chosen": np.full(2000, -1.0), "reference_rejected": np.full(2000, -1.0)} if name == "DPO" else {}
    refused(name, f"dialogue 1777.*{message}", workers=2, **data, **more)


@pytest.mark.parametrize("name", SIDES)
def test_the_error_says_how_many_more_examples_are_bad(name):
    prompts = [[1, 2], [], [1, 2], [99], [1, 2], [1, -3], [1, 2]]
    refused(name, r"dialogue 1, .* \(2 more of the 7 dialogues are bad\)$", prompts=prompts)


@pytest.mark.parametrize("name, side", [(name, side) for name, sides in SIDES.items() for side in sides])
def test_lists_of_unequal_length_and_empty_ones_are_refused(name, side):
    if len(SIDES[name]) > 1:
        refused(name, "[67] prompts, .*[67] .*; there must be as many of each", **{side: PROMPTS[:-1]})
        refused(name, "[78] prompts, .*[78] .*; there must be as many of each", **{side: [*PROMPTS, [1]]})
    refused(name, "0 prompts", **dict.fromkeys(SIDES[name], []))


@pytest.mark.parametrize("data", ["a text", None, 5, {0: [1, 2]}, iter([[1, 2]]), (p for p in PROMPTS)], ids=repr)
@pytest.mark.parametrize("name", SIDES)
def test_data_that_is_no_list_is_refused(name, data):
    refused(name, "prompts is .*; it must be a list of token lists", prompts=data)


@pytest.mark.parametrize("name", SIDES)
def test_one_prompt_in_place_of_a_list_of_prompts_is_refused(name):
    refused(name, "dialogue 0, prompts.0., is 1 .*; it must be a list", prompts=[1, 2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize("name", SIDES)
@one_or_two_workers
def test_arrays_of_tokens_and_tuples_train_like_lists(name, workers):
    lists = {side: np.random.default_rng(i).integers(3, VOCABULARY, size=(7, 4)).tolist()
             for i, side in enumerate(SIDES[name])}
    kinds = [lambda side: side, np.array, tuple, lambda side: [tuple(tokens) for tokens in side],
             lambda side: np.array(side, np.uint8), lambda side: [np.array(tokens, np.int32) for tokens in side]]
    metrics = [list(stage_of(name, make_training(name, workers), **{side: kind(lists[side]) for side in lists}))
               for kind in kinds]
    assert all(m == metrics[0] for m in metrics)


@pytest.mark.parametrize("name", SIDES)
def test_a_dialogue_may_fill_the_context(name):
    new = 4 if name == "RLHF" else 2
    data = {**dict.fromkeys(SIDES[name], [[3, 4]] * 7), "prompts": [[1] * (CONTEXT - new)] * 7}
    assert len(list(stage_of(name, make_training(name), **data))) == 2
    data["prompts"] = [*data["prompts"][:-1], [1] * (CONTEXT - new + 1)]
    refused(name, rf"dialogue 6 has {CONTEXT - new + 1} \+ {new} tokens and the context is 16", **data)


@given(rng=rngs, count=st.integers(1, 40), bad=st.integers(0, 3), kind=st.sampled_from(sorted(EXAMPLES)))
def test_any_number_of_bad_examples_is_counted_and_the_first_is_named(rng, count, bad, kind):
    config = transformer(np.float32).config
    prompts = [rng.integers(VOCABULARY, size=rng.integers(1, 9)).tolist() for _ in range(count)]
    responses = [rng.integers(VOCABULARY, size=rng.integers(1, 9)).tolist() for _ in range(count)]
    places = sorted(rng.permutation(count)[:bad].tolist())
    for place in places:
        (prompts if rng.random() < 0.5 else responses)[place] = EXAMPLES[kind][0]
    if not places:
        return check_dialogues("here", config.vocab_size, config.context, prompts, responses=responses)
    with pytest.raises((TypeError, ValueError, IndexError), match=f"^here: dialogue {places[0]}\\b") as raised:
        check_dialogues("here", config.vocab_size, config.context, prompts, responses=responses)
    more = f"({len(places) - 1} more of the {count} dialogues are bad)"
    assert str(raised.value).endswith(more) if len(places) > 1 else "more of" not in str(raised.value)


@pytest.mark.parametrize("stream, message", [
    (STREAM[:6], "the text has 6 tokens"), (STREAM[:0], "the text has 0 tokens"), ([], "the text has 0 tokens"),
    (STREAM * 1.0, "pretrain: stream holds float64"),
    (STREAM - 3, "pretrain: stream holds -3"), (STREAM + 3, "pretrain: stream holds 11"),
    (STREAM.reshape(6, 10), r"pretrain: stream has shape \(6, 10\)"), ("a text", "pretrain: stream holds <U6"),
], ids=["short", "empty", "an empty list", "floats", "negative", "outside the vocabulary", "two axes", "text"])
def test_a_stream_that_is_no_text_in_tokens_is_refused(stream, message):
    training = make_training("pretraining")
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        stage_of("pretraining", training, stream=stream)
    assert training.step == 0


def test_a_stream_may_be_a_list_and_as_short_as_one_window():
    metrics = [list(stage_of("pretraining", make_training("pretraining"), stream=kind(STREAM[:7])))
               for kind in (np.array, list, lambda s: s.astype(np.uint16))]
    assert metrics[0] == metrics[1] == metrics[2]


# What a user's functions give.

@one_or_two_workers
@pytest.mark.parametrize("given, message", [
    (lambda n: [1.0], "reward gave 1 of 6 numbers"), (lambda n: [1.0] * 7, "reward gave 7 of 6 numbers"),
    (lambda n: np.ones(3), "reward gave 3 of 6 numbers"), (lambda n: [], "reward gave 0 of 6 numbers"),
    (lambda n: None, "reward gave None"), (lambda n: 1.0, "reward gave 1.0"),
    (lambda n: np.float32(2), "reward gave .*2.0"),
    (lambda n: (1.0 for _ in range(n)), "reward gave <generator"),
    (lambda n: dict.fromkeys(range(n), 1.0), "reward gave {"),
    (lambda n: set(range(n)), "reward gave {"), (lambda n: "123456", "reward gave '123456'"),
    (lambda n: bytes(n), "reward gave b"), (lambda n: ([1.0] * n, [{}] * n), "reward gave 2 of 6 numbers"),
    (lambda n: np.ones((n, 1)), "the reward of sample 0 is ndarray of shape"),
    (lambda n: np.ones((n, n)), "the reward of sample 0 is ndarray of shape"),
    (lambda n: [[1.0]] * n, r"the reward of sample 0 is \[1.0\]"),
    (lambda n: [1.0] * 5 + [None], "the reward of sample 5 is None"),
    (lambda n: ["1"] * n, "the reward of sample 0 is '1'"),
    (lambda n: [1.0, 1j, *[1.0] * 4], "the reward of sample 1 is 1j"),
    (lambda n: [0.0, 0.0, np.nan, 0.0, np.nan, 0.0], "the reward of sample 2 is nan"),
    (lambda n: np.array([0, 0, 0, np.inf, 0, 0], np.float32), "the reward of sample 3 is inf"),
    (lambda n: [0, -np.inf, 0, 0, 0, 0], "the reward of sample 1 is -inf"),
    (lambda n: [10 ** 400] * n, "the reward of sample 0 is 1000"),
])
def test_the_result_of_a_reward_function_is_checked_by_name_before_anything_uses_it(given, message, workers):
    training = make_training("RLHF", workers)
    before = everything(training)[0]
    with pytest.raises((TypeError, ValueError), match=f"^train_rlhf: {message}"):
        next(stage_of("RLHF", training, reward=lambda prompts, answers: given(len(answers))))
    assert everything(training)[0] == before


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: np.array(x, np.int8),
lambda x: [np.float32(v) for v in x],
                                  lambda x: [np.array(v) for v in x], lambda x: [Fraction(v) for v in x],
                                  lambda x: [Tensor(v) for v in x]])
def test_rewards_are_numbers_of_any_kind(kind):
    def run(reward):
        return list(stage_of("RLHF", make_training("RLHF"), reward=reward))
    assert run(lambda prompts, answers: kind([a.count(5) for a in answers])) == run(fives)


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9), bad=st.integers(0, 8),
       what=st.sampled_from([np.nan, np.inf, -np.inf, None, "1"]))
def test_any_reward_without_a_finite_number_is_named_by_its_sample(values, bad, what):
    assert checked_rewards("here", values, len(values)).tolist() == values
    bad %= len(values)
    with pytest.raises((TypeError, ValueError), match=f"^here: the reward of sample {bad} is "):
        checked_rewards("here", [*values[:bad], what, *values[bad + 1:]], len(values))


@one_or_two_workers
def test_a_reward_function_gets_copies(workers):
    """It may sort, empty and overwrite them: neither the training nor the data set changes."""
    prompts = [list(p) for p in PROMPTS]

    def spoiling(asked, answers):
        rewards = fives(asked, answers)
        for tokens in (*asked, *answers):
            tokens.sort()
            tokens[:] = tokens[:1] * 9
        asked.clear()
        answers.clear()
        return rewards

    trainings = [make_training("RLHF", workers) for _ in range(2)]
    metrics = [list(stage_of("RLHF", training, reward=reward, prompts=prompts))
               for training, reward in zip(trainings, (fives, spoiling))]
    assert metrics[0] == metrics[1] and prompts == PROMPTS
    assert everything(trainings[0]) == everything(trainings[1])


@pytest.mark.parametrize("reward", [None, 1.0, [1.0], "reward"], ids=repr)
def test_a_reward_that_cannot_be_called_is_refused(reward):
    refused("RLHF", "reward is ", reward=reward)


TOKENS = np.ones((5, 6), int)
DRAWN = {
    "a dict": ({"tokens": TOKENS, "mask": TOKENS}, "draw gave {"), "text": ("ab", "draw gave 'ab'"),
    "masked tokens": ((np.ma.array(TOKENS, mask=TOKENS), TOKENS), "draw's tokens is MaskedArray of shape"),
    "tokens alone": (TOKENS, "draw gave ndarray of shape"), "None": (None, "draw gave None"),
    "three arrays": ((TOKENS, TOKENS, TOKENS), "draw gave "),
    "floats": ((TOKENS * 1.0, TOKENS), "draw's tokens holds float64"),
    "a row": ((TOKENS[0], TOKENS[0]), r"draw's tokens have shape \(6,\)"),
    "no rows": ((TOKENS[:0], TOKENS[:0]), "draw's tokens have shape"),
    "one token": ((TOKENS[:, :1], TOKENS[:, :1]), "draw's tokens have shape"),
    "longer than the context": ((np.ones((5, CONTEXT + 2), int),) * 2, "draw's tokens have shape"),
    "outside the vocabulary": ((TOKENS * VOCABULARY, TOKENS), "draw's tokens holds 9"),
    "negative": ((-TOKENS, TOKENS), "draw's tokens holds -1"),
    "a mask of another shape": ((TOKENS, TOKENS[:, 1:]), r"draw's mask has shape \(5, 5\)"),
    "a mask row": ((TOKENS, TOKENS[:1]), "draw's mask has shape"),
    "weights": ((TOKENS, TOKENS * 0.5), "draw's mask holds 0.5"),
    "labels": ((TOKENS, TOKENS * -100), "draw's mask holds -100"),
    "a mask of NaN": ((TOKENS, TOKENS * np.nan), "draw's mask holds nan"),
    "255": ((TOKENS, (TOKENS * 255).astype(np.uint8)), "draw's mask holds 255"),
    "an empty mask": ((TOKENS, TOKENS * 0), "draw's mask selects no token"),
    "a mask of first tokens": ((TOKENS, np.eye(1, 6) * np.ones((5, 1))), "draw's mask selects no token"),
}


@one_or_two_workers
@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawn_batch_is_checked_by_name_before_anything_uses_it(kind, workers):
    drawn, message = DRAWN[kind]
    training = make_training("pretraining", workers)
    before = everything(training)
    with pytest.raises((TypeError, ValueError, IndexError), match=f"^pretrain_on_documents: {message}"):
        next(stage_of("documents", training, draw=lambda rng, count: drawn))
    assert everything(training) == before


@pytest.mark.parametrize("kind", [lambda t, m: (t, m), lambda t, m: [t.tolist(), m.tolist()],
lambda t, m: (t.astype(np.uint8), m > 0),
                                  lambda t, m: np.stack([t, m]).astype(int)])
def test_tokens_and_masks_are_arrays_or_lists_of_any_integers(kind):
    def run(draw):
        return list(stage_of("documents", make_training("pretraining"), draw=draw))
    assert run(lambda rng, count: kind(*draw(rng, count))) == run(draw)


@one_or_two_workers
@pytest.mark.parametrize("given, message", [
    (lambda loss: None, "the loss is None"), (lambda loss: loss.item(), "the loss is "),
    (lambda loss: loss.data, "the loss is "),
    (lambda loss: loss.reshape(1), "the loss is Tensor of shape"),
    (lambda loss: loss * np.ones(3, np.float32), "the loss is Tensor of shape"),
    (lambda loss: Tensor(0.5), "the loss is Tensor"), (lambda loss: (loss, {}), "the loss is "),
])
def test_the_result_of_a_loss_is_checked_before_anything_uses_it(given, message, workers):
    training = make_training("DPO", workers)
    before = everything(training)[0]
    with pytest.raises(ValueError, match=f"train_dpo: {message}"):
        next(stage_of("DPO", training, loss=lambda **log_probs: given(dpo.dpo_loss(**log_probs))))
    with pytest.raises(ValueError, match=f"here, step 1: {message}"):
        train_step(training, lambda model, part: (given(model.log_probs(part).mean()), None), [STREAM[None, :6]], 0.1,
                   "here")
    assert everything(training)[0] == before


def test_a_loss_that_overwrites_its_arrays_changes_neither_metrics_nor_data():
    def spoiling(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
        references = reference_chosen.copy(), reference_rejected.copy()
        value = dpo.dpo_loss(policy_chosen, policy_rejected, *references, beta=beta)
        reference_chosen *= 0
        reference_rejected *= 0
        return value
    kept = [array.copy() for array in REFERENCES]
    metrics = [list(stage_of("DPO", make_training("DPO"), loss=loss)) for loss in (dpo.dpo_loss, spoiling)]
    assert metrics[0] == metrics[1] and all((a == b).all() for a, b in zip(kept, REFERENCES))


@pytest.mark.parametrize("loss", [None, 3, "dpo_loss"], ids=repr)
def test_a_loss_that_cannot_be_called_is_refused(loss):
    with pytest.raises(TypeError, match="is not a callable object"):
        stage_of("DPO", make_training("DPO"), loss=loss)


@pytest.mark.parametrize("rate", [-0.1, np.nan, np.inf, None])
def test_a_step_needs_a_learning_rate_and_a_shard(rate):
    training = make_training("SFT")
    with pytest.raises((TypeError, ValueError), match="here, step 1: learning_rate is "):
        train_step(training, lambda model, part: (model.log_probs(part).mean(), None), [STREAM[None, :6]], rate, "here")
    with pytest.raises(ValueError, match="here, step 1: the number of shards is 0"):
        train_step(training, lambda model, part: (model.log_probs(part).mean(), None), [], 0.1, "here")


def test_reference_log_probs_are_computed_of_checked_dialogues():
    reference = transformer(np.float32)
    for arguments, message in (((reference, PROMPTS, RESPONSES[:-1]), "7 prompts, 6 responses"),
                               ((reference, PROMPTS, [*RESPONSES[:-1], []]), "dialogue 6"),
                               ((None, PROMPTS, RESPONSES), "reference is None"),
                               ((reference, PROMPTS, RESPONSES, 0), "batch_size is 0")):
        with pytest.raises((TypeError, ValueError), match=f"^reference_log_probs: {message}"):
            reference_log_probs(*arguments)
