"""PyTorch, with the same weights and tokens, computes the same losses and gradients.

The other implementation is torch_reference.py: torch's own functions, and autograd for every gradient. All
weights are redrawn at order 1, where an error in a gradient is visible. Every parameter must have a gradient
on both sides, so that two gradients of 0 do not count as agreement. With
error = max|ours - expected| / max(max|expected|, 1e-3), for the loss and for each parameter:

float64  expected is torch's value; the error is at most 1e-10.
float32  expected is torch's value in float64, from the same weights. Torch's float32 has an error too; ours
         may be 3 times as large, plus 4 eps (64 eps for a loss: a single number, and often a small difference
         of large ones). A single rounding error is random, so both errors are geometric means over six draws
         of the weights.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helpers import assert_close
from minilm import layers, ops
from minilm.gradcheck import FLOOR, relative_error
from minilm.model import Config, RewardModel, Transformer
from minilm.objectives import dpo, policy_gradient, reward, sft
from minilm.optim import AdamW
from minilm.tensor import Tensor

torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install torch")
F = torch.nn.functional
import torch_reference as theirs  # noqa: E402  (it imports torch)

pytestmark = pytest.mark.parity

DTYPES = "float64", "float32"
DRAWS = {"float64": 1, "float32": 6}
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For arrays this small, torch is ten times faster on one thread than on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The comparison.

def assert_as_exact(ours, torchs, truths, name):
    """In float32, one array for each draw: our rounding errors against torch's."""
    errors, torchs_errors = ([relative_error(a, truth) for a, truth in zip(side, truths)] for side in (ours, torchs))
    error, torchs_error = geometric_mean(errors), geometric_mean(torchs_errors)
    allowed = 3 * torchs_error + (64 if truths[0].size == 1 else 4) * EPS
    draw = int(np.argmax([e for e, _ in errors]))
    largest, at = errors[draw]
    assert error <= allowed, (f"{name}: typical error {error:.2e}, torch's {torchs_error:.2e}, allowed {allowed:.2e}; "
                              f"largest {largest:.2e} in draw {draw}, at {at}: minilm {ours[draw][at]:.9g}, "
                              f"torch {torchs[draw][at]:.9g}, in float64 {truths[draw][at]:.9g}")


def geometric_mean(errors):
    return float(np.exp(np.log([np.maximum(e, EPS) for e, _ in errors]).mean()))


def assert_alive(results):
    """Every gradient is large enough that an error in it is visible."""
    largest = {name: float(np.abs(g).max()) for name, g in results.items() if name != "output"}
    dead = {name: size for name, size in largest.items() if not size > max(FLOOR, 1e-6 * max(largest.values()))}
    assert not dead, f"gradients that are 0 or nearly 0, by their largest element: {dead}"


def assert_parity(by_minilm, by_torch, dtype):
    """Two functions of dtype and draw, each to the output and all gradients by name."""
    draws = range(DRAWS[dtype])
    ours, torchs = [by_minilm(dtype, draw) for draw in draws], [by_torch(dtype, draw) for draw in draws]
    truths = [by_torch("float64", draw) for draw in draws]
    for results, truth in zip(ours, truths):
        assert results.keys() == truth.keys()
        for name, a in results.items():
            assert (a.shape, a.dtype) == (truth[name].shape, dtype), f"{name}: {a.shape}, {a.dtype}"
        assert_alive(results)
        assert_alive(truth)
    for name in truths[0]:
        of_name = [[results[name] for results in side] for side in (ours, torchs, truths)]
        if dtype == "float64":
            assert_close(of_name[0][0], of_name[2][0], name=name)
        else:
            assert_as_exact(*of_name, name)


# One model and one batch for all objectives.

ARCHITECTURES = {
    "grouped queries": {},
    "one key head": {"kv_heads": 1},
    "a key head each": {"kv_heads": 4},
    "tied": {"tied": True},
    "interleaved": {"rope_pairing": "interleaved"},
    "bidirectional": {"causal": False},
    "smeared keys": {"key_smear": True},
}
# All widths differ, and base and eps are not the defaults, so that a mixed-up setting is noticed.
SHAPE = {"vocab_size": 17, "width": 12, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 6, "ffn_width": 10,
         "rope_base": 50.0, "norm_eps": 0.1}

