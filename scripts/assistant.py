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
Everything is determined by the options and, for the last bits, by --threads.
"""

import os

# One thread for BLAS: each of our threads works on its own part of a batch (stages/training.py).
# NumPy reads this when it is imported, hence the order.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import figures
from minilm import data, evaluate
from minilm.backend import keep_freed_memory
from minilm.checkpoint import write_text
from minilm.generate import generate
from minilm.model import Config, RewardModel, Transformer
from minilm.model_file import load_model, save_model
from minilm.stages.instruction_tuning import instruction_tuning
from minilm.stages.preference_tuning import preference_tuning, reference_log_probs
from minilm.stages.pretraining import pretraining
from minilm.stages.reward_modelling import reward_modelling
from minilm.stages.rlhf import rlhf
from minilm.stages.training import Diverged, Training
from minilm.tokenizer import Tokenizer
from minilm.world import annotators, corpus, tasks
from run_folder import RunFolder, StopRequest, UsageError, main_guard

SIZES = {"small": {"width": 64, "layers": 3}, "large": {"width": 96, "layers": 4}}
STEPS = {"pretraining": 2000, "instruction tuning": 600, "reward model": 250, "rlhf": 80, "dpo": 150}
RLHF_BETAS, DPO_BETAS = (0.3, 0.1, 0.03, 0.0), (0.3, 0.1, 0.03)
MAIN_BETA = 0.3
DOCUMENTS, DEMONSTRATIONS, COMPARISONS, UNLABELLED, HELD_OUT = 24000, 4000, 2000, 3000, 540
VOCABULARY, ENGLISH_SHARE, MAX_NEW_TOKENS, BEST_OF = 640, 0.1, 40, 16
SAVE_EVERY = 30.0     # seconds


class Stopped(Exception):
    """Ctrl-C: the state is saved."""


@dataclasses.dataclass
class Job:
    """What the stages share: options, folder, texts, tokenizer, and the figures measured so far."""

    options: argparse.Namespace
    run: RunFolder
    stop: StopRequest
    text: str
    tokenizer: Tokenizer = None
    history: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)

    def rng(self, stage):
        """A Generator of the stage's own, so that a resumed run need not redo the stages before."""
        return np.random.default_rng([self.options.seed, *stage.encode()])

    def steps(self, stage):
        return max(1, round(STEPS[stage] * self.options.scale))

    def train(self, name, stage, start, loop, **settings):
        """Run one stage to its end, or from where it was stopped, or not at all if it is done.

        start() makes the model; loop(training, steps) is the stage. Returns the trained model.
        """
        path, state_name = self.run.path(f"{name}.safetensors"), f"{name}-state"
        if os.path.exists(path):
            model, _, metadata = load_model(path)
            self.history[name], self.seconds[name] = metadata["history"], metadata["seconds"]
            return model
        training = Training(start(), self.rng(name), threads=self.options.threads, **settings)
        history, before, began = [], 0.0, time.monotonic()
        saved = self.run.load_state(state_name)
        if saved:
            training.restore(*saved)
            history, before = saved[1]["history"], saved[1]["seconds"]

        def save():
            arrays, metadata = training.state()
            self.run.save_state(state_name, arrays, {**metadata, "history": history,
                                                     "seconds": before + time.monotonic() - began})
        steps, last_save = self.steps(stage), time.monotonic()
        with figures.progress(name, steps, training.step) as advance:
            for metrics in loop(training, steps):
                history.append({"step": training.step, **metrics})
                advance(metrics)
                if self.stop.requested or time.monotonic() - last_save > SAVE_EVERY:
                    save()
                    last_save = time.monotonic()
                if self.stop.requested:
                    raise Stopped
        self.history[name], self.seconds[name] = history, before + time.monotonic() - began
        save_model(path, training.model, self.tokenizer, history=history, seconds=self.seconds[name])
        self.run.drop_state(state_name)
        return training.model

    def sample(self, model, prompts, rng, temperature=1.0):
        """One response to each prompt, as token lists."""
        uniforms = rng.random((len(prompts), MAX_NEW_TOKENS))
        blocks = [slice(i, i + 64) for i in range(0, len(prompts), 64)]
        with ThreadPoolExecutor(self.options.threads) as pool:
            samples = pool.map(lambda b: generate(model, prompts[b], MAX_NEW_TOKENS, uniforms[b], self.tokenizer.eos,
                                                  temperature), blocks)
            return [response for block in samples for response in block.responses()]

    def judge(self, questions, responses):
        """(whether each is right, gold reward of each), two arrays (N,)."""
        texts = [data.decode_response(self.tokenizer, r) for r in responses]
        gold = [annotators.gold_reward(q, t, finished=r[-1] == self.tokenizer.eos)
                for q, t, r in zip(questions, texts, responses)]
        return np.array([annotators.is_right(q, t) for q, t in zip(questions, texts)], float), np.array(gold)


