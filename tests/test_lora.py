"""minilm/lora.py: an adapted model starts as its base, has the formula's values and gradients, and trains A and B."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs, small_transformer
from minilm import lora, ops
from minilm.generate import generate
from minilm.gradcheck import gradcheck
from minilm.lora import TARGETS, Adapted
from minilm.model import RewardModel, Transformer
from minilm.packing import pack
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor

TOKENS = np.array([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2]])
PROMPTS, CHOSEN, REJECTED = [[1, 2], [3], [4, 5]], [[3, 0], [1, 1, 0], [2, 0]], [[4, 0], [5, 0], [6, 6, 0]]
CONFIG = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 8}


def adapted(rng, targets=TARGETS, redraw=True, **config):
    base = small_transformer(rng, **{**CONFIG, **config})
    model = Adapted(base, 2, 3.0, rng, targets)
    if redraw:
        for p in model.parameters().values():
            p.data[...] = rng.normal(size=p.shape)
    return base, model


def test_it_starts_as_its_base_with_pefts_first_values(rng):
    base, model = adapted(rng, redraw=False)
    assert (model(TOKENS).data == base(TOKENS).data).all()
    for name, p in model.parameters().items():
        if name.endswith("lora_b"):
            assert not p.data.any()
        else:
            bound = p.shape[0] ** -0.5
            assert p.shape[1] == 2 and abs(p.data).max() <= bound and abs(p.data).max() > bound / 2
    assert len(model.parameters()) == 2 * 2 * len(TARGETS)


@given(rngs, st.sets(st.sampled_from(TARGETS), min_size=1), st.booleans())
def test_it_computes_what_the_merged_weights_compute(rng, targets, tied):
    base, model = adapted(rng, targets, tied=tied)
    merged = model.merged()
    assert type(merged) is Transformer
    assert_close(model(TOKENS), merged(TOKENS))
    for name, p in merged.parameters().items():
        changed = (p.data != base.parameters()[name].data).any()
        assert changed == bool(set(lora.MATRICES.get(name.rpartition(".")[2], ())) & targets), name
        assert changed or p.data is base.parameters()[name].data


def test_an_adapted_matrix_is_the_formula(rng):
    """The columns of k_proj in qkv: W + (alpha / r) A B."""
    base, model = adapted(rng, ["k_proj"])
    A, B = (model.parameters()[f"blocks.1.k_proj.lora_{x}"].data for x in "ab")
    expected = base.parameters()["blocks.1.qkv"].data.copy()
    expected[:, 8:12] += 3.0 / 2 * A @ B
    assert_close(model.merged().parameters()["blocks.1.qkv"], expected, 1e-14)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_all_adapters_are_those_of_finite_differences(rng, checkpointing):
    _, model = adapted(rng)
    model.activation_checkpointing = checkpointing
    names = list(model.parameters())

    def loss(*adapters):
        other = model.over(dict(zip(names, adapters)))
        return ops.sum(other.log_probs(TOKENS) * np.arange(8.0).reshape(2, 4))
    assert gradcheck(loss, *model.parameters().values()) < 1e-6


def test_packed_and_padded_batches_agree_and_base_weights_get_no_gradient(rng):
    base, model = adapted(rng)
    batch = pack(PROMPTS, CHOSEN, 16)
    packed = model.response_log_probs(batch)
    ops.sum(packed).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters().values())
    assert all(p.grad is None for p in base.parameters().values())
    assert_close(packed, model.merged().response_log_probs(batch))


def test_sampling_decodes_with_the_merged_weights(rng):
    _, model = adapted(rng)
    ours, merged = (generate(m, PROMPTS, 5, np.random.default_rng(1), 0) for m in (model, model.merged()))
    assert (ours.tokens == merged.tokens).all()
    assert_close(ours.log_probs, merged.log_probs)
    batch = pack(PROMPTS, ours.responses(), 16)
    assert_close(model.response_log_probs(batch), ours.log_probs * ours.mask, 1e-9)


@pytest.mark.parametrize("stage", ["SFT", "reward model", "DPO", "RLHF"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_stage_trains_the_adapters_alone(rng, stage, workers):
    base, model = adapted(rng, redraw=False)
    before = {name: p.data.copy() for name, p in base.parameters().items()}
    subject = RewardModel(model, rng) if stage == "reward model" else model
    state = TrainState(subject, np.random.default_rng(2), workers=workers)
    if stage == "SFT":
        steps = train_sft(state, PROMPTS, CHOSEN, 3, 4)
    elif stage == "reward model":
        steps = train_reward_model(state, PROMPTS, CHOSEN, REJECTED, 3, 4)
    elif stage == "DPO":
        sides = [reference_log_probs(base, PROMPTS, side) for side in (CHOSEN, REJECTED)]
        steps = train_dpo(state, PROMPTS, CHOSEN, REJECTED, *sides, 3, 4)
    else:
        steps = train_rlhf(state, base, lambda prompts, responses: [len(r) for r in responses], PROMPTS, 3, 2, 3, 4, 0)
    assert len(list(steps)) == 3
    assert all((p.data == before[name]).all() for name, p in base.parameters().items())
    assert all(p.data.any() for name, p in model.parameters().items())
    assert {name for name in state.snapshot()[0] if name.startswith("model.")} == {
        f"model.{name}" for name in subject.parameters()}


def test_dpo_starts_at_log_2(rng):
    base, model = adapted(rng, redraw=False)
    sides = [reference_log_probs(base, PROMPTS, side) for side in (CHOSEN, REJECTED)]
    first = next(train_dpo(TrainState(model, rng), PROMPTS, CHOSEN, REJECTED, *sides, 3, 4))
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-14)


def test_a_copy_is_independent_and_another_set_of_adapters_is_checked(rng):
    base, model = adapted(rng)
    other = model.copy()
    before = model(TOKENS).data
    for p in other.parameters().values():
        p.data[...] += 1
    assert (model(TOKENS).data == before).all() and (other(TOKENS).data != before).any()
    with pytest.raises(ValueError, match="the adapter 'blocks.0.q_proj.lora_a' is missing"):
        model.over({})
    with pytest.raises(ValueError, match="lora_a' is missing, or of another shape"):
        model.over({name: Tensor(np.zeros((1, 1))) for name in model.parameters()})


@pytest.mark.parametrize("wrong, message", [
    ({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"targets": ["lm_head"]}, "targets is .*must be a list of some"),
    ({"targets": []}, "targets"), ({"targets": "q_proj"}, "targets"), ({"rng": 3}, "Generator")])
def test_settings_out_of_range_are_named(rng, wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Adapted(small_transformer(rng), **{"rank": 2, "alpha": 3.0, "rng": rng, **wrong})


def test_on_the_emulated_device_it_computes_and_trains_as_on_the_cpu(rng, emulated):
    base = small_transformer(rng, heads=2, kv_heads=1, head_width=16, width=8)
    losses = []
    for device in ("cpu", "gpu"):
        other = Adapted(base.copy(), 2, 3.0, np.random.default_rng(0))
        other.to_device(device)
        state = TrainState(other, np.random.default_rng(2))
        losses.append([metrics["loss"] for metrics in train_sft(state, PROMPTS, CHOSEN, 2, 4)])
    assert_close(losses[1], losses[0])