# Six sequences. In pairs: three chosen, and the three rejected for them. As samples: three for each of two prompts.
REAL = """111111111
          011111111
          000111111
          111111100
          111111110
          001111100"""
RESPONSE = """000011111
              000111111
              000000111
              000111100
              000111110
              000111100"""
CHOSEN, REJECTED = slice(0, 3), slice(3, 6)


def rows_of_digits(text):
    return np.array([[int(digit) for digit in row] for row in text.split()])


def config(architecture):
    return Config(**{**SHAPE, **ARCHITECTURES[architecture]})


@functools.cache
def weights(architecture, draw):
    """Policy and reference near it, two dicts of arrays: float64, of numbers that float32 holds exactly."""
    rng = np.random.default_rng(draw)
    model = RewardModel(Transformer(config(architecture), rng), rng)
    shapes = {name: p.shape for name, p in {**model.parameters(), **model.transformer.parameters()}.items()}
    policy = {name: ("norm" in name) + rng.normal(size=shape) * (0.3 if "norm" in name else 0.7)
              for name, shape in shapes.items()}
    near = {name: w + 0.05 * rng.normal(size=w.shape) for name, w in policy.items()}
    return tuple({name: w.astype(np.float32).astype(np.float64) for name, w in model.items()}
                 for model in (policy, near))


