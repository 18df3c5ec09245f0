"""An optimiser step of SFT, DPO and RLOO: minilm's stages against TRL's trainers.

    python scripts/bench/objectives.py [--works sft,dpo] [--sizes 8M] [--peers trl] [--csv FILE] [--figure FILE]

Both have the same Llama with the same weights and tokens, in float32 on the CPU. A step is batching the tokens,
forward, backward, clipping of the gradient's norm, and AdamW. Reading and tokenising the data is not part of it.

    sft     8 dialogues of 64 to 320 tokens, three quarters of them prompt; the loss is on the response
    dpo     4 prompts of 256 tokens, two responses of 64 to each; the reference is the policy as it started
    rloo    1 prompt of 64 tokens, 8 samples of 64 drawn in the step, rewarded, and scored by a reference

`trl` has its defaults, except gradient checkpointing and bfloat16, which take longer on a CPU. In `trl-best` glibc
keeps freed memory, SFT has no padding, and DPO computes the reference's log-probs once, before the steps; minilm always
does all three. At 135M minilm checkpoints the activations of its blocks (Transformer.activation_checkpointing).
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
import tempfile
import time
from unittest import mock

import numpy as np

import library_process
import measuring
from minilm.fast import workers
from minilm.fast.malloc import keep_freed_memory
from minilm.generate import Samples
from minilm.model import Config, Transformer
from minilm.packing import pack
from minilm.stages import dpo, rlhf, sft
from minilm.stages.train_state import TrainState, train_step
from minilm.tensor import Tensor, no_grad
from support.run_folder import UsageError, main_guard

WORKER = library_process.asked()

SIZES = {"tiny": {"vocab_size": 256, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 64},
         "8M": {"vocab_size": 8192, "width": 256, "layers": 6, "heads": 4, "ffn_width": 1024},
         "135M": {"vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "ffn_width": 1536,
                  "rope_base": 1e5, "norm_eps": 1e-5}}          # the size of SmolLM2-135M
WORKS = ["sft", "dpo", "rloo"]
PEERS = ["trl", "trl-best"]
EOS = 1
BETA = {"dpo": 0.1, "rloo": 0.05}
RATE = 1e-6                     # TRL's default for DPO and RLOO
RECOMPUTED = 10**8              # with more parameters minilm checkpoints activations
REFERENCE = 0.95                # RLOO's reference is the policy times this, so that no log-ratio is zero
# Compared besides gradients. RLOO's loss is not: TRL's loss has the value of -mean(A) and the same gradient.
COMPARED = {"sft": ["loss"], "dpo": ["loss"], "rloo": ["reward", "kl_token"]}
TOLERANCE = 1e-3                # of gradients in float32, relative to the largest entry


def examples(work, vocab_size):
    """Token lists. RLOO's responses are for the comparison of results; in the steps it samples its own."""
    rng = np.random.default_rng(1)

    def draw(lengths, last=()):
        return [[*rng.integers(2, vocab_size, size=n - len(last)).tolist(), *last] for n in lengths]

    if work == "sft":
        lengths = np.linspace(64, 320, 8).astype(int)
        return {"prompts": draw(lengths * 3 // 4), "responses": draw(lengths - lengths * 3 // 4, [EOS])}
    if work == "dpo":
        return {"prompts": draw([256] * 4), "chosen": draw([64] * 4, [EOS]), "rejected": draw([64] * 4, [EOS])}
    return {"prompts": draw([64]), "responses": draw([64] * 8)}


def reward(vocab_size, responses):
    """The share of tokens in the lower half of the vocabulary."""
    return [float(np.mean(np.array(response) < vocab_size // 2)) for response in responses]


class InOrder(np.random.Generator):
    """The Generator of a stage: where the stage draws examples, it gets all of them in their order."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def integers(self, n, size):
        return np.arange(size) % n


# minilm.

def stage_of(work, training, data, model):
    """A stage that takes `steps` and `learning_rate`, with all data in each step; {"reference": log-probs} for DPO."""
    prompts = data["prompts"]
    size = len(prompts)
    if work == "sft":
        return functools.partial(sft.train_sft, training, **data, batch_size=size), {}
    if work == "dpo":
        began = time.perf_counter()
        references = [dpo.reference_log_probs(training.model, prompts, data[side])
                      for side in ("chosen", "rejected")]
        print(f"  minilm's reference log-probs, computed once: {time.perf_counter() - began:.2f} s", file=sys.stderr)
        return functools.partial(dpo.train_dpo, training, *data.values(), *references,
                                 batch_size=size, beta=BETA[work]), {"reference": np.stack(references)}
    reference = model(REFERENCE)
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
            log_probs = policy.response_log_probs(pack(prompts, tokens.tolist())).data
        return Samples(tokens, np.ones(log_probs.shape), log_probs, np.zeros(log_probs.shape))

    module = {"sft": sft, "dpo": dpo, "rloo": rlhf}[work]
    with (mock.patch.object(module, "train_step", functools.partial(train_step, clip=np.inf)),
          mock.patch.object(rlhf, "generate", given),
          mock.patch.object(InOrder, "random", lambda self, shape: np.array(responses))):
        yield


def load_minilm():
    keep_freed_memory()

    def make(spec):
        work = spec["work"]
        config = Config(**spec["config"])
        weights = read(spec)
        data = examples(work, config.vocab_size)

        def model(factor=1.0):
            scaled = Transformer(config, np.random.default_rng(0)).over(
                {name: Tensor(a if factor == 1 else np.float32(factor) * a, requires_grad=True)
                 for name, a in weights.items()})
            scaled.activation_checkpointing = sum(a.size for a in weights.values()) > RECOMPUTED
            return scaled

        training = TrainState(model(), InOrder(), workers.available_cores(), betas=(0.9, 0.999), weight_decay=0.0)
        stage, found = stage_of(work, training, data, model)
        weights = None          # RLOO's reference has a scaled copy, and AdamW has a copy

        def check():
            with for_comparison(work, data.get("responses", ())):
                metrics = next(stage(steps=1, learning_rate=0.0))
            return {**{name: metrics[name] for name in COMPARED[work]}, **found,
                    **{name: p.grad for name, p in training.model.parameters().items()}}
        return functools.partial(next, stage(steps=10**9, learning_rate=RATE)), check
    return make


# TRL.

def load_trl():
    import trl_trainers as theirs

    def make(spec):
        work = spec["work"]
        config = spec["config"]
        weights = read(spec)
        best = WORKER == "trl-best"
        V = config["vocab_size"]
        data = examples(work, V)
        if work == "sft":
            trainer = theirs.sft_trainer(config, weights, data, EOS, padding_free=best, learning_rate=RATE)
        elif work == "dpo":
            trainer = theirs.dpo_trainer(config, weights, data, EOS, precompute_ref_log_probs=best, beta=BETA["dpo"],
                                         learning_rate=RATE)
        else:
            reference = {name: np.float32(REFERENCE) * a for name, a in weights.items()}
            trainer = theirs.rloo_trainer(config, weights, reference, data, functools.partial(reward, V),
                                          beta=BETA["rloo"], learning_rate=RATE)
        rows = theirs.rows(trainer)
        return functools.partial(theirs.step, trainer, rows), functools.partial(
            theirs.check, trainer, rows, data.get("responses"))
    return make


LOADERS = {"minilm": load_minilm, "trl": load_trl, "trl-best": load_trl}


# Both.

def read(spec):
    with np.load(spec["file"]) as file:
        return dict(file)


def write(path, size):
    """Write the weights of a size to a file. Returns the spec of the workers."""
    config = Config(**SIZES[size], tied=True, context=512)
    np.savez(path, **{name: p.data for name, p in Transformer(config, np.random.default_rng(0)).parameters().items()})
    return {"file": str(path), "config": dataclasses.asdict(config)}


def main():
    asked = measuring.arguments(__doc__.partition("\n")[0], SIZES, PEERS, WORKS, unasked=["tiny"], versions=True)
    if not asked.other and not measuring.installed("trl"):
        raise UsageError("TRL is not installed: pip install trl==1.16.0")
    print(measuring.machine("torch", "transformers", "trl"))
    rows = []
    for size in asked.sizes:
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            spec = write(file.name, size)
            for work, peer in itertools.product(asked.works, asked.peers):      # one after the other: TRL may need 9 GB
                rows += measuring.compare(f"{work.upper()} step", size, {**spec, "work": work}, ["minilm", peer], {
                    "minilm": measuring.blas_threads(1), "trl-best": measuring.KEEP_MEMORY}, TOLERANCE, asked.rounds)
    measuring.finish(asked, rows, "An optimiser step, against TRL")


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
