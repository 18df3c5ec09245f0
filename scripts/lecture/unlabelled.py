"""A reward model makes use of prompts that nobody labelled

Claim. Modelling the preference directly generalises to data nobody labelled: prompts without comparisons can be used
too.

Test. Of 27 questions, 9 have comparisons (2,000, by the Bradley-Terry law of the gold reward, of the replies of an
instructed transformer of 25,632 parameters); 9 more can be asked, but nobody compared replies to them; 9 are never
asked in training. A reward model learns from the comparisons (a fifth chooses where to stop). Then three ways to a
policy, each with two beta, looked at after a quarter and a half of the steps too: the policy gradient on the reward
model's rewards for replies to all 18 questions that are asked; the same restricted to the 9 compared (the control that
separates the prompts from the method); DPO on the comparisons. All replies are listed, gold reward and KL are sums.
Each way's frontier of gold reward against KL is read at equal KL, for each group of questions by itself; beside it the
best policy for the reward model in closed form, pi* of the gold reward, which nobody can beat, and the instructed
model at temperatures from 1 down to 0.1, which needs no comparison at all. The share of pairs
of replies that the reward model orders as gold does is counted in each group.

Refuted. On the questions asked without comparisons, at 0.5 nats of KL there: refuted if the policy gradient on all 18
does not have more gold reward than DPO, or not more than the policy gradient on the 9, by two standard errors over the
seeds.

Limits. The questions are of one kind, and a policy that learns on some carries much of it to the others by itself;
where prompts differ more, those without labels may matter more, and the reward model may fail more. With 600
comparisons of 6 questions (tried with one seed) it learned these by heart: on the others RL on all 18 then lost gold
reward, and DPO was far ahead; 2,000 comparisons of 9 were chosen because a reward model of them was right about new
questions more often than not. A run with beta 0.3 and 0.1, which has no policy near 0.5 nats, had the same outcome.
The frontier takes each way's best beta by the gold reward, which nobody knows in earnest. The instructed model has
seen demonstrations of all questions. Much of what every way gains is sharpening: the instructed model at a lower
temperature, without any label, gets to nearly the same reward at this KL (its frontier has twelve points, theirs
six); so where one way is not ahead of another, neither may have learned more there than to be sharper.

Source. Ouyang et al. 2022, arXiv:2203.02155 (prompts for the policy apart from those for the reward model); Rafailov
et al. 2023, arXiv:2305.18290.
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, run, shown, spread, verdict
from common.recipes import early_stopped_reward_model, finetune_on_replies, reward_table

import numpy as np

from minilm.stages.dpo import train_dpo
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.exact.enumerable import divergence, expectation, optimum
from common.frontier import frontier
from worlds.replies import EOS, LONGEST, MODEL, ReplyWorld

ENVELOPE = tuple(np.geomspace(5, 0.05, 25))
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)    # of the reference: no labels
GROUPS = ("compared", "asked without comparisons", "never asked")           # a third of the questions each
DECIDED, NATS, COMPARISONS = GROUPS[1], 0.5, 2000
WAYS = ("RLHF on all asked", "RLHF on the compared", "DPO on the compared")
COOLER = "reference at lower temperatures"
LEVELS = ("best for the reward model", "pi*", COOLER)
SIZES = {"quick": {"seeds": 3, "asked": 2, "instruct": 10, "reward_steps": 2, "sampling_steps": 2, "pair_steps": 2,
                   "betas": (0.2,)},
         "default": {"seeds": 4, "asked": 3, "instruct": 300, "reward_steps": 300, "sampling_steps": 100,
                     "pair_steps": 300, "betas": (1.0, 0.3)}}


def measure(row, seed, asked, instruct, reward_steps, sampling_steps, pair_steps, betas):
    world, rng = ReplyWorld(asked), np.random.default_rng(seed)
    model, _ = row.trained("replies", seed, MODEL, finetune_on_replies, words=asked, steps=instruct)
    l, order = world.log_distributions(model), rng.permutation(len(world.prompts))
    groups = dict(zip(GROUPS, np.split(order, 3)))
    compared, all_asked = groups["compared"], order[:2 * len(order) // 3]
    p, chosen, rejected = world.comparisons(l, world.gold, rng, COMPARISONS, compared)
    rewards = reward_table(world, early_stopped_reward_model(world, model, rng, (p, chosen, rejected), reward_steps))
    pairs = world.tokens_of(p, chosen, rejected)
    references = [l[p, y].astype(np.float32) for y in (chosen, rejected)]

    def place(law):
        """(divergence, gold reward) in each group."""
        both = np.stack([divergence(law, l), expectation(law, world.gold)])
        return {group: both[:, numbers].mean(axis=1).tolist() for group, numbers in groups.items()}

    def reinforced(policy, numbers, beta):
        prompts = [world.prompts[i] for i in numbers]
        return train_rlhf(TrainState(policy, rng), model, world.reward(rewards), prompts, sampling_steps, 16, 4, LONGEST, EOS,
                    beta, 2e-3)

    def directly(policy, beta):
        return train_dpo(TrainState(policy, rng), *pairs, *references, pair_steps, 64, beta, 5e-4)

    def agreement(numbers):
        p, first, second = world.comparisons(l, world.gold, rng, 4000, numbers)
        gold = world.gold[p, first] - world.gold[p, second]
        return ((rewards[p, first] > rewards[p, second]) == (gold > 0))[gold != 0].mean()

    found = {"reference": place(l), "agreement": {group: agreement(numbers) for group, numbers in groups.items()},
             "best for the reward model": [place(optimum(l, rewards, beta)[0]) for beta in ENVELOPE],
             "pi*": [place(optimum(l, world.gold, beta)[0]) for beta in ENVELOPE],
             COOLER: [place(world.log_distributions(model, t)) for t in TEMPERATURES]}
    for way in WAYS:
        found[way] = []
        for beta in betas:
            policy = model.copy()
            if way == WAYS[2]:
                training, steps = directly(policy, beta), pair_steps
            else:
                training, steps = reinforced(policy, all_asked if way == WAYS[0] else compared, beta), sampling_steps
            looks = steps // 4, steps // 2, steps
            found[way] += [place(world.log_distributions(policy)) for step, _ in enumerate(training, 1) if step in looks]
        row.say(f"seed {seed}, {way}: " + "  ".join("{1:.2f} at {0:.2f}".format(*x[DECIDED]) for x in found[way]))
    return found


def corners(seed, way, group):
    return frontier(*np.transpose([point[group] for point in (seed["reference"], *seed[way])]))


def at(seeds, way, group, kl):
    """Gold reward of each seed at this KL (or more of them)."""
    return np.array([np.interp(kl, *corners(s, way, group).T) for s in seeds])


def conclude(seeds, size):
    gold = {(way, group): at(seeds, way, group, NATS) for way in (*WAYS, *LEVELS) for group in GROUPS}
    lead = {way: gold[WAYS[0], DECIDED] - gold[way, DECIDED] for way in WAYS[1:]}
    error = {way: a.std(ddof=1) / len(a) ** 0.5 for way, a in lead.items()}
    over = [gold[way, DECIDED] - gold[COOLER, DECIDED] for way in WAYS]         # over what no label was needed for
    ahead, unsure = zip(*((a.mean(), a.std(ddof=1) / len(a) ** 0.5) for a in over))
    start = {group: [s["reference"][group][1] for s in seeds] for group in GROUPS}
    numbers = {f"gold at {NATS} nats, {group} questions: {way}": spread(a) for (way, group), a in gold.items()}
    numbers |= {f"gold of the reference, {group} questions": spread(a) for group, a in start.items()}
    agree = {group: [s["agreement"][group] for s in seeds] for group in GROUPS}
    numbers |= {f"the reward model orders as gold, {group} questions": spread(a) for group, a in agree.items()}
    numbers |= {f"{WAYS[0]} less {way}, {DECIDED}": spread(a) for way, a in lead.items()}
    numbers |= {f"{way} less {COOLER}, {DECIDED}": spread(a) for way, a in zip(WAYS, over)}
    table = [["", *(f"gold at {NATS} nats, {group}" for group in GROUPS),
              *(f"furthest KL, {group}" for group in GROUPS)]]
    for way in (*WAYS, *LEVELS):
        furthest = (shown([max(point[group][0] for point in s[way]) for s in seeds]) for group in GROUPS)
        table.append([way, *(shown(gold[way, group]) for group in GROUPS), *furthest])
    table.append(["reference", *(shown(start[group]) for group in GROUPS), *["0"] * len(GROUPS)])
    here = {way: shown(gold[way, DECIDED]) for way in (*WAYS, *LEVELS)}
    sentence = (f"On questions asked without comparisons, at {NATS} nats of KL, RLHF on all questions asked has gold "
                f"reward {here[WAYS[0]]}, RLHF on the compared ones {here[WAYS[1]]}, DPO on them {here[WAYS[2]]} "
                f"(reference {shown(start[DECIDED])}, best for the reward model {here[LEVELS[0]]}, pi* "
                f"{here[LEVELS[1]]}). The reference at a lower temperature, without any label, has {here[COOLER]}: "
                f"the three are ahead of it by {', '.join(f'{a:+.2f}' for a in ahead)} (s.e. "
                f"{', '.join(f'{e:.2f}' for e in unsure)}). The prompts without labels are worth "
                f"{lead[WAYS[1]].mean():+.2f} (s.e. {error[WAYS[1]]:.2f}), prompts and method together "
                f"{lead[WAYS[2]].mean():+.2f} (s.e. {error[WAYS[2]]:.2f}). The reward model orders "
                f"{shown(agree[DECIDED])} of the pairs of these questions as gold does, {shown(agree[GROUPS[0]])} of "
                "those compared. On questions never asked: "
                f"{', '.join(f'{way} {shown(gold[way, GROUPS[2]])}' for way in WAYS)}.")
    return Conclusion(verdict(all(a.mean() > 2 * error[way] for way, a in lead.items())), sentence, numbers, table)


def draw(figure, seeds, size):
    grid = np.linspace(0, 1.5, 61)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, group in zip(axes, GROUPS):
        for way, colour, style in ((LEVELS[1], COLOURS[5], "--"), (LEVELS[0], COLOURS[3], ":"),
                                   (COOLER, COLOURS[4], "-.")):
            axis.plot(grid, at(seeds, way, group, grid).mean(axis=0), style, color=colour, linewidth=1.5,
                      label={"pi*": "pi* of the gold reward: the envelope", COOLER: f"{way}: no label"}.get(way, way))
        for way, colour in zip(WAYS, COLOURS):
            curve(axis, grid, at(seeds, way, group, grid), way, colour, marker="")
        axis.axvline(NATS, color=COLOURS[5], linewidth=0.6)
        axis.set(title=f"Questions {group}", xlabel="exact KL to the reference (nats)")
    axes[0].set_ylabel("expected gold reward")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(11, 4.4)))
