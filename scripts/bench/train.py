"""A training step of the same transformer: minilm against PyTorch, torch.compile and HIPS autograd.

    python scripts/bench/train.py [--sizes XS,S] [--peers torch,compile] [--csv FILE] [--figure FILE]
    python scripts/bench/train.py --device gpu [--sizes G8x1024] [--compute bfloat16] [--json FILE]

A step is forward, backward, clipping of the gradient's norm, and AdamW, on B windows of T random tokens, in float32.
`autograd` is HIPS autograd with the same formulas in its NumPy; in `autograd-tuned` glibc also keeps freed memory. A
library that is not installed is named and skipped. On a GPU also in bf16: minilm's mixed precision, PyTorch's autocast.
"""

import functools
import sys
import tempfile

import numpy as np

import gpu_process
import library_process
import measuring
from benchmark import Benchmark
from support.run_folder import main_guard

WORKER = library_process.asked()
PEERS = {"torch": "torch", "compile": "torch", "autograd": "autograd", "autograd-tuned": "autograd"}
GPU = {"sizes": ["S", "G8x1024"], "peers": ["torch"], "possible": ["torch", "compile"]}
# Of gradients in float32, relative to the largest entry; in bf16 of all gradients by norm, and of single numbers.
TOLERANCE = {"float32": 2e-3, "bfloat16": (0.1, 0.01)}
OPTIMISER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}


def load_minilm():
    from minilm.fast.malloc import keep_freed_memory
    from minilm.model import Config, Transformer
    from minilm.stages.train_state import TrainState
    from minilm.tensor import Tensor
    keep_freed_memory()

    def make(spec):
        weights, tokens = read(spec)
        model = gpu_process.on_gpu(Transformer(Config(**spec["config"]), np.random.default_rng(0)).over(
            {name: Tensor(a, requires_grad=True) for name, a in weights.items()}), spec)
        training = TrainState(model, np.random.default_rng(0), gpu_process.cores(spec), betas=OPTIMISER["betas"],
                            weight_decay=OPTIMISER["weight_decay"])

        def check():
            loss = next(measuring.training_steps(training, tokens, learning_rate=0.0, clip=np.inf))["loss"]
            return {"loss": loss, **gpu_process.gradients(spec, {
                name: p.grad for name, p in model.parameters().items()})}
        return functools.partial(next, measuring.training_steps(training, tokens, OPTIMISER["lr"])), check
    return make


