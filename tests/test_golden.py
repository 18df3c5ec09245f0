"""tests/golden and scripts/dev/golden.py, which writes it: the files hold the numbers of this library, and are right.

The committed files are compared with the script, with finite differences, with their own index, and with a second
implementation in PyTorch, which uses the files alone.
"""
import contextlib
import errno
import importlib
import inspect
import io
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import golden
import golden_files
from helpers import assert_close
from minilm import objectives
from minilm.gradcheck import relative_error
from minilm.model import Config
from minilm.objectives import dpo
from minilm.tensor import Tensor

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "tests" / "golden"
INDEX = json.loads((COMMITTED / golden.INDEX).read_text("utf-8"))
DIFFERENTIATED = [name for name, entry in INDEX["cases"].items() if any(key[0] == "d" for key in entry["results"])]


def load(name, folder=COMMITTED):
    """A case as a user of the files loads it: inputs, results, options."""
    entry = INDEX["cases"][name]
    arrays = golden_files.read_case(folder, entry)
    return ({key: arrays[key] for key in entry["inputs"]}, {key: arrays[key] for key in entry["results"]},
            entry.get("options", {}))


def write(*arguments):
    """The exit status of the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["golden.py", *map(str, arguments)])
        return golden.main_guard(golden.main)


def contents(folder):
    """The bytes of every file but the page that describes them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(COMMITTED, tmp_path / "golden", copy_function=shutil.copyfile))


def described(file):
    return {key: f"{file[key].dtype}{list(file[key].shape)}" for key in file.files}


def same(a, b):
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


# The committed set is what the script computes.

def disagreements(folder):
    """Differences of a folder's inputs from those of its seed, and of its results from those of its own inputs."""
    found, index = [], json.loads((folder / golden.INDEX).read_text("utf-8"))
    for name in golden.CASES:
        entry, fresh = golden.golden(name, index["seed"], index["size"])
        if index["cases"].get(name) != json.loads(json.dumps(entry)):
            found.append(f"{name}: index")
            continue
        inputs, results, options = load(name, folder)
        found += [f"{name}: {key}" for key, a in inputs.items() if not same(a, fresh[key])]
        computed = golden.compute(name, inputs, options)
        found += [f"{name}: {key}" for key, a in results.items() if not relative_error(computed[key], a)[0] <= 1e-12]
    return found


def test_the_committed_set_is_what_the_script_computes():
    assert disagreements(COMMITTED) == []


@pytest.mark.parametrize("name, key", [
    ("dpo_loss", "policy_chosen"), ("dpo_loss", "loss"), ("dpo_loss", "dpolicy_rejected"), ("rms_norm", "doutput"),
    ("sft_loss_masked_nan", "mask"), ("attention_padding", "key_mask"), ("attention_padding", "dk"),
    ("sft_metrics", "metrics/entropy"), ("token_log_probs", "targets"), ("transformer", "dblocks.1.gate_up"),
    ("adamw", "vector_after")])
def test_an_altered_array_is_caught(copy, name, key):
    inputs, results, _ = load(name, copy)
    arrays = {**inputs, **results}
    a = arrays[key]
    if a.dtype.kind == "f":
        a.flat[-1] += 1e-9 * np.abs(a).max()
    else:
        a.flat[-1] = not a.flat[-1]
    np.savez(copy / f"{name}.npz", **arrays)
    found = disagreements(copy)
    assert f"{name}: {key}" in found
    assert all(line.startswith(f"{name}: ") for line in found)


def test_an_altered_option_is_caught(copy):
    index = json.loads((copy / golden.INDEX).read_text("utf-8"))
    index["cases"]["ipo_loss"]["options"]["beta"] = 0.25
    (copy / golden.INDEX).write_text(json.dumps(index))
    assert disagreements(copy) == ["ipo_loss: index"]


# The index describes the files.

def test_the_index_lists_exactly_the_files_and_arrays():
    assert contents(COMMITTED).keys() == {golden.INDEX, *(e["file"] for e in INDEX["cases"].values())}
    for name, entry in INDEX["cases"].items():
        listed = {**entry["inputs"], **entry["results"]}
        assert len(listed) == len(entry["inputs"]) + len(entry["results"]), name
        with np.load(COMMITTED / entry["file"]) as file:
            assert described(file) == listed, name


