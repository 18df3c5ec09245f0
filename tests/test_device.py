"""Model, generation, objectives and stages on arrays of a GPU equal those on NumPy's arrays.

They run on the mock of CuPy (kernels/emulator), and on a GPU if there is one. The mock raises where CuPy
raises, and in more cases, so these tests also show that no array is copied to the CPU by accident.
"""
import functools
import sys
import types

import numpy as np
import pytest

import definitions
from common.attention_maps import attention_weights
from common.masked_pretraining import masked_pretraining
from helpers import assert_close, padded, small_transformer as any_small_transformer
from minilm import evaluate, layers, ops
from minilm.backend import array_module, is_cupy, to_device, to_numpy
from minilm.checkpoint import load_into
from minilm.data import make_batch
from minilm.diverged import Diverged
from minilm.fast.flat_parameters import shares_parameters
from minilm.generate import generate
from minilm.gradcheck import GradientError, gradcheck
from minilm.kernels.emulator import arrays
from minilm.model import RewardModel
from minilm.model_file import load_model, save_model
from minilm.objectives import dpo, kl, kl_in_the_loss, policy_gradient, reward, sft
from minilm.optim import AdamW
from minilm.packing import pack
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.pretraining import pretrain
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor
from minilm.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [5, 6], [4, 4]]
RESPONSES = [[2, 0], [3, 3, 1, 0], [5, 1, 0], [6], [2, 5, 0]]
OTHERS = [[1], [2, 0], [6, 6, 0], [3, 0], [1, 1, 1, 0]]
CONFIGS = {"plain": {"layers": 2},
           "grouped, smeared, tied": {"layers": 2, "kv_heads": 1, "key_smear": True, "tied": True},
           "interleaved pairs": {"rope_pairing": "interleaved"}}


small_transformer = functools.partial(any_small_transformer, head_width=16)      # smallest head width of the kernels


@pytest.fixture(autouse=True)
def cupy(xp):
    return xp


@pytest.fixture
def mock(cupy):
    """For tests that only the mock can run."""
    if not isinstance(cupy.ones(1), arrays.ndarray):
        pytest.skip("needs the mock")


def on_gpu(model):
    """A copy of the model on the GPU."""
    if isinstance(model, RewardModel):
        model = model.over({name: Tensor(p.data.copy(), requires_grad=True) for name, p in model.parameters().items()})
    else:
        model = model.copy()
    model.to_device("gpu")
    assert all(is_cupy(p.data) for p in model.parameters().values())
    return model


def host(x):
    return to_numpy(x.data if isinstance(x, Tensor) else x)


def value_and_gradients(parameters, function):
    """Value and gradients of function(), for a cotangent of N(0,1) entries, as arrays on the CPU."""
    for p in parameters.values():
        p.grad = None
    output = function()
    cotangent = np.random.default_rng(7).normal(size=output.shape)
    output.backward(to_device(cotangent, "gpu") if is_cupy(output.data) else cotangent)
    for name, p in parameters.items():
        assert p.grad is None or is_cupy(p.grad) == is_cupy(p.data), name
    return host(output), {name: None if p.grad is None else host(p.grad) for name, p in parameters.items()}


def assert_same(there, here):
    (value, gradients), (expected, expected_gradients) = there, here
    assert_close(value, expected)
    for name, gradient in expected_gradients.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            assert_close(gradients[name], gradient, name=name)


def assert_same_parameters(there, here):
    for (name, p), q in zip(there.parameters().items(), here.parameters().values()):
        assert is_cupy(p.data)
        assert_close(host(p), q, name=name)


# The model.

LEFT, LEFT_MASK = padded([[1, 2, 3], [4, 5, 6, 2, 1]], 1, 0)
RIGHT, RIGHT_MASK = padded([[1, 2, 3], [4, 5, 6, 2, 1]], 0, 1)
FORWARDS = {"logits": lambda m: m(RIGHT),
            "logits of nothing": lambda m: m(np.zeros((2, 0), int)),
            "log_probs": lambda m: m.log_probs(RIGHT, temperature=0.7),
            "padded on the left": lambda m: m.hidden(LEFT, key_mask=LEFT_MASK),
            "responses": lambda m: m.response_log_probs(pack(PROMPTS, RESPONSES), temperature=1.3)}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_the_transformer_and_all_its_gradients_equal_numpys(config, forward, rng):
    model = small_transformer(rng, **CONFIGS[config])
    assert_same(*(value_and_gradients(m.parameters(), lambda: FORWARDS[forward](m)) for m in (on_gpu(model), model)))


