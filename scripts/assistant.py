"""From random weights to an assistant, in minutes on two cores. The main job.

    python scripts/assistant.py --out runs/assistant

    pretraining          next-token prediction on text about a small world   -> base
    instruction tuning   imitate demonstrated answers                        -> instructed
    comparisons          sample two answers to a prompt, ask people which is better
    reward model         predict their choice
    RLHF                 policy gradient on the reward model, for several beta
    DPO                  from the same comparisons, directly, for several beta
    evaluation           on questions held out of every stage

Written to the folder: a model file a stage (safetensors, with config and tokenizer), comparisons.json,
results.json, training_curves.png, reward_against_kl.png. Ctrl-C saves; --resume goes on.
Everything is determined by the options and, for the last bits, by --workers. --scale below 0.1 shrinks
the numbers of texts and questions too, so that a trial run takes seconds.
"""

import os
import signal
import sys

# Ctrl-C while there is nothing to save yet: no more to say. main() takes over.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# One thread for BLAS: each of our workers, a process, has its own part of a batch (stages/train_state.py).
# NumPy reads this when it is imported, hence the order.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import dataclasses
import hashlib
import json
import platform
import time
import warnings

import numpy as np

from support import figures
from support.evaluation import Evaluation
from minilm import data, evaluate
from minilm.fast import workers
from minilm.backend import to_device
from minilm.fast.malloc import keep_freed_memory
from minilm.checkpoint import CheckpointError, load, load_into, write_text
from minilm.generate import generate
from minilm.model import Config, RewardModel, Transformer
from minilm.model_file import save_model
from minilm.stages.sft import train_sft
from minilm.stages.dpo import train_dpo, reference_log_probs
from minilm.stages.pretraining import pretrain
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import Diverged, TrainState, workers_for
from minilm.tokenizer import Tokenizer
from minilm.world import annotators, corpus, tasks
from support.run_folder import RunFolder, StopRequest, UsageError, command_to_resume, main_guard, require

SIZES = {"small": {"width": 64, "layers": 3}, "large": {"width": 96, "layers": 4}}
STEPS = {"pretraining": 1800, "instruction tuning": 500, "reward model": 200, "rlhf": 50, "dpo": 150}
RLHF_BETAS, DPO_BETAS = (1.0, 0.3, 0.1, 0.0), (1.0, 0.3, 0.1)
MAIN_BETA = 0.3
DOCUMENTS, DEMONSTRATIONS, COMPARISONS, UNLABELLED, HELD_OUT = 24000, 8000, 2000, 3000, 540
VOCABULARY, MAX_NEW_TOKENS, BEST_OF = 640, 40, 8
WINDOWS, LENGTH = 16, 128       # of a step of pretraining; the other stages' steps have about as many tokens
SAVE_EVERY = 30.0     # seconds
MAX_SCALE, MAX_WORKERS = 50, 64    # beyond: a history too long for a checkpoint's header, workers without work


class Stopped(Exception):
    """Ctrl-C: the state is saved."""


