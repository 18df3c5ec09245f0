"""A little preference data is enough, for the reward model and for DPO

Claim. A little preference data is enough, for the reward model and for DPO.

Test. An instructed transformer of 25,632 parameters answers 27 questions with one of 781 replies; pairs of its replies
to all of them are compared by people who choose by the Bradley-Terry law of the gold reward. From n comparisons (30 to
3,000; a fifth chooses where to stop) come (i) a reward model, 8 sqrt(n) steps, and the best policy for it, pi_ref
exp(r/beta) / Z, in closed form; and (ii) DPO, as many steps on the same comparisons, its learning rate, 5e-4,
preferred to 1e-3 and 2e-3 after trials with two of the reference models; beta = 0.3 for both. Expected gold reward and
KL divergence from the reference are sums over all replies. The policy-gradient stage is run once, with the reward
model of 300 comparisons, to see whether it gets to where the closed form is. Levels: the reference, and the
same at a lower temperature (down to 0.1, the best at which it is no further in KL than pi*), which need no comparison;
and pi* for the gold reward at the same beta, which knows everything. Because they end at different KL, the gain is
also given as a share of what pi* gains at that KL, and the reward model is read at DPO's.

Refuted. A little is 300 comparisons, which show at most 600 of the 21,087 outputs; enough is half of what pi* gains on
the reference. Refuted if either way, with any seed, gains less.

Limits. How much is a little depends on how much there is to learn: here a right answer, courtesy and brevity, of 27
questions of one kind. Much of what is gained is sharpening: the reference at a temperature near a quarter has a good
two thirds of pi*'s gain without any comparison, more than 300 bring either way on the mean of the seeds. So half of
the gain does not show that what people want was learned. (The temperature is chosen knowing pi*'s KL.) The reward
model's policy is the exact optimum, DPO's is a trained network: an ideal optimiser against a real one; like with like
is DPO and the policy gradient. People are consistent, but for the noise of the Bradley-Terry law; and the comparisons
are of the reference's own replies.

Source. Ouyang et al. 2022, arXiv:2203.02155; Rafailov et al. 2023, arXiv:2305.18290; Bradley and Terry 1952.
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import early_stopped_reward_model, finetune_on_replies, reward_table

import numpy as np

from common.early_stopping import keep_best
from minilm.stages.dpo import train_dpo, reference_log_probs
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.exact.enumerable import divergence, expectation, optimum
from common.frontier import frontier
from worlds.replies import EOS, LONGEST, MODEL, ReplyWorld

LITTLE, ENOUGH, BETA = 300, 0.5, 0.3
ENVELOPE = tuple(np.geomspace(5, 0.05, 30))
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)    # of the reference: no labels
SIZES = {"quick": {"seeds": 3, "asked": 2, "instruct": 10, "comparisons": (30, 300), "most": 2, "rl_steps": 1},
         "default": {"seeds": 4, "asked": 3, "instruct": 300, "comparisons": (30, 100, 300, 1000, 3000),
                     "most": 10**6, "rl_steps": 100}}


def fit_directly(world, model, l, rng, pairs, steps):
    """The policy of DPO on the comparisons pairs: log pi (P,N)."""
    policy, fifth = model.copy(), len(pairs[0]) // 5
    (p, *replies), (prompts, chosen, rejected) = pairs, world.tokens_of(*pairs)
    references = [l[p, y].astype(np.float32) for y in replies]

    def held_out_loss():
        now = reference_log_probs(policy, prompts[:fifth] * 2, chosen[:fifth] + rejected[:fifth])
        delta = (now[:fifth] - references[0][:fifth]) - (now[fifth:] - references[1][:fifth])
        return np.logaddexp(0, -BETA * delta).mean()

    rest = [part[fifth:] for part in (prompts, chosen, rejected, *references)]
    keep_best(train_dpo(TrainState(policy, rng), *rest, steps, 64, BETA, 5e-4), policy, held_out_loss)
    return world.log_distributions(policy)


def measure(row, seed, asked, instruct, comparisons, most, rl_steps):
    world, rng = ReplyWorld(asked), np.random.default_rng(seed)
    model, _ = row.trained("replies", seed, MODEL, finetune_on_replies, words=asked, steps=instruct)
    l = world.log_distributions(model)

    def place(law):
        return divergence(law, l).mean(), expectation(law, world.gold).mean()

    def corners(rewards):
        """The frontier of gold reward against KL that the best policies for these rewards make."""
        return frontier(*np.transpose([place(l), *(place(optimum(l, rewards, beta)[0]) for beta in ENVELOPE)]))

    known, start = corners(world.gold), expectation(l, world.gold).mean()
    best_kl, best = place(optimum(l, world.gold, BETA)[0])
    found = {"reference": start, "best": best, "best's KL": best_kl, "envelope": known,
             "cooler": [place(world.log_distributions(model, t)) for t in TEMPERATURES]}

    def note(name, kl, gold):
        """Gold, KL, and how the gain compares with pi*'s: at the same beta, and at the same KL."""
        for what, value in (("gold", gold), ("KL", kl), ("share", (gold - start) / (best - start)),
                            ("share at equal KL", (gold - start) / (np.interp(kl, *known.T) - start))):
            found.setdefault(f"{name}: {what}", []).append(value)

    pairs = world.comparisons(l, world.gold, rng, max(comparisons))
    for n in comparisons:
        few, steps = [part[:n] for part in pairs], min(most, round(8 * n ** 0.5))
        rewards = reward_table(world, early_stopped_reward_model(world, model, rng, few, steps))
        note("reward model", *place(optimum(l, rewards, BETA)[0]))
        kl, gold = place(fit_directly(world, model, l, rng, few, steps))
        note("DPO", kl, gold)
        note("reward model at equal KL", kl, np.interp(kl, *corners(rewards).T))
        if n == LITTLE:
            policy = model.copy()
            for _ in train_rlhf(TrainState(policy, rng), model, world.reward(rewards), world.prompts, rl_steps, 16, 4,
                          LONGEST, EOS, BETA, 2e-3):
                pass
            note("policy gradient", *place(world.log_distributions(policy)))
        row.say(f"seed {seed}, {n} comparisons: reward model {found['reward model: gold'][-1]:.2f}, DPO {gold:.2f}")
    return found


