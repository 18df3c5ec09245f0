"""minilm.stages: each step follows the gradient of its loss, stages resume bit for bit, and errors name the tensor."""
import copy
import functools
import os
import re
import time

import numpy as np
import pytest

import minilm.model
from helpers import assert_close, small_transformer
from minilm import checkpoint, evaluate, ops
from minilm.data import make_batch, windows
from minilm.diverged import Diverged
from minilm.model import Config, RewardModel
from minilm.objectives import dpo, policy_gradient
from minilm.objectives.policy_gradient import advantages
from minilm.optim import AdamW
from minilm.packing import scatter
from minilm.stages import rlhf as rlhf_module
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.pretraining import pretrain, pretrain_on_documents
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import prompt_shards, response_lengths, train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, shards, stage, workers_for
from minilm.tensor import Tensor, grad_enabled

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")      # from arithmetic with NaN and infinity

PAD, BOS, EOS, VOCABULARY = 0, 1, 2, 9


def dialogues(seed, count=7):
    """Random prompts and responses of many lengths, with BOS and EOS."""
    rng = np.random.default_rng(seed)
    return ([[BOS, *rng.integers(3, VOCABULARY, rng.integers(1, 4)).tolist()] for _ in range(count)],
            [[*rng.integers(3, VOCABULARY, rng.integers(0, 5)).tolist(), EOS] for _ in range(count)])


PROMPTS, RESPONSES = dialogues(0)
REJECTED = dialogues(1)[1]
STREAM = np.random.default_rng(2).integers(0, VOCABULARY, 60)


def transformer(dtype, seed=3):
    return small_transformer(np.random.default_rng(seed), dtype, vocab_size=VOCABULARY)


def fives(prompts, answers):
    return [answer.count(5) for answer in answers]


def rlhf_stage(training, steps, temperature=0.7, reward=fives, **options):
    """RLHF with 3 prompts a step and 2 samples each. The default reference equals the policy at its start."""
    options = {"beta": 0.1, "reference": transformer(training.model.dtype), "samples_per_prompt": 2, "eos": EOS,
               **options}
    return train_rlhf(training, reward=reward, prompts=PROMPTS, steps=steps, prompts_per_step=3, max_new_tokens=4,
                temperature=temperature, **options)


def dpo_stage(training, steps, **options):
    reference = transformer(training.model.dtype)
    log_probs = [reference_log_probs(reference, PROMPTS, answers, batch_size=3)
                 for answers in (RESPONSES, REJECTED)]
    return train_dpo(training, PROMPTS, RESPONSES, REJECTED, *log_probs, steps, 5, **options)


STAGES = {
    "pretraining": lambda t, steps, **o: pretrain(t, STREAM, steps, 5, 6, **o),
    "SFT": lambda t, steps, **o: train_sft(t, PROMPTS, RESPONSES, steps, 5, **o),
    "reward model": lambda t, steps, **o: train_reward_model(t, PROMPTS, RESPONSES, REJECTED, steps, 5, **o),
    "RLHF": rlhf_stage,
    "DPO": dpo_stage,
}
every_stage = pytest.mark.parametrize("stage", STAGES)
one_or_two_workers = pytest.mark.parametrize("workers", [1, 2])


def make_training(stage, workers=1, dtype=np.float32, seed=4):
    model = transformer(dtype)
    if stage == "reward model":
        model = RewardModel(model, np.random.default_rng(5))
    return TrainState(model, np.random.default_rng(seed), workers)


def run(stage, training, steps, until=None, **options):
    """The metrics of the steps up to `until` of `steps`."""
    metrics, loop = [], STAGES[stage](training, steps, **options)
    while training.step < (until or steps):
        metrics.append(next(loop))
    return metrics


def everything(training):
    """Parameters, moments, Generator and step, as bytes and numbers to compare later."""
    arrays, metadata = training.snapshot()
    return {name: a.tobytes() for name, a in arrays.items()}, metadata


# Metrics.

COMMON = {"loss", "grad_norm", "learning_rate"}
KEYS = {        # TRL's names where TRL has the metric
    "pretraining": {"trained_tokens"},
    "SFT": {"trained_tokens"},
    "reward model": {"accuracy", "ties", "margin", "min_reward", "mean_reward", "max_reward"},
    "RLHF": {"reward", "reward_std", "frac_reward_zero_std", "kl_sequence", "kl_token", "entropy",
             "completions/clipped_ratio", *(f"completions/{name}_length" for name in (
                 "mean", "min", "max", "mean_terminated", "min_terminated", "max_terminated"))},
    "DPO": {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties",
                          "logps/chosen", "logps/rejected"},
}


def test_metrics_of_lengths_are_of_all_responses_and_of_those_that_end():
    ends = np.array([False, False, True, True])
    found = response_lengths([[1, 2], [0, 1, 1, 1], [1, 1, 3], [3]], ends)
    assert found == {"completions/clipped_ratio": 0.25, "completions/mean_length": 2.5, "completions/min_length": 1,
                     "completions/max_length": 4, "completions/mean_terminated_length": 2,
                     "completions/min_terminated_length": 1, "completions/max_terminated_length": 3}
    assert response_lengths([[1]], ends)["completions/mean_terminated_length"] == 0


@every_stage
@one_or_two_workers
def test_a_stage_yields_finite_metrics_under_the_documented_names_and_ends_after_its_steps(stage, workers):
    training = make_training(stage, workers)
    before = everything(training)
    metrics = list(STAGES[stage](training, 3))
    assert len(metrics) == training.step == training.optimizer.steps == 3
    for m in metrics:
        assert set(m) == COMMON | KEYS[stage]
        assert all(type(value) is float and np.isfinite(value) for value in m.values()), m
        assert m["grad_norm"] > 0 and m["learning_rate"] > 0
        assert 0 <= m.get("entropy", 0) <= np.log(VOCABULARY)
    after = everything(training)
    for name, p in training.model.parameters().items():
        assert p.dtype == np.float32
        assert after[0][f"model.{name}"] != before[0][f"model.{name}"], f"{name} has not moved"


