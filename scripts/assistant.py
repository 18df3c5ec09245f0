"""From random weights to an assistant: all stages, in minutes on two cores.

    python scripts/assistant.py --out runs/assistant

    pretraining    predict the next token of texts         -> base
    SFT            imitate demonstrated answers            -> sft
    comparisons    sample two answers to a prompt; simulated people choose one
    reward model   predict their choice                    -> reward_model
    RLHF           policy gradient on the reward model, for several beta
    DPO            from the same comparisons, directly, for several beta
    evaluation     on questions that are held out of every stage

The folder gets a model file for each stage (safetensors, with config and
tokenizer), comparisons.json, results.json, training_curves.png and
reward_against_kl.png. Ctrl-C saves; --resume continues. The results depend on
the options alone, the number of workers included (in the last bits). Below
--scale 0.1 the numbers of texts and questions shrink too: a trial run takes less
than a minute at --scale 0.01. Then talk to the models: python scripts/chat.py runs/assistant
"""

import os
import signal
import sys

from support import installed

installed.check("numpy", "minilm")

# Ctrl-C while there is nothing to save: exit at once. Later main() handles it.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from support import one_blas_thread  # noqa: I001, F401

import argparse
import dataclasses
import hashlib
import json
import platform
import shlex
import time
import warnings
from collections.abc import Sequence

import numpy as np

from minilm import data, evaluate, parallel
from minilm.checkpoint import write_text
from minilm.diverged import Diverged
from minilm.fast.malloc import keep_freed_memory
from minilm.fast.workers import WorkerFailed
from minilm.model import Config, RewardModel, Transformer
from minilm.ranks import Ranks
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.pretraining import pretrain
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tokenizer import Tokenizer
from minilm.world import annotators, corpus, tasks
from support import figures
from support.evaluation import Evaluation
from support.job import Job, Stopped
from support.options import TRIAL_BELOW, parse
from support.run_folder import (
    RunFolder,
    StopRequest,
    UsageError,
    command_to_resume,
    main_guard,
    out_of_memory,
    print_nothing,
    require,
)
from support.tables import summary
from support.terminal import paragraph, progress, trial_note

VERSION = 3                 # of a run's files; a run of another version cannot be resumed
SIZES = {"small": {"width": 64, "layers": 3}, "large": {"width": 96, "layers": 4}}
STEPS = {"pretraining": 1800, "sft": 500, "reward model": 200, "rlhf": 50, "dpo": 150}
RLHF_BETAS = (1.0, 0.3, 0.1, 0.0)
DPO_BETAS = (1.0, 0.3, 0.1)
MAIN_BETA = 0.3             # of the policies in the table
DOCUMENTS = 24000           # for pretraining
DEMONSTRATIONS = 8000       # for SFT
COMPARISONS = 2000          # for the reward model and DPO
UNLABELLED = 3000           # questions for RLHF
HELD_OUT = 540              # questions for the evaluation
VOCABULARY = 640
MAX_NEW_TOKENS = 40
BEST_OF = 8
WINDOWS = 16                # of text in a step of pretraining
LENGTH = 128                # tokens of a window; a step of another stage has about as many tokens
COMPARED_TOGETHER = 512     # answers that are sampled between two movements of the progress bar
# Durations in steps of pretraining: of all training, for each step of pretraining; and of all the rest. Measured:
# 5,100 steps at --scale 1, 460 at --scale 0.05.
ALL_TRAINING = 2.6
ALL_SAMPLING = 450


def steps_of(options: argparse.Namespace, stage: str) -> int:
    return max(1, round(STEPS[stage] * options.scale))


def count_of(options: argparse.Namespace, full: int) -> int:
    """A number of texts or questions: smaller in a trial run, below --scale 0.1."""
    return round(full * min(1, max(0.05, 10 * options.scale)))


def prepare(job: Job, text: str) -> np.ndarray:
    """The corpus as a stream of tokens (N,). Trains the tokenizer on it."""
    began = time.monotonic()
    documents = corpus.pretraining_texts(job.rng("documents"), count_of(job.options, DOCUMENTS), text)
    job.tokenizer = Tokenizer.train(documents, VOCABULARY)
    stream = data.make_stream(job.tokenizer, documents)
    job.seconds["preparation"] = time.monotonic() - began
    return stream


def expected_seconds(job: Job, config: Config, stream: np.ndarray) -> float:
    """The duration of the whole run on this machine, from a few measured steps of pretraining."""
    model = Transformer(config, job.rng("weights")).to_device(job.options.device)
    training = TrainState(model, job.rng("duration"), group=job.ranks)
    ends = [time.monotonic() for _ in pretrain(training, stream, 6, WINDOWS, LENGTH)]
    step = np.median(np.diff(ends))
    sampling = ALL_SAMPLING * count_of(job.options, HELD_OUT) / HELD_OUT
    return step * (ALL_TRAINING * steps_of(job.options, "pretraining") + sampling)


def duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"