def test_the_index_states_the_conventions():
    assert INDEX["format"] == "minilm golden vectors" and INDEX["version"] == 1
    assert list(INDEX["conventions"]) == ["arrays", "numbers", "letters", "log-probs", "mask", "shift",
                                          "normalisation", "weights", "qkv", "gate_up", "rope"]
    assert INDEX["conventions"]["shift"].startswith("Logits at t score token t+1. ")
    assert INDEX["conventions"]["rope"].endswith("interleaved: (2i, 2i + 1), the paper.")
    assert all(entry["formula"] for entry in INDEX["cases"].values())


@pytest.mark.parametrize("name", INDEX["cases"])
def test_names_and_numbers_are_as_the_index_says(name):
    inputs, results, options = load(name)
    function = golden.CASES[name][0]
    inspect.signature(function.call).bind(**{key: a for key, a in inputs.items() if key != "doutput"}, **options)
    assert ("doutput" in inputs) == ("output" in results and "d" + function.gradients.split(" ")[0] in results)
    if "doutput" in inputs:
        assert inputs["doutput"].shape == results["output"].shape
    for key, a in inputs.items():
        assert a.dtype in (np.float64, np.int64, bool), key
        if a.dtype.kind == "f":
            assert ((a * 256 % 1 == 0) | np.isnan(a)).all(), key
            assert same(a.astype(np.float32), a), key
        assert np.isfinite(a).all() or name.endswith("_masked_nan"), key
    for key, a in results.items():
        assert a.dtype == np.float64 and np.isfinite(a).all(), key
        if key[0] == "d":
            assert a.shape == inputs[key[1:]].shape, key


def test_the_committed_set_is_small():
    assert sum(len(data) for data in contents(COMMITTED).values()) < 250_000


# Every objective is there.