@one_or_two_workers
def test_a_document_is_scored_where_its_mask_says_and_never_on_its_first_token(workers):
    def draw(rng, count):
        return rng.integers(VOCABULARY, size=(count, 7)), rng.random((count, 7)) < 0.6

    training = make_training("pretraining", workers, np.float64)
    model, metrics = training.model.copy(), next(pretrain_on_documents(training, draw, 1, 5))
    tokens, mask = draw(np.random.default_rng(4), 5)
    losses = [-model.log_probs(tokens[i:i + 1]).data[0, t - 1] for i in range(5) for t in range(1, 7) if mask[i, t]]
    assert_close(metrics["loss"], np.mean(losses))
    assert metrics["trained_tokens"] == len(losses) == mask[:, 1:].sum()


def test_trained_tokens_counts_response_tokens_alone():
    training = make_training("SFT")
    rows = np.random.default_rng(4).integers(len(PROMPTS), size=5)           # the rows that the stage will draw
    metrics = run("SFT", training, 1)[0]
    assert metrics["trained_tokens"] == sum(len(RESPONSES[i]) for i in rows)


# Stop and resume.

@every_stage
@one_or_two_workers
def test_a_stage_restored_from_a_file_continues_bit_for_bit(stage, workers, tmp_path):
    pytest.importorskip("safetensors")
    whole = make_training(stage, workers)
    expected = run(stage, whole, 5)

    stopped = make_training(stage, workers)
    before = run(stage, stopped, 5, until=2)
    checkpoint.save(tmp_path / "state", *stopped.snapshot())
    resumed = make_training(stage, workers, seed=99)
    resumed.restore(*checkpoint.load(tmp_path / "state"))
    assert before + run(stage, resumed, 5) == expected
    assert everything(resumed) == everything(whole)


@every_stage
@one_or_two_workers
def test_a_stage_ends_in_the_same_bits_every_time(stage, workers):
    runs = [make_training(stage, workers) for _ in range(2)]
    assert run(stage, runs[0], 3) == run(stage, runs[1], 3)
    assert everything(runs[0]) == everything(runs[1])


@pytest.mark.parametrize("other", [{"layers": 2}, {"width": 8}, {"key_smear": True}], ids=str)
def test_the_snapshot_of_another_model_raises(other):
    here = make_training("pretraining")
    there = TrainState(small_transformer(np.random.default_rng(0), np.float32, vocab_size=VOCABULARY, **other),
                     np.random.default_rng(0))
    for saved, target in ((here, there), (there, here)):
        with pytest.raises((KeyError, ValueError)):
            target.restore(*saved.snapshot())


def state_of(stage, **changes):
    """A snapshot with some of its arrays or metadata changed; None removes one."""
    arrays, metadata = make_training(stage).snapshot()
    for of in (arrays, metadata):
        of.update({name: change for name, change in changes.items() if name in of})
    return ({name: a for name, a in arrays.items() if a is not None},
            {name: value for name, value in metadata.items() if value is not None})


@pytest.mark.parametrize("changes", [
    {"optimizer.m": None}, {"optimizer.v": np.zeros(1, np.float32)}, {"optimizer.steps": None}, {"rng": None},
    {"rng": np.random.Philox(0).state}, {"step": None}], ids=lambda changes: next(iter(changes)))
def test_a_snapshot_that_raises_changes_nothing(changes):
    training = make_training("pretraining")
    training.optimizer.data += 1
    before = everything(training)
    with pytest.raises((KeyError, ValueError)):
        training.restore(*state_of("pretraining", **changes))
    assert everything(training) == before


def test_restoring_the_snapshot_of_a_deeper_model_raises_and_changes_nothing():
    models = [small_transformer(np.random.default_rng(layers), layers=layers) for layers in (1, 2)]
    shallow, deep = (TrainState(model, np.random.default_rng(0)) for model in models)
    for p in deep.optimizer.parameters.values():
        p.data += 1
    before, (arrays, metadata) = everything(shallow), deep.snapshot()
    for name in ("m", "v", "steps"):            # a state that fits the shallow model's optimiser
        arrays[f"optimizer.{name}"] = shallow.snapshot()[0][f"optimizer.{name}"]
    with pytest.raises(ValueError, match="blocks.1.attention_norm' that this model does not have"):
        shallow.restore(arrays, metadata)
    assert everything(shallow) == before


# Freezing.

def freeze(training, *names, frozen=True):
    for name in names:
        training.model.parameters()[name].requires_grad = not frozen


def bytes_of(training, *names):
    """Parameters and their moments, by name."""
    flat, optimizer = training.optimizer.flat, training.optimizer
    return {name: [flat.views(array)[name].tobytes() for array in (optimizer.data, optimizer.m, optimizer.v)]
            for name in names or flat.views(optimizer.data)}


@every_stage
@one_or_two_workers
def test_frozen_parameters_and_their_moments_stay_bit_for_bit_through_a_stage(stage, workers):
    """Also after steps that have left momentum behind, and with the default weight decay."""
    training, names = make_training(stage, workers), ("embedding", "blocks.0.ffn_norm", "blocks.0.qkv")
    run(stage, training, 2)
    freeze(training, *names)
    before = bytes_of(training)
    for m in run(stage, training, 5):
        assert m["grad_norm"] > 0
    after = bytes_of(training)
    assert {name for name in before if before[name] == after[name]} == {*names}


@every_stage
@pytest.mark.parametrize("workers", [2, 3])
def test_freezing_and_thawing_between_two_steps_is_the_same_with_several_workers(stage, workers):
    trainings = [make_training(stage, n, np.float64) for n in (1, workers)]
    metrics = []
    for training in trainings:
        metrics.append([])
        seen = [bytes_of(training, "blocks.0.gate_up", "final_norm")]
        for i, m in enumerate(STAGES[stage](training, 8), start=1):
            freeze(training, "blocks.0.gate_up", "final_norm", frozen=2 <= i < 5)
            seen.append(bytes_of(training, "blocks.0.gate_up", "final_norm"))
            assert (seen[i] == seen[i - 1]) == (i in (3, 4, 5)), i
            metrics[-1].append(m)
    assert_same_training(trainings, metrics)
    assert np.array_equal(trainings[0].optimizer.updates, trainings[1].optimizer.updates)
    assert sorted({*trainings[1].optimizer.updates.tolist()}) == [5, 8]