def test_a_bidirectional_model_equals_numpys(rng):
    model = small_transformer(rng, causal=False)
    for mask in (None, RIGHT_MASK):
        assert_same(*(value_and_gradients(m.parameters(), lambda: m.hidden(RIGHT, mask))
                      for m in (on_gpu(model), model)))


def test_activation_checkpointing_gives_the_same_bits(rng):
    model = on_gpu(small_transformer(rng, layers=2, key_smear=True))
    kept = value_and_gradients(model.parameters(), lambda: FORWARDS["responses"](model))
    model.activation_checkpointing = True
    again = value_and_gradients(model.parameters(), lambda: FORWARDS["responses"](model))
    assert (kept[0] == again[0]).all() and all((kept[1][name] == g).all() for name, g in again[1].items())


@pytest.mark.parametrize("config", CONFIGS)
def test_attention_weights_equal_numpys(config, rng):
    model = small_transformer(rng, **CONFIGS[config])
    assert_close(attention_weights(on_gpu(model), LEFT, LEFT_MASK), attention_weights(model, LEFT, LEFT_MASK))


def test_many_queries_and_many_rows_are_the_same_in_tiles_and_chunks(rng, monkeypatch):
    """Attention that computes its scores again, and logits a few rows at a time."""
    monkeypatch.setattr("minilm.fast.tiled_attention.QUERIES", 2)
    monkeypatch.setattr("minilm.fast.tiled_attention.SCORES_KEPT", 0)
    monkeypatch.setattr("minilm.fast.chunked_log_probs.LOGITS_HELD", 21)
    monkeypatch.setattr("minilm.kernels.log_probs.LOGITS_HELD", 21)
    monkeypatch.setattr("minilm.kernels.log_probs.SHARE_HELD", 0)
    model = small_transformer(rng, kv_heads=1)
    assert_same(*(value_and_gradients(m.parameters(), lambda: m.log_probs(RIGHT)) for m in (on_gpu(model), model)))


@pytest.mark.parametrize("tokens, mask", [(LEFT, LEFT_MASK), (RIGHT, RIGHT_MASK), (None, None)],
                         ids=["padded on the left", "padded on the right", "packed"])
def test_the_reward_model_and_all_its_gradients_equal_numpys(tokens, mask, rng):
    model = RewardModel(small_transformer(rng, key_smear=True), rng)
    def rewards(m):
        return m.packed_rewards(pack(PROMPTS, RESPONSES, last=True)) if tokens is None else m.rewards(tokens, mask)
    assert_same(*(value_and_gradients(m.parameters(), lambda: rewards(m)) for m in (on_gpu(model), model)))


def test_tokens_and_masks_may_be_on_the_gpu_already(rng):
    model, rewards = small_transformer(rng), RewardModel(small_transformer(rng), rng)
    tokens, mask = to_device(LEFT, "gpu"), to_device(LEFT_MASK, "gpu")
    assert_close(host(on_gpu(rewards).rewards(tokens, mask)), rewards.rewards(LEFT, LEFT_MASK))
    assert_close(host(on_gpu(model).log_probs(tokens)), model.log_probs(LEFT))
    assert_close(host(on_gpu(model)(tokens, key_mask=mask)), model(LEFT, key_mask=LEFT_MASK))


def test_tokens_outside_the_vocabulary_raise_before_they_are_moved(rng):
    """A GPU would read another row without an error."""
    model = on_gpu(small_transformer(rng))
    with pytest.raises(IndexError, match="tokens holds 7, which is not in the vocabulary of 7"):
        model([[1, 7]])
    with pytest.raises(IndexError, match="generate: prompt 0 holds -1, which is not in the vocabulary of 7"):
        generate(model, [[-1]], 2, np.random.default_rng(0), eos=0)
    with pytest.raises(IndexError, match="targets holds 9, which is not in the vocabulary of 7"):
        model.response_log_probs(pack([[1]], [[1, 9]]))