def public_functions():
    for module in pkgutil.iter_modules(objectives.__path__, "minilm.objectives."):
        module = importlib.import_module(module.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                yield function


def without_a_case():
    covered = {function.call for function, *_ in golden.CASES.values()}
    return [f"{function.__module__}.{function.__name__}" for function in public_functions() if function not in covered]


def test_every_public_function_of_the_objectives_has_a_case():
    assert not without_a_case(), "add a case for these to scripts/dev/golden.py"


def test_an_objective_without_a_case_is_named(monkeypatch):
    def hinge_loss(policy_chosen):
        """Without a case."""
    hinge_loss.__module__ = dpo.__name__
    monkeypatch.setattr(dpo, "hinge_loss", hinge_loss, raising=False)
    assert without_a_case() == ["minilm.objectives.dpo.hinge_loss"]


def test_every_baseline_level_and_pairing_has_a_case():
    def values(function, option):
        return {entry.get("options", {}).get(option) for entry in INDEX["cases"].values()
                if entry["function"] == function}
    assert values("advantages", "baseline") == {"none", "leave_one_out", "mean", "group"}
    assert values("reward_to_go", "baseline") == {"none", "leave_one_out", "mean"}
    assert values("ppo_clip_loss", "level") == {"token", "sequence", "geometric_mean"}
    assert values("policy_gradient_loss", "token_mean") == {None, "response", "batch", 8.0}
    assert values("grpo_loss", "token_mean") == {"response", "batch", 8.0}
    assert values("rope", "pairing") == {"half", "interleaved"}
    assert values("attention", "causal") == {True, False}


# The numbers are right.

def scalar(name, inputs, options):
    """The scalar that the gradients in the file belong to: the loss, or sum(output * doutput)."""
    variables = [key[1:] for key in INDEX["cases"][name]["results"] if key[0] == "d"]
    arguments = {key: Tensor(a) if key in variables else a for key, a in inputs.items() if key != "doutput"}
    result = golden.CASES[name][0].call(**arguments, **options)
    result = result["loss"] if isinstance(result, dict) else result
    return float((result.data * inputs.get("doutput", 1.0)).sum())


def derivatives(name, inputs, options, key, directions, step=6e-6):
    """Central differences of `scalar` with respect to one input, along each of the directions."""
    def at(a):
        return scalar(name, {**inputs, key: a}, options)
    return np.array([(at(inputs[key] + step * d) - at(inputs[key] - step * d)) / (2 * step) for d in directions])


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_alive_and_agree_with_finite_differences(name, rng):
    """Element by element; for a large array, along 16 directions."""
    inputs, results, options = load(name)
    for key, gradient in results.items():
        if key[0] == "d":
            assert np.abs(gradient).max() > 1e-2, f"{key} is 0"
            n, shape = gradient.size, gradient.shape
            directions = np.eye(n).reshape(n, *shape) if n <= 64 else rng.normal(size=(16, *shape))
            exact = (directions * gradient).reshape(len(directions), -1).sum(axis=1)
            assert_close(exact, derivatives(name, inputs, options, key[1:], directions), 1e-6, f"{name}: {key}")


@pytest.mark.parametrize("name, key", [("dpo_loss", "dpolicy_chosen"), ("attention_padding", "dk"),
                                       ("transformer", "dembedding")])
def test_finite_differences_notice_a_wrong_gradient(name, key, rng, monkeypatch):
    inputs, results, options = load(name)
    results[key].flat[np.argmax(np.abs(results[key]))] *= 1.001
    monkeypatch.setitem(globals(), "load", lambda name: (inputs, results, options))
    with pytest.raises(AssertionError, match=key):
        test_gradients_are_alive_and_agree_with_finite_differences(name, rng)


def test_every_loss_and_every_layer_has_gradients():
    without = {entry["function"] for name, entry in INDEX["cases"].items() if name not in DIFFERENTIATED}
    assert without == {"sft_metrics", "reward_metrics", "advantages", "reward_to_go", "policy_gradient_metrics",
                       "dpo_metrics", "kl_metrics", "adamw"}


@pytest.mark.parametrize("name", INDEX["cases"])
def test_float32_keeps_the_tolerance_that_the_index_promises(name):
    inputs, results, options = load(name)
    rounded = {key: a.astype(np.float32) if a.dtype.kind == "f" else a for key, a in inputs.items()}
    computed = golden.compute(name, rounded, options)
    for key, a in results.items():
        assert_close(computed[key], a, INDEX["tolerance"]["float32"], f"{name}: {key}")


# A second implementation, from the files alone.

class ByTorch:
    """Each function of the index, in PyTorch: from tensors by name and the options, to a tensor or several by name."""

    def __init__(self, inputs, options):
        vars(self).update({**inputs, **options})
        self.inputs, self.options = inputs, options

    def selected(self, x):
        return x.where(self.mask, 0.0)

    def delta(self, c=1.0, r=1.0):
        return (self.policy_chosen - self.reference_chosen) / c - (self.policy_rejected - self.reference_rejected) / r

    def sft_loss(self):
        return -self.selected(self.log_probs).sum() / self.options.get("total", self.mask.sum())

    def reward_loss(self):
        z = self.chosen_rewards - self.rejected_rewards - self.margin
        return (F.softplus(-z) + self.centering * (self.chosen_rewards + self.rejected_rewards) ** 2).mean()

    def advantages(self):
        R = self.rewards - self.beta * self.kl
        total, K = R.sum(dim=1, keepdim=True), R.shape[1]
        return {"none": R, "mean": R - total / K, "leave_one_out": R - (total - R) / (K - 1),
                "group": (R - total / K) / (R.std(dim=1, keepdim=True) + 1e-4)}[self.baseline]

    def reward_to_go(self):
        x = self.beta * self.selected(self.token_kl)
        self.kl, self.beta = x.sum(dim=-1), 1.0
        # The advantage of the whole response, plus the KL terms of the tokens before t.
        return self.advantages()[..., None] + x.cumsum(dim=-1) - x

    def by_token(self):
        return self.advantages_given if self.advantages_given.ndim == 2 else self.advantages_given[:, None]

    def averaged(self, terms):
        """The sum of terms (N,T) in the mask, over responses and tokens, divided as token_mean says."""
        sums, lengths, mean = self.selected(terms).sum(dim=1), self.mask.sum(dim=1), self.options.get("token_mean")
        return {None: lambda: sums.mean(), "response": lambda: (sums / lengths).mean(),
                "batch": lambda: sums.sum() / lengths.sum()}.get(mean, lambda: sums.mean() / mean)()

    def policy_gradient_loss(self):
        return -self.averaged(self.by_token() * self.log_probs)

    def ratio(self):
        """exp(policy - old): of each token, or of a response, (N,1)."""
        log_ratio, level = self.selected(self.log_probs - self.old_log_probs), self.options.get("level", "token")
        if level != "token":
            log_ratio = log_ratio.sum(dim=1, keepdim=True)
        return (log_ratio / self.mask.sum(dim=1, keepdim=True) if level == "geometric_mean" else log_ratio).exp()

    def ppo_clip_loss(self):
        ratio, A, high = self.ratio(), self.by_token(), self.options.get("epsilon_high", self.epsilon)
        terms = -torch.min(ratio * A, ratio.clamp(1 - self.epsilon, 1 + high) * A)
        return terms.mean() if terms.shape[1] == 1 else self.averaged(terms)

    def k3_times_ratio(self):
        return (self.reference - self.old).exp() - (self.policy - self.old).exp() * (1 - self.policy + self.reference)

    def k3_times_mean_ratio(self):
        self.policy, self.old, self.reference = map(self.selected, (self.policy, self.old, self.reference))
        self.log_probs, self.old_log_probs, self.options = self.policy, self.old, {"level": "geometric_mean"}
        k1, g = self.policy - self.reference, self.ratio()
        mean_log_ratio = (self.policy - self.old).sum(-1, keepdim=True) / self.mask.sum(-1, keepdim=True)
        return (mean_log_ratio - k1).exp() - g * (1 - k1)

    def token_kl_loss(self):
        return self.averaged(self.terms)

    def grpo_loss(self):
        """As TRL writes it: one term for each token, and one mean of all."""
        R = self.rewards - self.rewards.mean(dim=1, keepdim=True)
        self.advantages_given = (R if self.baseline == "mean" else R / (R.std(dim=1, keepdim=True) + 1e-4)).flatten()
        ratio, A = self.ratio(), self.by_token()
        self.policy, self.reference = map(self.selected, (self.log_probs, self.reference_log_probs))
        terms = -torch.min(ratio * A, ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high) * A)
        return self.averaged(terms + self.beta * ratio * self.k3())

    def dpo_loss(self):
        z, eps = self.beta * self.delta(), self.label_smoothing
        return -((1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)).mean()

    def robust_dpo_loss(self):
        z, eps = self.beta * self.delta(), self.flip_rate
        return -((1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)).mean() / (1 - 2 * eps)

    def ipo_loss(self):
        return ((self.delta() - 1 / (2 * self.beta)) ** 2).mean()

    def length_normalised_dpo_loss(self):
        return -F.logsigmoid(self.beta * self.delta(self.chosen_lengths, self.rejected_lengths)).mean()

    def k1(self):
        return self.policy - self.reference

    def k2(self):
        return self.k1() ** 2 / 2

    def k3(self):
        return (-self.k1()).expm1() + self.k1()

    def rms_norm(self):
        return F.rms_norm(self.x, self.weight.shape, self.weight, self.eps)

    def swiglu(self):
        gate, up = self.gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope(self):
        K = self.x.shape[-1]
        angles = self.positions[:, None] * self.base ** (-torch.arange(0, K, 2).double() / K)
        turn = torch.polar(torch.ones_like(angles), angles)
        split = (2, K // 2) if self.pairing == "half" else (K // 2, 2)
        axis = -2 if self.pairing == "half" else -1
        a, b = self.x.unflatten(-1, split).unbind(axis)
        turned = torch.complex(a, b) * turn
        return torch.stack([turned.real, turned.imag], dim=axis).flatten(-2)

    def attention(self):
        T, S = self.q.shape[-2], self.k.shape[-2]
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if self.causal else torch.ones(T, S, dtype=torch.bool)
        if "key_mask" in self.inputs:
            seen = seen & self.key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=seen, enable_gqa=True)

    def token_log_probs(self):
        logits = F.linear(self.hidden, self.unembedding)
        return -F.cross_entropy(logits.transpose(1, 2), self.targets, reduction="none")

    def sequence_log_probs(self):
        return self.selected(self.log_probs).sum(dim=1)

    def transformer(self):
        import torch_reference
        logits = torch_reference.logits(self.inputs, Config(**self.config), self.tokens)
        log_probs = logits[:, :-1].log_softmax(dim=-1).gather(-1, self.tokens[:, 1:, None])[..., 0]
        return {"logits": logits, "log_probs": log_probs, "loss": -log_probs[self.mask[:, 1:]].mean()}

    def adamw(self):
        matrix, vector = self.matrix.clone().requires_grad_(), self.vector.clone().requires_grad_()
        groups = [{"params": [matrix]}, {"params": [vector], "weight_decay": 0.0}]
        settings = {key: self.options[key] for key in ("betas", "eps", "weight_decay")}
        optimiser, norms, after = torch.optim.AdamW(groups, lr=self.learning_rate, **settings), [], [[], []]
        for gradients in zip(self.dmatrix, self.dvector):
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            matrix.grad, vector.grad = (g * min(1.0, self.max_norm / norm) for g in gradients)
            optimiser.step()
            norms.append(norm)
            for kept, p in zip(after, (matrix, vector)):
                kept.append(p.detach().clone())
        return {"norms": torch.stack(norms), **{f"{key}_after": torch.stack(kept)
                                                for key, kept in zip(("matrix", "vector"), after)}}


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name, e in INDEX["cases"].items() if hasattr(ByTorch, e["function"])])
def test_another_implementation_computes_the_same_from_the_files_alone(name):
    global torch, F
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    inputs, results, options = load(name)
    variables = [key[1:] for key in results if key[0] == "d"]
    tensors = {key: torch.from_numpy(a).requires_grad_(key in variables) for key, a in inputs.items()}
    theirs = ByTorch({"advantages_given" if key == "advantages" else key: t for key, t in tensors.items()}, options)
    found = getattr(theirs, INDEX["cases"][name]["function"])()
    if not isinstance(found, dict):
        found = {"output" if found.ndim else "loss": found}
    if variables:
        (found["loss"] if "loss" in found else (found["output"] * tensors["doutput"]).sum()).backward()
    found.update({"d" + key: tensors[key].grad for key in variables})
    assert found.keys() == results.keys()
    for key, a in results.items():
        assert_close(found[key].detach().numpy(), a, INDEX["tolerance"]["float64"], f"{name}: {key}")