def prepare(job):
    """The corpus as a stream of tokens; trains the tokenizer on it."""
    rng = job.rng("documents")
    documents = corpus.documents(rng, DOCUMENTS)
    length = round(ENGLISH_SHARE * sum(map(len, documents)))
    documents += [job.text[i:i + 400] for i in range(0, min(length, len(job.text)), 400)]
    documents = [documents[i] for i in rng.permutation(len(documents))]
    job.tokenizer = Tokenizer.train(documents, VOCABULARY)
    return data.make_stream(job.tokenizer, documents)


def encode_questions(job, questions):
    return [data.encode_prompt(job.tokenizer, q.text) for q in questions]


def make_comparisons(job, instructed):
    """Two sampled answers to each of many prompts, and which one somebody preferred."""
    rng, eos = job.rng("comparisons"), job.tokenizer.eos
    questions = tasks.draw_questions(rng, COMPARISONS)
    prompts = encode_questions(job, questions)
    pairs = list(zip(job.sample(instructed, prompts, rng), job.sample(instructed, prompts, rng)))
    people = annotators.draw_annotators(rng)
    chosen, rejected, lines = [], [], []
    for i, (question, pair) in enumerate(zip(questions, pairs)):
        texts = [data.decode_response(job.tokenizer, r) for r in pair]
        person = people[i % len(people)]
        first = person.prefers_first(question, *texts, rng, finished=[r[-1] == eos for r in pair])
        chosen.append(pair[1 - first])
        rejected.append(pair[first])
        lines.append({"question": question.text, "chosen": texts[1 - first], "rejected": texts[first],
                      "annotator": i % len(people)})
    write_text(job.run.path("comparisons.json"), json.dumps(lines, indent=1) + "\n")
    return prompts, chosen, rejected


def tune_by_rlhf(job, instructed, reward_model, beta):
    """One RLHF run. The gold reward of each step's samples is noted beside, and used for nothing."""
    tokenizer = job.tokenizer
    questions = tasks.draw_questions(job.rng("unlabelled"), UNLABELLED)
    prompts = encode_questions(job, questions)
    by_prompt = {tuple(p): q for p, q in zip(prompts, questions)}
    gold = []

    def reward(asked, answers):
        gold.append(float(job.judge([by_prompt[tuple(p)] for p in asked], answers)[1].mean()))
        return evaluate.predicted_rewards(reward_model, asked, answers, tokenizer.pad)

    def loop(training, steps):
        for metrics in rlhf(training, instructed, reward, prompts, steps, prompts_per_step=16, samples_per_prompt=8,
                            max_new_tokens=MAX_NEW_TOKENS, eos=tokenizer.eos, pad=tokenizer.pad, beta=beta,
                            learning_rate=5e-4):
            yield {**metrics, "gold_reward": gold[-1]}

    return job.train(f"rlhf-beta-{beta}", "rlhf", instructed.copy, loop, weight_decay=0.0)


def tune_by_dpo(job, instructed, comparisons, references, beta):
    def loop(training, steps):
        return preference_tuning(training, *comparisons, *references, steps, batch_size=32, pad=job.tokenizer.pad,
                                 beta=beta, learning_rate=3e-4)
    return job.train(f"dpo-beta-{beta}", "dpo", instructed.copy, loop, weight_decay=0.0)


