"""Mixed precision on the mock of CuPy: values and gradients near those of float64, training as in float32, errors."""
import numpy as np
import pytest

from minilm.backend import array_module, to_numpy
from minilm.config import Config
from minilm.model import RewardModel, Transformer
from minilm.optim import AdamW
from minilm.packing import pack
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.pretraining import pretrain
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor

PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [5, 6], [4, 4]]
RESPONSES = [[2, 0], [3, 3, 1, 0], [5, 1, 0], [6], [2, 5, 0]]
TOKENS = np.random.default_rng(0).integers(0, 7, (3, 9))
CONFIGS = {"plain": {"layers": 3}, "grouped, smeared": {"layers": 2, "kv_heads": 1, "key_smear": True},
           "tied": {"layers": 2, "tied": True}, "interleaved": {"rope_pairing": "interleaved"}}
LOSSES = {"a rectangle": lambda model: model.log_probs(TOKENS).mean(),
          "a pack": lambda model: model.response_log_probs(pack(PROMPTS, RESPONSES)).sum(),
          "at a temperature": lambda model: model.log_probs(TOKENS, 0.7).sum()}


MASK = np.ones((3, 9))
MASK[0, :3] = MASK[1, 6:] = MASK[2, :2] = MASK[2, 7:] = 0


@pytest.fixture(autouse=True)
def cupy(xp):
    return xp


def models(rng, **config):
    """The same model in float64 on the CPU, and in mixed precision."""
    shape = {"vocab_size": 7, "width": 64, "layers": 1, "heads": 2, "ffn_width": 96, "context": 16, **config}
    exact = Transformer(Config(**shape), rng, np.float64)
    for name, p in exact.parameters().items():
        if "norm" in name or "smear" in name:           # they start at 1 and 0
            p.data += 0.3 * rng.normal(size=p.shape)
    weights = {name: p.data.astype(np.float32) for name, p in exact.parameters().items()}
    return exact, Transformer.of(exact.config, weights).to_device("gpu", compute="bfloat16")


def distance(found, exact):
    """Of two dictionaries of arrays, relative to the norm of the second."""
    difference = sum(((to_numpy(found[name]) - exact[name]) ** 2).sum() for name in exact)
    return (difference / sum((a ** 2).sum() for a in exact.values())) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("config", CONFIGS)
def test_values_and_gradients_are_within_a_hundredth_of_float64s(config, loss, checkpointing, rng):
    """Two hundredths where the logits, of a tied embedding, are ten times as large."""
    exact, mixed = models(rng, **CONFIGS[config])
    mixed.activation_checkpointing = checkpointing
    values, gradients = [], []
    for model in (exact, mixed):
        value = LOSSES[loss](model)
        value.backward()
        values.append(value.item())
        gradients.append({name: p.grad for name, p in model.parameters().items()})
    assert values[1] == pytest.approx(values[0], rel=3e-3)
    assert 1e-5 < distance(gradients[1], gradients[0]) < (2e-2 if config == "tied" else 1e-2)
    for name, exact_one in gradients[0].items():
        assert gradients[1][name].dtype == np.float32
        assert distance({name: gradients[1][name]}, {name: exact_one}) < 3e-2, name


PADDED = {**CONFIGS, "both directions": {"layers": 2, "causal": False, "key_smear": True}}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("config", PADDED)
def test_a_padded_batch_is_as_near_to_float64_as_others(config, checkpointing, rng):
    """Of padding too: a query to the right of the real tokens sees all of them."""
    exact, mixed = models(rng, **PADDED[config])
    mixed.activation_checkpointing = checkpointing
    weights = rng.normal(size=(*TOKENS.shape, exact.config.width)).astype(np.float32)
    hidden, gradients = [], []
    for model in (exact, mixed):
        h = model.hidden(TOKENS, MASK)
        h.backward(array_module(h.data).asarray(weights.astype(h.dtype)))
        hidden.append({"": to_numpy(h.data)})
        gradients.append({name: p.grad for name, p in model.parameters().items() if p.grad is not None})
    assert 1e-5 < distance(hidden[1], hidden[0]) < 1e-2
    assert 1e-5 < distance(gradients[1], gradients[0]) < 1e-2
    for name, exact_one in gradients[0].items():
        assert distance({name: gradients[1][name]}, {name: exact_one}) < 3e-2, name


def test_padding_changes_no_real_token_and_gets_no_gradient_from_them(rng):
    _, mixed = models(rng, key_smear=True, layers=2)
    real = array_module(mixed.unembedding.data).asarray(MASK[:, :, None].astype(np.float32))
    found = []
    for padding in (0, 5):
        for p in mixed.parameters().values():
            p.grad = None
        h = mixed.hidden(np.where(MASK, TOKENS, padding).astype(int), MASK)
        (h * real).sum().backward()
        gradients = [to_numpy(p.grad) for name, p in mixed.parameters().items() if p.grad is not None]
        found.append([to_numpy(h.data)[MASK > 0], *gradients])
    assert all(np.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match="a row of key_mask has a gap"):
        mixed.hidden(TOKENS, np.where(np.arange(9) == 4, 0, MASK))


