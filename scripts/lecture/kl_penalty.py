"""The KL penalty, and exploitation of the reward model

Claim. Without the penalty the policy drifts from the model it starts from and exploits the reward model; beta sets
the balance.

Test. (1) 9 questions with 781 possible replies each, all listed; an SFT model of 25,632 parameters; a reward model (the
proxy reward) from 300 comparisons of its replies. The optimal policy pi* for every beta in closed form, and best of n
replies by the proxy reward: proxy and gold reward against KL, exact. (2) The same world and a sampled policy gradient
of 64 replies per step, beta 0 and beta 0.3: the three quantities, exact, every 10 steps. (3) A small assistant that
answers in English: 166,000 parameters (key_smear, an option that speeds up induction), finetuned on demonstrations of
four tasks of scripts/assistant.py without pretraining; 300 comparisons by its annotators, a reward model, RLHF with
beta 0 and beta 0.3, 64 replies per step: proxy and gold reward of the samples. The gold reward is used for measuring
only.

Rule. At the smallest beta the gold reward of pi* of the proxy reward is below its maximum over beta, although its proxy
reward is highest there; in training with short replies, beta 0.3 has more gold reward than beta 0 over the last fifth
of the steps; and the same holds in training in English. These are parts (1), (2) and (3) of the test. Effects of a
seed: the three differences of gold reward; margin 0. Condition: the proxy reward of pi* is highest at the smallest beta
on every seed.

Limits. The reward model has few comparisons, so that the effect appears in small models and minutes; with more
comparisons it appears at a larger KL. The KL of the maximum differs between seeds, and on a few seeds the gold reward
has not fallen in (3) when the run ends. With four seeds (3) came out at 1.95 standard errors and with six at 2.5, and a
run that differed by rounding alone gave a gain of 0.59 (standard error 0.23) instead of 0.33 (0.13); therefore there
are more seeds now. The reward model is not stopped early (about 21 passes over its 300 comparisons). In a trial of (1)
with early stopping on a held-out fifth, the gold reward fell on all six seeds too. In (3) rewards and KL are means of
64 samples per step, smoothed over ten steps, and many answers of the assistant are wrong. beta 0.3 is that of
scripts/assistant.py and was not tuned. Equal KL is not a fair comparison between methods: best of n uses its KL
differently.

Source. Gao, Schulman and Hilton 2022, arXiv:2210.10760; Stiennon et al. 2020, arXiv:2009.01325; best of n: Beirami
et al. 2024, arXiv:2401.01879.

Figure. Proxy reward (top row) and gold reward (bottom row) in three columns: pi* and best of n against KL, exact;
training on short replies against the step, beta 0.3 and beta 0; training in English against KL (symlog axis), beta 0.3
and beta 0, one line per seed.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import proxy_rewards, sft_model

# isort: split
import numpy as np

from minilm import data, evaluate
from minilm.exact.enumerable import best_of_n, divergence, expectation, optimum
from minilm.generate import generate
from minilm.model import RewardModel
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tokenizer import Tokenizer
from minilm.world import annotators, tasks
from minilm.world.manners import draw_manner, phrase
from worlds.replies import EOS, LONGEST, ReplyWorld

BETAS = tuple(np.geomspace(3, 0.01, 30))
DRAWS = tuple(2 ** k for k in range(13))
WITH, WITHOUT = "beta 0.3", "beta 0"
RUNS = {WITH: 0.3, WITHOUT: 0.0}
EVERY, SMOOTH = 10, 10                  # steps between two exact evaluations; steps that are averaged in the figure
QUANTITIES = ("KL", "proxy reward", "gold reward")
TASKS, WORDS, NEW = ("first", "last", "city", "count"), 512, 32
ASSISTANT = {"width": 64, "layers": 2, "heads": 4, "context": 128, "key_smear": True, "rope_base": 1000.0}
SIZES = {"quick": {"seeds": 3, "tuning": 4, "comparisons": 30, "steps": 10, "english_tuning": 4, "english_steps": 1},
         "default": {"seeds": 12, "tuning": 300, "comparisons": 300, "steps": 200, "english_tuning": 250,
                     "english_steps": 80}}


def short_replies(rng, tuning, comparisons, steps, dtype):
    """Parts (1) and (2): [KL, proxy, gold] along pi*, best of n, and the two runs, exact."""
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, tuning, dtype)
    reference = world.log_distributions(model)
    proxy = proxy_rewards(world, model, rng, comparisons, tuning // 3)

    def point(log_pi):
        return [divergence(log_pi, reference).mean(), expectation(log_pi, proxy).mean(),
                expectation(log_pi, world.gold).mean()]

    results = {"pi*": [point(optimum(reference, proxy, beta)[0]) for beta in BETAS],
               "best of n": [point(best_of_n(reference, proxy, n)) for n in DRAWS]}
    for name, beta in RUNS.items():
        policy = model.copy()
        results[name] = [point(reference)]
        stage = train_rlhf(TrainState(policy, rng, weight_decay=0.0), model, world.reward(proxy), world.prompts, steps,
                           16, 4, LONGEST, EOS, beta, 2e-3)
        for step, _ in enumerate(stage, 1):
            if step % EVERY == 0:
                results[name].append(point(world.log_distributions(policy)))
    return results


class EnglishAssistant:
    """Part (3): an SFT model that answers questions of TASKS in English, and its reward model."""

    def __init__(self, experiment, rng, comparisons, tuning):
        self.rng = rng
        questions = self.questions(4000)
        answers = [phrase(q, q.answer, draw_manner(rng)) for q in questions]
        texts = [f"{data.prompt_text(q.text)} {answer}" for q, answer in zip(questions, answers)]
        self.tokenizer = Tokenizer.train(texts[:2000], WORDS)
        dialogues = [data.encode_dialogue(self.tokenizer, q.text, answer) for q, answer in zip(questions, answers)]
        prompts, responses = zip(*dialogues)
        self.model = experiment.transformer(rng, vocab_size=self.tokenizer.vocab_size, **ASSISTANT)
        for _ in train_sft(TrainState(self.model, rng), prompts, responses, tuning, 48, 4e-3):
            pass
        self.reward_model = self._reward_model(comparisons, tuning // 3)

    def _reward_model(self, comparisons, steps):
        rng = self.rng
        questions = self.questions(comparisons)
        pair = [self.answer(self.model, questions) for _ in range(2)]
        first_preferred = annotators.compare(annotators.draw_annotators(rng), questions, *map(self.read, pair), rng)
        ordered = [(a, b) if first else (b, a) for first, a, b in zip(first_preferred, *pair)]
        chosen, rejected = zip(*ordered)
        reward_model = RewardModel(self.model.copy(), rng)
        prompts = self.encode(questions)
        for _ in train_reward_model(TrainState(reward_model, rng), prompts, chosen, rejected, steps, 32, 1e-3,
                                    centering=0.01):
            pass
        return reward_model

    def questions(self, count):
        return [tasks.draw_question(self.rng, task=TASKS[i % len(TASKS)]) for i in range(count)]

    def encode(self, questions):
        return [data.encode_prompt(self.tokenizer, q.text) for q in questions]

    def answer(self, model, questions, **options):
        """Responses, token lists."""
        return generate(model, self.encode(questions), NEW, self.rng, self.tokenizer.eos, **options).responses()

    def read(self, responses):
        """(text, finished) of each response."""
        return [(data.decode_response(self.tokenizer, response).strip(), response[-1] == self.tokenizer.eos)
                for response in responses]


def english(experiment, rng, comparisons, tuning, steps):
    """Part (3): [KL, proxy, gold] of the samples of each step, and a few answers."""
    assistant = EnglishAssistant(experiment, rng, comparisons, tuning)
    questions = assistant.questions(1000)
    prompts = assistant.encode(questions)
    question_of = dict(zip(map(tuple, prompts), questions))
    results = {"answers": {}}
    for name, beta in RUNS.items():
        policy = assistant.model.copy()
        gold = []

        def reward(prompts, responses):
            gold.append(np.mean([annotators.gold_reward(question_of[tuple(prompt)], *reading)
                                 for prompt, reading in zip(prompts, assistant.read(responses))]))
            return evaluate.predicted_rewards(assistant.reward_model, prompts, responses)

        stage = train_rlhf(TrainState(policy, rng, weight_decay=0.0), assistant.model, reward, prompts, steps, 16, 4,
                           NEW, assistant.tokenizer.eos, beta, 1.5e-3)
        results[name] = [[m["kl_sequence"], m["reward"], gold[-1]] for m in stage]
        examples = questions[:len(TASKS)]
        readings = assistant.read(assistant.answer(policy, examples, temperature=0.0))
        results["answers"][name] = [f"{q.text} -> {text}" for q, (text, _) in zip(examples, readings)]
    return results


def measure(experiment, seed, tuning, comparisons, steps, english_tuning, english_steps):
    rng = np.random.default_rng(seed)
    results = {"short": short_replies(rng, tuning, comparisons, steps, experiment.dtype)}
    experiment.say(f"seed {seed}: short replies done")
    return {**results, "english": english(experiment, rng, comparisons, english_tuning, english_steps)}


def late(path, column):
    """The mean of a column over the last fifth of a run."""
    path = np.array(path)
    return path[-max(1, len(path) // 5):, column].mean()


def gained(seeds, world, column=2):
    """A quantity (gold) at the end of the run with the penalty, minus that without it: (seeds,)."""
    return np.array([late(s[world][WITH], column) - late(s[world][WITHOUT], column) for s in seeds])


def shortened(text, most=140):
    return text if len(text) <= most else text[:most] + " ..."


def conclude(seeds, size):
    paths = [np.array(s["short"]["pi*"]) for s in seeds]            # (betas, QUANTITIES) of each seed
    best = [np.array(s["short"]["best of n"]) for s in seeds]
    peaks = [path[path[:, 2].argmax()] for path in paths]
    fall = np.array([peak[2] - path[-1, 2] for peak, path in zip(peaks, paths)])
    rise = [path[-1, 1] - path[:-1, 1].max() for path in paths]
    condition = Comparison("proxy reward of pi* at the smallest beta, minus the highest at other beta", rise, above=0)
    rule = [Comparison("gold reward of pi* of the proxy reward, its maximum over beta minus that at the smallest "
                       "beta", fall, above=0),
            Comparison("gold reward at the end, beta 0.3 minus beta 0, short replies", gained(seeds, "short"), above=0),
            Comparison("gold reward at the end, beta 0.3 minus beta 0, English", gained(seeds, "english"), above=0)]
    findings = [Comparison(f"KL at the end, beta 0 minus beta 0.3, {world} (nats)", -gained(seeds, name, 0), above=0)
                for name, world in (("short", "short replies"), ("english", "English"))]
    findings.append(Comparison("gold reward of best of n, its maximum over n minus that at the largest n",
                               [path[:, 2].max() - path[-1, 2] for path in best], above=0))
    worst = min(seeds, key=lambda s: late(s["english"][WITHOUT], 2))
    points = {("short", "pi*, gold at its maximum"): peaks,
              ("short", f"pi*, beta {BETAS[-1]:.2g}"): [path[-1] for path in paths],
              ("short", "best of n, gold at its maximum"): [path[path[:, 2].argmax()] for path in best],
              ("short", f"best of {DRAWS[-1]}"): [path[-1] for path in best],
              **{(world, f"policy gradient, {name}, end"): [[late(s[world][name], i) for i in range(3)] for s in seeds]
                 for world in ("short", "english") for name in RUNS}}
    table = [["world", "policy", *QUANTITIES]]
    numbers = {}
    for (world, policy), values in points.items():
        columns = np.transpose(values)
        table.append([world, policy, *map(mean_range, columns)])
        numbers |= {f"{world}, {policy}: {name}": spread(column) for name, column in zip(QUANTITIES, columns)}
    table.append(["english", "an answer of the worst run, beta 0", shortened(worst["english"]["answers"][WITHOUT][0]),
                  "", ""])
    words = (f"As beta falls, the gold reward of pi* of the proxy reward rises to {mean([p[2] for p in peaks])} and "
             f"then falls to "
             f"{mean([path[-1, 2] for path in paths])}, while its proxy reward rises. In training, beta 0.3 ends above "
             f"beta 0 in gold reward by {mean(gained(seeds, 'short'))} (short replies) and "
             f"{mean(gained(seeds, 'english'))} (English).")
    return Conclusion(rule, words, numbers, table, [condition], findings)


def smooth(values):
    """Means over SMOOTH steps."""
    return np.convolve(values, np.ones(SMOOTH) / SMOOTH, mode="valid") if len(values) >= SMOOTH else np.array(values)


def draw(figure, seeds, size):
    axes = figure.subplots(2, 3, sharex="col")
    steps = np.arange(0, size["steps"] + 1, EVERY)
    for (exact, stepwise, sampled), column, quantity in zip(axes, (1, 2), QUANTITIES[1:]):
        for name, colour in (("pi*", COLOURS[0]), ("best of n", COLOURS[2])):
            paths = [np.array(s["short"][name]) for s in seeds]
            x = np.linspace(max(path[0, 0] for path in paths), min(path[-1, 0] for path in paths), 100)
            means = np.mean([np.interp(x, path[:, 0], path[:, column]) for path in paths], axis=0)
            exact.plot(x, means, color=colour, linewidth=1.8, label=name)       # within the range of all seeds
            for path in paths:
                exact.plot(path[:, 0], path[:, column], color=colour, linewidth=0.8, alpha=0.35)
        for name, colour in zip(RUNS, (COLOURS[0], COLOURS[4])):
            by_seed = np.array([s["short"][name] for s in seeds])[:, :, column]
            curve(stepwise, steps, by_seed, name, colour, marker="")
            for s in seeds:
                kl, _, reward = (smooth(path) for path in np.transpose(s["english"][name])[[0, 0, column]])
                sampled.plot(kl, reward, color=colour, linewidth=1, label=name if s is seeds[0] else None)
                sampled.plot(kl[-1], reward[-1], "o", color=colour, markersize=4)
        exact.set_ylabel(quantity)
    world = ReplyWorld(words=2)
    for axis in axes[1, :2]:
        level(axis, world.gold.max(axis=1).mean(), "best\nreply", side="outside")
        level(axis, np.mean([s["short"][WITHOUT][0][2] for s in seeds]), "SFT\nmodel", side="outside")
    sampled.set_xscale("symlog", linthresh=1)
    sampled.set_xlim(right=max(2, sampled.get_xlim()[1]))       # a tick at 1 at least
    titles = "Exact: beta falls, n grows", "Short replies, sampled", "English, sampled (one line per seed)"
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    for axis, label in zip(axes[1], ("KL (nats per reply)", "step", "KL (nats per reply; symlog axis)")):
        axis.set_xlabel(label)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10.5, 5.6)))