class Evaluation:
    """Everything is measured on one sampled answer, at temperature 1, to each held-out question."""

    def __init__(self, job, instructed, reward_model):
        self.job, self.instructed, self.reward_model = job, instructed, reward_model
        self.questions = tasks.draw_questions(job.rng("held-out questions"), HELD_OUT, held_out=True)
        self.prompts = encode_questions(job, self.questions)
        # The opponent's answers, and the level of the learned reward: of the instructed model, in
        # draws apart from those that its own row is measured on.
        opponent = self.answers(instructed, "opponent")
        _, self.opponent_gold = job.judge(self.questions, opponent)
        self.zero = self.predicted(opponent).mean()

    def answers(self, model, draw="evaluation", temperature=1.0):
        return self.job.sample(model, self.prompts, self.job.rng(draw), temperature)

    def predicted(self, responses):
        return evaluate.predicted_rewards(self.reward_model, self.prompts, responses, self.job.tokenizer.pad)

    def row(self, stage, model, responses=None, kl=None):
        """One row of the table. kl: a number, where the policy's log-probs are not known."""
        responses = self.answers(model) if responses is None else responses
        right, gold = self.job.judge(self.questions, responses)
        if kl is None:
            k1 = evaluate.sequence_kl(model, self.instructed, self.prompts, responses, self.job.tokenizer.pad)
        row = {"stage": stage}
        for name, values in (("task_accuracy", right), ("gold_reward", gold),
                             ("learned_reward", self.predicted(responses) - self.zero),
                             ("win_rate", evaluate.wins(gold, self.opponent_gold)),
                             ("kl_sequence", k1 if kl is None else np.full(2, kl))):
            row[name], row[f"{name}_se"] = evaluate.mean_and_error(values)
        return row

    def best_of_n(self, n):
        """The instructed model's answer that the reward model likes best of n. KL: the upper bound."""
        draws = [self.answers(self.instructed, f"best of {i}") for i in range(n)]
        best = np.argmax([self.predicted(responses) for responses in draws], axis=0)
        return [draws[i][j] for j, i in enumerate(best)], evaluate.best_of_n_kl(n)

    def few_shot_accuracy(self, model, shots=3):
        """The base model's chance: the same questions after demonstrations of the same task, no training."""
        rng = self.job.rng("few-shot")
        prompts = []
        for question in self.questions:
            shown = [tasks.draw_question(rng, task=question.task) for _ in range(shots)]
            text = "".join(f"{data.prompt_text(q.text)} {q.answer}.\n" for q in shown)
            prompts.append([self.job.tokenizer.bos] + self.job.tokenizer.encode(text + data.prompt_text(question.text)))
        texts = [self.job.tokenizer.decode(r).split(".")[0].strip() for r in self.job.sample(model, prompts, rng)]
        return evaluate.mean_and_error([t == q.answer for t, q in zip(texts, self.questions)])


