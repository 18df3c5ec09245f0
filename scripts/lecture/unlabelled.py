"""A reward model and prompts that nobody labelled

Claim. Modelling the preference directly generalises to data nobody labelled: prompts without comparisons can be used
too.

Test. Of 27 questions, 9 have comparisons (2,000, by the Bradley-Terry model of the gold reward, of replies of an SFT
model of 25,632 parameters); 9 more are used as prompts, without comparisons; 9 are not used in training. A reward model
is trained on the comparisons (a fifth of them decides when to stop). Three methods then train a policy, each with two
beta, evaluated also after a quarter and a half of the steps: the policy gradient on the rewards of the reward model,
with all 18 prompts; the same with the 9 compared questions only (the control that separates the prompts from the
method); and DPO on the comparisons. All replies are listed, so gold reward and KL are exact. The frontier of gold
reward against KL of each method is read at equal KL, separately for each group of questions. Levels: the best policy
for the reward model in closed form, pi* of the gold reward (the best possible), and the SFT model at temperatures from
1 to 0.1, which needs no comparison. The accuracy of the reward model is the share of pairs of replies that it orders as
the gold reward does, in each group.

Rule. On the questions used as prompts without comparisons, at 0.5 nat of KL there, the policy gradient on all 18
questions has more gold reward than the policy gradient on the 9 compared questions, and more than DPO. Margin 0 for
both. Whether the reward model generalises to these questions is reported as a finding.

Limits. The questions are of one kind, and a policy trained on some of them carries a large part of its gain to the
others. If prompts differ more, prompts without labels may matter more, and the reward model may fail more. With 600
comparisons of 6 questions (tried with one seed) the reward model memorised them: on the other questions RL with all 18
prompts then lost gold reward, and DPO was far ahead. 2,000 comparisons of 9 questions were chosen because the reward
model was then usually accurate on new questions. A run with beta 0.3 and 0.1, which has no policy near 0.5 nat, had the
same outcome. The frontier uses the best beta of each method by the gold reward, which nobody knows in practice. The SFT
model has seen demonstrations of all questions. A large part of every gain is sharpening: the SFT model at a lower
temperature reaches nearly the same reward at this KL without any label (its frontier has twelve points, those of the
methods have six).

Source. Ouyang et al. 2022, arXiv:2203.02155 (prompts for the policy apart from those for the reward model); Rafailov
et al. 2023, arXiv:2305.18290.

Figure. Expected gold reward against KL to the reference, in three panels for the questions that were compared, that
were used as prompts only, and that were not used; one line for each of RLHF on all prompts, RLHF and DPO on the
compared questions, pi*, the best policy for the reward model, and the reference at a lower temperature.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, mean, mean_range, run, spread
from common.recipes import early_stopped_reward_model, finetune_on_replies, reward_table

# isort: split
import numpy as np

from common.frontier import frontier
from minilm.exact.enumerable import divergence, expectation, optimum
from minilm.stages.dpo import train_dpo
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from worlds.replies import EOS, LONGEST, MODEL, ReplyWorld

ENVELOPE = tuple(np.geomspace(5, 0.05, 25))
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)    # of the reference: no labels
GROUPS = ("compared", "prompts only", "not used")           # a third of the questions each
DECIDED, NATS, COMPARISONS = GROUPS[1], 0.5, 2000
METHODS = ("RLHF, all prompts", "RLHF, compared questions", "DPO, compared questions")
LOWER = "reference at a lower temperature"
LEVELS = ("best for the reward model", "pi*", LOWER)
SIZES = {"quick": {"seeds": 3, "words": 2, "tuning": 10, "reward_steps": 2, "sampling_steps": 2, "pair_steps": 2,
                   "betas": (0.2,)},
         "default": {"seeds": 8, "words": 3, "tuning": 300, "reward_steps": 300, "sampling_steps": 100,
                     "pair_steps": 300, "betas": (1.0, 0.3)}}


def measure(experiment, seed, words, tuning, reward_steps, sampling_steps, pair_steps, betas):
    world = ReplyWorld(words)
    rng = np.random.default_rng(seed)
    model, _ = experiment.trained("replies", seed, MODEL, finetune_on_replies, words=words, steps=tuning)
    reference = world.log_distributions(model)
    order = rng.permutation(len(world.prompts))
    groups = dict(zip(GROUPS, np.split(order, 3)))
    compared = groups["compared"]
    used = order[:2 * len(order) // 3]                  # compared, and prompts only
    p, chosen, rejected = world.comparisons(reference, world.gold, rng, COMPARISONS, compared)
    reward_model = early_stopped_reward_model(world, model, rng, (p, chosen, rejected), reward_steps)
    rewards = reward_table(world, reward_model)
    pairs = world.tokens_of(p, chosen, rejected)
    references = [reference[p, y].astype(model.dtype) for y in (chosen, rejected)]

    def point(log_pi):
        """(divergence, gold reward) in each group."""
        both = np.stack([divergence(log_pi, reference), expectation(log_pi, world.gold)])
        return {group: both[:, questions].mean(axis=1).tolist() for group, questions in groups.items()}

    def rlhf(policy, questions, beta):
        prompts = [world.prompts[i] for i in questions]
        return train_rlhf(TrainState(policy, rng), model, world.reward(rewards), prompts, sampling_steps, 16, 4,
                          LONGEST, EOS, beta, 2e-3)

    def dpo(policy, beta):
        return train_dpo(TrainState(policy, rng), *pairs, *references, pair_steps, 64, beta, 5e-4)

    def agreement(questions):
        p, first, second = world.comparisons(reference, world.gold, rng, 4000, questions)
        gold = world.gold[p, first] - world.gold[p, second]
        return ((rewards[p, first] > rewards[p, second]) == (gold > 0))[gold != 0].mean()

    results = {"reference": point(reference),
               "agreement": {group: agreement(questions) for group, questions in groups.items()},
               "best for the reward model": [point(optimum(reference, rewards, beta)[0]) for beta in ENVELOPE],
               "pi*": [point(optimum(reference, world.gold, beta)[0]) for beta in ENVELOPE],
               LOWER: [point(world.log_distributions(model, t)) for t in TEMPERATURES]}
    for method in METHODS:
        results[method] = []
        for beta in betas:
            policy = model.copy()
            if method == METHODS[2]:
                stage = dpo(policy, beta)
                steps = pair_steps
            else:
                stage = rlhf(policy, used if method == METHODS[0] else compared, beta)
                steps = sampling_steps
            evaluated_at = steps // 4, steps // 2, steps
            results[method] += [point(world.log_distributions(policy)) for step, _ in enumerate(stage, 1)
                                if step in evaluated_at]
        points = "  ".join("{1:.2f} at {0:.2f}".format(*x[DECIDED]) for x in results[method])
        experiment.say(f"seed {seed}, {method}: {points}")
    return results


def corners(seed, name, group):
    """The frontier of a method in a group of questions, with the reference."""
    return frontier(*np.transpose([point[group] for point in (seed["reference"], *seed[name])]))


def at(seeds, name, group, kl):
    """Gold reward of each seed at this KL (or at several)."""
    return np.array([np.interp(kl, *corners(s, name, group).T) for s in seeds])


def conclude(seeds, size):
    gold = {(name, group): at(seeds, name, group, NATS) for name in (*METHODS, *LEVELS) for group in GROUPS}
    here = {name: gold[name, DECIDED] for name in (*METHODS, *LEVELS)}
    start = {group: np.array([s["reference"][group][1] for s in seeds]) for group in GROUPS}
    agree = {group: [s["agreement"][group] for s in seeds] for group in GROUPS}
    everything, compared_only, _ = METHODS
    rule = [Comparison(f"gold reward on the questions that are {DECIDED}, at {NATS} nat, {everything}, minus {name}",
                       here[everything] - here[name], above=0) for name in METHODS[1:]]
    findings = [Comparison(f"share of pairs that the reward model orders as gold does, questions that are {DECIDED}",
                           agree[DECIDED], above=0.5),
                Comparison(f"gold reward on the questions that are {DECIDED}, at {NATS} nat, {everything}, minus the "
                           "reference", here[everything] - start[DECIDED], above=0)]
    findings += [Comparison(f"gold reward on the questions that are {DECIDED}, at {NATS} nat, {name}, minus {LOWER} "
                            "(no labels)", here[name] - here[LOWER], above=0) for name in METHODS]
    numbers = {f"gold at {NATS} nat, questions {group}: {name}": spread(values)
               for (name, group), values in gold.items()}
    numbers |= {f"gold of the reference, questions {group}": spread(values) for group, values in start.items()}
    numbers |= {f"the reward model orders as gold, questions {group}": spread(values)
                for group, values in agree.items()}
    table = [["", *(f"gold at {NATS} nat, {group}" for group in GROUPS),
              *(f"largest KL, {group}" for group in GROUPS)]]
    for name in (*METHODS, *LEVELS):
        largest = (mean_range([max(point[group][0] for point in s[name]) for s in seeds]) for group in GROUPS)
        table.append([name, *(mean_range(gold[name, group]) for group in GROUPS), *largest])
    table.append(["reference", *(mean_range(start[group]) for group in GROUPS), *["0"] * len(GROUPS)])
    words = (f"On the questions that are {DECIDED}, at {NATS} nat of KL, the gold reward is {mean(here[everything])} "
             f"with RLHF on all prompts and {mean(here[compared_only])} with RLHF on the compared questions only "
             f"(reference {mean(start[DECIDED])}). The reward model orders {mean(agree[DECIDED])} of the pairs of "
             "these questions as gold does.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    grid = np.linspace(0, 1.5, 61)
    axes = figure.subplots(1, 3, sharey=True)
    labels = {"pi*": "pi* of the gold reward: the best possible", LOWER: f"{LOWER}: no label"}
    for axis, group in zip(axes, GROUPS):
        for name, colour, style in ((LEVELS[1], COLOURS[5], "--"), (LEVELS[0], COLOURS[3], ":"),
                                   (LOWER, COLOURS[4], "-.")):
            axis.plot(grid, at(seeds, name, group, grid).mean(axis=0), style, color=colour, linewidth=1.5,
                      label=labels.get(name, name))
        for method, colour in zip(METHODS, COLOURS):
            curve(axis, grid, at(seeds, method, group, grid), method, colour, marker="")
        axis.axvline(NATS, color=COLOURS[5], linewidth=0.6)
        axis.set(title=f"Questions: {group}", xlabel="exact KL to the reference (nats)")
    axes[0].set_ylabel("expected gold reward")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9, 4.6)))
