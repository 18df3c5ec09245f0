"""The gain of each speed trick of minilm/fast: the same work with and without it, in time and in memory.

    python scripts/bench/tricks.py [--only packing,cache] [--rounds 7] [--quick]

Each row computes the same numbers twice, checks that they agree, and then times the two by turns in one process.
Time is the median of the ratios of the rounds, with the least and the greatest; memory is the peak of the arrays that
NumPy allocates during the work. Ratios are with / without, lower is better. malloc is measured in processes of its own.
BLAS has one thread.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import dataclasses
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from unittest import mock

import numpy as np

import measuring
from minilm import layers, ops, plain
from minilm.data import make_batch
from minilm.fast import few_rows
from minilm.fast.malloc import keep_freed_memory
from minilm.generate import generate, sample
from minilm.model import Config, Transformer
from minilm.objectives.sft import sft_loss
from minilm.optim import AdamW
from minilm.packing import pack
from minilm.stages.pretraining import pretrain
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor, no_grad
from support import command_line
from support.command_line import Parser, whole
from support.run_folder import UsageError, main_guard

CONFIG = Config(vocab_size=512, width=128, layers=4, heads=4, context=512)     # size S of scripts/bench/train.py
B, T = 16, 128


@dataclasses.dataclass
class Trick:
    """with_it and without_it do the same work and return arrays that agree to `tolerance` of their largest number."""

    file: str
    work: str
    without: str
    with_it: Callable
    without_it: Callable
    tolerance: float = 1e-3
    one_process: bool = True       # so that its peak memory means something


def model(**changes):
    return Transformer(dataclasses.replace(CONFIG, **changes), np.random.default_rng(0))


def gradient(model, loss):
    """Forward and backward: the gradient of the embedding."""
    for p in model.parameters().values():
        p.grad = None
    loss().backward()
    return model.parameters()["embedding"].grad


def packing():
    policy, rng = model(), np.random.default_rng(1)
    prompts = [p for p in rng.integers(1, 512, size=(4, 256)).tolist() for _ in range(2)]
    responses = rng.integers(1, 512, size=(8, 64)).tolist()
    batch, padded = pack(prompts, responses), make_batch(prompts, responses, pad=0)
    return Trick("packed_attention.py", "DPO pairs, 4 x (256 + 2 x 64) tokens, forward and backward", "padded rows",
                 lambda: gradient(policy, lambda: policy.response_log_probs(batch).sum()),
                 lambda: gradient(policy, lambda: layers.sequence_log_probs(policy.log_probs(padded.tokens),
                                                                            padded.target_mask).sum()))


def tiles():
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.normal(size=(1, 4, 2048, 32)).astype("float32"), requires_grad=True) for _ in range(3))

    def run(attention):
        q.grad = k.grad = v.grad = None
        attention(q, k, v).sum().backward()
        return q.grad
    return Trick("tiled_attention.py", "causal attention, T 2048, forward and backward", "all scores at once",
                 lambda: run(layers.attention), lambda: run(layers.attention_without_tiles))


def chunks():
    rng = np.random.default_rng(0)
    hidden, unembedding = (Tensor(rng.normal(size=(n, 128)).astype("float32") * 0.1, requires_grad=True)
                           for n in (2048, 50257))
    targets = rng.integers(50257, size=2048)

    def run(log_probs):
        hidden.grad = unembedding.grad = None
        log_probs(hidden, unembedding, targets).sum().backward()
        return hidden.grad
    return Trick("chunked_log_probs.py", "log-probs of 2048 tokens, V 50257, forward and backward",
                 "all logits at once",
                 lambda: run(layers.token_log_probs), lambda: run(layers.token_log_probs_without_chunks))


def training_step(policy, tokens):
    optimizer = AdamW(policy.parameters())
    mask = np.ones((len(tokens), tokens.shape[1] - 1))

    def step():
        optimizer.zero_grad()
        loss = sft_loss(policy.log_probs(tokens), mask)
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step(0.0)
        return np.array(loss.item())
    return step


def deferred():
    policy = model(vocab_size=50257, width=768, layers=12, heads=12)
    step = training_step(policy, np.random.default_rng(1).integers(50257, size=(2, 257)))

    def computed_at_once():
        with (mock.patch.object(ops, "DeferredMatmul", lambda x, y: x @ y),
              mock.patch("minilm.fast.chunked_log_probs.DeferredMatmul", lambda x, y: x @ y)):
            return step()
    return Trick("deferred.py", "training step, size G", "gradients computed, then copied",
                 step, computed_at_once)


def flat():
    policies = model(), model()
    optimizer, state = AdamW(policies[0].parameters()), {}
    for policy in policies:
        for p in policy.parameters().values():
            p.grad = np.ones_like(p.data)

    def plain_step():
        plain.adamw(policies[1].parameters(), state, 1e-3)
        return policies[1].parameters()["embedding"].data

    def flat_step():
        optimizer.step(1e-3)
        return policies[0].parameters()["embedding"].data
    return Trick("flat_parameters.py", "AdamW, 0.9 million parameters", "plain.adamw", flat_step, plain_step)


def activations():
    policy = model()
    step = training_step(policy, np.random.default_rng(1).integers(512, size=(B, T + 1)))

    def run(checkpointing):
        policy.activation_checkpointing = checkpointing
        return step()
    return Trick("activation_checkpointing.py", "training step, size S", "every activation kept",
                 lambda: run(True), lambda: run(False))


def cache():
    policy, prompts = model(), np.random.default_rng(1).integers(512, size=(8, 32)).tolist()
    uniforms = np.random.default_rng(2).random((8, 64))

    def whole_forwards():
        tokens = np.array(prompts)
        for t in range(64):
            with no_grad():
                logits = policy(tokens).data[:, -1]
            tokens = np.concatenate([tokens, sample(logits, uniforms[:, t])[0][:, None]], axis=1)
        return tokens[:, 32:]
    return Trick("cached_decoding.py", "64 tokens after 32, 8 rows", "the whole forward for each token",
                 lambda: generate(policy, prompts, 64, uniforms, eos=None).tokens, whole_forwards, tolerance=0)


def logits():
    rng = np.random.default_rng(0)
    hidden, unembedding = (rng.standard_normal((rows, 576), np.float32) for rows in (4, 49152))
    return Trick("few_rows.py", "logits of 4 rows, D 576, V 49152, 10 times", "one product",
                 lambda: [few_rows.logits(hidden, unembedding) for _ in range(10)][-1],
                 lambda: [np.ascontiguousarray((unembedding @ hidden.T).T) for _ in range(10)][-1])


def one_node():
    policy, tokens = model(), np.random.default_rng(1).integers(512, size=(B, T))
    ones = np.ones(tokens.shape)
    return Trick("packed_attention.py", "hidden states of 16 x 128 tokens, size S, forward and backward",
                 "a node for each layer of attention",
                 lambda: gradient(policy, lambda: policy.hidden(tokens).sum()),
                 lambda: gradient(policy, lambda: policy.hidden(tokens, key_mask=ones).sum()))


def workers():
    def run(count):
        policy = model()
        state = TrainState(policy, np.random.default_rng(0), workers=count)
        steps = pretrain(state, np.random.default_rng(1).integers(512, size=10_000), 10 ** 9, B, T, learning_rate=0.0)
        return lambda: np.array(next(steps)["grad_norm"])
    two, one = run(2), run(1)
    return Trick("workers.py", "training step, size S, 2 processes", "1 process", two, one, one_process=False)


TRICKS = {f.__name__: f for f in (packing, one_node, tiles, chunks, deferred, flat, activations, cache, logits,
                                   workers)}


def measure(trick, rounds):
    """The ratio of each round, the two median times in seconds, and the ratio of peak memory. Raises UsageError."""
    a, b = trick.with_it(), trick.without_it()
    if np.abs(a - b).max() > trick.tolerance * np.abs(b).max():
        raise UsageError(f"{trick.file}: the results differ by {np.abs(a - b).max():.2e}")
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for j, work in enumerate((trick.with_it, trick.without_it)):
            began = time.perf_counter()
            work()
            times[i, j] = time.perf_counter() - began
    memory = peak(trick.with_it) / peak(trick.without_it) if trick.one_process else None
    return times[:, 0] / times[:, 1], np.median(times, axis=0), memory


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def row(file, work, without, ratios, seconds, memory):
    ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    times = " / ".join(f"{1e3 * s:.0f} ms" for s in seconds)
    return f"| {file} | {work} | {without} | {ratio} | {times} | {'' if memory is None else f'{memory:.2f}'} |"


def malloc_seconds(keep):
    """Seconds of a training step in a process of its own, whose malloc keeps freed memory or not."""
    code = f"import tricks; print(tricks.step_seconds({keep}))"
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"malloc.py: the process failed:\n{done.stderr}")
    return float(done.stdout)


def step_seconds(keep, steps=5):
    if keep:
        keep_freed_memory()
    step = training_step(model(), np.random.default_rng(1).integers(512, size=(B, T + 1)))
    step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--only", type=command_line.names("trick", [*TRICKS, "malloc"]),
                        help=f"with commas, of {', '.join([*TRICKS, 'malloc'])}")
    parser.add_argument("--rounds", type=whole(1, measuring.MOST_ROUNDS), default=7,
                        help="of the two by turns (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round: shows that it runs")
    asked = parser.parse_args()
    names = asked.only or [*TRICKS, "malloc"]
    rounds = 1 if asked.quick else asked.rounds
    print(f"{measuring.machine()}\n\n| minilm/fast | work | without it | time, with / without | times | memory |\n"
          "|---|---|---|---|---|---|", flush=True)
    if "malloc" in names:
        times = np.array([[malloc_seconds(True), malloc_seconds(False)] for _ in range(rounds)])
        print(row("malloc.py", "training step, size S", "glibc's default", times[:, 0] / times[:, 1],
                  np.median(times, axis=0), None), flush=True)
    keep_freed_memory()
    for name in names:
        if name in TRICKS:
            trick = TRICKS[name]()
            print(row(trick.file, trick.work, trick.without, *measure(trick, rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
