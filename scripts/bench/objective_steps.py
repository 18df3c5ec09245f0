"""An optimiser step of SFT, DPO and RLOO, of all weights or of adapters: the work that objectives.py and align.py time.

A worker's spec has

    work        sft, dpo or rloo
    file        the weights, an .npz by minilm's names
    config      the fields of Config
    adapters    the adapters to train, an .npz by minilm's names; without it all weights are trained
    alpha       of the adapters
    device, compute, torch      "gpu" and a precision, and PyTorch's device (benchmark.py); without them the CPU

The reference of DPO is the policy as it started, so its loss is log 2 when results are compared, and a wrong reference
or sigmoid would not show (the tests compare them). RLOO's reference is another model. With adapters, both are the model
under the adapters, which start away from zero.
"""

import contextlib
import functools
import sys
import time
from unittest import mock

import numpy as np

import gpu_process
import library_process
from minilm.backend import to_numpy
from minilm.fast.malloc import keep_freed_memory
from minilm.generate import Samples
from minilm.lora import Adapted
from minilm.model import Config, Transformer
from minilm.packing import pack
from minilm.stages import dpo, rlhf, sft
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor, no_grad

WORKS = ["sft", "dpo", "rloo"]
EOS = 1
BETA = {"dpo": 0.1, "rloo": 0.05}
RATE = 1e-6                     # TRL's default for DPO and RLOO
RECOMPUTED = 10**8              # with more parameters minilm checkpoints activations on the CPU
REFERENCE = 0.95                # RLOO's reference is all weights times this
LONGEST = 320                   # tokens of a prompt and its response
# Compared besides gradients. RLOO's loss is not: TRL's loss has the value of -mean(A) and the same gradient.
COMPARED = {"sft": ["loss"], "dpo": ["loss"], "rloo": ["reward", "kl_token"]}
TOLERANCE = 1e-3                # of gradients in float32, relative to the largest entry
# In bf16, of all gradients by norm, and of single numbers. The gradients of RLOO's samples almost cancel, their
# rounding errors do not: of a model with two layers ours differs by 0.06 from that in float32, TRL's by 0.09. A wrong
# factor would change the norm.
BF16_TOLERANCE = {"sft": (0.1, 0.02), "dpo": (0.1, 0.02), "rloo": (0.3, 0.1)}


