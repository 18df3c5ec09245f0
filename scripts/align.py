"""Align a model with your own examples: a real one, or one of assistant.py.

    python scripts/align.py sft    --model MODEL --data FILE --out DIR
    python scripts/align.py reward --model MODEL --data FILE --out DIR
    python scripts/align.py dpo    --model MODEL --data FILE --out DIR
    python scripts/align.py rlhf   --model MODEL --data FILE --out DIR --reward R

MODEL is a GGUF file (python scripts/get_smollm2.py fetches one), a folder of
Hugging Face, an adapter, or a model file of assistant.py. FILE has one JSON
object per line, in the formats of TRL:

    {"prompt": "Hi", "completion": "Hello"}                        for sft
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}     reward, dpo
    {"prompt": "Hi"}                                               for rlhf

Each part is a string, which continues the text, or a list of messages
({"role": "user", "content": "Hi"}), which goes through the model's chat
template. --chat reads strings as messages of user and assistant.

R is a reward model that `align.py reward` has trained, or module:function, a
function of prompts and responses (two lists of strings) that gives a list of
numbers: --reward mine:shorter calls shorter in mine.py.

The model is measured before and after on examples that are held out: those of
--eval-data, or a tenth of the prompts. Of a real model, adapters (LoRA) of rank
8 are trained; --lora-rank 0 trains all weights.
DIR gets the adapter (as PEFT's), the model, metrics.jsonl with TRL's names, a
figure and results.json. Ctrl-C saves; --resume goes on. Then talk to it:

    python scripts/chat.py MODEL DIR/model
"""

from support import installed

installed.check("numpy", "minilm")

from support import one_blas_thread  # noqa: I001, F401

import argparse
import functools
import hashlib
import json
import shlex
import sys
import time

import numpy as np

from minilm import checkpoint
from minilm.diverged import Diverged
from minilm.fast.malloc import keep_freed_memory
from minilm.fast.workers import WorkerFailed
from minilm.lora import Adapted
from minilm.model import RewardModel, Transformer
from minilm.pretrained.adapter_folder import save_adapters
from minilm.pretrained.training_data import DataError
from minilm.stages.train_state import TrainState
from support import alignment
from support.align_figure import figure
from support.align_options import parse
from support.align_stages import Stage, last_words, read_examples, reward_function
from support.machine import machine
from support.models import load_any, save_any
from support.run_folder import RunFolder, StopRequest, UsageError, command_to_resume, main_guard, require
from support.terminal import columns, paragraph, progress

SAVE_EVERY = 60.0       # seconds
VERSION = 3             # of a run's files
DRAWN_EXAMPLES = 4      # answers that are shown