@one_or_two_workers
def test_a_snapshot_taken_while_a_parameter_is_frozen_continues_bit_for_bit(workers, tmp_path):
    pytest.importorskip("safetensors")

    def half(training):
        freeze(training, "embedding")
        run("SFT", training, 9, until=training.step + 2)
        freeze(training, "embedding", frozen=False)
    whole, stopped, resumed = (make_training("SFT", workers, seed=seed) for seed in (4, 4, 99))
    for training in (whole, stopped):
        run("SFT", training, 9, until=2)
        half(training)
    half(whole)
    checkpoint.save(tmp_path / "state", *stopped.snapshot())
    resumed.restore(*checkpoint.load(tmp_path / "state"))
    half(resumed)
    assert run("SFT", whole, 9) == run("SFT", resumed, 9)
    assert everything(resumed) == everything(whole) and sorted({*whole.optimizer.updates.tolist()}) == [5, 9]


def test_a_diverged_gradient_is_named_beside_frozen_parameters():
    training = make_training("pretraining")
    freeze(training, "embedding")
    training.model.parameters()["unembedding"].data[...] *= 1e25
    with pytest.raises(Diverged, match="first bad tensor: "):
        run("pretraining", training, 3)


# Two optimisers for one model.

@every_stage
@one_or_two_workers
def test_a_second_train_state_on_a_model_stops_the_first_one_before_its_next_step(stage, workers):
    first = make_training(stage, workers)
    loop = STAGES[stage](first, 9)
    next(loop)
    before = {name: p.data.copy() for name, p in first.model.parameters().items()}
    second = TrainState(first.model, np.random.default_rng(0), workers)
    with pytest.raises(RuntimeError, match="parameter 'embedding' has left this optimiser's flat array"):
        next(loop)
    assert all(np.array_equal(p.data, before[name]) for name, p in first.model.parameters().items())
    run(stage, second, 2)
    assert not np.array_equal(first.model.parameters()["embedding"].data, before["embedding"])


def test_backward_through_a_model_that_was_restored_since_its_forward_pass_raises():
    training = make_training("pretraining")
    loss = training.model.log_probs(np.array([[1, 2, 3]])).sum()
    training.restore(*(copy.deepcopy(part) for part in training.snapshot()))
    with pytest.raises(RuntimeError, match="was changed in place by TrainState.restore after"):
        loss.backward()


# Workers and micro-batches.

def assert_same_training(trainings, metrics):
    (one, other), (expected, actual) = trainings, metrics
    for m, n in zip(expected, actual, strict=True):
        assert m.keys() == n.keys()
        # Absolute, because a policy gradient's loss is a small difference of large numbers. Whether policy and
        # reference are exactly equal at the start depends on rounding.
        for key in m.keys() - {"rewards/ties", "rewards/accuracies"}:
            assert abs(n[key] - m[key]) <= 1e-10 * max(1, abs(m[key])), key
    for name, p in one.model.parameters().items():
        assert_close(other.model.parameters()[name].data, p.data, name=name)


@pytest.mark.parametrize("cores, tokens, workers", [(8, 1, 1), (8, 1024, 2), (8, 10**6, 8), (1, 10**6, 1),
                                                    (2, 2048, 2)])
