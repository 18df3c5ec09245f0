"""A long RLHF run in one process: does memory stay flat, and do sampled and recomputed log-probs stay equal?

    python scripts/assistant.py --out runs/assistant                # once; a trial, --scale 0.05, is enough
    python scripts/dev/long_run.py runs/assistant --minutes 60

The policy starts as the SFT model of that folder, and is trained on its reward model as in assistant.py, at a constant
learning rate. One line a minute (a tenth of the run, if that is shorter):

    memory     resident memory of the process (RSS) after the steps of the line: the greatest, in MiB
    drift      greatest |log pi(y_t|x, y_<t)| difference, in nats, between the value of sampling (one token at a time,
               from a cache) and the value recomputed from whole sequences, over fresh samples of the current policy
    others     means over the steps of the line; KL in nats a response, entropy in nats a token

The last line says from which minute memory is flat, with the slope of a straight line through the values from then on.
The exit status is 1 if memory grows by more than 2% over the second half of the run. Linux only (/proc).
Tests: tests/test_long_run.py.
"""
import os
import sys
import time
from pathlib import Path

# One process, one thread, as in assistant.py. NumPy reads these variables when it is imported.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from minilm import data, evaluate
from minilm.diverged import Diverged
from minilm.fast.malloc import keep_freed_memory
from minilm.generate import generate
from minilm.model import Transformer
from minilm.model_file import load_model
from minilm.packing import pack
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from minilm.world import tasks

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support.command_line import Parser, number, whole
from support.run_folder import StopRequest, UsageError, main_guard

STEPS = 10 ** 9             # more than will be reached: the learning rate stays at its peak
LEARNING_RATE = 1.5e-4      # with which RLHF ends in assistant.py
MAX_NEW_TOKENS = 40
QUESTIONS = 3000
PROBES = 64                 # samples whose log-probs are recomputed for each line
GROWTH = 0.02               # memory is flat from a minute on if it exceeds that minute's value by at most this share
SHOWN = {"reward": "reward", "kl_sequence": "KL", "entropy": "entropy", "completions/mean_length": "tokens",
         "grad_norm": "grad norm"}      # {name of the metric: name of the column}


def resident_mib() -> float:
    """The resident memory of this process in MiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    except OSError as error:
        raise UsageError("long_run.py reads memory from /proc/self/statm, which only Linux has") from error
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def drift(policy: Transformer, prompts: Sequence, rng: np.random.Generator, eos: int) -> float:
    """The greatest difference between a token's log-prob when it was sampled and the recomputed one, in nats."""
    samples = generate(policy, prompts, MAX_NEW_TOKENS, rng, eos)
    with no_grad():
        recomputed = policy.response_log_probs(pack(prompts, samples.responses(), policy.config.context)).data
    width = recomputed.shape[1]
    return float(np.abs(np.where(samples.mask[:, :width] > 0, recomputed - samples.log_probs[:, :width], 0)).max())


def flat_from(memory: Sequence[float]) -> int:
    """The first place from which on memory exceeds the value there by at most the share GROWTH."""
    return next(i for i in range(len(memory)) if max(memory[i:]) <= (1 + GROWTH) * memory[i])


def verdict(minutes: Sequence[float], memory: Sequence[float]) -> tuple[str, bool]:
    """The last line, and whether memory is flat. minutes, memory (MiB): of each line that was printed, at least one."""
    start = flat_from(memory)
    is_flat = minutes[start] <= minutes[-1] / 2
    if not is_flat:                                 # the slope of the second half
        start = next(i for i, minute in enumerate(minutes) if minute > minutes[-1] / 2)
    x = np.asarray(minutes[start:]) / 60
    y = np.asarray(memory[start:])
    slope = np.polyfit(x, y, 1)[0] if len(x) > 1 else math.nan
    words = "memory flat after" if is_flat else "MEMORY GROWS after"
    return (f"{words} minute {minutes[start]:.1f}: slope {slope:+.2f} MiB/h, from {y[0]:.1f} to {y[-1]:.1f} MiB "
            f"(most {y.max():.1f})"), bool(is_flat)