@dataclasses.dataclass
class Job:
    """What the stages share: options, folder, texts, tokenizer, and the figures measured so far."""

    options: argparse.Namespace
    run: RunFolder
    stop: StopRequest
    text: str
    text_source: dict
    tokenizer: Tokenizer = None
    history: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)

    def rng(self, stage):
        """A Generator of the stage's own, so that a resumed run need not redo the stages before."""
        return np.random.default_rng([self.options.seed, *stage.encode()])

    def steps(self, stage):
        return max(1, round(STEPS[stage] * self.options.scale))

    def count(self, full):
        """How many texts or questions: of a trial run, with --scale below 0.1, fewer."""
        return round(full * min(1, max(0.05, 10 * self.options.scale)))

    def stop_if_asked(self):
        if self.stop.requested:
            raise Stopped

    def train(self, name, stage, start, loop, **settings):
        """Run one stage to its end, or from where it was stopped, or not at all if it is done.

        start() makes the model; loop(training, steps) is the stage. Returns the trained model.
        """
        path, state_name, origin = self.run.path(f"{name}.safetensors"), f"{name}-state", self.run.fingerprint
        foreign = "of another run or another architecture. Delete it, and --resume trains that stage again."
        self.stop_if_asked()
        model = start().to_device(self.options.device)
        if os.path.exists(path):
            arrays, metadata = load(path)
            if not isinstance(metadata, dict) or metadata.get("run") != origin:
                raise CheckpointError(f"{path}: {foreign}")
            load_into(model.parameters(), arrays, path)
            self.history[name], self.seconds[name] = metadata["history"], metadata["seconds"]
            self.run.drop_state(state_name)
            return model
        training = TrainState(model, self.rng(name), workers=self.options.workers, **settings)
        history, before, began = [], 0.0, time.monotonic()
        if saved := self.run.load_state(state_name):
            arrays, metadata = saved
            try:
                if metadata["run"] != origin:
                    raise ValueError("another run")
                training.restore(arrays, metadata)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.run.path(state_name)}.safetensors: {foreign}") from error
            history, before = metadata["history"], metadata["seconds"]

        def save():
            arrays, metadata = training.snapshot()
            self.run.save_state(state_name, arrays, {**metadata, "run": origin, "history": history,
                                                     "seconds": before + time.monotonic() - began})
        steps, last_save = self.steps(stage), time.monotonic()
        with figures.progress(name, steps, training.step) as advance:
            for metrics in loop(training, steps):
                history.append({"step": training.step, **metrics})
                advance(metrics)
                if self.stop.requested or time.monotonic() - last_save > SAVE_EVERY:
                    save()
                    last_save = time.monotonic()
                self.stop_if_asked()
        self.history[name], self.seconds[name] = history, before + time.monotonic() - began
        save_model(path, training.model, self.tokenizer, run=origin, history=history, seconds=self.seconds[name])
        self.run.drop_state(state_name)
        return training.model

    def sample(self, model, prompts, rng, temperature=1.0):
        """One response to each prompt, as token lists."""
        uniforms = rng.random((len(prompts), MAX_NEW_TOKENS))

        def draw(i):
            self.stop_if_asked()
            block = slice(i, i + 128)
            return generate(model, prompts[block], MAX_NEW_TOKENS, uniforms[block], self.tokenizer.eos,
                            temperature).responses()

        blocks = workers.parallel_map(draw, range(0, len(prompts), 128), self.options.workers)
        return [response for block in blocks for response in block]

    def read(self, responses):
        """(text, whether it was finished) of each response."""
        return [(data.decode_response(self.tokenizer, r), r[-1] == self.tokenizer.eos) for r in responses]

    def judge(self, questions, responses):
        """(whether each is right, gold reward of each), two arrays (N,)."""
        answered = list(zip(questions, self.read(responses)))
        return (np.array([annotators.is_right(q, text) for q, (text, _) in answered], float),
                np.array([annotators.gold_reward(q, *reading) for q, reading in answered]))


def prepare(job):
    """The corpus as a stream of tokens; trains the tokenizer on it."""
    began = time.monotonic()
    documents = corpus.pretraining_texts(job.rng("documents"), job.count(DOCUMENTS), job.text)
    job.tokenizer = Tokenizer.train(documents, VOCABULARY)
    stream = data.make_stream(job.tokenizer, documents)
    job.seconds["preparation"] = time.monotonic() - began
    return stream


def encode_questions(job, questions):
    return [data.encode_prompt(job.tokenizer, q.text) for q in questions]


def make_comparisons(job, instructed):
    """Two sampled answers to each of many prompts, and which one somebody preferred."""
    print("comparisons", flush=True)
    began, rng = time.monotonic(), job.rng("comparisons")
    questions = tasks.draw_questions(rng, job.count(COMPARISONS))
    prompts = encode_questions(job, questions)
    firsts, seconds = (job.sample(instructed, prompts, rng) for _ in range(2))
    people = annotators.draw_annotators(rng)
    preferred = annotators.compare(people, questions, job.read(firsts), job.read(seconds), rng)
    chosen, rejected = zip(*[pair if first else pair[::-1] for first, *pair in zip(preferred, firsts, seconds)])
    lines = [{"question": q.text, "chosen": c, "rejected": r, "annotator": i % len(people)}
             for i, (q, (c, _), (r, _)) in enumerate(zip(questions, job.read(chosen), job.read(rejected)))]
    write_text(job.run.path("comparisons.json"), json.dumps(lines, indent=1) + "\n")
    job.seconds["comparisons"] = time.monotonic() - began
    return prompts, chosen, rejected


