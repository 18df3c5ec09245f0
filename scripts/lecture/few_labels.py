"""How much preference data the reward model and DPO need

Claim. A little preference data is enough, for the reward model and for DPO.

Test. An SFT model of 25,632 parameters answers 27 questions with one of 781 replies. Pairs of its replies to all
questions are compared by the Bradley-Terry model of the gold reward. n comparisons (30 to 3,000, a fifth of them
decides when to stop) are used in two ways. (i) A reward model is trained for 8 sqrt(n) steps; its best policy
pi_ref exp(r/beta) / Z is known in closed form. (ii) DPO is trained for as many steps; its learning rate, 5e-4, was
preferred to 1e-3 and 2e-3 in trials with two of the reference models. beta is 0.3 for both. The expected gold reward
and the KL to the reference are sums over all replies. The policy-gradient stage runs once, with the reward model of 300
comparisons, to compare it with the closed form. Levels: the reference; the reference at a lower temperature (down to
0.1; the best one with at most the KL of pi*), which needs no comparison; and pi* of the gold reward at the same beta.
The policies end at different KL, so the gain is also given as a share of the gain of pi* at that KL, and the reward
model is also read at the KL of DPO.

Rule. With 300 comparisons, which show at most 600 of the 21,087 possible outputs (27 questions, 781 replies each), both
the best policy for the reward model and DPO gain more than half of the gold reward that pi* of the gold reward gains
over the reference. Effects of a seed: the two shares; margin 0.5.

Limits. Whether 300 is little depends on how much there is to learn: here the correct answer, courtesy and brevity for
27 questions of one kind. A large part of the gain is sharpening: the reference at a temperature near 0.25 has about two
thirds of the gain of pi* without any comparison, more than 300 comparisons give either method in the mean of the seeds.
So half of the gain does not show that the preferences were learned. (This temperature is selected with the knowledge of
the KL of pi*.) The policy of the reward model is the exact optimum and DPO trains a network: an ideal optimiser is
compared with a real one. DPO and the policy gradient are compared on equal terms. People are consistent except for the
noise of the Bradley-Terry model, and all comparisons are of replies of the reference.

Source. Ouyang et al. 2022, arXiv:2203.02155; Rafailov et al. 2023, arXiv:2305.18290; Bradley and Terry 1952.

Figure. Left: expected gold reward against the number of comparisons (log axis), one line for the best policy for the
reward model and one for DPO, dotted lines for pi* and for policies without comparisons; right: the same policies as
points of gold reward against KL, beside the curves of pi* and of the reference at lower temperatures.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import early_stopped_reward_model, finetune_on_replies, reward_table

# isort: split
import numpy as np

from common.early_stopping import keep_best
from common.frontier import frontier
from minilm.exact.enumerable import divergence, expectation, optimum
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from worlds.replies import EOS, LONGEST, MODEL, ReplyWorld

LITTLE, ENOUGH, BETA = 300, 0.5, 0.3
ENVELOPE = tuple(np.geomspace(5, 0.05, 30))
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)    # of the reference: no labels
METHODS = ("reward model", "DPO")
KINDS = ("gold", "KL", "share", "share at equal KL")
SIZES = {"quick": {"seeds": 3, "words": 2, "tuning": 10, "comparisons": (30, 300), "most": 2, "rl_steps": 1},
         "default": {"seeds": 8, "words": 3, "tuning": 300, "comparisons": (30, 100, 300, 1000, 3000),
                     "most": 10**6, "rl_steps": 100}}


def fit_by_dpo(world, model, reference, rng, pairs, steps):
    """log pi (P,Y) after DPO on comparisons (p, chosen, rejected), stopped by the loss on a fifth of them."""
    policy = model.copy()
    fifth = len(pairs[0]) // 5
    p, *replies = pairs
    prompts, chosen, rejected = world.tokens_of(*pairs)
    references = [reference[p, y].astype(policy.dtype) for y in replies]

    def held_out_loss():
        log_pi = reference_log_probs(policy, prompts[:fifth] * 2, chosen[:fifth] + rejected[:fifth])
        delta = (log_pi[:fifth] - references[0][:fifth]) - (log_pi[fifth:] - references[1][:fifth])
        return np.logaddexp(0, -BETA * delta).mean()

    rest = [part[fifth:] for part in (prompts, chosen, rejected, *references)]
    keep_best(train_dpo(TrainState(policy, rng), *rest, steps, 64, BETA, 5e-4), policy, held_out_loss)
    return world.log_distributions(policy)


def measure(experiment, seed, words, tuning, comparisons, most, rl_steps):
    world = ReplyWorld(words)
    rng = np.random.default_rng(seed)
    model, _ = experiment.trained("replies", seed, MODEL, finetune_on_replies, words=words, steps=tuning)
    reference = world.log_distributions(model)

    def point(log_pi):
        return divergence(log_pi, reference).mean(), expectation(log_pi, world.gold).mean()

    def corners(rewards):
        """The frontier of gold reward against KL of the best policies for these rewards."""
        best = [point(optimum(reference, rewards, beta)[0]) for beta in ENVELOPE]
        return frontier(*np.transpose([point(reference), *best]))

    envelope = corners(world.gold)
    start = expectation(reference, world.gold).mean()
    best_kl, best = point(optimum(reference, world.gold, BETA)[0])
    results = {"reference": start, "best": best, "best's KL": best_kl, "envelope": envelope,
               "lower temperature": [point(world.log_distributions(model, t)) for t in TEMPERATURES]}

    def record(name, kl, gold):
        """Gold reward, KL, and the gain as a share of that of pi*: at the same beta, and at the same KL."""
        at_equal_kl = np.interp(kl, *envelope.T) - start
        for kind, value in zip(KINDS, (gold, kl, (gold - start) / (best - start), (gold - start) / at_equal_kl)):
            results.setdefault(f"{name}: {kind}", []).append(value)

    pairs = world.comparisons(reference, world.gold, rng, max(comparisons))
    for n in comparisons:
        few = [part[:n] for part in pairs]
        steps = min(most, round(8 * n ** 0.5))
        rewards = reward_table(world, early_stopped_reward_model(world, model, rng, few, steps))
        record("reward model", *point(optimum(reference, rewards, BETA)[0]))
        kl, gold = point(fit_by_dpo(world, model, reference, rng, few, steps))
        record("DPO", kl, gold)
        record("reward model at equal KL", kl, np.interp(kl, *corners(rewards).T))
        if n == LITTLE:
            policy = model.copy()
            for _ in train_rlhf(TrainState(policy, rng), model, world.reward(rewards), world.prompts, rl_steps, 16, 4,
                                LONGEST, EOS, BETA, 2e-3):
                pass
            record("policy gradient", *point(world.log_distributions(policy)))
        experiment.say(f"seed {seed}, {n} comparisons: reward model {results['reward model: gold'][-1]:.2f}, "
                       f"DPO {gold:.2f}")
    return results


def best_lower_temperature(s):
    """The reference at the lower temperature with the most gold reward and at most the KL of pi*, by KINDS."""
    allowed = [(gold, kl, t) for t, (kl, gold) in zip(TEMPERATURES, s["lower temperature"]) if kl <= s["best's KL"]]
    gold, kl, t = max(allowed)
    start = s["reference"]
    envelope = np.interp(kl, *np.transpose(s["envelope"]))                      # the gold reward of pi* at that KL
    return {"gold": gold, "KL": kl, "share": (gold - start) / (s["best"] - start),
            "share at equal KL": (gold - start) / (envelope - start) if envelope > start else 0.0, "temperature": t}


def conclude(seeds, size):
    comparisons = size["comparisons"]
    at = comparisons.index(LITTLE)
    lower = {kind: np.array([best_lower_temperature(s)[kind] for s in seeds]) for kind in (*KINDS, "temperature")}

    def values(name, i=at):
        return np.array([s[name][i] for s in seeds])

    share = {method: values(f"{method}: share") for method in METHODS}
    rule = [Comparison(f"share of the gain of pi* of the gold reward, {method}, {LITTLE} "
                       f"comparisons", share[method], above=ENOUGH)
            for method in METHODS]
    findings = [Comparison(f"share of the gain of pi*, {method} minus the reference at a lower temperature (no "
                           f"comparisons), {n:,} comparisons", values(f"{method}: share", i) - lower["share"], above=0)
                for i, n in ((at, LITTLE), (len(comparisons) - 1, comparisons[-1])) for method in METHODS]
    findings.append(Comparison(f"gold reward at the KL of DPO, reward model minus DPO, {LITTLE} comparisons",
                               values("reward model at equal KL: gold") - values("DPO: gold"), above=0))
    numbers = {name: spread(s[name] for s in seeds) for name in ("reference", "best", "best's KL")}
    numbers |= {f"{name}: {kind}, {n} comparisons": spread(values(f"{name}: {kind}", i))
                for name in (*METHODS, "reward model at equal KL") for kind in KINDS for i, n in enumerate(comparisons)}
    numbers |= {f"policy gradient: {kind}": spread(values(f"policy gradient: {kind}", 0)) for kind in KINDS}
    numbers |= {f"reference at a lower temperature: {kind}": spread(lower[kind]) for kind in lower}
    table = [["comparisons", *(f"{method}: {kind}" for method in METHODS for kind in KINDS),
              "reward model at equal KL: gold"]]
    table += [[f"{n}", *(mean_range(values(f"{method}: {kind}", i)) for method in METHODS for kind in KINDS),
               mean_range(values("reward model at equal KL: gold", i))] for i, n in enumerate(comparisons)]
    table.append(["none: the reference", mean_range([s["reference"] for s in seeds]), *[""] * (2 * len(KINDS))])
    table.append(["none: lower temperature", *(mean_range(lower[kind]) for kind in KINDS), *[""] * (len(KINDS) + 1)])
    table.append(["gold known: pi*", *(mean_range([s[name] for s in seeds]) for name in ("best", "best's KL")),
                  *[""] * (2 * len(KINDS) - 1)])
    words = (f"With {LITTLE} comparisons the best policy for the reward model gains "
             f"{mean(share['reward model'])} of the gain of pi* of the gold reward, and DPO {mean(share['DPO'])}; "
             f"the reference at a lower temperature gains {mean(lower['share'])} without any comparison.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    reward, points = figure.subplots(1, 2)
    comparisons = size["comparisons"]
    grid = np.linspace(0, 2.5, 60)
    envelope = np.mean([np.interp(grid, *np.transpose(s["envelope"])) for s in seeds], axis=0)
    points.plot(grid, envelope, "--", color=COLOURS[5], linewidth=1.5, label="pi* of the gold reward, every beta")
    for method, colour, marker, label in zip(METHODS, COLOURS, "os", ("best policy for the reward model", "DPO")):
        curve(reward, comparisons, [s[f"{method}: gold"] for s in seeds], label, colour, marker)
        x, y = (np.array([s[f"{method}: {kind}"] for s in seeds]) for kind in ("KL", "gold"))
        for i in range(len(comparisons)):
            points.scatter(x[:, i], y[:, i], s=8 + 16 * i, color=colour, marker=marker, alpha=0.6, linewidths=0)
    for x, y, marker, colour, label in (
            ("policy gradient: KL", "policy gradient: gold", "x", COLOURS[3],
             f"policy gradient, reward model of {LITTLE}"),
            ("best's KL", "best", "*", COLOURS[2], f"pi* of the gold reward, beta {BETA}"),
            (None, "reference", "D", COLOURS[5], "reference")):
        xy = ([np.ravel(s[name])[0] if name else 0.0 for s in seeds] for name in (x, y))
        points.scatter(*xy, marker=marker, s=30, color=colour, label=label, zorder=3)
    level(reward, np.mean([s["best"] for s in seeds]), f"pi* of the gold reward, beta {BETA}")
    level(reward, np.mean([s["reference"] for s in seeds]), "the reference: no comparisons", below=True)
    level(reward, np.mean([best_lower_temperature(s)["gold"] for s in seeds]), 
          "the reference at a lower temperature: no comparisons", side="left")
    path = np.mean([s["lower temperature"] for s in seeds], axis=0)
    points.plot(*path.T, "-.", color=COLOURS[4], linewidth=1.5, label="the reference at temperatures from 1 to 0.1")
    reward.set(title=f"Gold reward, beta = {BETA}", xscale="log", xlabel="comparisons", ylabel="expected gold reward")
    reward.set_xticks(comparisons, [f"{n:,}" for n in comparisons])
    reward.minorticks_off()
    points.set(title="Against KL (larger: more comparisons)", xlabel="exact KL to the reference (nats)",
               ylabel="expected gold reward")
    handles, labels = (sum(both, []) for both in zip(*(axis.get_legend_handles_labels() for axis in (reward, points))))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10, 4.8)))