def test_a_small_gradient_of_an_embedding_keeps_its_digits_beside_large_ones(rng, cupy):
    """CuPy's add.reduceat, a difference of running sums, would lose them."""
    tokens = np.repeat([0, 1], [1000, 1])
    dy = np.where(tokens[:, None] == 0, 1000.0, 0.001).astype(np.float32) * np.ones((1, 4), np.float32)
    table = Tensor(cupy.zeros((2, 4), np.float32), requires_grad=True)
    ops.embed(table, tokens).backward(cupy.asarray(dy))
    assert table.grad.dtype == np.float32
    assert_close(host(table.grad)[1], np.full(4, np.float32(0.001)), tolerance=1e-6)


FORMULAS = {
    "rms_norm": lambda m, x, w: m.rms_norm(x, w),
    "swiglu": lambda m, x, w: m.swiglu(x),
    "rope": lambda m, x, w: m.rope(x, *layers.rope_tables(array_module(x.data).arange(5), 16, dtype="float64")),
    "smear": lambda m, x, w: m.smear(x, x[0, :, 1], x.data[:, :, 0]),
    "attention": lambda m, x, w: m.attention(x, x[:, 1:3], x[:, 2:] * w, key_mask=np.arange(5) < [[5], [3]]),
    "attention of an encoder": lambda m, x, w: m.attention(x * w, x[:, :2], x[:, 2:], causal=False),
    "token_log_probs": lambda m, x, w: m.token_log_probs(x, x[0, 0], np.arange(40).reshape(2, 4, 5) % 5),
    "sequence_log_probs": lambda m, x, w: m.sequence_log_probs(x[0, 0], np.arange(16) < [[1], [2], [3], [16], [4]])}
WITH_KERNELS = {"rms_norm", "swiglu", "attention", "attention of an encoder", "token_log_probs"}


@pytest.mark.parametrize("name, kernel", [(name, kernel) for name in FORMULAS
                                          for kernel in (True, False) if kernel or name in WITH_KERNELS])
def test_layers_equal_their_formulas(name, kernel, rng, cupy):
    x = Tensor(cupy.asarray(rng.normal(size=(2, 4, 5, 16))), requires_grad=True)
    w = Tensor(cupy.asarray(rng.normal(size=16)), requires_grad=True)
    plainly = types.SimpleNamespace(**{f: functools.partial(getattr(layers, f), kernel=False)
                                       for f in ("rms_norm", "swiglu", "attention", "token_log_probs")})
    with pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.setattr(cupy, "RawModule", None)
        module = layers if kernel or name not in WITH_KERNELS else plainly
        found = value_and_gradients({"x": x, "w": w}, lambda: FORMULAS[name](module, x, w))
    assert_same(found, value_and_gradients({"x": x, "w": w}, lambda: FORMULAS[name](definitions, x, w)))


def test_a_key_mask_with_a_gap_raises_in_the_kernel(rng, cupy):
    x, gap = cupy.asarray(rng.normal(size=(2, 2, 4, 16))), np.array([[1, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="a row of key_mask has a gap; .* pass kernel=False"):
        layers.attention(x, x, x, key_mask=gap)
    assert_close(host(layers.attention(x, x, x, key_mask=gap, kernel=False)),
                 layers.attention(*3 * [host(x)], key_mask=gap).data)


# The optimiser.

@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 2e-5)])
def test_steps_of_adamw_equal_numpys(dtype, tolerance, rng):
    here = small_transformer(rng, dtype, key_smear=True)
    there, norms = on_gpu(here), {}
    for model in (there, here):
        optimizer = AdamW(model.parameters(), learning_rate=0.01, weight_decay=0.1)
        norms[model] = []
        for _ in range(4):
            optimizer.zero_grad()
            sft.sft_loss(model.response_log_probs(pack(PROMPTS, RESPONSES)), pack(PROMPTS, RESPONSES).mask).backward()
            norms[model] += map(float, (optimizer.clip(0.5), optimizer.step()))
    assert_close(np.array(norms[there]), np.array(norms[here]), tolerance)
    for name, p in there.parameters().items():
        assert p.grad is p.grad_buffer and is_cupy(p.grad)
        assert_close(host(p), here.parameters()[name], tolerance, name)