@functools.cache
def batch(dtype):
    """Every array that an objective needs, by name; the same numbers in either dtype."""
    rng = np.random.default_rng(2)
    real, response = rows_of_digits(REAL), rows_of_digits(RESPONSE)
    B, T = real.shape
    # log(pi / pi_old) of the samples: well outside the clip (at log 0.8 and log 1.2) or well inside. The advantages of
    # a prompt add up to zero, so both signs occur with ratios on both sides.
    by_token = np.array([0.5, -0.1, -0.5, 0.1])[np.arange(T) % 4] * response
    by_sequence = np.array([[0.5, 0.5, 0.5, -0.5, -0.5, 0.1]]).T * response / response.sum(axis=1, keepdims=True)
    arrays = {"cotangent": rng.normal(size=(B, T, SHAPE["vocab_size"])) * real[:, :, None],
              "margin": rng.uniform(0, 1, size=B // 2),
              "scores": rng.normal(size=(2, 3)),
              "log_ratio token": by_token[:, 1:],
              "log_ratio sequence": by_sequence[:, 1:]}
    arrays = {name: a.astype(np.float32).astype(dtype) for name, a in arrays.items()}
    return {"tokens": rng.integers(SHAPE["vocab_size"], size=(B, T)), "real": real, "response": response, **arrays}


# The objectives, from tokens to a scalar.

class Minilm:
    """Each objective as a training loop computes it; theirs.Objectives has the same methods."""

    def __init__(self, architecture, dtype, draw):
        self.batch, rng = batch(dtype), np.random.default_rng(0)
        self.policy, self.reference = (Transformer(config(architecture), rng, dtype) for _ in range(2))
        self.rewarder = RewardModel(self.policy, rng)
        for model, values in zip((self.policy, self.reference), weights(architecture, draw)):
            for name, p in model.parameters().items():
                p.data = values[name].astype(dtype)
        self.rewarder.head.data = weights(architecture, draw)[0]["reward_head"].astype(dtype)

    def run(self, objective, **options):
        """The value, as "output", and the gradient of every parameter that has one."""
        loss = getattr(self, objective)(**options)
        loss.backward()
        trained = self.rewarder if objective == "reward" else self.policy
        gradients = {name: p.grad for name, p in trained.parameters().items() if p.grad is not None}
        return {"output": loss.data, **gradients}

    def logits(self):
        b = self.batch
        return ops.sum(self.policy(b["tokens"], key_mask=b["real"]) * b["cotangent"])

    def sft(self):
        b = self.batch
        return sft.sft_loss(self.policy.log_probs(b["tokens"]), b["response"][:, 1:])

    def reward(self, centering):
        b = self.batch
        chosen, rejected = (self.rewarder.rewards(b["tokens"][half], b["real"][half]) for half in (CHOSEN, REJECTED))
        return reward.reward_loss(chosen, rejected, margin=b["margin"], centering=centering)

    def sampled(self, temperature, beta):
        """log-probs (N,T), advantages (N,), mask (N,T)"""
        b, mask = self.batch, self.batch["response"][:, 1:]
        log_probs, reference = (model.log_probs(b["tokens"], temperature) for model in (self.policy, self.reference))
        kl = layers.sequence_log_probs(log_probs.data - reference.data, mask).data
        return log_probs, policy_gradient.advantages(b["scores"], kl.reshape(2, 3), beta).reshape(-1), mask

    def policy_gradient(self, temperature, beta):
        return policy_gradient.policy_gradient_loss(*self.sampled(temperature, beta))

    def ppo_clip(self, temperature, beta, level):
        log_probs, advantages, mask = self.sampled(temperature, beta)
        old = log_probs.data - self.batch["log_ratio " + level]
        return policy_gradient.ppo_clip_loss(log_probs, old, advantages, mask, level=level)

    def preferences(self):
        """Summed log-probs of chosen and rejected: the policy's as Tensors, the reference's as arrays."""
        b = self.batch
        policy, reference = ([layers.sequence_log_probs(model.log_probs(b["tokens"][half]), b["response"][half, 1:])
                              for half in (CHOSEN, REJECTED)] for model in (self.policy, self.reference))
        return *policy, *(log_probs.data for log_probs in reference)

    def dpo(self, beta, **options):
        return dpo.dpo_loss(*self.preferences(), beta=beta, **options)

    def robust_dpo(self, beta, flip_rate):
        return dpo.robust_dpo_loss(*self.preferences(), beta=beta, flip_rate=flip_rate)

    def ipo(self, beta):
        return dpo.ipo_loss(*self.preferences(), beta=beta)

    def length_normalised_dpo(self, beta):
        lengths = self.batch["response"].sum(axis=1)
        return dpo.length_normalised_dpo_loss(*self.preferences(), lengths[CHOSEN], lengths[REJECTED], beta=beta)


SAMPLING = {"temperature": 0.7, "beta": 0.2}
# name: the method of both sides, and its options
OBJECTIVES = {
    "padded logits": ("logits", {}),
    "sft": ("sft", {}),
    "reward": ("reward", {"centering": 0.1}),
    "policy gradient": ("policy_gradient", SAMPLING),
    "ppo by token": ("ppo_clip", SAMPLING | {"level": "token"}),
    "ppo by sequence": ("ppo_clip", SAMPLING | {"level": "sequence"}),
    "dpo": ("dpo", {"beta": 0.3}),
    "dpo with smoothed labels": ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    "robust dpo": ("robust_dpo", {"beta": 0.3, "flip_rate": 0.2}),
    "ipo": ("ipo", {"beta": 0.3}),
    "length-normalised dpo": ("length_normalised_dpo", {"beta": 1.5}),
}


def objective_by_minilm(objective, architecture, dtype, draw):
    method, options = OBJECTIVES[objective]
    return Minilm(architecture, dtype, draw).run(method, **options)


@functools.cache
def objective_by_torch(objective, architecture, dtype, draw):
    method, options = OBJECTIVES[objective]
    models = ({name: w.astype(dtype) for name, w in model.items()} for model in weights(architecture, draw))
    return theirs.Objectives(config(architecture), *models, batch(dtype)).run(method, **options)


# A bidirectional model sees the tokens that it would predict, so only two of the objectives apply to it.
@pytest.mark.parametrize("objective, architecture", [
    (objective, architecture) for objective in OBJECTIVES for architecture in ARCHITECTURES
    if architecture != "bidirectional" or objective in ("padded logits", "reward")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_objective_has_the_value_and_all_gradients_of_torch(dtype, objective, architecture):
    assert_parity(functools.partial(objective_by_minilm, objective, architecture),
                  functools.partial(objective_by_torch, objective, architecture), dtype)


# Layers.

INDICES = np.random.default_rng(3).integers(5, size=(3, 4))     # some occur twice
PADDED = rows_of_digits("0011111 1111100")                      # the first two queries of row 0 see no key


def rope(x, pairing):
    return layers.rope(x, *layers.rope_tables(np.arange(x.shape[2]), x.shape[3], dtype=x.dtype), pairing=pairing)


def torchs_token_log_probs(hidden, unembedding):
    return F.log_softmax(hidden @ unembedding.T, dim=-1).gather(-1, torch.tensor(INDICES)[..., None])[..., 0]


def attentions(causal, key_mask):
    """Ours and torch's."""
    torchs_mask = None if key_mask is None else torch.tensor(key_mask)
    return (functools.partial(layers.attention, causal=causal, key_mask=key_mask),
            functools.partial(theirs.attention, causal=causal, key_mask=torchs_mask))


# name: ours, torch's, the shapes of the inputs
LAYERS = {
    "embed": (lambda table: ops.embed(table, INDICES),
              lambda table: F.embedding(torch.tensor(INDICES), table),
              {"table": (17, 8)}),
    "rms_norm": (lambda x, weight: layers.rms_norm(x, weight, eps=0.1),       # a large eps
                 lambda x, weight: F.rms_norm(x, weight.shape, weight, eps=0.1),
                 {"x": (3, 4, 8), "weight": (8,)}),
    "swiglu": (layers.swiglu, theirs.swiglu, {"gate_up": (3, 4, 10)}),
    "smear": (lambda k, amount: layers.smear(k, amount, 0 * k.data[:, :, 0]), theirs.smear,
              {"k": (3, 2, 7, 6), "amount": (2, 6)}),
    **{f"rope {pairing}": (functools.partial(rope, pairing=pairing), functools.partial(theirs.rope, pairing=pairing),
                           {"x": (2, 3, 7, 6)})
       for pairing in ("half", "interleaved")},
    **{f"attention {name}": (*attentions(causal, mask), {"q": (2, 4, T, 6), "k": (2, G, 7, 6), "v": (2, G, 7, 6)})
       for name, causal, mask, G, T in [
           ("causal", True, None, 2, 7),
           ("bidirectional", False, None, 2, 7),
           ("one key head", True, None, 1, 7),
           ("a key head each", True, None, 4, 7),
           ("after a cache", True, None, 2, 3),
           ("causal and padded", True, PADDED, 2, 7),
           ("bidirectional and padded", False, PADDED, 2, 7)]},
    **{f"token_log_probs {name}": (lambda hidden, unembedding, chunk=chunk: layers.token_log_probs(
                                       hidden, unembedding, INDICES, chunk=chunk),
                                   torchs_token_log_probs, {"hidden": (3, 4, 8), "unembedding": (17, 8)})
       for name, chunk in [("at once", None), ("in chunks", 5)]},
}


def inputs(shapes, dtype, draw):
    rng = np.random.default_rng(draw)
    return {name: rng.normal(size=shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def cotangent(shape, dtype):
    return np.random.default_rng(4).normal(size=shape).astype(np.float32).astype(dtype)


def layer_by_minilm(layer, shapes, dtype, draw):
    tensors = {name: Tensor(a, requires_grad=True) for name, a in inputs(shapes, dtype, draw).items()}
    output = layer(*tensors.values())
    output.backward(cotangent(output.shape, dtype))
    return {"output": output.data, **{name: t.grad for name, t in tensors.items()}}


def layer_by_torch(layer, shapes, dtype, draw):
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in inputs(shapes, dtype, draw).items()}
    output = layer(*tensors.values())
    output.backward(torch.tensor(cotangent(output.shape, dtype)))
    return {"output": output.detach().numpy(), **{name: t.grad.numpy() for name, t in tensors.items()}}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_has_the_value_and_all_gradients_of_torch(dtype, layer):
    ours, torchs, shapes = LAYERS[layer]
    assert_parity(functools.partial(layer_by_minilm, ours, shapes),
                  functools.partial(layer_by_torch, torchs, shapes), dtype)


@settings(max_examples=50)
@given(st.data(), st.booleans(), st.integers(0, 1000))
def test_attention_of_any_shape_and_mask(data, causal, draw):
    B, G, group, T, cached, pairs = (data.draw(st.integers(low, high), label) for label, low, high in [
        ("B", 1, 3), ("G", 1, 3), ("H/G", 1, 3), ("T", 1, 9), ("S-T", 0, 4), ("K/2", 1, 4)])
    S, K = T + cached, 2 * pairs
    mask = data.draw(st.none() | st.lists(st.lists(st.integers(0, 1), min_size=S, max_size=S), min_size=B, max_size=B))
    shapes = {"q": (B, G * group, T, K), "k": (B, G, S, K), "v": (B, G, S, K)}
    ours, torchs = attentions(causal, mask if mask is None else np.array(mask))
    results = layer_by_minilm(ours, shapes, "float64", draw)
    for name, expected in layer_by_torch(torchs, shapes, "float64", draw).items():
        assert_close(results[name], expected, name=name)


# The optimiser.

# The matrix is larger than one block of an AdamW step.
TRAINED = {"matrix": (200, 180), "norm": (13,), "cube": (3, 4, 5), "bias": (1,)}


def parameters(steps):
    """Parameters, ours and torch's, and the gradients of each step."""
    rng = np.random.default_rng(5)
    values, *gradients = ({name: rng.normal(size=shape) for name, shape in TRAINED.items()} for _ in range(1 + steps))
    return ({name: Tensor(a.copy(), requires_grad=True) for name, a in values.items()},
            {name: torch.tensor(a, requires_grad=True) for name, a in values.items()}, *gradients)


def set_gradients(ours, torchs, gradients):
    for name, g in gradients.items():
        ours[name].grad, torchs[name].grad = g, torch.tensor(g)


def test_twenty_steps_of_adamw():
    ours, torchs, *gradients = parameters(20)
    options = {"betas": (0.8, 0.95), "eps": 1e-3}
    optimiser = AdamW(ours, weight_decay=0.3, **options)
    torchs_optimiser = torch.optim.AdamW([
        {"params": [p for p in torchs.values() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in torchs.values() if p.ndim < 2], "weight_decay": 0.0}], **options)
    for step, gradient in enumerate(gradients):
        set_gradients(ours, torchs, gradient)
        rate = 0.1 / (1 + step)
        optimiser.step(rate)
        for group in torchs_optimiser.param_groups:
            group["lr"] = rate
        torchs_optimiser.step()
        for name, p in torchs.items():
            assert_close(ours[name], p.detach().numpy(), 1e-12, f"{name} after step {step}")


@pytest.mark.parametrize("frozen", [
    {"matrix": range(5, 12)}, {"norm": range(20)}, {"cube": range(0, 8), "bias": range(3, 20)},
    {"matrix": range(0, 20, 2), "norm": range(1, 20, 3)}, dict.fromkeys(TRAINED, range(7, 9))],
    ids=["a while", "always", "from the start, and for ever", "now and then", "everything"])
@pytest.mark.parametrize("how", ["no gradient", "requires_grad"])
def test_twenty_steps_with_clipping_while_some_parameters_are_frozen_for_some_steps(how, frozen):
    """torch.optim.AdamW and clip_grad_norm_ skip parameters without a gradient, and count steps for each parameter."""
    ours, torchs, *gradients = parameters(20)
    options = {"betas": (0.8, 0.95), "eps": 1e-3}
    optimiser = AdamW(ours, weight_decay=0.3, **options)
    torchs_optimiser = torch.optim.AdamW([
        {"params": [p for p in torchs.values() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in torchs.values() if p.ndim < 2], "weight_decay": 0.0}], lr=0.05, **options)
    for step, gradient in enumerate(gradients):
        optimiser.zero_grad()
        torchs_optimiser.zero_grad()
        names = {name for name in TRAINED if step in frozen.get(name, ())}
        for name in TRAINED if how == "requires_grad" else ():
            ours[name].requires_grad = name not in names
            torchs[name].requires_grad_(name not in names)
        set_gradients(ours, torchs, {name: g for name, g in gradient.items() if name not in names})
        norm = optimiser.clip(1e6)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs.values(), 1e6).numpy(), 1e-12, "norm")
        optimiser.step(0.05)
        torchs_optimiser.step()
        for name, p in torchs.items():
            assert_close(ours[name], p.detach().numpy(), 1e-10, f"{name} after step {step}")
    counts = dict(zip(optimiser.flat.views(optimiser.data), optimiser.updates))
    assert counts == {name: int(torchs_optimiser.state[p]["step"]) if p in torchs_optimiser.state else 0
                      for name, p in torchs.items()}


def test_a_frozen_layer_of_a_model_has_torchs_training():
    """Gradients by backward on both sides: embedding frozen for ever, one layer for ten of twenty steps."""
    tokens = np.random.default_rng(1).integers(9, size=(20, 4, 8))
    shapes = {"embedding": (9, 6), "hidden": (6, 7), "out": (7, 9)}
    start = {name: np.random.default_rng(2).normal(size=shape) for name, shape in shapes.items()}
    ours = {name: Tensor(a.copy(), requires_grad=name != "embedding") for name, a in start.items()}
    torchs = {name: torch.tensor(a, requires_grad=name != "embedding") for name, a in start.items()}
    optimiser, torchs_optimiser = AdamW(ours, 0.05), torch.optim.AdamW(torchs.values(), 0.05, (0.9, 0.95))
    for step, batch in enumerate(tokens):
        ours["hidden"].requires_grad = not 5 <= step < 15
        torchs["hidden"].requires_grad_(not 5 <= step < 15)
        optimiser.zero_grad()
        torchs_optimiser.zero_grad()
        logits = ops.tanh(ops.embed(ours["embedding"], batch[:, :-1]) @ ours["hidden"]) @ ours["out"]
        (-ops.gather(ops.log_softmax(logits), batch[:, 1:]).mean()).backward()
        theirs_logits = torch.tanh(torchs["embedding"][batch[:, :-1]] @ torchs["hidden"]) @ torchs["out"]
        F.cross_entropy(theirs_logits.reshape(-1, 9), torch.tensor(batch[:, 1:].reshape(-1))).backward()
        assert (ours["embedding"].grad is None) and (ours["hidden"].grad is None) == (torchs["hidden"].grad is None)
        optimiser.step()
        torchs_optimiser.step()
        for name, p in torchs.items():
            assert_close(ours[name], p.detach().numpy(), 1e-10, f"{name} after step {step}")
    assert np.array_equal(ours["embedding"].data, start["embedding"])


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["above", "below"])
def test_clipping_the_norm(max_norm):
    ours, torchs, gradients = parameters(1)
    optimiser = AdamW(ours)
    set_gradients(ours, torchs, gradients)
    norm = optimiser.clip(max_norm)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs.values(), max_norm).numpy(), 1e-12, "norm")
    # torch divides by norm + 1e-6, so its clipped norm is slightly below max_norm; ours is max_norm.
    short = norm / (norm + 1e-6) if norm > max_norm else 1.0
    for name, p in torchs.items():
        assert_close(short * ours[name].grad, p.grad.numpy(), 1e-12, name)


# The comparison itself.

correct = functools.partial(objective_by_torch, "sft", "grouped queries")


def altered(change):
    """The correct side, with one gradient changed."""
    def side(dtype, draw):
        results = correct(dtype, draw)
        return {**results, "blocks.1.qkv": change(results["blocks.1.qkv"].copy())}
    return side


def one_element_off(g):
    g[-1, -1] += 1e-4 * np.abs(g).max()
    return g


def one_nan(g):
    g[0, 0] = np.nan
    return g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [np.zeros_like, np.negative, np.transpose, one_element_off, one_nan],
                         ids=lambda change: change.__name__)
def test_the_comparison_names_a_wrong_gradient(change, dtype):
    with pytest.raises(AssertionError, match="blocks.1.qkv"):
        assert_parity(altered(change), correct, dtype)


def test_two_gradients_of_0_do_not_agree():
    with pytest.raises(AssertionError, match="nearly 0.*blocks.1.qkv"):
        assert_parity(altered(np.zeros_like), altered(np.zeros_like), "float64")
