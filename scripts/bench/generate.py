"""Sampling with a cache of keys and values: minilm's generate against Hugging Face's and a loop in PyTorch.

    python scripts/bench/generate.py [--sizes B1,B32] [--peers hf,torch] [--csv FILE] [--figure FILE]
    python scripts/bench/generate.py --device gpu [--sizes B32] [--compute bfloat16] [--json FILE]

A Llama of 7 million parameters (V 4096, D 256, L 6, H 4, float32) reads B different prompts of 32 tokens and draws
64 new tokens for each, at temperature 1; no response ends early. `hf` is generate of transformers; `torch` is a loop
over the model of torch_llama.py with a cache that is allocated once; in `-tuned` glibc also keeps freed memory. First
the log-probs of minilm's tokens are compared with those of the other libraries, which get these tokens one by one
through their caches. On a GPU also with weights and caches in bf16.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import decoding
import gpu_process
import library_process
import measuring
from benchmark import Benchmark
from support.run_folder import main_guard

PROMPT = 32
NEW = 64
CONFIG = {"vocab_size": 4096, "width": 256, "layers": 6, "heads": 4, "context": PROMPT + NEW}
SIZES = {"B1": 1, "B32": 32, "B128": 128}
PEERS = {"hf": "transformers", "hf-tuned": "transformers", "torch": "torch", "torch-tuned": "torch"}
GPU = {"peers": ["hf", "torch"], "possible": ["hf", "torch"]}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}         # of log-probs, relative to the largest


def load_minilm():
    from minilm.fast.malloc import keep_freed_memory
    from minilm.model import Config, Transformer
    from minilm.tensor import Tensor
    keep_freed_memory()

    def make(spec):
        weights, prompts = read(spec)
        rng = np.random.default_rng(1)
        model = Transformer(Config(**spec["config"]), rng).over({name: Tensor(a) for name, a in weights.items()})
        return decoding.by_minilm(gpu_process.on_gpu(model, spec), prompts, spec["new"], spec["drawn"],
                                  gpu_process.cores(spec))
    return make


class Cache:
    """The keys and values of one layer of torch_llama.Llama, in arrays allocated once."""

    def __init__(self, batch, config, like):
        shape = (batch, config["kv_heads"], config["context"], config["head_width"])
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.length = 0

    def extend(self, k, v):
        start = self.length
        self.length = self.length + k.shape[2]
        self.keys[:, :, start:self.length] = k
        self.values[:, :, start:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]


def load_torch():
    import torch

    from torch_llama import Llama

    def make(spec):
        weights, prompts = read(spec)
        model = gpu_process.torch_for_sampling(Llama(spec["config"]).load(weights), spec)
        prompts = torch.from_numpy(prompts).to(gpu_process.torch_device(spec))
        new = spec["new"]
        caches = [Cache(len(prompts), spec["config"], model.embedding.weight) for _ in model.blocks]

        def beginning():
            for cache in caches:
                cache.length = 0
            return lambda tokens: model(tokens, caches)[:, -1]

        @torch.inference_mode()
        def step():
            next_logits = beginning()
            tokens = prompts
            drawn = torch.empty(len(prompts), new, dtype=torch.int64, device=prompts.device)
            for t in range(new):
                cumulative = torch.softmax(next_logits(tokens).float(), -1).cumsum(-1)
                # Inverse CDF, as in minilm: multinomial draws V random numbers for each token.
                uniforms = torch.rand(len(prompts), 1, device=prompts.device) * cumulative[:, -1:]
                tokens = drawn[:, t:t + 1] = torch.searchsorted(cumulative, uniforms)
            return drawn

        def check():
            return {"log_probs": decoding.score(spec["drawn"], prompts, beginning()), "shape": np.array(step().shape)}
        return step, check
    return make


def load_hf():
    import transformers

    from hf_llama import llama
    transformers.logging.set_verbosity_error()

    def make(spec):
        weights, prompts = read(spec)
        model = gpu_process.torch_for_sampling(llama(spec["config"], weights), spec)
        return decoding.by_transformers(model, prompts, spec["new"], spec["drawn"])
    return make


LOADERS = {"minilm": load_minilm, "hf": load_hf, "hf-tuned": load_hf, "torch": load_torch, "torch-tuned": load_torch}


def read(spec):
    with np.load(spec["file"]) as file:
        arrays = dict(file)
    return arrays, arrays.pop("prompts")


def write(folder, size):
    """Write weights and prompts to a file. Returns the spec of the workers."""
    import dataclasses

    from minilm.model import Config, Transformer
    config = Config(**CONFIG)
    rng = np.random.default_rng(0)
    weights = {name: p.data for name, p in Transformer(config, rng).parameters().items()}
    weights["unembedding"] *= 20            # otherwise all tokens are about equally likely, unlike in a trained model
    prompts = rng.integers(config.vocab_size, size=(SIZES[size], PROMPT))
    np.savez(folder / "weights.npz", prompts=prompts, **weights)
    return {"file": str(folder / "weights.npz"), "drawn": str(folder / "drawn.npy"), "new": NEW,
            "config": dataclasses.asdict(config)}


def main():
    run = Benchmark(__doc__.partition("\n")[0], SIZES, PEERS, GPU, ["torch", "transformers"])
    peers = measuring.present(run.asked.peers, PEERS)
    for size, compute in run.cases():
        with tempfile.TemporaryDirectory() as folder:
            run.compare("sampling", size, compute, write(Path(folder), size), ["minilm", *peers], {
                "minilm": measuring.blas_threads(1), "hf-tuned": measuring.KEEP_MEMORY,
                "torch-tuned": measuring.KEEP_MEMORY}, TOLERANCE[compute])
    return run.finish(f"Sampling {NEW} tokens after {PROMPT}")


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