def test_frozen_parameters_stay_bit_for_bit_and_the_others_have_numpys_steps(rng):
    """Frozen from the start, for a while, and never; each run of trained parameters is a launch of its own."""
    here = small_transformer(rng, key_smear=True, layers=2)
    there, norms = on_gpu(here), {}
    for model in (there, here):
        parameters = model.parameters()
        optimizer = AdamW(parameters, learning_rate=0.01, weight_decay=0.1)
        norms[model] = []
        for step in range(6):
            for name, p in parameters.items():
                p.requires_grad = not (name in ("embedding", "blocks.1.ffn_norm") or "0.qkv" in name and step in (2, 3))
            before = {name: host(p).tobytes() for name, p in parameters.items()}
            optimizer.zero_grad()
            sft.sft_loss(model.response_log_probs(pack(PROMPTS, RESPONSES)), pack(PROMPTS, RESPONSES).mask).backward()
            norms[model] += map(float, (optimizer.clip(0.5), optimizer.step()))
            for name, p in parameters.items():
                assert (host(p).tobytes() == before[name]) == (not p.requires_grad), (name, step)
        assert sorted({*optimizer.updates.tolist()}) == [0, 4, 6]
    assert_close(np.array(norms[there]), np.array(norms[here]))
    for name, p in there.parameters().items():
        assert_close(host(p), here.parameters()[name], name=name)


def test_a_parameter_changed_on_the_gpu_between_forward_and_backward_raises(rng):
    model = on_gpu(small_transformer(rng))
    optimizer, loss = AdamW(model.parameters()), model.log_probs(np.array([[1, 2, 3]])).sum()
    model.log_probs(np.array([[1, 2, 3]])).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameter '.*', shape .*, was changed in place by AdamW.step"):
        loss.backward()
    model.parameters()["embedding"].assign(np.zeros((7, 4)))
    assert not host(model.parameters()["embedding"]).any()


def test_models_share_parameters_on_the_gpu_as_on_the_cpu(rng):
    model = on_gpu(small_transformer(rng))
    AdamW(model.parameters())
    assert shares_parameters(model, model) == "embedding" and shares_parameters(model, model.copy()) is None
    assert shares_parameters(model, small_transformer(rng)) is None


# Generation.

@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"temperature": 0.7, "top_k": 4},
                                      {"temperature": 1.5, "top_p": 0.8}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_the_same_tokens_are_drawn_with_the_same_log_probs(config, settings, rng):
    """For prompts of several lengths, some of them equal, with compaction of the batch."""
    model = small_transformer(rng, context=40, **CONFIGS[config])
    for p in model.parameters().values():           # flatter distributions, so that responses end at different times
        p.data *= 0.6
    there, here = (generate(m, PROMPTS * 3, 12, np.random.default_rng(5), eos=0, **settings)
                   for m in (on_gpu(model), model))
    assert all(type(a) is np.ndarray for a in there.arrays())
    assert (there.tokens == here.tokens).all() and (there.mask == here.mask).all()
    assert settings == {"temperature": 0} or len({*here.mask.sum(axis=1)}) > 3
    assert_close(there.log_probs, here.log_probs)
    assert_close(there.entropies, here.entropies)


def test_several_end_tokens_and_prompts_and_uniforms_of_the_gpu_give_numpys_tokens(cupy, rng):
    model, prompts, uniforms = small_transformer(rng), np.array([[1, 2], [3, 4], [1, 2]]), rng.random((3, 8))
    here = generate(model, prompts, 8, uniforms, eos=[0, 3])
    there = generate(on_gpu(model), cupy.asarray(prompts), 8, cupy.asarray(uniforms), eos=[0, 3])
    assert there.responses() == here.responses()


@pytest.mark.parametrize("eos, width", [(range(7), 1), (None, 12)])
def test_samples_are_as_wide_as_the_longest_response(eos, width, rng):
    """The tokens of a GPU come in blocks of several."""
    model = small_transformer(rng, context=40)
    samples = generate(on_gpu(model), PROMPTS, 12, np.random.default_rng(0), eos=eos and list(eos))
    assert samples.tokens.shape == (len(PROMPTS), width) and (samples.mask == 1).all()


def test_logits_that_are_no_numbers_end_generation_with_step_row_and_tensor(rng):
    model = on_gpu(small_transformer(rng))
    model.parameters()["final_norm"].data[:] = np.nan
    with pytest.raises(Diverged, match="generate, step 1, row 0: .* the parameter final_norm, "):
        generate(model, PROMPTS, 3, rng, eos=0)