def load_torch():
    import torch

    from torch_llama import Llama

    def make(spec):
        weights, tokens = read(spec)
        device = gpu_process.torch_device(spec)
        model = Llama(spec["config"]).load(weights).to(device)
        tokens = torch.from_numpy(tokens).to(device)
        optimiser = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMISER)
        compiled = torch.compile(model.loss) if WORKER == "compile" else model.loss

        def loss_of(tokens):
            with gpu_process.autocast(spec):
                return compiled(tokens)

        def step():
            optimiser.zero_grad(set_to_none=True)
            loss = loss_of(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            return loss.detach()

        def check():
            loss = loss_of(tokens)
            loss.backward()
            return {"loss": loss.item(), **gpu_process.gradients(spec, model.gradients())}
        return step, check
    return make


def load_autograd():
    import autograd
    import autograd.numpy as anp

    def norm(x, weight, eps):
        return x / anp.sqrt(anp.mean(x * x, axis=-1, keepdims=True) + eps) * weight

    def make(spec):
        weights, tokens = read(spec)
        c = spec["config"]
        inputs = tokens[:, :-1]
        targets = tokens[:, 1:]
        B, T = inputs.shape
        H = c["heads"]
        K = c["head_width"]
        angles = np.outer(np.arange(T), c["rope_base"] ** (-np.arange(0, K, 2) / K))
        cos = np.cos(angles).astype(np.float32)
        sin = np.sin(angles).astype(np.float32)
        hidden = np.triu(np.full((T, T), -1e30, np.float32), 1)

        def rotate(x):
            a, b = anp.split(x, 2, axis=-1)         # the gradients of slices would be added one element at a time
            return anp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        def loss_of(p):
            x = p["embedding"][inputs.reshape(-1)]          # (B T,D): np.dot uses BLAS only for matrices
            for i in range(c["layers"]):
                name = f"blocks.{i}."
                qkv = anp.dot(norm(x, p[name + "attention_norm"], c["norm_eps"]), p[name + "qkv"])
                q, k, v = anp.transpose(anp.reshape(qkv, (B, T, 3, H, K)), (2, 0, 3, 1, 4))
                scores = anp.matmul(rotate(q), anp.swapaxes(rotate(k), -1, -2)) * np.float32(K ** -0.5) + hidden
                weight = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
                mixed = anp.matmul(weight / anp.sum(weight, axis=-1, keepdims=True), v)
                mixed = anp.reshape(anp.transpose(mixed, (0, 2, 1, 3)), (B * T, H * K))
                x = x + anp.dot(mixed, p[name + "attention_out"])
                gate_up = anp.dot(norm(x, p[name + "ffn_norm"], c["norm_eps"]), p[name + "gate_up"])
                gate, up = anp.split(gate_up, 2, axis=-1)
                x = x + anp.dot(gate / (1 + anp.exp(-gate)) * up, p[name + "ffn_out"])
            logits = anp.dot(norm(x, p["final_norm"], c["norm_eps"]), p["unembedding"].T)
            logits = logits - anp.max(logits, axis=-1, keepdims=True)
            picked = logits[np.arange(B * T), targets.reshape(-1)]
            return anp.mean(anp.log(anp.sum(anp.exp(logits), axis=-1)) - picked)

        gradient = autograd.value_and_grad(loss_of)
        moments = {name: (np.zeros_like(a), np.zeros_like(a)) for name, a in weights.items()}
        steps = 0

        def step():
            nonlocal steps
            steps += 1
            _, gradients = gradient(weights)
            length = np.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
            b1, b2 = OPTIMISER["betas"]
            for name, g in gradients.items():
                p = weights[name]
                m, v = moments[name]
                g = g * np.float32(min(1.0, 1.0 / length))
                m += (1 - b1) * (g - m)
                v += (1 - b2) * (g * g - v)
                decay = OPTIMISER["weight_decay"] if p.ndim > 1 else 0.0
                p -= OPTIMISER["lr"] * (m / (1 - b1 ** steps) / (np.sqrt(v / (1 - b2 ** steps)) + OPTIMISER["eps"])
                                        + decay * p)

        def check():
            loss, gradients = gradient(weights)
            return {"loss": loss, **gradients}
        return step, check
    return make


LOADERS = {"minilm": load_minilm, "torch": load_torch, "compile": load_torch, "autograd": load_autograd,
           "autograd-tuned": load_autograd}


def read(spec):
    with np.load(spec["file"]) as file:
        arrays = dict(file)
    return arrays, arrays.pop("tokens")


def write(path, size):
    """Write weights and tokens of a size to a file. Returns the spec of the workers."""
    import dataclasses

    from minilm.model import Config, Transformer
    V, D, L, H, T, B = measuring.SIZES[size]
    config = Config(vocab_size=V, width=D, layers=L, heads=H, context=T)
    rng = np.random.default_rng(0)
    weights = {name: p.data for name, p in Transformer(config, rng).parameters().items()}
    np.savez(path, tokens=rng.integers(V, size=(B, T + 1)), **weights)
    return {"file": str(path), "config": dataclasses.asdict(config)}


def main():
    run = Benchmark(__doc__.partition("\n")[0], measuring.SIZES, PEERS, GPU, ["torch", "autograd"],
                    unasked=measuring.UNASKED)
    peers = measuring.present(run.asked.peers, PEERS)
    for size, compute in run.cases():
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            run.compare("training step", size, compute, write(file.name, size), ["minilm", *peers], {
                "minilm": measuring.blas_threads(1), "autograd-tuned": measuring.KEEP_MEMORY}, TOLERANCE[compute])
    return run.finish("A training step")


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