WAYS = ("reward model", "DPO")


def cooled(s):
    """The reference at that lower temperature which has the most gold reward, no further in KL than pi*."""
    allowed = [(gold, kl, t) for t, (kl, gold) in zip(TEMPERATURES, s["cooler"]) if kl <= s["best's KL"]]
    (gold, kl, t), start = max(allowed), s["reference"]
    there = np.interp(kl, *np.transpose(s["envelope"]))                         # what pi* has at that KL
    return {"gold": gold, "KL": kl, "share": (gold - start) / (s["best"] - start),
            "share at equal KL": (gold - start) / (there - start) if there > start else 0.0, "temperature": t}


def conclude(seeds, size):
    comparisons, at = size["comparisons"], size["comparisons"].index(LITTLE)
    shares = {way: [s[f"{way}: share"][at] for s in seeds] for way in WAYS}
    holds = all(share >= ENOUGH for way in WAYS for share in shares[way])
    kinds = ("gold", "KL", "share", "share at equal KL")
    numbers = {name: spread(s[name] for s in seeds) for name in ("reference", "best", "best's KL")}
    numbers |= {f"{way}: {kind}, {n} comparisons": spread(s[f"{way}: {kind}"][i] for s in seeds)
                for way in (*WAYS, "reward model at equal KL") for kind in kinds for i, n in enumerate(comparisons)}
    numbers |= {f"policy gradient: {kind}": spread(s[f"policy gradient: {kind}"][0] for s in seeds) for kind in kinds}
    free = {kind: [cooled(s)[kind] for s in seeds] for kind in (*kinds, "temperature")}
    numbers |= {f"reference at a lower temperature: {kind}": spread(values) for kind, values in free.items()}
    table = [["comparisons", *(f"{way}: {kind}" for way in WAYS for kind in kinds), "reward model at equal KL: gold"]]
    table += [[f"{n}", *(shown([s[f"{way}: {kind}"][i] for s in seeds]) for way in WAYS for kind in kinds),
               shown([s["reward model at equal KL: gold"][i] for s in seeds])] for i, n in enumerate(comparisons)]
    table.append(["none: the reference", shown([s["reference"] for s in seeds]), *[""] * (2 * len(kinds))])
    table.append(["none: the same, cooler", *(shown(free[kind]) for kind in kinds), *[""] * (len(kinds) + 1)])
    table.append(["all known: pi*", *(shown([s[name] for s in seeds]) for name in ("best", "best's KL")),
                  *[""] * (2 * len(kinds) - 1)])

    def now(name, i=at):
        return shown([s[name][i] for s in seeds])

    def first(bars):
        """From how many comparisons on every seed has at least its share of pi*'s gain."""
        found = []
        for way in WAYS:
            passed = (np.array([s[f"{way}: share"] for s in seeds]) >= np.reshape(bars, (-1, 1))).all(axis=0)
            lasting = [f"{n:,}" for i, n in enumerate(comparisons) if passed[i:].all()]
            found.append(f"{lasting[0] if lasting else 'more than were tried'} ({way})")
        return ", ".join(found)

    known, start = (shown([s[name] for s in seeds]) for name in ("best", "reference"))
    sentence = (f"With {LITTLE} comparisons the best policy for the reward model gains {now('reward model: share')} "
                f"of what pi* gains at beta {BETA}, DPO {now('DPO: share')}; with {comparisons[-1]:,}, "
                f"{now('reward model: share', -1)} and {now('DPO: share', -1)}. The reference at a lower temperature "
                f"({shown(free['temperature'])}), without any comparison, gains {shown(free['share'])}: gold "
                f"{shown(free['gold'])} at KL {shown(free['KL'])}. Every seed has as much from this number of "
                "comparisons on: " + first(free["share"]) + f". In gold reward, with {LITTLE}: "
                f"{now('reward model: gold')} at KL {now('reward model: KL')}, DPO {now('DPO: gold')} at KL "
                f"{now('DPO: KL')} (reference {start}, pi* {known}). At DPO's KL the reward model of {LITTLE} has "
                f"gold {now('reward model at equal KL: gold')}. Every seed has half of the gain "
                "from this number on: "
                + first(ENOUGH) + f". The policy gradient gets to gold {now('policy gradient: gold', 0)} at KL "
                f"{now('policy gradient: KL', 0)}.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    (reward, places), comparisons = figure.subplots(1, 2), size["comparisons"]
    grid = np.linspace(0, 2.5, 60)
    envelope = np.mean([np.interp(grid, *np.transpose(s["envelope"])) for s in seeds], axis=0)
    places.plot(grid, envelope, "--", color=COLOURS[5], linewidth=1.5, label="pi* of the gold reward, every beta")
    for way, colour, marker, label in zip(WAYS, COLOURS, "os", ("best policy for the reward model", "DPO")):
        curve(reward, comparisons, [s[f"{way}: gold"] for s in seeds], label, colour, marker)
        x, y = (np.array([s[f"{way}: {kind}"] for s in seeds]) for kind in ("KL", "gold"))
        for i in range(len(comparisons)):
            places.scatter(x[:, i], y[:, i], s=8 + 16 * i, color=colour, marker=marker, alpha=0.6, linewidths=0)
    for x, y, marker, colour, label in (
            ("policy gradient: KL", "policy gradient: gold", "x", COLOURS[3],
             f"policy gradient, reward model of {LITTLE}"),
            ("best's KL", "best", "*", COLOURS[2], f"pi* of the gold reward, beta {BETA}"),
            (None, "reference", "D", COLOURS[5], "reference")):
        points = ([np.ravel(s[name])[0] if name else 0.0 for s in seeds] for name in (x, y))
        places.scatter(*points, marker=marker, s=30, color=colour, label=label, zorder=3)
    level(reward, np.mean([s["best"] for s in seeds]), f"pi* of the gold reward, beta {BETA}")
    level(reward, np.mean([s["reference"] for s in seeds]), "the reference: no comparisons")
    level(reward, np.mean([cooled(s)["gold"] for s in seeds]), "the reference, cooler: no comparisons",
          side="left")
    path = np.mean([s["cooler"] for s in seeds], axis=0)
    places.plot(*path.T, "-.", color=COLOURS[4], linewidth=1.5, label="the reference at temperatures from 1 to 0.1")
    reward.set(title=f"Gold reward, beta = {BETA}", xscale="log", xlabel="comparisons", ylabel="expected gold reward")
    reward.set_xticks(comparisons, [f"{n:,}" for n in comparisons])
    reward.minorticks_off()
    places.set(title="The same against KL (larger: more comparisons)", xlabel="exact KL to the reference (nats)",
               ylabel="expected gold reward")
    handles, labels = (sum(both, []) for both in zip(*(axis.get_legend_handles_labels() for axis in (reward, places))))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10, 4.8)))