# Objectives: log-probs on the GPU, everything else on the CPU.

N, T = 4, 5
NUMBERS = np.random.default_rng(3)
MASK = (np.arange(T) < [[5], [2], [3], [1]]).astype(float)
A, A_T, OLD = NUMBERS.normal(size=N), NUMBERS.normal(size=(N, T)), NUMBERS.normal(size=(N, T))
R_C, R_R, LENGTHS = NUMBERS.normal(size=N), NUMBERS.normal(size=N), np.array([5, 2, 3, 1])
TOKEN_LOSSES = {
    "sft_loss": lambda log_probs: sft.sft_loss(log_probs, MASK),
    "sft_loss of a window": lambda log_probs: sft.sft_loss(log_probs, MASK, total=40),
    "policy_gradient_loss": lambda log_probs: policy_gradient.policy_gradient_loss(log_probs, A, MASK),
    "policy_gradient_loss, rewards to go": lambda log_probs: policy_gradient.policy_gradient_loss(log_probs, A_T, MASK),
    "ppo_clip_loss": lambda log_probs: policy_gradient.ppo_clip_loss(log_probs, OLD, A, MASK),
    "ppo_clip_loss of responses":
        lambda log_probs: policy_gradient.ppo_clip_loss(log_probs, OLD, A, MASK, level="sequence"),
    "ppo_clip_loss of geometric means":
        lambda log_probs: policy_gradient.ppo_clip_loss(log_probs, OLD, A, MASK, level="geometric_mean"),
    **{f"ppo_clip_loss, {mean}": lambda log_probs, mean=mean: policy_gradient.ppo_clip_loss(
        log_probs, OLD, A, MASK, epsilon_high=0.3, token_mean=mean) for mean in ("response", "batch", 7.0)},
    "k3_times_ratio": lambda log_probs: kl_in_the_loss.token_kl_loss(
        kl_in_the_loss.k3_times_ratio(log_probs, OLD, OLD - 0.3), MASK, "response"),
    "k3_times_mean_ratio": lambda log_probs: kl_in_the_loss.token_kl_loss(
        kl_in_the_loss.k3_times_mean_ratio(log_probs, OLD, OLD - 0.3, MASK), MASK, "batch")}
PAIR_LOSSES = {
    "reward_loss": lambda c, r: reward.reward_loss(c, r, margin=0.3, centering=0.1),
    "reward_loss, margins": lambda c, r: reward.reward_loss(c, r, margin=A),
    "dpo_loss": lambda c, r: dpo.dpo_loss(c, r, R_C, R_R, beta=0.5, label_smoothing=0.1),
    "robust_dpo_loss": lambda c, r: dpo.robust_dpo_loss(c, r, R_C, R_R, beta=0.5, flip_rate=0.1),
    "ipo_loss": lambda c, r: dpo.ipo_loss(c, r, R_C, R_R),
    "length_normalised_dpo_loss": lambda c, r: dpo.length_normalised_dpo_loss(c, r, R_C, R_R, LENGTHS, LENGTHS[::-1]),
    "k1, k2, k3": lambda c, r: kl.k1(c, r.data) + kl.k2(c, r.data) * kl.k3(r, c.data)}
LOSSES = {**{name: (loss, (OLD * 0.5,)) for name, loss in TOKEN_LOSSES.items()},
          **{name: (loss, (R_R, A)) for name, loss in PAIR_LOSSES.items()}}


@pytest.mark.parametrize("loss", LOSSES)
def test_objectives_take_masks_references_and_rewards_from_the_cpu(loss):
    function, inputs = LOSSES[loss]
    sides = []
    for device in ("gpu", "cpu"):
        leaves = [Tensor(to_device(x.copy(), device), requires_grad=True) for x in inputs]
        sides.append(value_and_gradients(dict(enumerate(leaves)), lambda: function(*leaves)))
    assert_same(*sides)


def test_metrics_of_arrays_on_the_gpu_equal_numpys():
    both = [[to_device(x, device) for x in (OLD, A_T, MASK, R_C, R_R, A)] for device in ("gpu", "cpu")]
    for metrics in (lambda x, y, mask, *_: sft.sft_metrics(x, mask, x > y, y > x, entropies=y),
                    lambda x, y, mask, *_: kl.kl_metrics(x, y, mask),
                    lambda x, y, mask, c, r, a: reward.reward_metrics(c, r),
                    lambda x, y, mask, c, r, a: dpo.dpo_metrics(c, r, r, a)):
        there, here = (metrics(*side) for side in both)
        assert there == here and all(type(value) is float for value in there.values())


