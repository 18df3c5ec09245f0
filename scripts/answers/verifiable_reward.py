"""What does reinforcement learning with a verifiable reward (RLVR) add to a few demonstrations?

Claim. It raises the share of right answers of one sample far more than further finetuning on the same demonstrations
for as much compute, mostly by making likely what the model could already do with more samples. Finetuning on the
model's own right answers does as well here. A verifier that accepts too much is exploited.

Test. A transformer of 104,000 parameters is pretrained on sums of 2 to 4 digits mod 10 (worlds/digit_sums.py). Seven of
ten documents write the running sums, as careless people do: of the sums of 10 or more, 60% are one too high. SFT on 16
worked sums without mistakes follows (20 steps). Then, with the same compute each, counted in response tokens through a
model, a backward pass as two forward passes: GRPO (standardised rewards of 8 samples, mean over the tokens of each
response, two updates a batch, clip 0.2 and 0.28, no KL penalty) and RLOO (leave-one-out, the sum over tokens, one
update), with reward 1 for a response that ends with the right digit, on 2,000 questions; SFT for longer on the 16
demonstrations; and SFT on the model's own right answers to the same questions (filtered samples, without reinforcement
learning). SFT has the compute of RLOO; that of GRPO differs from it by the lengths of its responses. GRPO runs once
more with a loose verifier, which accepts the right digit anywhere in the response. Measured on 200 held-out questions
of 3 and 4 digits: pass@k for 1 to 16 samples at temperature 1, the unbiased estimator from 16 samples; greedy decoding;
the length of the responses.

Rule. After GRPO one sample is right more often (pass@1) than from the SFT model, by at least 0.1, and than after SFT
for longer with the same compute; and with the loose verifier the strict share of right answers ends at least 0.1 below
that with the strict verifier, while its own reward ends above 0.9.

Limits. The mistakes of the text and the right answers are both ours: what has to be learned is in the model before, in
the less likely of two continuations. Longer answers are not needed for these sums, so the length of the reasoning
changes little. That filtered samples do as well became part of the answer after the run. The step sizes were chosen on
one seed that is not among these. RLOO and GRPO differ in four settings at once. A large model on real problems may gain
in pass@k too; here it is near 1 before.

Source. Shao et al. 2024, arXiv:2402.03300 (GRPO); Ahmadian et al. 2024, arXiv:2402.14740 (RLOO); Chen et al. 2021,
arXiv:2107.03374, (1) (pass@k); Yue et al. 2025, arXiv:2504.13837 (pass@k before and after RLVR); Yuan et al. 2023,
arXiv:2308.01825 (finetuning on filtered samples).

Figure. Left: the share of questions with a right answer among k samples against k (log axis), one line for each model;
right: the reward of the loose verifier and the share of strictly right answers against the step of GRPO, for the strict
and the loose verifier.
"""

import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "lecture"))       # for common
from common.experiment import COLOURS, Comparison, Conclusion, curve, mean, mean_range, run, spread

# isort: split
import numpy as np

from minilm.generate import generate
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from worlds import digit_sums

CORPUS = {("worked", "none"): 0.7, ("direct", "none"): 0.3}
MISTAKES = 0.6
DEMONSTRATIONS, SFT_STEPS = 16, 20
PROMPTS, SAMPLES, LONGEST = 16, 8, 24           # of a step of RLVR
TRIES = 16                                      # samples for pass@k
KS = (1, 2, 4, 8, 16)
RATE = 1e-3
GRPO = {"baseline": "group", "token_mean": "response", "updates": 2, "epsilon_high": 0.28}
RLOO = {"baseline": "leave_one_out"}
NAMES = {"base": "base", "sft": "SFT", "grpo": "GRPO", "rloo": "RLOO", "longer": "SFT for longer",
         "filtered": "SFT on own right answers", "loose": "GRPO, loose verifier"}
SIZES = {"quick": {"seeds": 3, "steps": [6, 3], "batches": 2, "held_out": 6},
         "default": {"seeds": 6, "steps": [240, 320], "batches": 100, "held_out": 200}}


def read_careless_sums(model, rng, steps, mistakes):
    for count, part in zip(steps, digit_sums.CURRICULUM):
        def draw(rng, size):
            return digit_sums.documents(rng, size, part["examples"], part["length"], CORPUS, mistakes)
        for _ in pretrain_on_documents(TrainState(model, rng), draw, count, part["batch_size"], part["learning_rate"]):
            pass


