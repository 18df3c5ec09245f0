"""Adapters in mixed precision: near float64, float32 masters, two bytes for a frozen number on the GPU."""
import numpy as np
import pytest

from minilm.backend import is_cupy, to_numpy
from minilm.generate import generate
from minilm.kernels.bf16 import from_bf16, to_bf16
from minilm.kernels.mixed_layers import Linear, Rounded
from minilm.lora import TARGETS, Adapted
from minilm.model import RewardModel, Transformer
from minilm.packing import pack
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from test_mixed_precision import CONFIGS, LOSSES, MASK, PROMPTS, RESPONSES, TOKENS, distance, models

RANK, ALPHA = 3, 6.0


@pytest.fixture(autouse=True)
def cupy(xp):
    return xp


def adapted(rng, targets=TARGETS, redraw=True, **config):
    """The same adapters over the same weights in float64 on the CPU, and in mixed precision."""
    base, _ = models(rng, **config)
    exact = Adapted(base, RANK, ALPHA, rng, targets)
    if redraw:
        for p in exact.parameters().values():
            p.data[...] = 0.1 * rng.normal(size=p.shape)
    weights = {name: p.data.astype(np.float32) for name, p in base.parameters().items()}
    mixed = Adapted(Transformer.of(base.config, weights), RANK, ALPHA, rng, targets)
    for name, p in mixed.parameters().items():
        p.data[...] = exact.parameters()[name].data
    return exact, mixed.to_device("gpu", compute="bfloat16")


def padded(model):
    return (model.hidden(TOKENS, MASK) * model._on_device(np.cos(np.arange(64)).astype(model.dtype))).sum()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("config, targets, loss", [
    ("plain", TARGETS, "a rectangle"), ("grouped, smeared", TARGETS, "a pack"), ("tied", TARGETS, "at a temperature"),
    ("grouped, smeared", ["k_proj", "up_proj"], "a pack"), ("plain", ["down_proj"], "padding"),
    ("interleaved", ["q_proj", "v_proj", "o_proj"], "padding")])
def test_gradients_of_adapters_are_within_a_hundredth_of_float64s(config, targets, loss, checkpointing, rng):
    exact, mixed = adapted(rng, targets, **CONFIGS[config])
    mixed.activation_checkpointing = checkpointing
    values, gradients = [], []
    for model in (exact, mixed):
        value = padded(model) if loss == "padding" else LOSSES[loss](model)
        value.backward()
        values.append(value.item())
        gradients.append({name: p.grad for name, p in model.parameters().items()})
    assert loss == "padding" or values[1] == pytest.approx(values[0], rel=3e-3)
    assert 1e-5 < distance(gradients[1], gradients[0]) < (2e-2 if config == "tied" else 1e-2)
    for name, exact_one in gradients[0].items():
        assert gradients[1][name].dtype == np.float32
        assert distance({name: gradients[1][name]}, {name: exact_one}) < 3e-2, name


def test_a_small_update_is_not_lost_beside_a_large_weight(rng, cupy):
    """x W and (x A) B are computed apart. In one matrix of bf16 an update of 2^-10 of a weight is rounded away."""
    W = from_bf16(to_bf16(rng.choice([-1, 1], (32, 16)) * rng.uniform(1, 2, (32, 16))))
    A, B = rng.normal(size=(32, 2)), 2 ** -12 * rng.normal(size=(2, 16))
    x, W, A, B = (cupy.asarray(a.astype(np.float32)) for a in (from_bf16(to_bf16(rng.normal(size=(8, 32)))), W, A, B))
    rounded = cupy.asarray(to_bf16(x.get()))
    with_update, without = (Linear(W, *adapter).forward(rounded, np.float32).get() for adapter in ((A, B), ()))
    expected = (x @ A @ B).get()
    assert np.linalg.norm(with_update - without - expected) < 1e-2 * np.linalg.norm(expected)
    assert (to_bf16((W + A @ B).get()) == to_bf16(W.get())).mean() > 0.9


@pytest.mark.parametrize("kind", [np.float32, np.uint16])
def test_the_smaller_term_is_rounded_first(kind, rng, cupy):
    """In bf16 a sum with a small second term has the error of one rounding."""
    x, A = (cupy.asarray(to_bf16(rng.normal(size=shape))) for shape in ((40, 32), (32, 2)))
    W = cupy.asarray(rng.normal(size=(32, 24)).astype(np.float32))
    B = cupy.asarray(0.02 * rng.normal(size=(2, 24)).astype(np.float32))
    found = Linear(W, Rounded(A), B).forward(x, kind).get()
    numbers, W, A, B = (from_bf16(to_bf16(a) if a.dtype == np.float32 else a).astype(np.float64)
                        for a in (x.get(), W.get(), A.get(), B.get()))
    exact = numbers @ W + from_bf16(to_bf16(numbers @ A)) @ B
    error = np.linalg.norm((from_bf16(found) if kind is np.uint16 else found) - exact) / np.linalg.norm(exact)
    assert error < (1e-6 if kind is np.float32 else 1.75e-3)