# Stages.

STREAM = np.random.default_rng(1).integers(7, size=200)


def references(model):
    return [reference_log_probs(model, PROMPTS, responses) for responses in (RESPONSES, OTHERS)]


STAGES = {
    "pretraining": lambda t, ref: pretrain(t, STREAM, 3, 4, 6, microbatches=2),
    "SFT": lambda t, ref: train_sft(t, PROMPTS, RESPONSES, 3, 4),
    "reward model": lambda t, ref: train_reward_model(t, PROMPTS, RESPONSES, OTHERS, 3, 4, microbatches=2),
    "RLHF": lambda t, ref: train_rlhf(t, ref, lambda _, ys: [len(y) for y in ys], PROMPTS, 3, 2, 3, 6, eos=0),
    "masked pretraining": lambda t, ref: masked_pretraining(t, lambda *_: (LEFT, LEFT_MASK), 3, 2, 0, share=0.7),
    "DPO": lambda t, ref: train_dpo(t, PROMPTS, RESPONSES, OTHERS, *references(ref), 3, 4,
                                                          loss=functools.partial(dpo.dpo_loss, label_smoothing=0.1))}


def run_stage(name, model):
    reference = None if isinstance(model, RewardModel) else model.copy()
    return list(STAGES[name](TrainState(model, np.random.default_rng(2), weight_decay=0.1), reference))


def model_for(name, rng, dtype=np.float64):
    model = small_transformer(rng, dtype, causal=name != "masked pretraining")
    return RewardModel(model, rng) if name == "reward model" else model


def compare_runs(reported, expected, there, here):
    assert len(reported) == 3
    for metrics, others in zip(reported, expected):
        assert all(type(value) is float for value in metrics.values()), metrics
        assert list(metrics) == list(others)
        assert_close(np.array([*metrics.values()]), np.array([*others.values()]))
    assert_same_parameters(there, here)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_metrics_and_the_weights_of_numpy(name, rng):
    here = model_for(name, rng)
    there = on_gpu(here)
    compare_runs(run_stage(name, there), run_stage(name, here), there, here)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_in_float32_begins_as_in_float64_and_stays_in_float32(name, rng):
    """The first step alone: where a gradient is 0 up to rounding, AdamW turns the rounding error into a whole step."""
    model = model_for(name, rng, np.float32)
    single, double = on_gpu(model), on_gpu(model_for(name, rng))
    for wide, narrow in zip(double.parameters().values(), single.parameters().values()):
        wide.data[...] = narrow.data.astype(np.float64)
    first, expected = (run_stage(name, m)[0] for m in (single, double))
    assert_close(np.array([*first.values()]), np.array([*expected.values()]), 1e-4)
    assert all(p.data.dtype == np.float32 for p in single.parameters().values())


def test_several_workers_raise(rng):
    model = on_gpu(small_transformer(rng))
    with pytest.raises(ValueError, match="2 workers are processes that share a CPU's memory; on a GPU, ask for 1"):
        TrainState(model, rng, workers=2)
    with pytest.raises(ValueError, match="2 workers"):
        generate(model, PROMPTS * 3, 2, rng, eos=0, workers=2)


# Evaluation, checkpoints, gradcheck.

def test_evaluation_equals_numpys(rng):
    policy, reference = small_transformer(rng), small_transformer(rng)
    here = evaluate.sequence_kl(policy, reference, PROMPTS, RESPONSES, batch_size=2)
    there = evaluate.sequence_kl(on_gpu(policy), on_gpu(reference), PROMPTS, RESPONSES, batch_size=2)
    assert type(there) is np.ndarray
    assert_close(there, here)
    rewards = RewardModel(small_transformer(rng), rng)
    assert_close(evaluate.predicted_rewards(on_gpu(rewards), PROMPTS, RESPONSES, batch_size=2),
                 evaluate.predicted_rewards(rewards, PROMPTS, RESPONSES, batch_size=2))


