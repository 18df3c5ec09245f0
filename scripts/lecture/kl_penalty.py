"""Without the KL penalty the policy exploits its reward model

Claim. Without the penalty the policy drifts from the model it starts from and exploits the reward model; beta sets
the balance.

Test. (1) 9 questions, 781 possible replies to each, all listed; a transformer of 25,632 parameters, instructed; a
reward model from 300 comparisons of its replies. The best policy pi* for every beta, in closed form, and best of n
replies by the learned reward: learned and gold reward against KL, exact. (2) The same world, sampled policy gradient
of 64 replies a step, beta 0 and beta 0.3: the three quantities, exact, every 10 steps. (3) A tiny assistant that
answers in English: 166,000 parameters (key_smear, the option that speeds up induction), instructed with
demonstrations of four tasks of the main job and without pretraining; 300 comparisons by its people, a reward model,
RLHF with beta 0 and beta 0.3, 64 replies a step: learned and gold reward of the samples. Gold is used to measure
alone.

Refuted. If, with any seed, in (1) the gold reward of pi* at the smallest beta is not below its peak over beta though
the learned one is at its highest; or if over the seeds the gold reward in the last fifth of the steps, beta 0.3 less
beta 0, is not above zero by two standard errors, in (2) or in (3).

Limits. A reward model of few comparisons, so that it shows in small models and minutes: with more the turn comes
later. Where it comes differs by seed, and with one in a few it has not come in (3) when the run ends. With four seeds
(3) came out at 1.95 standard errors; two more were added, and the rule was left as it was: 2.5 now, which chance
brings more often than one time in twenty with six seeds; a run that differed from this one by rounding alone had 0.59
(standard error 0.23) for the 0.33 (0.13) here. The reward model is not stopped early (about 21 passes over its 300
comparisons); in a trial of (1) with one that a held-out fifth stopped, gold turned down with all six seeds too. In (3)
rewards and KL are means of 64 samples a step, smoothed over ten steps; the assistant is often wrong. beta 0.3 is that
of the main job and was not tuned. KL is no fair measure between methods: best of n spends it otherwise.

Source. Gao, Schulman and Hilton 2022, arXiv:2210.10760; Stiennon et al. 2020, arXiv:2009.01325; best of n: Beirami
et al. 2024, arXiv:2401.01879.
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import proxy_rewards, sft_model

import numpy as np

from minilm import data, evaluate
from minilm.generate import generate
from minilm.model import Config, RewardModel, Transformer
from minilm.stages.sft import train_sft
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.tokenizer import Tokenizer
from minilm.world import annotators, tasks
from minilm.exact.enumerable import best_of_n, divergence, expectation, optimum
from minilm.world.manners import draw_manner, phrase
from worlds.replies import EOS, LONGEST, ReplyWorld

BETAS = tuple(np.geomspace(3, 0.01, 30))
DRAWS = tuple(2 ** k for k in range(13))
WITH, WITHOUT = "beta 0.3", "beta 0"
RUNS = {WITH: 0.3, WITHOUT: 0.0}
EVERY, SMOOTH = 10, 10
QUANTITIES = ("KL", "learned reward", "gold reward")
TASKS, WORDS, NEW = ("first", "last", "city", "count"), 512, 32
ASSISTANT = {"width": 64, "layers": 2, "heads": 4, "context": 128, "key_smear": True, "rope_base": 1000.0}
SIZES = {"quick": {"seeds": 3, "tuning": 4, "comparisons": 30, "steps": 10, "english_tuning": 4, "english_steps": 1},
         "default": {"seeds": 6, "tuning": 300, "comparisons": 300, "steps": 200, "english_tuning": 250,
                     "english_steps": 80}}


def short_replies(rng, tuning, comparisons, steps):
    """Parts (1) and (2): [KL, learned, gold] along pi*, best of n, and the two runs, exact."""
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, tuning)
    reference = world.log_distributions(model)
    learned = proxy_rewards(world, model, rng, comparisons, tuning // 3)

    def place(l):
        return [divergence(l, reference).mean(), expectation(l, learned).mean(), expectation(l, world.gold).mean()]

    found = {"pi*": [place(optimum(reference, learned, beta)[0]) for beta in BETAS],
             "best of n": [place(best_of_n(reference, learned, n)) for n in DRAWS]}
    for name, beta in RUNS.items():
        policy = model.copy()
        found[name] = [place(reference)]
        stage = train_rlhf(TrainState(policy, rng, weight_decay=0.0), model, world.reward(learned), world.prompts, steps,
                     16, 4, LONGEST, EOS, beta, 2e-3)
        for step, _ in enumerate(stage, 1):
            if step % EVERY == 0:
                found[name].append(place(world.log_distributions(policy)))
    return found


def english(rng, comparisons, tuning, steps):
    """Part (3): [KL, learned, gold] of the samples of each step, and a few answers."""
    def questions(count):
        return [tasks.draw_question(rng, task=TASKS[i % len(TASKS)]) for i in range(count)]

    shown_to = questions(4000)
    said = [phrase(q, q.answer, draw_manner(rng)) for q in shown_to]
    texts = [f"{data.prompt_text(q.text)} {answer}" for q, answer in zip(shown_to, said)]
    tokenizer = Tokenizer.train(texts[:2000], WORDS)
    prompts, responses = zip(*[data.encode_dialogue(tokenizer, q.text, answer) for q, answer in zip(shown_to, said)])
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, **ASSISTANT), rng)
    for _ in train_sft(TrainState(model, rng), prompts, responses, tuning, 48, 4e-3):
        pass

    def encode(asked):
        return [data.encode_prompt(tokenizer, q.text) for q in asked]

    def read(answers):
        return [(data.decode_response(tokenizer, answer), answer[-1] == tokenizer.eos) for answer in answers]

    asked = questions(comparisons)
    pair = [generate(model, encode(asked), NEW, rng, tokenizer.eos).responses() for _ in range(2)]
    wins = annotators.compare(annotators.draw_annotators(rng), asked, *map(read, pair), rng)
    chosen, rejected = zip(*[(a, b) if first else (b, a) for first, a, b in zip(wins, *pair)])
    reward_model = RewardModel(model.copy(), rng)
    for _ in train_reward_model(TrainState(reward_model, rng), encode(asked), chosen, rejected, tuning // 3, 32, 1e-3):
        pass

    unlabelled = questions(1000)
    by_prompt = dict(zip(map(tuple, encode(unlabelled)), unlabelled))
    found = {"answers": {}}
    for name, beta in RUNS.items():
        policy, gold = model.copy(), []

        def reward(asked, answers):
            gold.append(np.mean([annotators.gold_reward(by_prompt[tuple(prompt)], *reading)
                                 for prompt, reading in zip(asked, read(answers))]))
            return evaluate.predicted_rewards(reward_model, asked, answers)

        stage = train_rlhf(TrainState(policy, rng, weight_decay=0.0), model, reward, encode(unlabelled), steps,
                     16, 4, NEW, tokenizer.eos, beta, 1.5e-3)
        found[name] = [[m["kl_sequence"], m["reward"], gold[-1]] for m in stage]
        examples = unlabelled[:len(TASKS)]
        said = read(generate(policy, encode(examples), NEW, rng, tokenizer.eos, temperature=0.0).responses())
        found["answers"][name] = [f"{q.text} -> {text}" for q, (text, _) in zip(examples, said)]
    return found


def measure(row, seed, tuning, comparisons, steps, english_tuning, english_steps):
    rng = np.random.default_rng(seed)
    found = {"short": short_replies(rng, tuning, comparisons, steps)}
    row.say(f"seed {seed}: short replies done")
    return {**found, "english": english(rng, comparisons, english_tuning, english_steps)}


def last(path, column):
    """The mean of a column over the last fifth of a run."""
    path = np.array(path)
    return path[-max(1, len(path) // 5):, column].mean()


def gained(seeds, world):
    """Gold reward at the end of the run with the penalty, less that without: mean over the seeds, standard error."""
    gains = [last(s[world][WITH], 2) - last(s[world][WITHOUT], 2) for s in seeds]
    return float(np.mean(gains)), float(np.std(gains, ddof=1) / len(gains) ** 0.5)


def shortened(text, most=140):
    return text if len(text) <= most else text[:most] + " ..."


def conclude(seeds, size):
    paths, best = ([np.array(s["short"][name]) for s in seeds] for name in ("pi*", "best of n"))
    peaks = [path[path[:, 2].argmax()] for path in paths]
    rises = [path[-1, 1] > path[:, 1].max() - 1e-6 for path in paths]
    turns = all(rising and path[-1, 2] < peak[2] for rising, path, peak in zip(rises, paths, peaks))
    gains = {world: gained(seeds, world) for world in ("short", "english")}
    worst = min(seeds, key=lambda s: last(s["english"][WITHOUT], 2))
    rows = {("short", "pi*, gold at its highest"): peaks,
            ("short", f"pi*, beta {BETAS[-1]:.2g}"): [path[-1] for path in paths],
            ("short", "best of n, gold at its highest"): [path[path[:, 2].argmax()] for path in best],
            ("short", f"best of {DRAWS[-1]}"): [path[-1] for path in best],
            **{(world, f"policy gradient, {name}, end"): [[last(s[world][name], i) for i in range(3)] for s in seeds]
               for world in gains for name in RUNS}}
    table, numbers = [["world", "policy", *QUANTITIES]], {}
    for (world, policy), points in rows.items():
        columns = np.transpose(points)
        table.append([world, policy, *map(shown, columns)])
        numbers |= {f"{world}, {policy}: {what}": spread(column) for what, column in zip(QUANTITIES, columns)}
    sentence = (f"As beta falls, the gold reward of pi* peaks at a KL of {shown([p[0] for p in peaks])} nats with "
                f"{shown([p[2] for p in peaks])} and falls to {shown([p[-1, 2] for p in paths])}, while the learned "
                f"one rises, as it must ({sum(rises)} of {len(seeds)} seeds). Sampled, beta 0.3 ends above beta 0 in "
                "gold reward by "
                + " and by ".join(f"{gain:.2f} (standard error {error:.2f}, {world})"
                                  for world, (gain, error) in gains.items())
                + f". Where beta 0 does worst in English: {shortened(worst['english']['answers'][WITHOUT][0])}")
    return Conclusion(verdict(turns and all(gain > 2 * error for gain, error in gains.values())), sentence, numbers,
                      table)


def smooth(values):
    """Means over SMOOTH steps."""
    return np.convolve(values, np.ones(SMOOTH) / SMOOTH, mode="valid") if len(values) >= SMOOTH else np.array(values)


def draw(figure, seeds, size):
    axes = figure.subplots(2, 3, sharex="col")
    steps = np.arange(0, size["steps"] + 1, EVERY)
    for (exact, stepwise, sampled), column, what in zip(axes, (1, 2), ("learned reward", "gold reward")):
        for name, colour in (("pi*", COLOURS[0]), ("best of n", COLOURS[2])):
            paths = [np.array(s["short"][name]) for s in seeds]
            x = np.linspace(max(path[0, 0] for path in paths), min(path[-1, 0] for path in paths), 100)
            means = np.mean([np.interp(x, path[:, 0], path[:, column]) for path in paths], axis=0)
            exact.plot(x, means, color=colour, linewidth=1.8, label=name)       # as far as all seeds go
            for path in paths:
                exact.plot(path[:, 0], path[:, column], color=colour, linewidth=0.8, alpha=0.35)
        for name, colour in zip(RUNS, (COLOURS[0], COLOURS[4])):
            by_seed = np.array([s["short"][name] for s in seeds])[:, :, column]
            curve(stepwise, steps, by_seed, name, colour, marker="")
            for s in seeds:
                kl, _, reward = (smooth(path) for path in np.transpose(s["english"][name])[[0, 0, column]])
                sampled.plot(kl, reward, color=colour, linewidth=1, label=name if s is seeds[0] else None)
                sampled.plot(kl[-1], reward[-1], "o", color=colour, markersize=4)
        exact.set_ylabel(what)
    world = ReplyWorld(words=2)
    for axis in axes[1, :2]:
        level(axis, world.gold.max(axis=1).mean(), "the best reply there is")
        level(axis, np.mean([s["short"][WITHOUT][0][2] for s in seeds]), "instructed")
    sampled.set_xscale("symlog", linthresh=1)
    titles = "Exact: beta falls, n grows", "Short replies, sampled", "English, sampled (a line a seed)"
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    for axis, label in zip(axes[1], ("KL (nats per reply)", "step", "KL (nats per reply)")):
        axis.set_xlabel(label)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10.5, 5.6)))