def models(folder: Path):
    """(SFT model, reward model, tokenizer) of a folder of assistant.py. Raises CheckpointError, UsageError."""
    sft, tokenizer, _ = load_model(folder / "sft.safetensors")
    reward_model, _, _ = load_model(folder / "reward_model.safetensors")
    if not isinstance(sft, Transformer) or isinstance(reward_model, Transformer):
        raise UsageError(f"{folder}: sft.safetensors must hold a Transformer, reward_model.safetensors a RewardModel; "
                         "give a folder of assistant.py")
    return sft, reward_model, tokenizer


def steps_of_rlhf(policy: Transformer, sft: Transformer, reward_model, prompts: Sequence, rng: np.random.Generator,
                  eos: int, beta: float) -> Iterator[dict]:
    """The metrics of each step, without end."""
    state = TrainState(policy, rng, workers=1, weight_decay=0.0)

    def reward(asked, responses):
        return evaluate.predicted_rewards(reward_model, asked, responses)
    return train_rlhf(state, sft, reward, prompts, STEPS, prompts_per_step=16, samples_per_prompt=8,
                      max_new_tokens=MAX_NEW_TOKENS, eos=eos, beta=beta, learning_rate=LEARNING_RATE)


def lines(steps: Iterator[dict], minutes: float, probe, stop: StopRequest) -> Iterator[dict]:
    """A line's numbers by column, for every minute or tenth of the run, until it is over or was stopped."""
    began = time.monotonic()
    length = min(60.0, 6 * minutes)
    step = 0
    since = []
    memory = 0.0
    for metrics in steps:
        step += 1
        since.append([metrics[name] for name in SHOWN])
        memory = max(memory, resident_mib())
        elapsed = time.monotonic() - began
        if elapsed >= length or stop.requested:
            yield {"minute": elapsed / 60, "step": step, "memory": memory, "drift": probe(),
                   **dict(zip(SHOWN.values(), np.mean(since, axis=0)))}
            if elapsed >= 60 * minutes or stop.requested:
                return
            length = min(60 * minutes, elapsed + min(60.0, 6 * minutes))
            since = []
            memory = 0.0


def parsed() -> argparse.Namespace:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of a run of assistant.py: its SFT model and its reward model")
    parser.add_argument("--minutes", metavar="X", type=number(0.0001, 1e6), default=60.0,
                        help="of training (default: %(default)s)")
    parser.add_argument("--beta", metavar="B", type=number(0, 1e6), default=0.3,
                        help="of the KL penalty (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0,
                        help="of all random numbers (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    sft, reward_model, tokenizer = models(asked.folder)
    keep_freed_memory()                             # as assistant.py does
    warnings.simplefilter("ignore", RuntimeWarning)         # NumPy's warnings about NaN: Diverged says more
    rng = np.random.default_rng(asked.seed)
    prompts = [data.encode_prompt(tokenizer, question.text) for question in tasks.draw_questions(rng, QUESTIONS)]
    probe_rng = np.random.default_rng([asked.seed, 1])
    policy = sft.copy()

    def probe():
        chosen = [prompts[i] for i in probe_rng.integers(len(prompts), size=PROBES)]
        return drift(policy, chosen, probe_rng, tokenizer.eos)

    print(f"{'minute':>7} {'step':>6} {'MiB':>8} {'drift':>8}", *(f"{name:>9}" for name in SHOWN.values()), flush=True)
    printed = []
    with StopRequest() as stop:
        steps = steps_of_rlhf(policy, sft, reward_model, prompts, rng, tokenizer.eos, asked.beta)
        for line in lines(steps, asked.minutes, probe, stop):
            printed.append(line)
            print(f"{line['minute']:7.1f} {line['step']:6d} {line['memory']:8.1f} {line['drift']:8.1e}",
                  *(f"{line[name]:9.3f}" for name in SHOWN.values()), flush=True)
        steps.close()
    words, is_flat = verdict([line["minute"] for line in printed], [line["memory"] for line in printed])
    print(f"{printed[-1]['step']} steps; greatest drift {max(line['drift'] for line in printed):.1e} nats; {words}")
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main_guard(main, Diverged))
