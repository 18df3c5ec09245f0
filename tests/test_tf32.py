"""compute="tensorfloat32": a float32 model whose products with weights have factors of 10 bits of mantissa."""
import numpy as np
import pytest

from minilm import mixed_precision
from minilm.backend import to_numpy
from minilm.config import Config
from minilm.fast.cached_decoding import Decoder, forward_cached
from minilm.generate import generate
from minilm.kernels.emulator import cublas
from minilm.lora import Adapted
from minilm.model import RewardModel, Transformer
from minilm.packing import pack
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor
from test_mixed_precision import CONFIGS, LOSSES, MASK, PROMPTS, RESPONSES, TOKENS, distance, models


@pytest.fixture(autouse=True)
def cupy(xp):
    return xp


def three(rng, **config):
    """A model in float64 on the CPU, and on the GPU in float32 and with TF32."""
    exact, _ = models(rng, **config)
    plain, tf32 = (Transformer.of(exact.config, {name: p.data.astype(np.float32) for name, p in
                                                 exact.parameters().items()}).to_device("gpu", compute)
                   for compute in ("float32", "tensorfloat32"))
    return exact, plain, tf32


def gradients_of(model, loss):
    value = loss(model)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.parameters().items() if p.grad is not None}


PADDING = {"a padded rectangle": lambda model: (model.hidden(TOKENS, MASK) * model._on_device(
    np.cos(np.arange(64)).astype(model.dtype))).sum(), "logits": lambda model: (model(TOKENS) * model(TOKENS)).sum()}


@pytest.mark.parametrize("loss", [*LOSSES, *PADDING])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_within_two_thousandths_of_float64s_and_those_of_float32_are_nearer(config, loss, rng):
    """10 bits of mantissa have an eighth of the error of 7: those of bf16 are within a hundredth."""
    exact, plain, tf32 = three(rng, **CONFIGS[config])
    (_, expected), (_, of_float32), (_, found) = (
        gradients_of(model, {**LOSSES, **PADDING}[loss]) for model in (exact, plain, tf32))
    assert 1e-4 < distance(found, expected) < (4e-3 if config == "tied" else 2e-3)
    assert distance(of_float32, expected) < 1e-5
    for name, exact_one in expected.items():
        assert found[name].dtype == np.float32
        assert distance({name: found[name]}, {name: exact_one}) < 8e-3, name


def test_numbers_of_10_bits_of_mantissa_are_not_rounded(rng):
    _, _, tf32 = three(rng)
    hidden, U = (tf32._on_device(cublas.to_tf32(rng.normal(size=shape).astype(np.float32)))
                 for shape in ((3, 64), (7, 64)))
    found = mixed_precision.logits(Tensor(hidden), Tensor(U), "tensorfloat32")
    assert to_numpy(found.data) == pytest.approx(to_numpy(hidden @ U.T), rel=1e-6, abs=1e-6)


def test_a_prompt_and_a_new_token_have_the_hidden_states_of_training_and_not_those_of_float32(rng):
    """Up to the order of sums, which sometimes rounds a factor the other way."""
    _, plain, tf32 = three(rng)
    decoder = Decoder(tf32)
    cache = decoder.cache(len(TOKENS), TOKENS.shape[1])
    for part, end in ((TOKENS[:, :-1], -2), (TOKENS[:, -1:], -1)):
        found = to_numpy(forward_cached(decoder, part, None, cache))
        here, in_float32 = (np.linalg.norm(found - to_numpy(model.hidden(TOKENS).data)[:, end])
                            for model in (tf32, plain))
        assert here < in_float32 / 5 and in_float32 > 0


@pytest.mark.parametrize("config", ["plain", "grouped, smeared"])
def test_samples_have_the_log_probs_of_training(config, rng):
    _, plain, tf32 = three(rng, **CONFIGS[config])
    samples, expected = (generate(model, PROMPTS, 8, np.random.default_rng(1), 0) for model in (tf32, plain))
    batch = pack(PROMPTS, samples.responses())
    mask = batch.mask > 0
    log_ratio = (to_numpy(tf32.response_log_probs(batch).data) - samples.log_probs[:, :mask.shape[1]])[mask]
    assert np.abs(log_ratio).max() < 3e-4
    assert (samples.tokens == expected.tokens).all()
    assert 0 < np.abs(samples.log_probs - expected.log_probs).max() < 1e-3


def test_adapters_and_a_reward_model_compute_so_too(rng):
    exact, plain, _ = three(rng)
    losses = []
    for compute in ("float32", "tensorfloat32"):
        model = Adapted(plain.copy(), 3, 6.0, np.random.default_rng(0)).to_device("gpu", compute)
        state = TrainState(model, np.random.default_rng(2))
        losses.append([metrics["loss"] for metrics in train_sft(state, PROMPTS, RESPONSES, 3, 4, learning_rate=3e-3)])
        samples = generate(model, PROMPTS, 4, np.random.default_rng(1), None)
        found = to_numpy(model.response_log_probs(pack(PROMPTS, samples.responses())).data)
        assert found == pytest.approx(samples.log_probs, abs=3e-4)
        assert model.merged().compute == compute
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[1] != losses[0]
    reward_model = RewardModel(plain, rng).to_device("gpu", "tensorfloat32")
    assert reward_model.transformer.compute == "tensorfloat32"


def test_a_model_of_any_width_takes_it_and_can_go_back(rng):
    config = Config(vocab_size=7, width=12, layers=1, heads=3, head_width=16, ffn_width=20, context=16)
    model = Transformer(config, rng)
    before = model.log_probs(TOKENS).data
    found = to_numpy(model.to_device("gpu", "tensorfloat32").log_probs(TOKENS).data)
    assert 0 < np.abs(found - before).max() < 1e-2
    assert model.to_device("cpu").compute == "float32" and (model.log_probs(TOKENS).data == before).all()


@pytest.mark.parametrize("device, dtype, message", [
    ("cpu", np.float32, "compute='tensorfloat32' needs the device 'gpu'"),
    ("gpu", np.float64, "compute='tensorfloat32' needs a model of float32")])
def test_what_cannot_be_computed_so_is_named(device, dtype, message, rng):
    exact, _ = models(rng)
    model = Transformer.of(exact.config, {name: p.data.astype(dtype) for name, p in exact.parameters().items()})
    with pytest.raises(ValueError, match=message):
        model.to_device(device, "tensorfloat32")
    assert model.compute == "float32"