def tune_by_rlhf(job, instructed, reward_model, beta):
    """One RLHF run. The gold reward of each step's samples is noted beside, and used for nothing."""
    tokenizer = job.tokenizer
    questions = tasks.draw_questions(job.rng("unlabelled"), job.count(UNLABELLED))
    prompts = encode_questions(job, questions)
    by_prompt = {tuple(p): q for p, q in zip(prompts, questions)}
    gold = []

    def reward(asked, answers):
        gold.append(evaluate.mean_and_error(job.judge([by_prompt[tuple(p)] for p in asked], answers)[1]))
        return evaluate.predicted_rewards(reward_model, asked, answers)

    def loop(training, steps):
        for metrics in train_rlhf(training, instructed, reward, prompts, steps, prompts_per_step=16, samples_per_prompt=8,
                            max_new_tokens=MAX_NEW_TOKENS, eos=tokenizer.eos, beta=beta,
                            learning_rate=5e-4):
            yield {**metrics, "gold_reward": gold[-1][0], "gold_reward_se": gold[-1][1]}

    return job.train(f"rlhf-beta-{beta}", "rlhf", instructed.copy, loop, weight_decay=0.0)


def tune_by_dpo(job, instructed, comparisons, references, beta):
    def loop(training, steps):
        return train_dpo(training, *comparisons, *references, steps, batch_size=32,
                                 beta=beta, learning_rate=3e-4)
    return job.train(f"dpo-beta-{beta}", "dpo", instructed.copy, loop, weight_decay=0.0)


def run_stages(job):
    """All of it, in order. Returns what goes into results.json."""
    options = job.options
    print("preparing text and tokenizer (English from {source}, sha256 {sha256:.12})".format(**job.text_source), flush=True)
    stream = prepare(job)
    config = Config(vocab_size=job.tokenizer.vocab_size, heads=4, context=256, key_smear=True, rope_base=1000.0,
                    **SIZES[options.size])

    base = job.train("base", "pretraining", lambda: Transformer(config, job.rng("weights")),
                     lambda training, steps: pretrain(training, stream, steps, batch_size=WINDOWS, length=LENGTH,
                                                         learning_rate=5e-3))
    demonstrations = corpus.demonstrations(job.rng("demonstrations"), job.count(DEMONSTRATIONS))
    prompts, responses = zip(*[data.encode_dialogue(job.tokenizer, q.text, r) for q, r in demonstrations])
    instructed = job.train("instructed", "instruction tuning", base.copy,
                           lambda training, steps: train_sft(training, prompts, responses, steps, batch_size=64,
                                                                      learning_rate=2e-3))
    comparisons = make_comparisons(job, instructed)
    reward_model = job.train("reward_model", "reward model",
                             lambda: RewardModel(instructed.copy(), job.rng("reward head")),
                             lambda training, steps: train_reward_model(training, *comparisons, steps, batch_size=32,
                                                                      learning_rate=1e-3))
    by_rlhf = {beta: tune_by_rlhf(job, instructed, reward_model, beta) for beta in RLHF_BETAS}
    asked, *answered = comparisons
    references = [reference_log_probs(instructed, asked, responses) for responses in answered]
    by_dpo = {beta: tune_by_dpo(job, instructed, comparisons, references, beta) for beta in DPO_BETAS}

    print("evaluation", flush=True)
    began, evaluation = time.monotonic(), Evaluation(job, instructed, reward_model, job.count(HELD_OUT))
    measured = evaluation.results(base, by_rlhf, by_dpo, MAIN_BETA, BEST_OF)
    job.seconds["evaluation"] = time.monotonic() - began
    return {**measured, "turning_point": figures.turning_point(job.history[f"rlhf-beta-{min(RLHF_BETAS)}"]),
            "main_beta": MAIN_BETA, "history": job.history,
            "seed": options.seed, "scale": options.scale, "size": options.size, "workers": options.workers, "device": options.device,
            "config": dataclasses.asdict(config), "parameters": sum(p.size for p in base.parameters().values()),
            "steps": {stage: job.steps(stage) for stage in STEPS}, "seconds": job.seconds,
            "text": job.text_source,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}}