def draw_questions(rng, count, digits, held_out=False):
    """[(question, worked answer without mistakes)]"""
    drawn = [digit_sums.draw_digits(rng, int(rng.choice(digits)), held_out) for _ in range(count)]
    return [(digit_sums.question(one), digit_sums.answer(one, "worked")) for one in drawn]


class Verifier:
    """The reward 1 for a right answer. `rewards`: of each batch, [loose, strict]."""

    def __init__(self, asked, loose=False):
        self.right = {tuple(question): digit_sums.final_digit(answer) for question, answer in asked}
        self.loose = loose
        self.rewards = []

    def __call__(self, prompts, responses):
        right = [self.right[tuple(prompt)] for prompt in prompts]
        anywhere = [float(digit in response) for digit, response in zip(right, responses)]
        at_the_end = [float(digit_sums.final_digit(response) == digit) for digit, response in zip(right, responses)]
        self.rewards.append([np.mean(anywhere), np.mean(at_the_end)])
        return anywhere if self.loose else at_the_end


def measured(model, asked, rng):
    """pass@k for each of KS, greedy accuracy, mean length."""
    prompts = [question for question, _ in asked for _ in range(TRIES)]
    responses = generate(model, prompts, LONGEST, rng, digit_sums.END).responses()
    strict = Verifier(asked)
    correct = np.reshape(strict(prompts, responses), (-1, TRIES)).sum(axis=1).astype(int)
    missed = [[math.comb(TRIES - c, k) / math.comb(TRIES, k) for c in correct] for k in KS]
    greedy = generate(model, [question for question, _ in asked], LONGEST, rng, digit_sums.END, temperature=0)
    strict([question for question, _ in asked], greedy.responses())
    return {"pass": [1 - float(np.mean(each)) for each in missed], "greedy": strict.rewards[-1][1],
            "length": float(np.mean([len(response) for response in responses]))}


def sft(model, rng, examples, steps):
    for _ in train_sft(TrainState(model, rng), *map(list, zip(*examples)), steps, DEMONSTRATIONS, RATE):
        pass
    return model


def measure(experiment, seed, steps, batches, held_out):
    rng = np.random.default_rng([seed, 3])
    base, _ = experiment.trained("careless-sums", seed, digit_sums.MODEL, read_careless_sums, steps=steps,
                                 mistakes=MISTAKES)
    test = draw_questions(np.random.default_rng([seed, 1]), held_out, (3, 4), held_out=True)
    demonstrations = draw_questions(rng, DEMONSTRATIONS, (2, 3))
    asked = draw_questions(rng, 2000, digit_sums.DIGITS)
    start = sft(base.copy(), rng, demonstrations, SFT_STEPS)
    models = {"base": base, "sft": start}
    rewards = {}
    # Passes of a token through a model: sampling and reference 1 each, an update 3.
    for name, recipe, loose in (("rloo", RLOO, False), ("grpo", GRPO, False), ("loose", GRPO, True)):
        updates = recipe.get("updates", 1)
        draws = max(1, round(batches * 5 / (2 + 3 * updates)))
        verifier = Verifier(asked, loose)
        policy = start.copy()
        stage = train_rlhf(TrainState(policy, rng), start, verifier, [question for question, _ in asked],
                           draws * updates, PROMPTS, SAMPLES, LONGEST, digit_sums.END, beta=0.0, learning_rate=RATE,
                           **recipe)
        lengths = [metrics["completions/mean_length"] for metrics in stage]
        models[name], rewards[name] = policy, verifier.rewards
        if name == "rloo":
            compute = (2 + 3 * updates) * PROMPTS * SAMPLES * sum(lengths)
        experiment.say(f"seed {seed}: {NAMES[name]}, reward {rewards[name][-1]}")
    own = generate(start, [question for question, _ in asked], LONGEST, rng, digit_sums.END).responses()
    kept = [(question, response) for (question, answer), response in zip(asked, own)
            if digit_sums.final_digit(response) == digit_sums.final_digit(answer)]
    for name, examples in (("longer", demonstrations), ("filtered", kept)):
        per_step = 3 * DEMONSTRATIONS * np.mean([len(response) for _, response in examples])
        spent = sum(map(len, own)) if name == "filtered" else 0
        models[name] = sft(start.copy(), rng, examples, max(1, round((compute - spent) / per_step)))
    return {"rewards": rewards, **{name: measured(model, test, np.random.default_rng([seed, 2]))
                                   for name, model in models.items()}}