def test_only_metrics_are_left_out_of_the_other_implementation():
    left = {entry["function"] for entry in INDEX["cases"].values() if not hasattr(ByTorch, entry["function"])}
    assert all(function.endswith("_metrics") for function in left)


# The extreme cases are extreme.

def test_extreme_cases_defeat_the_log_of_a_sigmoid():
    inputs, results, options = load("dpo_loss_extreme")
    z = options["beta"] * ((inputs["policy_chosen"] - inputs["reference_chosen"])
                           - (inputs["policy_rejected"] - inputs["reference_rejected"]))
    comparison, _, _ = load("reward_loss_extreme")
    for logits in (z, comparison["chosen_rewards"] - comparison["rejected_rewards"] - comparison["margin"]):
        assert 500 < logits.max() < 2000 and -2000 < logits.min() < -750
        with np.errstate(all="ignore"):
            assert np.isinf(-np.log(1 / (1 + np.exp(-logits)))).any()
    assert results["loss"] > 100
    hidden, results, _ = load("token_log_probs_extreme")
    with np.errstate(all="ignore"):
        assert not np.isfinite(np.exp(hidden["hidden"] @ hidden["unembedding"].T)).all()


@pytest.mark.parametrize("name", ["k3_times_ratio_extreme", "k3_times_mean_ratio_extreme"])
def test_extreme_cases_defeat_the_product_of_k3_and_a_ratio_that_underflows(name):
    inputs, results, _ = load(name)
    with np.errstate(all="ignore"):
        k3 = np.exp(inputs["reference"] - inputs["policy"]) - 1 + inputs["policy"] - inputs["reference"]
        assert np.isnan(np.exp(inputs["policy"] - inputs["old"]) * k3).any()
    assert np.isfinite(results["output"]).all() and results["output"].max() > 1