def parse():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description=__doc__[:__doc__.index("\n    python")] + __doc__[__doc__.index("\n    pretraining"):])

    def refuse(message):
        raise UsageError(f"{message}; --help lists the options")
    parser.error = refuse
    parser.add_argument("--out", metavar="DIR", default="runs/assistant",
                        help="folder for everything that is written (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run that the folder holds, if any")
    parser.add_argument("--scale", metavar="X", type=float, default=1.0,
                        help="multiplies every stage's number of steps (default: %(default)s); try 0.01 first")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another run of chance (default: %(default)s)")
    parser.add_argument("--workers", "--threads", metavar="N", type=int,
                        help="processes that a training step is split over (default: what pays on this machine, or "
                             "what a resumed run had)")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu",
                        help="where the models are; gpu needs CuPy, pip install -e '.[gpu]' (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE",
                        help="a UTF-8 text file for the real English in the corpus (default: Python's own help topics)")
    options = parser.parse_args()
    if not 0 < options.scale <= MAX_SCALE:
        raise UsageError(f"--scale {options.scale} must be above 0 and at most {MAX_SCALE}; 0.1 is a tenth of the steps")
    if options.workers is None:
        recorded = RunFolder.recorded(options.out).get("workers") if options.resume else None
        options.workers = recorded or (workers_for(WINDOWS * LENGTH) if options.device == "cpu" else 1)
    if not 1 <= options.workers <= MAX_WORKERS:
        raise UsageError(f"--workers {options.workers} must be from 1 to {MAX_WORKERS}; there are {os.cpu_count()} cores here")
    if options.device == "gpu":
        if options.workers > 1:
            raise UsageError(f"--workers {options.workers} are processes on the CPU; with --device gpu there is one")
        try:
            to_device(np.zeros(1), "gpu")
        except (ImportError, RuntimeError) as error:            # of CuPy, or of CUDA's for want of a device
            raise UsageError(f"--device gpu: {error}") from error
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must not be negative")
    return options


def main():
    options = parse()
    require("matplotlib", "safetensors", "tqdm")
    try:
        if options.text is not None:
            text, source = data.read_text(options.text), os.path.basename(options.text)
        else:
            text, source = corpus.english()[0], f"Python {platform.python_version()} help topics"
    except ValueError as error:
        raise UsageError(str(error)) from error
    text_hash = hashlib.sha256(text.encode()).hexdigest()
    keep_freed_memory()
    warnings.simplefilter("ignore", RuntimeWarning)    # of NumPy, at NaN: Diverged says it better
    fingerprint = {"text": text_hash, **{name: getattr(options, name) for name in ("scale", "size", "seed", "workers", "device")}}
    with StopRequest() as stop, RunFolder(options.out, options.resume, fingerprint) as run:
        if run.finished:
            print(f"{options.out} holds a finished run; its results are in {run.path('results.json')}")
            return 0
        job = Job(options, run, stop, text, {"source": source, "sha256": text_hash})
        try:
            results = run_stages(job)
            figures.training_curves(results, run.path("training_curves.png"))
            figures.reward_against_kl(results, run.path("reward_against_kl.png"))
            run.finish(results)
        except (Stopped, KeyboardInterrupt):
            print(f"stopped; what was saved is in {options.out}. Go on with:\n    {command_to_resume()}")
            return 130
        except Diverged as error:
            raise UsageError(f"{error}. The last good checkpoint is kept in {options.out}. Start again with another "
                             "--seed, or with a lower learning rate in scripts/assistant.py.") from error
        print(figures.summary(results))
        print(f"\nwritten to {options.out}: results.json, training_curves.png, reward_against_kl.png, "
              "comparisons.json and a model file for each stage")


if __name__ == "__main__":
    sys.exit(main_guard(main))