def by_seed(seeds, name, key, k=None):
    return np.array([s[name][key] if k is None else s[name][key][KS.index(k)] for s in seeds])


def conclude(seeds, size):
    one = {name: by_seed(seeds, name, "pass", 1) for name in NAMES}
    many = {name: by_seed(seeds, name, "pass", TRIES) for name in NAMES}
    last = max(1, len(seeds[0]["rewards"]["loose"]) // 10)
    loose_reward = [np.mean([batch[0] for batch in s["rewards"]["loose"][-last:]]) for s in seeds]
    rule = [Comparison("pass@1, GRPO minus the SFT model", one["grpo"] - one["sft"], above=0.1),
            Comparison("pass@1, GRPO minus SFT for longer", one["grpo"] - one["longer"], above=0),
            Comparison("pass@1, strict verifier minus loose verifier", one["grpo"] - one["loose"], above=0.1),
            Comparison("reward by the loose verifier at the end", loose_reward, above=0.9)]
    findings = [Comparison("pass@1, GRPO minus RLOO", one["grpo"] - one["rloo"], above=0),
                Comparison("pass@1, GRPO minus SFT on own right answers", one["grpo"] - one["filtered"], above=0),
                Comparison("pass@1 of GRPO minus greedy decoding of the SFT model",
                           one["grpo"] - by_seed(seeds, "sft", "greedy"), above=0),
                Comparison(f"pass@{TRIES}, GRPO minus the SFT model", many["grpo"] - many["sft"], above=0)]
    table = [["model", *(f"pass@{k}" for k in KS), "greedy", "tokens"]]
    for name, label in NAMES.items():
        table.append([label, *(mean_range(by_seed(seeds, name, "pass", k)) for k in KS),
                      mean_range(by_seed(seeds, name, "greedy")), mean_range(by_seed(seeds, name, "length"), 1)])
    numbers = {f"pass@1, {label}": spread(one[name]) for name, label in NAMES.items()}
    numbers |= {f"pass@{TRIES}, {label}": spread(many[name]) for name, label in NAMES.items()}
    words = (f"With the same compute, pass@1 rises from {mean(one['sft'])} after SFT to {mean(one['grpo'])} with "
             f"GRPO, {mean(one['rloo'])} with RLOO and {mean(one['filtered'])} with SFT on the model's own right "
             f"answers, and falls to {mean(one['longer'])} with SFT for longer, while pass@{TRIES} of the SFT model is "
             f"{mean(many['sft'])}; with a loose verifier GRPO ends at {mean(one['loose'])}.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    left, right = figure.subplots(1, 2)
    colours = (*COLOURS, "#7a6a3a")
    for (name, label), colour, marker in zip(NAMES.items(), colours, "osD^vP*"):
        curve(left, KS, [s[name]["pass"] for s in seeds], label, colour, marker)
    left.set(title="pass@k, held-out sums", xlabel="samples k", ylabel="share of questions with a right answer",
             xscale="log", ylim=(0, 1.03))
    left.set_xticks(KS, KS)
    left.minorticks_off()
    left.legend(fontsize=8, loc="lower right")
    lines = (("loose", 0, "loose verifier: its reward", COLOURS[4], "-"),
             ("loose", 1, "loose verifier: strictly right", COLOURS[4], "--"),
             ("grpo", 1, "strict verifier: strictly right", COLOURS[2], "-"))
    for name, which, label, colour, style in lines:
        rewards = np.array([s["rewards"][name] for s in seeds])[:, :, which]
        width = max(1, rewards.shape[1] // 12)
        smooth = np.array([np.convolve(row, np.ones(width) / width, mode="valid") for row in rewards])
        curve(right, np.arange(smooth.shape[1]) + width, smooth, label, colour, marker="", linestyle=style)
    right.set(title="What the verifier accepts", xlabel="batches of samples (moving average)",
              ylabel="share of samples", ylim=(0, 1.03))
    right.legend(fontsize=8, loc="lower left")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (9.0, 4.4)))