@pytest.mark.parametrize("name", [name for name in INDEX["cases"] if name.endswith("_masked_nan")])
def test_masked_nan_cases_defeat_multiplication_by_the_mask_and_are_else_the_plain_ones(name):
    inputs, results, _ = load(name)
    poisoned = [key for key, a in inputs.items() if np.isnan(a).any()]
    assert poisoned
    for key in poisoned:
        assert np.isnan(inputs[key] * inputs["mask"]).any() and not np.isnan(inputs[key][inputs["mask"]]).any()
    for key, a in results.items():
        if a.shape == inputs["mask"].shape and key[0] == "d":
            assert (a[~inputs["mask"]] == 0).all()
    options = INDEX["cases"][name].get("options")
    plain = next(other for other, entry in INDEX["cases"].items() if other != name and entry.get("options") == options
                 and entry["function"] == INDEX["cases"][name]["function"])
    for key, a in load(plain)[1].items():
        assert_close(results[key], a, 1e-14, key)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_lie_on_both_sides_of_the_clip_with_advantages_of_both_signs(level):
    inputs, results, options = load(f"ppo_clip_loss_{level}")
    mask, log_ratio = inputs["mask"], inputs["log_probs"] - inputs["old_log_probs"]
    if level == "sequence":
        log_ratio = np.broadcast_to(np.where(mask, log_ratio, 0).sum(axis=1, keepdims=True), mask.shape)
    ratio, up = np.exp(log_ratio), np.broadcast_to(inputs["advantages"][:, None] > 0, mask.shape)
    above, below, alive = ratio > 1 + options["epsilon"], ratio < 1 - options["epsilon"], results["dlog_probs"] != 0
    for where, live in ((above & up, False), (above & ~up, True), (below & up, True), (below & ~up, False),
                        (~above & ~below & up, True), (~above & ~below & ~up, True)):
        assert (where & mask).any() and (alive[where & mask] == live).all()
    assert not alive[~mask].any()