@pytest.mark.parametrize("shape", [(2, 0), (0, 4), (0, 0)])
def test_no_tokens_have_no_hidden_states(shape, rng):
    _, mixed = models(rng)
    for mask in (None, np.ones(shape)):
        assert mixed.hidden(np.zeros(shape, int), mask).shape == (*shape, 64)


# Training.

def stream(rng, count):
    """A text that can be learnt: each token is the sum of the two before it, but for one in eight."""
    tokens = [1, 2]
    for noise in rng.random(count):
        tokens.append(int(rng.integers(7)) if noise < 1 / 8 else sum(tokens[-2:]) % 7)
    return np.array(tokens)


def losses_of(seed, data_seed, compute, steps):
    config = Config(vocab_size=7, width=32, layers=2, heads=1, ffn_width=48, context=24)
    model = Transformer(config, np.random.default_rng(seed)).to_device("gpu", compute)
    state = TrainState(model, np.random.default_rng(data_seed))
    text = stream(np.random.default_rng(9), 4000)
    return np.array([metrics["loss"] for metrics in pretrain(state, text, steps, 8, 16, learning_rate=3e-3)])


@pytest.mark.slow
def test_200_steps_of_a_loss_curve_are_within_the_noise_of_float32s():
    """Noise: how far runs in float32 with other batches are from each other, over their last 50 steps."""
    runs = [losses_of(1, batches, "float32", 200) for batches in (1, 2, 3)]
    mixed = losses_of(1, 1, "bfloat16", 200)
    ends = np.array([curve[150:].mean() for curve in runs])
    assert ends.mean() < 0.8 * np.mean([curve[:5].mean() for curve in runs])        # something was learnt
    assert abs(mixed[150:].mean() - ends[0]) < ends.std(ddof=1)
    assert np.abs(mixed - runs[0]).mean() < 0.2 * np.abs(runs[1] - runs[0]).mean()


def test_the_first_steps_have_the_losses_of_float32():
    assert losses_of(1, 1, "bfloat16", 10) == pytest.approx(losses_of(1, 1, "float32", 10), rel=2e-3)