class Alignment:
    """One run: the model before and after, its examples, its folder."""

    def __init__(self, options: argparse.Namespace, run: RunFolder, stop: StopRequest):
        self.options = options
        self.run = run
        self.stop = stop
        self.base, self.tokenizer = load_any(options.model)
        if not isinstance(self.base, Transformer):
            raise UsageError(f"{options.model} is a reward model. Choose a model that writes text.")
        if isinstance(self.base, Adapted):
            self.base = self.base.merged()
        self.encoding, self.train_set, self.held_out = read_examples(options, self.tokenizer, self.base.config)
        self.policy = self._policy()
        self.judge = reward_function(options, self.encoding, self.held_out, self.train_set)
        self.sampling = alignment.Sampling(options.seed, options.max_new_tokens, options.workers)
        self.metrics: list[dict] = []
        self.began = time.monotonic()
        self.earlier = 0.0              # seconds, before the run was resumed

    def _policy(self):
        """The model that is trained, at its start."""
        o = self.options
        rng = np.random.default_rng([o.seed, 1])
        body = Adapted(self.base, o.lora_rank, o.lora_alpha, rng, o.lora_targets) if o.lora_rank else self.base.copy()
        body.activation_checkpointing = o.activation_checkpointing
        return RewardModel(body, rng) if o.stage == "reward" else body

    def measure(self, model: Transformer | RewardModel) -> dict:
        """Of held-out examples, by the stage."""
        o = self.options
        if isinstance(model, RewardModel):
            return alignment.of_rewards(model, self.held_out, o.workers)
        merged = model.merged()
        print(f"measures the model on {len(self.held_out.prompts)} held-out examples", flush=True)
        found = alignment.perplexity_elsewhere(merged, self.encoding)
        if o.stage == "sft":
            return found | alignment.of_demonstrations(merged, self.held_out, o.workers)
        if o.stage == "dpo":
            found |= alignment.of_pairs(merged, self.base, self.held_out, o.beta, o.workers)
        return found | alignment.of_answers(merged, self.base, self.held_out, self.encoding.ends, self.sampling,
                                            self.judge, self.rivals)

    @functools.cached_property
    def rivals(self) -> np.ndarray | None:
        """The rewards of the base's second answers to the held-out prompts."""
        if self.judge is None:
            return None
        drawn = self.sampling.draw(self.base, self.held_out.prompts, self.encoding.ends, "second answers of the base")
        return np.array(self.judge(self.held_out.prompts, drawn), float)

    def train(self) -> bool:
        """All steps, with a save now and then; False if Ctrl-C ended it."""
        o = self.options
        stage = Stage(o, self.base, self.train_set, self.encoding.ends, self.judge)
        state = TrainState(self.policy, np.random.default_rng([o.seed, 2]), workers=o.workers, betas=(0.9, 0.999),
                           weight_decay=o.weight_decay)
        self._restore(state)
        last = time.monotonic()
        tokens = self.metrics[-1]["num_tokens"] if self.metrics else 0
        with progress(o.stage, stage.steps, state.step) as advance:
            for found in stage.run(state):
                tokens += stage.tokens(state.step - 1, found)
                self.metrics.append({"step": state.step, "epoch": stage.epoch(state.step), **found,
                                     "num_tokens": tokens})
                advance(found)
                stopping = self.stop.requested and state.step < stage.steps
                if stopping or time.monotonic() - last > SAVE_EVERY:
                    self._save(state)
                    last = time.monotonic()
                if stopping:
                    return False
        self._save_metrics()
        return True

    def seconds(self) -> float:
        """Of this run, with those before it was resumed."""
        return self.earlier + time.monotonic() - self.began

    def _save(self, state):
        arrays, metadata = state.snapshot()
        self._save_metrics()
        self.run.save_state("state", arrays, {**metadata, "run": self.run.fingerprint, "seconds": self.seconds()})

    def _save_metrics(self):
        text = "".join(json.dumps(line) + "\n" for line in self.metrics)
        self.run.write("metrics.jsonl", lambda path: checkpoint.write_text(path, text))

    def _restore(self, state):
        saved = self.run.load_state("state")
        if saved is None:
            return
        path = self.run.path("state.safetensors")
        try:
            state.restore(*saved)
            lines = self.run.path("metrics.jsonl").read_text("utf-8").splitlines()
            self.metrics = [json.loads(line) for line in lines[:state.step]]
            self.earlier = float(saved[1]["seconds"])
            if len(self.metrics) != state.step or saved[1]["run"] != self.run.fingerprint:
                raise ValueError("another run")
        except (OSError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UsageError(f"{path}: damaged, or of another run. Delete it and metrics.jsonl; --resume then starts "
                             "anew.") from error

    def examples(self) -> list[dict]:
        """Answers before and after, to some held-out prompts, with the same random numbers at temperature 1."""
        if isinstance(self.policy, RewardModel):
            return []
        prompts = self.held_out.prompts[:DRAWN_EXAMPLES]
        answers = [self.sampling.draw(model, prompts, self.encoding.ends, "examples")
                   for model in (self.base, self.policy.merged())]
        texts = [[alignment.text_of(self.encoding, answer) for answer in side] for side in answers]
        questions = [last_words(given) for given in self.held_out.given[:DRAWN_EXAMPLES]]
        return [{"prompt": question, "before": before, "after": after}
                for question, before, after in zip(questions, *texts)]

    def finish(self, before: dict) -> None:
        """Model, figure, results, and a table on the terminal."""
        o = self.options
        if isinstance(self.policy, Adapted):
            self.run.write("adapter", lambda path: save_adapters(self.policy, path, o.model))
        path = save_any(self.policy, self.tokenizer, self.run.path("model"))
        results = {"stage": o.stage, "model": o.model, "data": o.data, "eval_data": o.eval_data, "seed": o.seed,
                   "steps": len(self.metrics), "seconds": round(self.seconds(), 1), "machine": machine(),
                   "held_out": len(self.held_out.prompts), "before": before, "after": self.measure(self.policy),
                   "examples": self.examples()}
        self.run.write("training.png", lambda path: figure(self.metrics, o.stage, path))
        self.run.finish(results)
        self.run.drop_state("state")
        print(f"\n{table(results)}\n")
        for example in results["examples"]:
            print(paragraph(example["prompt"]))
            for when in ("before", "after"):
                print(paragraph(f"    {when}: {example[when]}"))
            print()
        if o.stage != "reward":
            print(f"Talk to it:\n    python scripts/chat.py {shlex.quote(o.model)} {shlex.quote(str(path))}")


def table(results: dict) -> str:
    """The measurements before and after, side by side."""
    rows = [(f"{results['held_out']} held-out examples", "before", "after")]
    for name in results["after"]:
        if not name.endswith("_se"):
            rows.append((name, *(shown(results[when], name) for when in ("before", "after"))))
    widths = [max(columns(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def shown(found: dict, name: str) -> str:
    if name not in found:
        return "-"
    error = found.get(f"{name}_se")
    return f"{found[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def digest(path: str, option: str) -> str:
    """SHA-256 of a file. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Give a file of examples with {option}") from error


def main() -> int:
    options = parse(__doc__)
    keep_freed_memory()
    require("matplotlib", "safetensors", "tqdm")
    sha256 = {name: digest(getattr(options, name), option) for name, option in
              (("data", "--data"), ("eval_data", "--eval-data")) if getattr(options, name)}
    fingerprint = {"version": VERSION, "sha256": sha256, **{name: value for name, value in vars(options).items()
                                                           if name not in (*sha256, "out", "resume", "workers")}}
    with StopRequest() as stop, RunFolder(options.out, options.resume, fingerprint) as run:
        if run.finished:
            print(f"{options.out} holds a finished run; its results are in {run.path('results.json')}")
            return 0
        try:
            work = Alignment(options, run, stop)
            before = work.measure(work.policy if options.stage == "reward" else work.base)
            if not work.train():
                print(f"stopped; continue with:\n    {command_to_resume()}")
                return 130
            work.finish(before)
        except Diverged as error:
            raise UsageError(f"{error}. Start again with a lower --learning-rate, and another --out.") from error
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main, DataError, WorkerFailed))