def test_masks_are_ragged_and_padding_is_on_both_sides():
    mask = load("sft_loss")[0]["mask"]
    assert len(set(mask.sum(axis=1))) > 1 and mask[0, -1] and not mask[:, 0].any() and mask[1].sum() == 1
    inputs, results, _ = load("attention_padding")
    assert not inputs["key_mask"][0, 0] and not inputs["key_mask"][1, -1]
    assert (results["output"][0, :, :2] == 0).all() and (results["dq"][0, :, :2] == 0).all()
    assert inputs["q"].shape[1] == 2 * inputs["k"].shape[1]
    assert load("attention_cached")[0]["q"].shape[2] < inputs["k"].shape[2]


def test_metrics_see_ties_and_optimiser_steps_are_clipped_or_not():
    assert load("reward_metrics")[1]["metrics/ties"] > 0 and load("dpo_metrics")[1]["metrics/rewards/ties"] > 0
    assert 0 < load("policy_gradient_metrics")[1]["metrics/frac_reward_zero_std"] < 1
    _, results, options = load("adamw")
    assert len(results["norms"]) == 3 and results["norms"].min() < options["max_norm"] < results["norms"].max()


# The script.

def test_two_runs_write_the_same_bytes_and_another_seed_writes_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write("--out", tmp_path / name, "--seed", seed) == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() == contents(COMMITTED).keys()
    assert all(a[name] != c[name] for name in a)


def test_the_script_runs_on_its_own_and_names_its_index(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "dev" / "golden.py", "--out", "new/set"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(golden.CASES)} cases in new/set; begin with new/set/index.json\n"