def sft_stage(job: Job, base: Transformer) -> Transformer:
    demonstrations = corpus.demonstrations(job.rng("demonstrations"), count_of(job.options, DEMONSTRATIONS))
    prompts, responses = zip(*[data.encode_dialogue(job.tokenizer, q.text, r) for q, r in demonstrations])

    def loop(training, steps):
        return train_sft(training, prompts, responses, steps, batch_size=64, learning_rate=2e-3)
    return job.train("sft", steps_of(job.options, "sft"), base.copy, loop)


def comparisons_stage(job: Job, sft: Transformer) -> tuple[Sequence, Sequence, Sequence]:
    """Two sampled answers to each of many prompts, and the choice of one annotator: (prompts, chosen, rejected)."""
    began = time.monotonic()
    rng = job.rng("comparisons")
    questions = tasks.draw_questions(rng, count_of(job.options, COMPARISONS))
    prompts = job.encode_questions(questions)
    firsts = []
    seconds = []
    starts = range(0, len(prompts), COMPARED_TOGETHER)
    with progress("comparisons", 2 * len(starts), unit="sampling answers, part") as advance:
        for answers in (firsts, seconds):
            for start in starts:
                answers += job.sample(sft, prompts[start:start + COMPARED_TOGETHER], rng)
                advance()
    people = annotators.draw_annotators(rng)
    first_wins = annotators.compare(people, questions, job.read(firsts), job.read(seconds), rng)
    chosen, rejected = zip(*[pair if wins else pair[::-1] for wins, *pair in zip(first_wins, firsts, seconds)])
    lines = [{"question": q.text, "chosen": c, "rejected": r, "annotator": i % len(people)}
             for i, (q, (c, _), (r, _)) in enumerate(zip(questions, job.read(chosen), job.read(rejected)))]
    job.run.write("comparisons.json", lambda path: write_text(path, json.dumps(lines, indent=1) + "\n"))
    if empty := sum(not line["chosen"] or not line["rejected"] for line in lines):
        print(paragraph(f"{empty} of {len(lines)} comparisons have an empty answer (no text before <eos>). They are "
                        "used like the others: the models learn whether an empty answer is the better one."))
    job.seconds["comparisons"] = time.monotonic() - began
    return prompts, chosen, rejected


def reward_model_stage(job: Job, sft: Transformer, comparisons: tuple) -> RewardModel:
    def loop(training, steps):
        return train_reward_model(training, *comparisons, steps, batch_size=32, learning_rate=1e-3, centering=0.01)
    return job.train("reward_model", steps_of(job.options, "reward model"),
                     lambda: RewardModel(sft.copy(), job.rng("reward head")), loop)


def rlhf_stage(job: Job, sft: Transformer, reward_model: RewardModel, beta: float) -> Transformer:
    """One RLHF run. The gold reward of each step's samples is recorded, and not trained on."""
    questions = tasks.draw_questions(job.rng("unlabelled"), count_of(job.options, UNLABELLED))
    prompts = job.encode_questions(questions)
    question_of = {tuple(prompt): question for prompt, question in zip(prompts, questions)}
    gold = []

    def reward(prompts_of_step, responses):
        _, gold_rewards = job.judge([question_of[tuple(prompt)] for prompt in prompts_of_step], responses)
        gold.append(evaluate.mean_and_error(gold_rewards))
        return evaluate.predicted_rewards(reward_model, prompts_of_step, responses)

    def loop(training, steps):
        for metrics in train_rlhf(training, sft, reward, prompts, steps, prompts_per_step=16, samples_per_prompt=8,
                                  max_new_tokens=job.max_new_tokens, eos=job.tokenizer.eos, beta=beta,
                                  learning_rate=5e-4):
            yield {**metrics, "gold_reward": gold[-1][0], "gold_reward_se": gold[-1][1]}

    return job.train(f"rlhf-beta-{beta}", steps_of(job.options, "rlhf"), sft.copy, loop, weight_decay=0.0)


def dpo_stage(job: Job, sft: Transformer, comparisons: tuple, references: list, beta: float) -> Transformer:
    def loop(training, steps):
        return train_dpo(training, *comparisons, *references, steps, batch_size=32, beta=beta, learning_rate=3e-4)
    return job.train(f"dpo-beta-{beta}", steps_of(job.options, "dpo"), sft.copy, loop, weight_decay=0.0)