def examples(work, vocab_size):
    """Token lists. RLOO's responses are for the comparison of results; in the steps it samples its own."""
    rng = np.random.default_rng(1)

    def draw(lengths, last=()):
        return [[*rng.integers(2, vocab_size, size=n - len(last)).tolist(), *last] for n in lengths]

    if work == "sft":
        lengths = np.linspace(64, LONGEST, 8).astype(int)
        return {"prompts": draw(lengths * 3 // 4), "responses": draw(lengths - lengths * 3 // 4, [EOS])}
    if work == "dpo":
        return {"prompts": draw([256] * 4), "chosen": draw([64] * 4, [EOS]), "rejected": draw([64] * 4, [EOS])}
    return {"prompts": draw([64]), "responses": draw([64] * 8)}


def reward(vocab_size, responses):
    """The share of tokens in the lower half of the vocabulary."""
    return [float(np.mean(np.array(response) < vocab_size // 2)) for response in responses]


def read(path):
    with np.load(path) as file:
        return dict(file)


class InOrder(np.random.Generator):
    """The Generator of a stage: where the stage draws examples, it gets all of them in their order."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def integers(self, n, size):
        return np.arange(size) % n


# minilm.

def stage_of(work, training, data, start, reference):
    """A stage that takes `steps` and `learning_rate`, with all data in each step; {"reference": log-probs} for DPO.

    start: DPO's reference; reference: RLOO's.
    """
    prompts = data["prompts"]
    size = len(prompts)
    if work == "sft":
        return functools.partial(sft.train_sft, training, **data, batch_size=size), {}
    if work == "dpo":
        began = time.perf_counter()
        references = [dpo.reference_log_probs(start, prompts, data[side]) for side in ("chosen", "rejected")]
        print(f"  minilm's reference log-probs, computed once: {time.perf_counter() - began:.2f} s", file=sys.stderr)
        return functools.partial(dpo.train_dpo, training, *data.values(), *references,
                                 batch_size=size, beta=BETA[work]), {"reference": np.stack(references)}
    responses = data["responses"]
    return functools.partial(
        rlhf.train_rlhf, training, reference, lambda _, drawn: reward(reference.config.vocab_size, drawn), prompts,
        prompts_per_step=size, samples_per_prompt=len(responses) // size, max_new_tokens=len(responses[0]), eos=None,
        beta=BETA[work]), {}


@contextlib.contextmanager
def for_comparison(work, responses):
    """Inside, a stage does not clip, and takes these responses instead of sampling."""
    def given(policy, prompts, _, tokens, *__):
        with no_grad():
            log_probs = to_numpy(policy.response_log_probs(pack(prompts, tokens.tolist())).data)
        return Samples(tokens, np.ones(log_probs.shape), log_probs, np.zeros(log_probs.shape))

    module = {"sft": sft, "dpo": dpo, "rloo": rlhf}[work]
    with (mock.patch.object(module, "train_step", functools.partial(train_step, clip=np.inf)),
          mock.patch.object(rlhf, "generate", given),
          mock.patch.object(InOrder, "random", lambda self, shape: np.array(responses))):
        yield


def adapted(model, spec):
    """The model with the adapters of the spec."""
    adapters = read(spec["adapters"])
    rank = next(iter(adapters.values())).shape[1]           # of A, which is the first
    return Adapted(model, rank, spec["alpha"], np.random.default_rng(0)).over(
        {name: Tensor(a, requires_grad=True) for name, a in adapters.items()})


def load_minilm():
    keep_freed_memory()

    def make(spec):
        work = spec["work"]
        config = Config(**spec["config"])
        weights = read(spec["file"])
        data = examples(work, config.vocab_size)

        def model(factor=1.0):
            scaled = Transformer.of(config, {name: a if factor == 1 else np.float32(factor) * a
                                             for name, a in weights.items()})
            scaled.activation_checkpointing = (sum(a.size for a in weights.values()) > RECOMPUTED
                                               and spec.get("device") != "gpu")
            return gpu_process.on_gpu(scaled, spec)

        start = reference = model()
        policy = start
        if "adapters" in spec:
            policy = adapted(start, spec)
        elif work == "rloo":
            reference = model(REFERENCE)
        training = TrainState(policy, InOrder(), gpu_process.cores(spec), betas=(0.9, 0.999), weight_decay=0.0)
        stage, found = stage_of(work, training, data, start, reference)
        weights = None          # RLOO's reference has a scaled copy, and AdamW has a copy

        def check():
            with for_comparison(work, data.get("responses", ())):
                metrics = next(stage(steps=1, learning_rate=0.0))
            return {**{name: metrics[name] for name in COMPARED[work]}, **found, **gpu_process.gradients(
                spec, {name: p.grad for name, p in training.model.parameters().items()})}
        return functools.partial(next, stage(steps=10**9, learning_rate=RATE)), check
    return make


# TRL.

def load_trl():
    import trl_trainers as theirs
    best = library_process.asked() == "trl-best"

    def make(spec):
        work = spec["work"]
        config = spec["config"]
        weights = read(spec["file"])
        adapters = (spec["alpha"], read(spec["adapters"])) if "adapters" in spec else None
        V = config["vocab_size"]
        data = examples(work, V)
        options = {"learning_rate": RATE, "use_cpu": gpu_process.torch_device(spec) == "cpu",
                   "bf16": spec.get("compute") == "bfloat16"}
        if work == "sft":
            trainer = theirs.sft_trainer(config, weights, data, EOS, adapters, padding_free=best, **options)
        elif work == "dpo":
            trainer = theirs.dpo_trainer(config, weights, data, EOS, adapters, precompute_ref_log_probs=best,
                                         beta=BETA["dpo"], **options)
        else:
            reference = None if adapters else {name: np.float32(REFERENCE) * a for name, a in weights.items()}
            trainer = theirs.rloo_trainer(config, weights, reference, data, functools.partial(reward, V), adapters,
                                          beta=BETA["rloo"], **options)
        rows = theirs.rows(trainer)

        def check():
            found, gradients = theirs.check(trainer, rows, data.get("responses"))
            return {**found, **gpu_process.gradients(spec, gradients)}
        return functools.partial(theirs.step, trainer, rows), check
    return make


LOADERS = {"minilm": load_minilm, "trl": load_trl, "trl-best": load_trl}