def run_stages(job):
    """All of it, in order. Returns what goes into results.json."""
    options, (text_hash, english_from) = job.options, job.source
    print(f"preparing text and tokenizer (English from {english_from}, sha256 {text_hash[:12]})", flush=True)
    stream = prepare(job)
    config = Config(vocab_size=job.tokenizer.vocab_size, heads=4, context=256, key_smear=True, rope_base=1000.0,
                    **SIZES[options.size])

    base = job.train("base", "pretraining", lambda: Transformer(config, job.rng("weights")),
                     lambda training, steps: pretraining(training, stream, steps, batch_size=16, length=128,
                                                         learning_rate=5e-3))
    demonstrations = corpus.demonstrations(job.rng("demonstrations"), DEMONSTRATIONS)
    prompts, responses = zip(*[data.encode_dialogue(job.tokenizer, q.text, r) for q, r in demonstrations])
    instructed = job.train("instructed", "instruction tuning", base.copy,
                           lambda training, steps: instruction_tuning(training, prompts, responses, steps, batch_size=64,
                                                                      pad=job.tokenizer.pad, learning_rate=2e-3))
    comparisons = make_comparisons(job, instructed)
    reward_model = job.train("reward_model", "reward model",
                             lambda: RewardModel(instructed.copy(), job.rng("reward head")),
                             lambda training, steps: reward_modelling(training, *comparisons, steps, batch_size=32,
                                                                      pad=job.tokenizer.pad, learning_rate=1e-3))
    by_rlhf = {beta: tune_by_rlhf(job, instructed, reward_model, beta) for beta in RLHF_BETAS}
    asked, *answered = comparisons
    references = [reference_log_probs(instructed, asked, responses, job.tokenizer.pad) for responses in answered]
    by_dpo = {beta: tune_by_dpo(job, instructed, comparisons, references, beta) for beta in DPO_BETAS}

    print("evaluation", flush=True)
    began, evaluation = time.monotonic(), Evaluation(job, instructed, reward_model)
    best, bound = evaluation.best_of_n(BEST_OF)
    frontier = {"rlhf": [{"beta": b, **evaluation.row("rlhf", m)} for b, m in by_rlhf.items()],
                "dpo": [{"beta": b, **evaluation.row("dpo", m)} for b, m in by_dpo.items()]}
    main = {name: next({k: v for k, v in row.items() if k != "beta"} for row in rows if row["beta"] == MAIN_BETA)
            for name, rows in frontier.items()}
    rows = [evaluation.row("base", base), evaluation.row("instructed", instructed),
            evaluation.row("best_of_n", None, best, bound), main["rlhf"], main["dpo"]]
    models = {"base": base, "instructed": instructed, "rlhf": by_rlhf[MAIN_BETA], "dpo": by_dpo[MAIN_BETA]}
    examples = [{"question": q.text, "answer": q.answer} for q in evaluation.questions[:6]]
    for name, model in models.items():
        for example, response in zip(examples, job.sample(model, evaluation.prompts[:6], job.rng("examples"), 0.0)):
            example[name] = data.decode_response(job.tokenizer, response)
    few_shot = evaluation.few_shot_accuracy(base)
    job.seconds["evaluation"] = time.monotonic() - began
    return {"rows": rows, "frontier": frontier, "examples": examples, "history": job.history,
            "base_few_shot_accuracy": few_shot[0], "base_few_shot_accuracy_se": few_shot[1],
            "best_of_n": BEST_OF, "main_beta": MAIN_BETA, "held_out_questions": HELD_OUT,
            "seed": options.seed, "scale": options.scale, "size": options.size, "threads": options.threads,
            "config": dataclasses.asdict(config), "parameters": sum(p.size for p in base.parameters().values()),
            "steps": {stage: job.steps(stage) for stage in STEPS}, "seconds": job.seconds,
            "text": {"source": english_from, "sha256": text_hash},
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/assistant", help="folder for everything that is written")
    parser.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's number of steps")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1),
                        help="threads a training step is split over")
    parser.add_argument("--text", help="a text file to read instead of Python's own help topics")
    options = parser.parse_args(arguments)
    if not 0 < options.scale < float("inf"):
        raise UsageError(f"--scale {options.scale} must be above 0, such as 0.1 for a tenth of the steps")
    if options.threads < 1:
        raise UsageError(f"--threads {options.threads} must be at least 1")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must not be negative")
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        if options.text:
            text, source = data.read_text(options.text), os.path.basename(options.text)
        else:
            text, source = corpus.english()[0], f"Python {platform.python_version()} help topics"
    except ValueError as error:
        raise UsageError(str(error)) from error
    text_hash = hashlib.sha256(text.encode()).hexdigest()
    keep_freed_memory()
    fingerprint = {name: getattr(options, name) for name in ("scale", "size", "seed", "threads")}
    with RunFolder(options.out, options.resume, {**fingerprint, "text": text_hash}) as run, StopRequest() as stop:
        if run.finished:
            print(f"{options.out} holds a finished run; its results are in {run.path('results.json')}")
            return 0
        job = Job(options, run, stop, text)
        job.source = text_hash, source
        try:
            results = run_stages(job)
        except Stopped:
            print(f"stopped and saved; go on with: python scripts/assistant.py --resume {shown(arguments)}")
            return 130
        figures.training_curves(results, run.path("training_curves.png"))
        figures.reward_against_kl(results, run.path("reward_against_kl.png"))
        run.finish(results)
        print(figures.summary(results))
        print(f"\nwritten to {options.out}: results.json, training_curves.png, reward_against_kl.png, "
              "comparisons.json and a model file for each stage")
    return 0


def shown(arguments):
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(a for a in given if a != "--resume")


if __name__ == "__main__":
    sys.exit(main_guard(main, Diverged))