def run_stages(job: Job, text: str, text_source: dict) -> dict:
    """All stages in order. Returns the content of results.json."""
    options = job.options
    print(paragraph("preparing text and tokenizer (English from {source}, sha256 {sha256:.12})".format(**text_source)),
          flush=True)
    stream = prepare(job, text)
    config = Config(vocab_size=job.tokenizer.vocab_size, heads=4, context=256, key_smear=True, rope_base=1000.0,
                    **SIZES[options.size])

    if not job.run.resumed:
        print(f"about {duration(expected_seconds(job, config, stream))} for all stages on this machine, estimated from "
              "a few steps", flush=True)

    def pretraining(training, steps):
        return pretrain(training, stream, steps, batch_size=WINDOWS, length=LENGTH, learning_rate=5e-3)
    base = job.train("base", steps_of(options, "pretraining"), lambda: Transformer(config, job.rng("weights")),
                     pretraining)
    sft = sft_stage(job, base)
    comparisons = comparisons_stage(job, sft)
    reward_model = reward_model_stage(job, sft, comparisons)
    by_rlhf = {beta: rlhf_stage(job, sft, reward_model, beta) for beta in RLHF_BETAS}
    prompts, *responses = comparisons
    references = job.ranks.once(lambda: [reference_log_probs(sft, prompts, each) for each in responses])
    by_dpo = {beta: dpo_stage(job, sft, comparisons, references, beta) for beta in DPO_BETAS}

    began = time.monotonic()
    evaluation = Evaluation(job, sft, reward_model, count_of(options, HELD_OUT))
    measured = evaluation.results(base, by_rlhf, by_dpo, MAIN_BETA, BEST_OF)
    job.seconds["evaluation"] = time.monotonic() - began
    return {**measured, **settings(job, config, base), "text": text_source,
            "turning_point": figures.turning_point(job.history[f"rlhf-beta-{min(RLHF_BETAS)}"])}


def settings(job: Job, config: Config, base: Transformer) -> dict:
    options = job.options
    return {"main_beta": MAIN_BETA, "history": job.history, "seed": options.seed, "scale": options.scale,
            "trial": options.scale < TRIAL_BELOW, "size": options.size, "workers": options.workers,
            "device": options.device, "config": dataclasses.asdict(config),
            "parameters": sum(p.size for p in base.parameters().values()),
            "steps": {stage: steps_of(options, stage) for stage in STEPS}, "seconds": job.seconds,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}}


def english_text(options: argparse.Namespace) -> tuple[str, dict]:
    """The real English of the corpus, and {"source", "sha256"}."""
    try:
        if options.text is not None:
            text = data.read_text(options.text)
            source = os.path.basename(options.text)
        else:
            text, _ = corpus.english()
            source = f"Python {platform.python_version()} help topics"
    except ValueError as error:
        raise UsageError(str(error)) from error
    return text, {"source": source, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def announce(options: argparse.Namespace, run: RunFolder) -> None:
    if options.resume:
        print(f"{'resuming the run in' if run.resumed else '--resume: a new run starts, because there is none in'} "
              f"{options.out}")
    if run.resumed:
        print(paragraph("Finished models are loaded, and a model in training continues at its last checkpoint. Answers "
                        "for the comparisons and the evaluation are sampled again, with the same random numbers."))
    if options.scale < TRIAL_BELOW:
        print(trial_note(options.scale))


def report(results: dict, run: RunFolder, out: str) -> None:
    """Figures, results.json, and the tables on the terminal."""
    run.write("training_curves.png", lambda path: figures.training_curves(results, path))
    run.write("reward_against_kl.png", lambda path: figures.reward_against_kl(results, path))
    run.finish(results)
    print(summary(results))
    print(f"\nTalk to the models:\n    python scripts/chat.py {shlex.quote(out)}\n")
    print(paragraph(f"Written to {out}: results.json, training_curves.png, reward_against_kl.png, comparisons.json "
                    "and a model file for each stage."))


def how_to_continue(out: str) -> str:
    return f"everything saved so far is in {out}. Continue with:\n    {command_to_resume()}"


def main() -> int:
    options = parse(__doc__, SIZES, WINDOWS * LENGTH)
    keep_freed_memory()
    warnings.simplefilter("ignore", RuntimeWarning)    # NumPy's warnings about NaN: Diverged says more
    try:
        with world_for(options) as ranks:
            return train(options, ranks)
    except KeyboardInterrupt:
        print(f"stopped; {how_to_continue(options.out)}")
        return 130


def world_for(options: argparse.Namespace) -> Ranks:
    try:
        return parallel.world(options.workers, options.device)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error


def train(options: argparse.Namespace, ranks: Ranks) -> int:
    """The exit status. Every rank runs all of it, and rank 0 prints and writes."""
    if ranks.rank:
        print_nothing()
    require("matplotlib", "safetensors", "tqdm")
    text, text_source = ranks.once(lambda: english_text(options))
    options.workers = ranks.size
    fingerprint = {"version": VERSION, "text": text_source["sha256"],
                   **{name: getattr(options, name) for name in ("scale", "size", "seed", "device")}}
    with StopRequest(ranks) as stop, RunFolder(options.out, options.resume, fingerprint, ranks) as run:
        if run.finished:
            print(f"{options.out} holds a finished run; its results are in {run.path('results.json')}. "
                  f"Show them again:\n    python scripts/support/figures.py {shlex.quote(options.out)}")
            return 0
        announce(options, run)
        try:
            results = run_stages(Job(options, run, stop, ranks, MAX_NEW_TOKENS), text, text_source)
            report(results, run, options.out)
        except Stopped:
            print(f"stopped; {how_to_continue(options.out)}")
            return 130
        except Diverged as error:
            raise UsageError(f"{error}. The last good checkpoint is kept in {options.out}. Start again with another "
                             "--seed, or with a lower learning rate in scripts/assistant.py.") from error
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, (OSError, WorkerFailed)) or out_of_memory(cause):
                print(how_to_continue(options.out), flush=True)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main, WorkerFailed, ranks=True))