def test_a_run_restored_on_the_gpu_continues_bit_for_bit(rng):
    one, other = (on_gpu(small_transformer(np.random.default_rng(seed), layers=2, key_smear=True)) for seed in (0, 1))
    training, restored = TrainState(one, np.random.default_rng(2)), TrainState(other, np.random.default_rng(3))
    stage = train_sft(training, PROMPTS, RESPONSES, 4, 3)
    metrics = [next(stage), next(stage)]
    saved, metadata = training.snapshot()
    assert all(type(a) is np.ndarray for a in saved.values())
    restored.restore({name: a.copy() for name, a in saved.items()}, metadata)
    metrics = list(stage)
    assert list(train_sft(restored, PROMPTS, RESPONSES, 4, 3)) == metrics and len(metrics) == 2
    for name, p in one.parameters().items():
        assert (host(p) == host(other.parameters()[name])).all()


def test_a_model_goes_from_the_gpu_to_a_file_and_back(rng, tmp_path):
    pytest.importorskip("safetensors")
    tokenizer = Tokenizer()
    model = small_transformer(rng, vocab_size=tokenizer.vocab_size)
    save_model(tmp_path / "model", on_gpu(model), tokenizer)
    loaded, *_ = load_model(tmp_path / "model")
    other = on_gpu(small_transformer(rng, vocab_size=tokenizer.vocab_size))
    load_into(other.parameters(), {name: p.data for name, p in loaded.parameters().items()})
    for name, p in model.parameters().items():
        assert (loaded.parameters()[name].data == p.data).all() and (host(other.parameters()[name]) == p.data).all()


@pytest.mark.parametrize("directions", [None, 5])
def test_gradcheck_works_on_the_gpu(directions, rng, cupy):
    x, y = (Tensor(cupy.asarray(rng.normal(size=shape)), requires_grad=True) for shape in ((3, 4), (4, 2)))
    before = host(x)
    assert gradcheck(lambda x, y: ops.tanh(x) @ y, x, y, directions=directions) < 1e-7
    assert_close(host(x), before, 1e-15)

    def wrong(x, y):
        return x.sum() * 1.0 + (Tensor(y.data, requires_grad=True) * y).sum()
    with pytest.raises(GradientError):
        gradcheck(wrong, x, y, directions=directions)


# No array is copied to the CPU by accident.

def test_only_a_few_numbers_per_step_are_copied_to_the_cpu(mock, rng, monkeypatch):
    """In training and generation no weights, hidden states or logits are copied."""
    sizes, get = [], arrays.ndarray.get
    monkeypatch.setattr(arrays.ndarray, "get", lambda self, **to: sizes.append(self.size) or get(self, **to))
    policy = small_transformer(rng, vocab_size=64, width=32, layers=2, key_smear=True).to_device("gpu")
    for name in ("SFT", "DPO", "RLHF", "pretraining"):
        run_stage(name, policy)
    assert sizes and max(sizes) <= 3 * 2 * 3 * 6, sorted(sizes)[-5:]    # three for each of 6 tokens of 2 x 3 responses


def test_a_numpy_array_beside_a_tensor_on_the_gpu_raises_with_the_primitive(cupy):
    x = Tensor(cupy.ones(2))
    for left, right in ((x, np.ones(2)), (np.ones(2), x)):
        with pytest.raises(TypeError, match=r"multiply\(\(2,\), \(2,\)\): Unsupported type .*numpy.ndarray"):
            left * right
    with pytest.raises(TypeError, match=r"add\(\(2,\), \(2,\)\): .*mixed"):
        x + Tensor(np.ones(2))


def test_numpy_inside_a_model_on_the_gpu_raises(mock, rng, monkeypatch):
    """For example in a layer that calls np instead of array_module."""
    monkeypatch.setattr("minilm.layers.array_module", lambda *_: np)
    with pytest.raises(TypeError):
        on_gpu(small_transformer(rng)).log_probs(RIGHT)


def test_without_cupy_the_gpu_raises_with_the_package_to_install(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="pip install .cupy-cuda13x"):
        small_transformer(rng).to_device("gpu")


def test_a_padded_batch_has_the_gradients_of_numpy(rng):
    batch = make_batch(PROMPTS, RESPONSES, pad=0)
    model = small_transformer(rng)
    def loss(m):
        return sft.sft_loss(m.log_probs(batch.tokens), batch.target_mask)
    assert_same(*(value_and_gradients(m.parameters(), lambda: loss(m)) for m in (on_gpu(model), model)))