def aligned(stage, compute):
    """The last metrics of a stage, over several steps."""
    rng = np.random.default_rng(3)
    config = Config(vocab_size=7, width=32, layers=2, heads=1, ffn_width=48, context=16)
    model = Transformer(config, rng).to_device("gpu", compute)
    reference = model.copy()
    prompts = [[int(i)] for i in rng.integers(1, 7, 24)]
    if stage == "DPO":
        chosen, rejected = ([[*(rng.integers(1, 4, 3) + shift).tolist(), 0] for _ in prompts] for shift in (0, 3))
        references = (reference_log_probs(reference, prompts, side) for side in (chosen, rejected))
        steps = train_dpo(TrainState(model, rng), prompts, chosen, rejected, *references, 40, 8, learning_rate=3e-3)
        return np.mean([[m["rewards/margins"], m["rewards/accuracies"]] for m in steps][-10:], axis=0)
    def reward(prompts, answers):
        return [float(np.mean([token in (1, 2, 3) for token in answer])) for answer in answers]
    steps = train_rlhf(TrainState(model, rng), reference, reward, prompts, 40, 8, 4, 4, eos=None, beta=0.02,
                       learning_rate=2e-3)
    return np.mean([[m["reward"]] for m in steps][-10:], axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage, least", [("DPO", 1.0), ("RLHF", 0.75)])
def test_alignment_ends_in_the_same_place(stage, least):
    found, expected = (aligned(stage, compute) for compute in ("bfloat16", "float32"))
    assert expected[0] > least                          # it went somewhere
    assert found == pytest.approx(expected, rel=0.05, abs=0.02)


def test_a_reward_model_has_its_body_in_mixed_precision(rng):
    _, mixed = models(rng)
    reward_model = RewardModel(mixed, rng).to_device("gpu", "bfloat16")
    assert reward_model.transformer.compute == "bfloat16" and mixed.copy().compute == "bfloat16"
    exact = RewardModel(Transformer.of(mixed.config, {n: to_numpy(p.data) for n, p in mixed.parameters().items()}), rng)
    exact.head.data[...] = to_numpy(reward_model.head.data)
    batch = pack(PROMPTS, RESPONSES, last=True)
    expected = exact.packed_rewards(batch).data
    assert to_numpy(reward_model.packed_rewards(batch).data) == pytest.approx(expected, abs=2e-2)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    for pad in (lambda text: [0] * (7 - len(text)) + text, lambda text: text + [0] * (7 - len(text))):
        mask = np.array([pad([1] * len(text)) for text in texts])
        found = to_numpy(reward_model.rewards(np.array([*map(pad, texts)]), mask).data)
        assert found == pytest.approx(expected, abs=2e-2)


def test_float32_is_what_it_was_and_a_model_can_go_back(rng):
    exact, mixed = models(rng)
    plain = Transformer.of(exact.config, {name: p.data.astype(np.float32) for name, p in exact.parameters().items()})
    plain.to_device("gpu")
    before = to_numpy(plain.log_probs(TOKENS).data)
    assert plain.compute == "float32" and before == pytest.approx(exact.log_probs(TOKENS).data, abs=1e-4)
    assert (to_numpy(mixed.to_device("gpu").log_probs(TOKENS).data) == before).all()
    assert mixed.to_device("cpu").compute == "float32"


def test_gradients_of_several_uses_of_a_weight_add_up(rng):
    """The second product is added to the first where it is stored."""
    _, mixed = models(rng)
    once, twice = (Transformer.of(mixed.config, {n: to_numpy(p.data) for n, p in mixed.parameters().items()}).to_device(
        "gpu", compute="bfloat16") for _ in range(2))
    once.log_probs(TOKENS).sum().backward()
    for _ in range(2):
        twice.log_probs(TOKENS).sum().backward()
    for name, p in twice.parameters().items():
        assert to_numpy(p.grad) == pytest.approx(2 * to_numpy(once.parameters()[name].grad), rel=1e-5, abs=1e-5), name


def test_weights_that_begin_anywhere_in_a_flat_array_are_taken(rng):
    _, mixed = models(rng)
    before = to_numpy(mixed.log_probs(TOKENS).data)
    AdamW({"extra": Tensor(mixed.unembedding.data[:1, :3].copy(), requires_grad=True), **mixed.parameters()})
    assert any(p.data.data.ptr % 16 for p in mixed.parameters().values())
    loss = mixed.log_probs(TOKENS)
    assert (to_numpy(loss.data) == before).all()
    loss.sum().backward()


WRONG = [({"compute": "float16"}, {}, "compute is 'float16'; it must be one of float32, tensorfloat32, bfloat16"),
         ({"device": "cpu"}, {}, "needs the device 'gpu'"), ({}, {"dtype": np.float64}, "needs a model of float32"),
         ({}, {"width": 32}, r"needs a head_width of \(32, 64, 128\)"),
         ({}, {"width": 68, "head_width": 32}, "needs a width of at most 4096 that 8 divides"),
         ({}, {"width": 4160, "head_width": 32}, "needs a width of at most 4096"),
         ({}, {"ffn_width": 12}, "needs an ffn_width that 8 divides")]


@pytest.mark.parametrize("given, config, message", WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_computed_so_is_refused_and_nothing_is_moved(given, config, message, rng):
    shape = {"vocab_size": 7, "width": 64, "layers": 1, "heads": 2, "ffn_width": 96, "context": 16, **config}
    dtype = shape.pop("dtype", np.float32)
    model = Transformer(Config(**shape), rng, dtype)
    with pytest.raises(ValueError, match=message):
        model.to_device(**{"device": "gpu", "compute": "bfloat16", **given})
    assert model.compute == "float32" and type(model.unembedding.data) is np.ndarray


def test_a_gpu_without_these_tensor_cores_is_refused(rng, emulated, monkeypatch):
    monkeypatch.setattr(emulated.cuda.Device, "compute_capability", "75")
    with pytest.raises(ValueError, match="needs a GPU of compute capability 8.0 or later"):
        models(rng)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", ["plain", "tied"])
def test_gradients_are_not_a_tenth_further_from_float64_than_those_of_pytorchs_autocast(config, seed):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from torch_llama import Llama
    exact, mixed = models(np.random.default_rng(seed), **CONFIGS[config])
    gradients = []
    for model in (exact, mixed):
        model.log_probs(TOKENS).mean().backward()
        gradients.append({name: p.grad for name, p in model.parameters().items()})
    theirs = Llama(vars(exact.config))
    weights = {name: p.data.astype(np.float32) for name, p in exact.parameters().items()}
    theirs.load({"unembedding": weights["embedding"], **weights})
    if exact.config.tied:
        theirs.unembedding.weight = theirs.embedding.weight
    tokens = torch.tensor(TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = theirs.embedding(tokens[:, :-1])
        for block in theirs.blocks:
            x = block(x, theirs.cos[:x.shape[1]], theirs.sin[:x.shape[1]])
        logits = theirs.unembedding(theirs.final_norm(x))
    torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None]).mean().backward()
    found = {name.removesuffix(".weight"): p.grad.numpy() for name, p in theirs.named_parameters()}
    found = {name: g.T if name.startswith("blocks.") and g.ndim == 2 else g for name, g in found.items()}
    assert distance(gradients[1], gradients[0]) < 1.1 * distance(found, gradients[0])