def test_merged_weights_are_those_of_the_float32_masters(rng):
    exact, mixed = adapted(rng)
    merged, expected = mixed.merged(), exact.merged()
    assert type(merged) is Transformer and merged.compute == "bfloat16"
    for name, p in merged.parameters().items():
        assert is_cupy(p.data) and to_numpy(p.data) == pytest.approx(expected.parameters()[name].data, rel=1e-5,
                                                                     abs=1e-6), name
    apart, together = (to_numpy(model.log_probs(TOKENS).data) for model in (mixed, merged))
    assert 0 < np.abs(apart - together).max() < 1e-2
    plain = mixed.to_device("gpu")
    assert mixed.compute == "float32" and to_numpy(plain.log_probs(TOKENS).data) == pytest.approx(
        exact.log_probs(TOKENS).data, abs=1e-4)
    for device in ("cpu", "gpu"):
        mixed.to_device(device)
        for name, p in mixed.merged().parameters().items():
            assert to_numpy(p.data) == pytest.approx(expected.parameters()[name].data, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_matrix_is_on_the_gpu_once_with_two_bytes_a_number(tied, rng):
    _, mixed = adapted(rng, tied=tied, layers=2)
    for name, p in mixed._frozen.items():
        matrix = name.endswith(("qkv", "_out", "gate_up", "unembedding"))
        assert is_cupy(p.data) != matrix and p.dtype == np.float32, name
        if matrix:
            kept = mixed._parameters[name]
            bits = (kept.weight if callable(kept) else kept).bits
            assert bits.dtype == np.uint16 and is_cupy(bits) and bits is mixed._rounded[name].bits
    decoding = mixed.decoding_weights()
    assert decoding["blocks.1.qkv"].W is mixed._rounded["blocks.1.qkv"].bits
    assert decoding["unembedding"].bits is mixed.unembedding.bits
    other = mixed.copy()
    assert other._rounded is mixed._rounded and other.compute == "bfloat16"


@pytest.mark.parametrize("config", ["plain", "grouped, smeared"])
def test_log_probs_of_samples_are_those_of_training(config, rng):
    _, mixed = adapted(rng, **CONFIGS[config])
    samples = generate(mixed, PROMPTS, 8, np.random.default_rng(1), 0)
    batch = pack(PROMPTS, samples.responses())
    mask = batch.mask > 0
    log_ratio = (to_numpy(mixed.response_log_probs(batch).data) - samples.log_probs[:, :mask.shape[1]])[mask]
    assert np.abs(log_ratio).max() < 3e-3 and (log_ratio ** 2).mean() ** 0.5 < 1e-3


def test_adapters_of_a_model_in_mixed_precision_compute_so_too(rng):
    _, base = models(rng, layers=2)
    model = Adapted(base, RANK, ALPHA, rng)
    assert model.compute == "bfloat16" and base.compute == "bfloat16"
    assert (to_numpy(model.log_probs(TOKENS).data) == to_numpy(base.log_probs(TOKENS).data)).all()
    assert all(is_cupy(p.data) for p in base.parameters().values())


@pytest.mark.parametrize("stage", ["SFT", "RLHF"])
def test_a_stage_trains_the_adapters_alone_as_in_float32(stage, rng):
    losses = []
    for compute in ("float32", "bfloat16"):
        _, model = adapted(np.random.default_rng(0), redraw=False)
        model.to_device("gpu", compute)
        before = {name: w.bits.copy() for name, w in model._rounded.items()}
        state = TrainState(model, np.random.default_rng(2))
        steps = train_sft(state, PROMPTS, RESPONSES, 4, 4, learning_rate=3e-3) if stage == "SFT" else train_rlhf(
            state, model.copy(), lambda prompts, responses: [len(r) for r in responses], PROMPTS, 3, 2, 3, 4, 0,
            learning_rate=3e-3)
        losses.append([metrics["loss"] for metrics in steps])
        assert all((w.bits == before[name]).all() for name, w in model._rounded.items())
        assert all(p.data.any() and p.dtype == np.float32 for p in model.parameters().values())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3, abs=5e-3)


def test_a_reward_model_with_adapters_is_trained_in_mixed_precision(rng):
    _, mixed = adapted(rng)
    model = RewardModel(mixed, rng).to_device("gpu", "bfloat16")
    model.packed_rewards(pack(PROMPTS, RESPONSES, last=True)).sum().backward()
    assert all(p.grad is not None and to_numpy(p.grad).any() for p in model.parameters().values())