def test_a_step_gets_at_most_one_worker_per_core_and_per_512_tokens(cores, tokens, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert workers_for(tokens) == workers


@every_stage
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_change_nothing_but_rounding(stage, workers):
    trainings = [make_training(stage, n, np.float64) for n in (1, workers)]
    assert_same_training(trainings, [run(stage, t, 3) for t in trainings])


def test_with_fewer_prompts_than_workers_the_samples_of_a_prompt_are_split():
    """3 prompts with 2 samples each on 4 workers: every worker has samples, and no sample is drawn twice."""
    parts = prompt_shards(3, 2, 4)
    assert sorted(map(len, parts)) == [1, 1, 2, 2] and sorted(np.concatenate(parts)) == list(range(6))
    trainings = [make_training("RLHF", n, np.float64) for n in (1, 4)]
    assert_same_training(trainings, [run("RLHF", training, 3) for training in trainings])


@pytest.mark.parametrize("stage", ["pretraining", "SFT"])
@one_or_two_workers
def test_microbatches_of_unequal_length_equal_the_whole_batch(stage, workers):
    """5 dialogues in 4 shards of 2, 1, 1 and 1: the mean over all tokens, which differs from the mean of means."""
    trainings = [make_training(stage, 1, np.float64), make_training(stage, workers, np.float64)]
    assert_same_training(trainings, [run(stage, trainings[0], 3, microbatches=1),
                                     run(stage, trainings[1], 3, microbatches=4)])


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("parts", range(1, 5))
def test_every_item_is_in_one_shard_and_no_shard_is_empty(count, parts):
    items = [np.arange(count)[part].tolist() for part in shards(count, parts)]
    assert sorted(sum(items, [])) == list(range(count)) and len(items) == min(count, parts)
    assert max(map(len, items)) - min(map(len, items)) <= 1


@stage
def steps_on(training, batches):
    """A stage with one step per batch, a list of shards. Yields the number of workers."""
    for parts in batches:
        train_step(training, lambda model, part: (-ops.sum(model.log_probs(part)), None), parts, 0.01, "here")
        yield training.group.active_size


def test_a_worker_without_a_shard_adds_no_gradient():
    trainings = [make_training("pretraining", workers, np.float64) for workers in (1, 2)]
    for workers, training in enumerate(trainings, start=1):
        batches = [[STREAM[None, :6], STREAM[None, 6:12]], [STREAM[None, 12:18]]]
        assert list(steps_on(training, batches)) == [workers] * 2
    one, two = trainings
    assert_close(two.optimizer.grad, one.optimizer.grad)


def test_a_step_outside_a_stage_uses_one_worker_and_adds_no_old_gradient():
    trainings = [make_training("pretraining", workers, np.float64) for workers in (1, 2)]
    parts = [STREAM[None, :6], STREAM[None, 6:12]]
    for training in trainings:
        next(steps_on(training, [parts, parts]))
        train_step(training, lambda model, part: (-ops.sum(model.log_probs(part)), None), parts, 0.01, "here")
    one, two = trainings
    assert_close(two.optimizer.grad, one.optimizer.grad)
    assert two.step == 2


def test_workers_wait_until_the_next_step_is_asked_for_and_then_use_the_weights_of_that_time():
    trainings = [make_training("pretraining", workers, np.float64) for workers in (1, 2)]
    for training in trainings:
        loop = STAGES["pretraining"](training, 2)
        next(loop)
        time.sleep(0.05)
        training.model.parameters()["final_norm"].data[...] = 0.5
        next(loop)
    assert_same_training(trainings, [[], []])


def test_the_reward_function_is_called_once_a_step_by_rank_0():
    here, calls = os.getpid(), []

    def reward(prompts, answers):
        calls.append(len(answers))
        return [float(sum(answer)) if os.getpid() == here else 0.0 for answer in answers]

    trainings = [make_training("RLHF", workers, np.float64) for workers in (1, 2)]
    assert_same_training(trainings, [run("RLHF", training, 2, reward=reward) for training in trainings])
    assert calls == [6] * 4


# The gradient of a step, in closed form. After a step the optimiser still has it, clipped to norm 1.

class LogProbsAsParameters:
    """A "model" whose parameters are the log-probs themselves, a row for each first token of a sequence."""

    def __init__(self, rows, length):
        self.config = Config(context=length)
        self.table = Tensor(np.full((rows, length), -1.0), requires_grad=True)

    def parameters(self):
        return {"table": self.table}

    def response_log_probs(self, pack):
        first = np.empty(len(pack.tokens), int)
        for s in pack.segments:
            first[s.start:s.stop] = pack.tokens[s.prefix_start if s.keys > s.queries else s.start]
        return scatter(self.table[first[pack.rows], pack.positions[pack.rows]], pack.mask)


def numbered(prompts, responses):
    """The prompts, each with its number as first token, and (N,12) with 1 where each response is scored."""
    prompts = [[i] + p[1:] for i, p in enumerate(prompts)]
    where = np.zeros((len(prompts), 12))
    for i, (p, r) in enumerate(zip(prompts, responses)):
        where[i, len(p) - 1:len(p) - 1 + len(r)] = 1
    return prompts, where


def test_sft_learns_response_and_eos_and_neither_prompt_nor_padding():
    prompts, responses_at = numbered(PROMPTS, RESPONSES)
    training = TrainState(LogProbsAsParameters(len(prompts), 12), np.random.default_rng(4))
    next(train_sft(training, prompts, RESPONSES, 1, 20))
    drawn = np.bincount(np.random.default_rng(4).integers(len(prompts), size=20), minlength=len(prompts))
    weights = drawn[:, None] * responses_at
    assert_close(training.model.table.grad, -weights / weights.sum())


def test_dpo_raises_chosen_and_lowers_rejected_tokens_equally_and_no_other_token():
    """-+ beta sigmoid(0) / B at each token of a response, because its log-prob is a sum over tokens."""
    prompts, chosen_at = numbered(PROMPTS, RESPONSES)
    _, rejected_at = numbered(PROMPTS, REJECTED)
    model = LogProbsAsParameters(len(prompts), 12)
    references = [reference_log_probs(model, prompts, answers) for answers in (RESPONSES, REJECTED)]
    assert_close(references[0], -np.array([len(r) for r in RESPONSES], float))
    training = TrainState(model, np.random.default_rng(4))
    next(train_dpo(training, prompts, RESPONSES, REJECTED, *references, 1, 20, beta=0.3))
    drawn = np.bincount(np.random.default_rng(4).integers(len(prompts), size=20), minlength=len(prompts))
    assert_close(model.table.grad, -0.3 * 0.5 / 20 * drawn[:, None] * (chosen_at - rejected_at))


def test_pretraining_minimises_the_mean_over_every_position_of_every_window():
    training = make_training("pretraining", workers=2, dtype=np.float64)
    before = training.model.copy()
    metrics = run("pretraining", training, 1)[0]
    loss = -before.log_probs(windows(STREAM, np.random.default_rng(4), 5, 7)).mean()
    assert metrics["trained_tokens"] == 30
    assert_step_is_down_the_gradient_of(loss, before, training, metrics)


def assert_step_is_down_the_gradient_of(loss, before, training, metrics):
    loss.backward()
    assert_close(metrics["loss"], loss.item(), name="loss")
    for name, p in training.model.parameters().items():
        assert_close(p.grad * max(1.0, metrics["grad_norm"]), before.parameters()[name].grad, name=name)


@one_or_two_workers
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_rlhf_scores_policy_and_reference_at_the_sampling_temperature(temperature, workers):
    """The second step of RLHF, recomputed from the prompts and responses that the reward function got.

    The stage takes the KL from the log-probs of sampling. Here the samples are scored again at the same temperature.
    Both are equal only if samples, prompts, policy and temperature are equal. The same holds for the advantages and
    the gradient.
    """
    seen, beta = [], 0.3

    def reward(prompts, answers):
        seen.append((prompts, answers))
        return [a.count(5) - 0.1 * p.count(4) for p, a in zip(prompts, answers)]

    training, reference = make_training("RLHF", workers, np.float64), transformer(np.float64)
    loop = rlhf_stage(training, 9, temperature, reward, reference=reference, beta=beta, learning_rate=0.02)
    next(loop)
    before = training.model.copy()
    metrics = next(loop)
    prompts, answers = seen[1]
    batch = make_batch(prompts, answers, PAD)
    log_pi = before.log_probs(batch.tokens, temperature)
    kl = ((log_pi.data - reference.log_probs(batch.tokens, temperature).data) * batch.target_mask).sum(axis=1)
    rewards = np.array([a.count(5) - 0.1 * p.count(4) for p, a in zip(prompts, answers)])
    assert_close(metrics["kl_sequence"], kl.mean(), name="kl_sequence")
    assert_close(metrics["kl_token"], kl.sum() / batch.mask.sum(), name="kl_token")
    assert_close([metrics["reward"], metrics["reward_std"]], [rewards.mean(), rewards.std(ddof=1)])
    assert metrics["completions/mean_length"] == batch.mask.sum() / 6
    assert np.abs(kl).min() > 1e-6, "the policy has moved"

    A = advantages(rewards.reshape(3, 2), kl.reshape(3, 2), beta).reshape(-1, 1)
    assert_step_is_down_the_gradient_of(-ops.sum(log_pi * (A * batch.target_mask)) / 6, before, training, metrics)


def copied(model):
    return model.over({name: Tensor(p.data.copy(), requires_grad=True) for name, p in model.parameters().items()})


def comparisons(training):
    """Rows, prompts, chosen and rejected responses of the next step, as the Generator will draw them."""
    state = training.rng.bit_generator.state
    rows = training.rng.integers(len(PROMPTS), size=5)
    training.rng.bit_generator.state = state
    return rows, *([answers[i] for i in rows] for answers in (PROMPTS, RESPONSES, REJECTED))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_of_the_reward_model_is_down_the_gradient_of_its_loss(workers):
    """The loss is computed by hand from prompt and response, with centering; the metrics are of the same rewards."""
    training = make_training("reward model", workers, np.float64)
    loop = STAGES["reward model"](training, 5, centering=0.3)
    next(loop)
    before, (_, prompts, chosen, rejected) = copied(training.model), comparisons(training)
    metrics = next(loop)
    batches = [make_batch(prompts, answers, PAD) for answers in (chosen, rejected)]
    c, r = (before.rewards(batch.tokens, batch.real) for batch in batches)
    loss = ops.softplus(r - c).mean() + ((c + r) * (c + r)).mean() * 0.3
    assert_close([metrics["margin"], metrics["accuracy"]], [(c.data - r.data).mean(), (c.data > r.data).mean()])
    assert_step_is_down_the_gradient_of(loss, before, training, metrics)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_of_dpo_is_down_the_gradient_of_its_loss(workers):
    """The second step, where policy and reference differ. Every pair has its own reference log-probs."""
    training, reference = make_training("DPO", workers, np.float64), transformer(np.float64)
    references = [reference_log_probs(reference, PROMPTS, answers) for answers in (RESPONSES, REJECTED)]
    loop = train_dpo(training, PROMPTS, RESPONSES, REJECTED, *references, 5, 5, beta=0.7,
                             learning_rate=0.02)
    next(loop)
    before, (rows, prompts, *answers) = training.model.copy(), comparisons(training)
    metrics = next(loop)
    sums = []
    for each in answers:
        batch = make_batch(prompts, each, PAD)
        sums.append(ops.sum(before.log_probs(batch.tokens) * batch.target_mask, axis=1))
    (l_c, l_r), (ref_c, ref_r) = sums, (log_probs[rows] for log_probs in references)
    assert_close(metrics["rewards/chosen"], 0.7 * (l_c.data - ref_c).mean())
    assert_close(metrics["rewards/rejected"], 0.7 * (l_r.data - ref_r).mean())
    assert_step_is_down_the_gradient_of(dpo.dpo_loss(l_c, l_r, ref_c, ref_r, beta=0.7), before, training, metrics)


def test_a_loss_of_any_parameters_gets_the_log_probs_and_beta():
    given = {}

    def loss(*positional, **named):
        given.update(named)
        return dpo.dpo_loss(**named)
    metrics = next(dpo_stage(make_training("DPO", dtype=np.float64), 1, loss=loss))
    assert set(given) == {"policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "beta"}
    assert metrics["loss"] == next(dpo_stage(make_training("DPO", dtype=np.float64), 1))["loss"]


def test_a_loss_whose_beta_is_already_set_raises():
    loss = functools.partial(dpo.dpo_loss, beta=5.0)
    with pytest.raises(ValueError, match="train_dpo sets 'beta' of its loss"):
        next(dpo_stage(make_training("DPO"), 1, loss=loss))


def test_a_positional_only_loss_raises_before_any_step():
    def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, /):
        raise AssertionError("not called")
    with pytest.raises(ValueError, match="'policy_chosen' is none of them, or positional-only"):
        next(dpo_stage(make_training("DPO"), 1, loss=loss))


def simpo_loss(policy_chosen, policy_rejected, chosen_lengths, rejected_lengths, beta):
    """A loss without a reference: Meng et al. 2024, arXiv:2405.14734, (6), with gamma = 0.5."""
    margin = beta * (policy_chosen / chosen_lengths - policy_rejected / rejected_lengths) - 0.5
    return -ops.log_sigmoid(margin).mean()


def summed_and_counted(model, prompts, responses):
    """log pi(y|x) and the number of tokens of each response, computed from padded rows."""
    batch = make_batch(prompts, responses, PAD)
    return ops.sum(model.log_probs(batch.tokens) * batch.target_mask, axis=1), batch.target_mask.sum(axis=1)


@pytest.mark.parametrize("name", ["length-normalised DPO", "SimPO"])
@one_or_two_workers
def test_a_loss_with_lengths_gets_the_lengths_of_chosen_and_rejected_in_tokens(name, workers):
    loss = {"length-normalised DPO": dpo.length_normalised_dpo_loss, "SimPO": simpo_loss}[name]
    training, reference = make_training("DPO", workers, np.float64), transformer(np.float64)
    references = [reference_log_probs(reference, PROMPTS, answers) for answers in (RESPONSES, REJECTED)]
    loop = train_dpo(training, PROMPTS, RESPONSES, REJECTED, *references, 5, 5, beta=0.7, learning_rate=0.02, loss=loss)
    next(loop)
    before, (rows, prompts, chosen, rejected) = training.model.copy(), comparisons(training)
    metrics = next(loop)
    log_pi_w, lengths_w = summed_and_counted(before, prompts, chosen)
    log_pi_l, lengths_l = summed_and_counted(before, prompts, rejected)
    assert (lengths_w != lengths_l).any() and (lengths_w == [len(y) for y in chosen]).all()
    difference = log_pi_w / lengths_w - log_pi_l / lengths_l
    offset = 0.5 if name == "SimPO" else 0.7 * (references[0][rows] / lengths_w - references[1][rows] / lengths_l)
    by_hand = ops.softplus(offset - 0.7 * difference).mean()            # -log sigmoid(z) = softplus(-z)
    assert_step_is_down_the_gradient_of(by_hand, before, training, metrics)


@pytest.mark.parametrize("loss", [simpo_loss, dpo.length_normalised_dpo_loss])
def test_a_loss_with_lengths_trains_a_float32_model(loss):
    metrics = run("DPO", make_training("DPO"), 2, loss=loss)
    assert all(np.isfinite(m["loss"]) for m in metrics)


def test_a_loss_with_an_unknown_required_parameter_raises_with_its_name():
    def with_margin(policy_chosen, policy_rejected, margin):
        return ops.softplus(policy_rejected - policy_chosen + margin).mean()

    training = make_training("DPO")
    with pytest.raises(ValueError, match="'margin' is none of them.* Rename it, or set it with functools.partial"):
        next(dpo_stage(training, 1, loss=with_margin))
    metrics = next(dpo_stage(training, 1, loss=functools.partial(with_margin, margin=0.5)))
    assert np.isfinite(metrics["loss"])


def test_a_loss_without_log_probs_of_the_policy_raises():
    with pytest.raises(ValueError, match="it takes no log-probs of the policy"):
        next(dpo_stage(make_training("DPO"), 1, loss=lambda reference_chosen, beta: Tensor(0.0)))


@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_rate_warms_up_and_falls_and_the_optimiser_gets_it(stage, monkeypatch):
    taken, step = [], AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, rate: (taken.append(rate), step(self, rate))[1])
    metrics = run(stage, make_training(stage), 12, learning_rate=0.01)
    rates = [m["learning_rate"] for m in metrics]
    assert rates[:2] == [0.005, 0.01] and taken == rates
    assert all(a > b for a, b in zip(rates[2:], rates[3:])) and 0 < rates[-1] < 0.005