def test_the_large_set_has_the_same_cases_and_larger_arrays(tmp_path):
    assert write("--out", tmp_path, "--size", "large") == 0
    index = json.loads((tmp_path / golden.INDEX).read_text("utf-8"))
    assert index["size"] == "large" and index["cases"].keys() == INDEX["cases"].keys()
    for name, entry in index["cases"].items():
        small = sum(a.size for a in load(name)[0].values())
        with np.load(tmp_path / entry["file"]) as file:
            assert described(file) == {**entry["inputs"], **entry["results"]}
            assert sum(file[key].size for key in entry["inputs"]) > small
            assert all(np.isfinite(file[key]).all() for key in entry["results"])


def test_a_run_that_was_cut_short_is_repeated_in_its_folder(copy):
    for name in ("transformer.npz", "adamw.npz"):
        (copy / name).unlink()
    assert write("--out", copy) == 0
    assert contents(copy).keys() == contents(COMMITTED).keys() and not disagreements(copy)


@pytest.mark.parametrize("files", [{"notes.txt": "mine"}, {"dpo_loss.npz": "mine"}, {"index.json": "[]"},
                                   {"index.json": "not json"}, {"index.json": '{"format": "another"}'}])
def test_a_folder_of_other_files_is_not_changed(tmp_path, capsys, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    assert write("--out", tmp_path) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path} is not empty, and no golden set of this seed and size. "
                                       "Choose another --out.\n")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("other", [("--seed", 1), ("--size", "large")])
def test_a_set_of_another_seed_or_size_is_not_changed(copy, capsys, other):
    assert write("--out", copy, *other) == 2
    assert "Choose another --out." in capsys.readouterr().err
    assert contents(copy) == contents(COMMITTED)


def test_bad_arguments_give_one_line_of_error(tmp_path, capsys):
    assert write("--seed", -1, "--out", tmp_path / "new") == 2
    assert capsys.readouterr().err == (
        "error: --seed: '-1' must be a whole number of at least 0; --help lists the options\n")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    assert write("--out", tmp_path / "file") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_every_file_whole(copy, capsys, monkeypatch):
    before = contents(copy)
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", full)
    assert write("--out", copy) == 2
    assert capsys.readouterr().err == (f"error: {copy / 'sft_loss.npz'}: not written: No space left on device. "
                                       "Check that disk and folder.\n")
    assert contents(copy).keys() == before.keys() and not disagreements(copy)


# The README of the vectors. tests/test_readme.py runs its code; here, its comparisons notice a difference in dpo_loss.

def run_block(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    return printed.getvalue()


def blocks(word):
    page = (COMMITTED / "README.md").read_text("utf-8")
    return [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if word in block]


def test_the_readme_shows_numpy_and_torch_and_needs_no_minilm():
    assert [len(blocks(word)) for word in ("dpo_loss.npz", "import torch")] == [2, 1]
    assert not blocks("minilm import") + blocks("import minilm")


COMPARISONS = [pytest.param(block, id="torch", marks=pytest.mark.parity) if "torch" in block
               else pytest.param(block, id="numpy") for block in blocks("dpo_loss.npz")]


@pytest.mark.parametrize("block", COMPARISONS)
def test_the_readmes_comparison_holds(block, monkeypatch):
    if "torch" in block:
        pytest.importorskip("torch")
    assert run_block(block, ROOT, monkeypatch) == ""


@pytest.mark.parametrize("block", COMPARISONS)
@pytest.mark.parametrize("key", ["loss", "dpolicy_chosen", "reference_rejected"])
def test_the_readmes_comparison_notices_a_difference(block, key, tmp_path, monkeypatch):
    if "torch" in block:
        pytest.importorskip("torch")
    inputs, results, _ = load("dpo_loss")
    arrays = {**inputs, **results}
    arrays[key] = arrays[key] * (1 + 1e-8)
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    np.savez(tmp_path / "tests" / "golden" / "dpo_loss.npz", **arrays)
    with pytest.raises(AssertionError):
        run_block(block, tmp_path, monkeypatch)