# RLHF and DPO.

@one_or_two_workers
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_a_policy_equal_to_its_reference_has_kl_0(temperature, workers):
    """At every temperature the log-probs of sampling equal the reference's log-probs of the same tokens."""
    metrics = next(rlhf_stage(make_training("RLHF", workers, np.float64), 1, temperature))
    assert abs(metrics["kl_sequence"]) < 1e-12 and abs(metrics["kl_token"]) < 1e-12


@one_or_two_workers
def test_the_reward_function_sees_each_prompt_beside_the_samples_drawn_for_it(workers):
    seen = []

    def reward(prompts, answers):
        seen.append((prompts, answers))
        return np.zeros(len(answers))

    training = make_training("RLHF", workers)
    list(rlhf_stage(training, 3, reward=reward))
    for prompts, answers in seen:
        assert len(prompts) == len(answers) == 6 and prompts[0::2] == prompts[1::2]
        assert all(p in PROMPTS for p in prompts)
        for answer in answers:
            assert type(answer) is list and EOS not in answer[:-1] and (answer[-1] == EOS or len(answer) == 4)
    assert len({tuple(a) for _, answers in seen for a in answers}) > 6, "the answers differ"


@pytest.mark.parametrize("eos, ends", [([EOS, 5, 7], {EOS, 5, 7}), ({5, 7}, {5, 7}), (7, {7}), (None, set())], ids=str)
def test_each_of_several_end_tokens_ends_a_response_in_rlhf(eos, ends):
    seen = []

    def reward(_, answers):
        seen.extend(answers)
        return fives(_, answers)
    list(rlhf_stage(make_training("RLHF"), 6, eos=eos, reward=reward))
    assert all(not ends & set(answer[:-1]) and (answer[-1] in ends or len(answer) == 4) for answer in seen)
    assert ends == {answer[-1] for answer in seen} & ends, "each of them ended a response"


@pytest.mark.parametrize("eos", ["<eos>", True, 2.0, -1, VOCABULARY, [], [EOS, "a"]], ids=str)
def test_an_eos_that_is_no_token_is_refused_before_the_first_step_of_rlhf(eos):
    with pytest.raises((TypeError, ValueError), match="train_rlhf: eos is "):
        next(rlhf_stage(make_training("RLHF"), 1, eos=eos))


def test_rlhf_increases_the_reward():
    training = make_training("RLHF")
    metrics = list(rlhf_stage(training, 40, temperature=1.0, learning_rate=0.03, beta=0.01))
    first, last = ([m["reward"] for m in part] for part in (metrics[:8], metrics[-8:]))
    error = (np.var(first, ddof=1) / 8 + np.var(last, ddof=1) / 8) ** 0.5
    assert np.mean(last) - np.mean(first) > 5 * error, f"{np.mean(first):.2f} -> {np.mean(last):.2f} +- {error:.2f}"
    assert np.mean([m["kl_sequence"] for m in metrics[-8:]]) > 0.1, "with some divergence"


RECIPES = dict(re.findall(r"^    (\S.*?)  +(\w+=\S+(?:, \w+=\S+)*)", rlhf_module.__doc__, re.MULTILINE))


def test_the_recipes_are_found():
    assert [*RECIPES] == ["GRPO", "Dr. GRPO", "DAPO", "GSPO"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_of_the_docstring_increase_the_reward(recipe):
    """With two updates on each batch of samples."""
    training = make_training("RLHF")
    options = eval(f"dict({RECIPES[recipe]})", {"max_new_tokens": 4})
    options = {"beta": 0.01, "learning_rate": 0.03, "samples_per_prompt": 8, "updates": 2, **options}
    metrics = list(rlhf_stage(training, 40, temperature=1.0, **options))
    first, last = ([m["reward"] for m in part] for part in (metrics[:4], metrics[-4:]))
    assert len(metrics) == 20 and np.mean(last) > np.mean(first) + 0.5


def test_kl_penalises_drift():
    """With reward 0 the policy moves to the reference from any start."""
    training = make_training("RLHF")
    metrics = list(rlhf_stage(training, 60, temperature=1.0, learning_rate=0.03, beta=1.0, samples_per_prompt=16,
                              reference=transformer(np.float32, seed=8), reward=lambda p, a: np.zeros(len(a))))
    first, last = (np.mean([m["kl_sequence"] for m in part]) for part in (metrics[:10], metrics[-10:]))
    assert first > 1 and last < 0.5 * first, f"KL {first:.2f} -> {last:.2f}"


@pytest.mark.parametrize("stage", ["RLHF", "DPO"])
def test_the_reference_does_not_change_by_a_bit(stage):
    reference, training = transformer(np.float32), make_training(stage, workers=2)
    weights = {name: p.data.tobytes() for name, p in reference.parameters().items()}
    if stage == "RLHF":
        run(stage, training, 3, reference=reference)
    else:
        log_probs = [reference_log_probs(reference, PROMPTS, a) for a in (RESPONSES, REJECTED)]
        kept = [array.copy() for array in log_probs]
        list(train_dpo(training, PROMPTS, RESPONSES, REJECTED, *log_probs, 3, 5))
        assert all((a == b).all() for a, b in zip(log_probs, kept))
    assert {name: p.data.tobytes() for name, p in reference.parameters().items()} == weights
    assert all(p.grad is None for p in reference.parameters().values())


@one_or_two_workers
def test_dpo_starts_at_log_2(workers):
    """Policy and reference have equal log-probs although their batches hold other dialogues. There is no dropout."""
    metrics = next(dpo_stage(make_training("DPO", workers), 1))
    assert abs(metrics["loss"] - np.log(2)) < 1e-6
    assert abs(metrics["rewards/margins"]) < 1e-5


@pytest.mark.parametrize("loss, start", [(dpo.robust_dpo_loss, np.log(2)), (dpo.ipo_loss, 1 / (4 * 0.2 ** 2))])
def test_train_dpo_takes_another_loss(loss, start):
    metrics = run("DPO", make_training("DPO", 2, np.float64), 2, loss=loss, beta=0.2)
    assert_close(metrics[0]["loss"], start)
    assert metrics[1]["loss"] < start


def test_train_rlhf_takes_another_baseline():
    """With a constant reward of 1 and no KL penalty the advantage is 1 without a baseline, and 0 with one."""
    metrics = {baseline: next(rlhf_stage(make_training("RLHF", dtype=np.float64), 1, beta=0.0, baseline=baseline,
                                         reward=lambda p, a: np.ones(len(a))))
               for baseline in ("none", "mean", "leave_one_out")}
    assert metrics["none"]["grad_norm"] > 0.1 and metrics["none"]["loss"] > 0.1
    assert metrics["mean"]["loss"] == metrics["leave_one_out"]["loss"] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_baseline_rlhf_reinforces_responses_and_no_prompt(workers):
    """With leave-one-out a gradient of the prompt would cancel, because the advantages of a prompt sum to 0."""
    seen, rewards = [], np.array([1.0, 2, 3, 4, 5, 6])
    training = make_training("RLHF", workers, np.float64)
    loop = rlhf_stage(training, 5, 0.7, lambda *sample: (seen.append(sample), rewards)[1], beta=0.0, baseline="none")
    next(loop)
    before, metrics = training.model.copy(), next(loop)
    batch = make_batch(*seen[1], PAD)
    loss = -ops.sum(before.log_probs(batch.tokens, 0.7) * (rewards[:, None] * batch.target_mask)) / 6
    assert_step_is_down_the_gradient_of(loss, before, training, metrics)


# Means over tokens, and several updates on the same samples.

CLIPPED = {"level": "token", "epsilon": 0.05, "epsilon_high": 0.2}


@pytest.mark.parametrize("workers, microbatches", [(1, None), (1, 4), (2, 3)])
@pytest.mark.parametrize("options", [{"token_mean": "response"}, {"token_mean": "batch"}, {"token_mean": 3.0},
                                     {"level": "geometric_mean"}], ids=str)
def test_a_mean_over_tokens_is_over_all_samples_of_a_step_however_they_are_split(options, workers, microbatches):
    seen, rewards = [], np.array([1.0, 2, 3, 4, 5, 6])
    training = make_training("RLHF", workers, np.float64)
    loop = rlhf_stage(training, 5, 0.7, lambda *sample: (seen.append(sample), rewards)[1], beta=0.0, baseline="none",
                      microbatches=microbatches, **options)
    next(loop)
    before, metrics = training.model.copy(), next(loop)
    batch = make_batch(*seen[1], PAD)
    log_probs, mask = before.log_probs(batch.tokens, 0.7), batch.target_mask
    assert len(set(mask.sum(axis=1))) > 1, "the answers have several lengths"
    if "level" in options:
        loss = policy_gradient.ppo_clip_loss(log_probs, log_probs.data, rewards, mask, **options)
    else:
        loss = policy_gradient.policy_gradient_loss(log_probs, rewards, mask, **options)
    assert_step_is_down_the_gradient_of(loss, before, training, metrics)


@pytest.mark.parametrize("workers, microbatches", [(1, None), (2, 3)])
@pytest.mark.parametrize("options", [CLIPPED, {**CLIPPED, "token_mean": "batch"}, {**CLIPPED, "level": "sequence"},
                                     {**CLIPPED, "level": "geometric_mean"}], ids=str)
def test_several_updates_take_ppos_loss_from_the_policy_that_drew_the_samples(options, workers, microbatches):
    """The second of two updates. Its learning rate is large enough that ratios are clipped on both sides."""
    seen, kept = [], []
    rewards = np.array([1.0, -2, 3, -1, -3, 2])
    training = make_training("RLHF", workers, np.float64)

    def rate(step):
        kept.append(training.model.copy())
        return 0.02
    metrics = list(rlhf_stage(training, 2, 0.7, lambda *sample: (seen.append(sample), rewards)[1], beta=0.0,
                              baseline="none", microbatches=microbatches, updates=2, learning_rate=rate, **options))
    assert (len(seen), len(metrics), training.step) == (1, 1, 2)
    old, before = kept
    batch = make_batch(*seen[0], PAD)
    old_log_probs = old.log_probs(batch.tokens, 0.7).data
    log_probs, mask = before.log_probs(batch.tokens, 0.7), batch.target_mask
    loss = policy_gradient.ppo_clip_loss(log_probs, old_log_probs, rewards, mask, **options)
    unclipped = policy_gradient.ppo_clip_loss(log_probs, old_log_probs, rewards, mask, **{
        **options, "epsilon": 1e9, "epsilon_high": None})
    symmetric = policy_gradient.ppo_clip_loss(log_probs, old_log_probs, rewards, mask, **{
        **options, "epsilon_high": None})
    assert len({round(x.item(), 6) for x in (loss, unclipped, symmetric)}) == 3, "both clips act, and differ"
    assert_step_is_down_the_gradient_of(loss, before, training, metrics[0])


def test_steps_are_updates_and_the_last_samples_may_have_fewer():
    calls = []
    training = make_training("RLHF")
    metrics = list(rlhf_stage(training, 5, reward=lambda p, a: (calls.append(1), fives(p, a))[1], updates=2))
    assert (len(calls), len(metrics), training.step) == (3, 3, 5)


@pytest.mark.parametrize("setting, wrong", [
    *(("updates", value) for value in (0, 1.5, True, None)), *(("token_mean", value) for value in (0, "sum", np.nan)),
    *(("epsilon", value) for value in (0, None)), ("epsilon_high", -1), ("level", "prompt")])
def test_settings_of_the_loss_that_are_out_of_range_raise_when_rlhf_is_called(setting, wrong):
    with pytest.raises((ValueError, TypeError), match=setting):
        rlhf_stage(make_training("RLHF"), 1, **{setting: wrong})


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_the_entropy_of_rlhf_is_the_mean_over_drawn_tokens_at_the_sampling_temperature(temperature, workers):
    training, seen = make_training("RLHF", workers, np.float64), []
    loop = rlhf_stage(training, 5, temperature, lambda *sample: (seen.append(sample), np.zeros(6))[1])
    next(loop)
    before, metrics = training.model.copy(), next(loop)
    batch = make_batch(*seen[1], PAD)
    log_p = ops.log_softmax(before(batch.tokens) / temperature).data[:, :-1]
    entropies = -(np.exp(log_p) * log_p).sum(axis=-1)
    assert (batch.target_mask.sum(axis=1) < 4).any(), "some answers end early, so there is padding"
    assert_close(metrics["entropy"], entropies[batch.target_mask > 0].mean())


def test_rlhf_scores_its_reference_without_a_graph():
    reference, recorded = transformer(np.float32), []
    log_probs = reference.response_log_probs
    reference.response_log_probs = lambda *arguments: (recorded.append(grad_enabled()), log_probs(*arguments))[1]
    next(rlhf_stage(make_training("RLHF"), 1, reference=reference))
    assert recorded == [False]


# Divergence.

def where_found(stage):
    """RLHF samples before it computes a loss."""
    return "generate, step 1, row 0: the logits are NaN or infinite" if stage == "RLHF" else "the loss is nan"


@every_stage
@one_or_two_workers
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_parameter_stops_the_stage_by_name_before_anything_is_updated(stage, workers, bad):
    training = make_training(stage, workers)
    loop = STAGES[stage](training, 5)
    next(loop)
    training.model.parameters()["blocks.0.gate_up"].data[1, 2] = bad
    before = everything(training)
    with pytest.raises(Diverged, match=rf"^{stage}, step 2: {where_found(stage)}; "
                                       r"first bad tensor: the parameter blocks.0.gate_up, shape \(4, 6\)$"):
        next(loop)
    after = everything(training)
    assert after[0] == before[0] and after[1]["step"] == before[1]["step"] == 1


@every_stage
def test_a_nan_is_traced_to_its_primitive(stage):
    """The weights are finite, and a product of activations is not."""
    training = make_training(stage)
    training.model.parameters()["blocks.0.gate_up"].data[...] = 1e25
    before = everything(training)
    with pytest.raises(Diverged, match=f"^{stage}, step 1: {where_found(stage)}; first bad tensor: the output "
                                       "of swiglu, "):
        run(stage, training, 1)
    assert everything(training)[0] == before[0]


def test_a_nan_reward_is_named_by_its_sample_before_anything_is_updated():
    training = make_training("RLHF")
    before = everything(training)[0]
    with pytest.raises(ValueError, match="train_rlhf: the reward of sample 2 is nan; it must be a finite number"):
        next(rlhf_stage(training, 1, reward=lambda prompts, answers: [0.0, 1.0, np.nan, np.inf, 1.0, 1.0]))
    assert everything(training)[0] == before


@pytest.mark.parametrize("loss, message", [
    (lambda p: ops.sum(ops.sqrt(p * 0.0)), "norm is nan; first bad tensor: the gradient of parameter final_norm, "),
    (lambda p: ops.sum(p * 1e30), r"norm is inf; first bad tensor: none \(the sum of squares overflowed\)"),
], ids=["infinite slope", "overflow"])
@one_or_two_workers
def test_a_gradient_that_is_not_finite_stops_before_anything_is_updated(loss, message, workers):
    training = make_training("pretraining", workers)
    before = everything(training)
    with pytest.raises(Diverged, match=f"^here, step 1: the gradient's {message}"):
        train_step(training, lambda model, part: (loss(model.parameters()["final_norm"]), None), [0] * workers, 1e-3,
                 "here")
    assert everything(training) == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_update_that_overflows_is_reported_in_its_own_step():
    training = make_training("pretraining")
    with pytest.raises(Diverged, match="^here, step 1: the update went to NaN or infinity; first bad tensor: "):
        train_step(training, lambda model, part: (ops.sum(model.parameters()["final_norm"]), None), [0], 1e39, "here")


# Graphs.

def test_evaluation_and_reference_log_probs_record_no_graph(rng, monkeypatch):
    """A recorded graph is freed by backward alone. (Sampling uses no Tensors.)"""
    recorded, hidden_states = [], minilm.model.hidden_states

    def watched(*arguments):
        recorded.append(grad_enabled())
        return hidden_states(*arguments)
    monkeypatch.setattr(minilm.model, "hidden_states", watched)
    model, prompts, responses = small_transformer(rng), [[1, 2], [3]], [[3, 0], [5, 1]]
    for work in (lambda: evaluate.sequence_kl(model, model, prompts, responses),
                 lambda: evaluate.predicted_rewards(RewardModel(model, rng), prompts, responses),
                 lambda: reference_log_probs(model, prompts, responses)):
        recorded.clear()
        work()
        assert recorded and not any(recorded)


@pytest.mark.parametrize("microbatches, sizes", [(2, [6, 4, 2]), (None, [6, 6]), (3, [6, 2, 2, 2])])
def test_the_samples_of_a_prompt_stay_in_one_shard(microbatches, sizes, monkeypatch):
    """Each worker draws all its samples in one batch; the gradient is computed in `microbatches` shards."""
    packed, pack = [], rlhf_module.pack
    monkeypatch.setattr(rlhf_module, "pack", lambda prompts, *rest: packed.append(prompts) or pack(prompts, *rest))
    next(rlhf_stage(make_training("RLHF"), 1, microbatches=microbatches))
    assert list(map(len, packed)) == sizes
    assert all(prompts[0::2] == prompts[1::2] for prompts in packed)
