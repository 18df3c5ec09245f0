"""RLHF and DPO compared: the same pairs, the same reference

Claim. RLHF and DPO aim at the same policy pi*, so from the same comparisons and the same reference they end in the
same place on reward against KL; and DPO costs less, for it needs no reward model and no samples.

Test. A transformer of 25,632 parameters is instructed with 4,000 demonstrations; 2,000 pairs of its replies to 9
questions are compared by a Bradley-Terry judge of the gold reward. RLHF: a reward model is fitted to these pairs (300
steps of 64), then a policy for each of four beta (100 steps of 16 x 4 samples); nothing but the reward model speaks
of the pairs. DPO: a policy for each beta from the pairs (300 steps of 64). All 781 replies are listed: gold reward
and KL are sums. Every policy on the way counts, and of each method's points the frontier is taken (the upper concave
hull: mixtures of two policies reach it), read at equal KL. Beside them pi* of the gold reward (nobody can do better),
pi* of the reward model (where its RL would end), the best of n replies by the reward model, and what needs no label:
the reference itself, sampled colder (temperatures from 1 to 0.1). Learning rates and steps were chosen on another
seed, DPO's among four. Costs: reply tokens through a model (a backward pass counts as two more), samples, the peak of
memory in a step, CPU seconds.

Refuted. If at a KL of 1 nat the two are not within 0.1 of gold reward of each other, by the mean over the seeds and
two standard errors around it; or if one policy costs DPO more tokens than RLHF.

Limits. (Before a review the rule was that neither is ahead with every seed, which noise alone could bring about.) Both
chose their best among the same number of beta by the gold reward, which nobody has in earnest: it is what
could be had. One model size, one number of pairs, one optimiser; questions and replies are few enough for RL to visit
all of them. With endless pairs and exact gradients both reach pi* (tests/test_exact_optimum.py): what differs is not
the aim but what a few hundred steps make of it; dpo.py shows where DPO's reward goes, onto replies that are in no
pair. The half about cost follows from the numbers of steps, which we chose. Gold above pi* of the reward model is no
better optimum: RL stopped before that model was exploited.

Source. Rafailov et al. 2023, arXiv:2305.18290 (DPO; their frontier is figure 2); Xu et al. 2024, arXiv:2404.10719
(the same question for large models: PPO ahead); the concave hull: scripts/lecture/common/frontier.py.
"""

import sys
import time
import tracemalloc

from common.experiment import COLOURS, Conclusion, curve, run, shown, spread, verdict
from common.recipes import reward_table, sft_model

import numpy as np

from minilm.evaluate import predicted_rewards
from minilm.model import RewardModel
from minilm.stages.dpo import train_dpo, reference_log_probs
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.exact.enumerable import best_of_n, divergence, expectation, optimum
from common.frontier import frontier
from worlds.replies import EOS, LONGEST, ReplyWorld

METHODS = ("RLHF", "DPO")
LEVELS, DECIDES = (0.25, 0.5, 1.0, 2.0), 1.0            # nats at which frontiers are read; the one of the rule
SAME = 0.1                                              # of gold reward: as good as the same place
ENVELOPE = tuple(np.geomspace(5, 0.05, 30))
COLDER, TEMPERATURES = "the reference, colder", tuple(np.linspace(1, 0.1, 19))
DRAWS = tuple(2 ** k for k in range(8))
PAIRS, BATCH, PROMPTS, SAMPLES = 2000, 64, 16, 4
# looks: policies on the way of each that are looked at
SIZES = {"quick": {"seeds": 3, "tuning": 5, "pair_steps": 3, "sampling_steps": 2, "betas": [0.5, 0.1], "looks": 1},
         "default": {"seeds": 5, "tuning": 300, "pair_steps": 300, "sampling_steps": 100,
                     "betas": [1.0, 0.5, 0.2, 0.1], "looks": 5}}


def measure(row, seed, tuning, pair_steps, sampling_steps, betas, looks, dpo_rate=3e-4):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=2)
    model = sft_model(world, rng, tuning)
    reference = world.log_distributions(model)
    p, chosen, rejected = world.comparisons(reference, world.gold, rng, PAIRS)
    pairs = world.tokens_of(p, chosen, rejected)

    def place(l):
        return [divergence(l, reference).mean(), expectation(l, world.gold).mean()]

    def fit(steps):
        reward_model = RewardModel(model.copy(), rng)
        for _ in train_reward_model(TrainState(reward_model, rng), *pairs, steps, BATCH, 1e-3):
            pass
        return reward_model

    def reinforced(policy, reward_model, frozen, beta, steps):
        def reward(prompts, responses):
            return predicted_rewards(reward_model, prompts, responses)
        return train_rlhf(TrainState(policy, rng), frozen, reward, world.prompts, steps, PROMPTS, SAMPLES, LONGEST, EOS, beta,
                    2e-3)

    def directly(policy, log_probs, beta, steps):
        return train_dpo(TrainState(policy, rng), *pairs, *log_probs, steps, BATCH, beta, dpo_rate)

    # What each needs: memory in its first steps, with all that it must hold; seconds of training, without looking.
    began = time.process_time()
    reward_model = fit(pair_steps)
    seconds = {"reward model": time.process_time() - began}
    began = time.process_time()
    log_probs = [reference_log_probs(model, pairs[0], replies) for replies in pairs[1:]]
    seconds["reference log-probs"] = time.process_time() - began
    memory = {"reward model": peak(lambda: fit(2)),
              "RLHF": peak(lambda: list(reinforced(model.copy(), fit(0), model.copy(), 0.1, 2))),
              "DPO": peak(lambda: list(directly(model.copy(), [a.copy() for a in log_probs], 0.1, 2)))}

    learned = reward_table(world, reward_model)
    found = {"reference": place(reference), "memory": memory, "seconds": seconds,
             "pi*": [place(optimum(reference, world.gold, beta)[0]) for beta in ENVELOPE],
             "pi* of the reward model": [place(optimum(reference, learned, beta)[0]) for beta in ENVELOPE],
             COLDER: [place(world.log_distributions(model, t)) for t in TEMPERATURES],
             "best of n": [place(best_of_n(reference, learned, n)) for n in DRAWS]}
    for method, steps in zip(METHODS, (sampling_steps, pair_steps)):
        found[method], seconds[method], lengths = [], 0.0, []
        for beta in betas:
            policy, way = model.copy(), []
            began = time.process_time()
            training = (reinforced(policy, reward_model, model, beta, steps) if method == "RLHF" else
                        directly(policy, log_probs, beta, steps))
            for step, metrics in enumerate(training, 1):
                lengths.append(metrics.get("completions/mean_length", 0))
                if step % (steps // looks) == 0:
                    seconds[method] += (time.process_time() - began) / len(betas)
                    way.append(place(world.log_distributions(policy)))
                    began = time.process_time()
            found[method].append(way)
        ends = [way[-1] for way in found[method]]
        row.say(f"seed {seed}, {method}: gold at KL " + "  ".join(f"{gold:.2f} at {kl:.2f}" for kl, gold in ends))
        if method == "RLHF":
            drawn = np.mean(lengths) * PROMPTS * SAMPLES * sampling_steps
    compared = np.mean([len(reply) for replies in pairs[1:] for reply in replies])
    fitted = 2 * BATCH * pair_steps * compared
    # Trained: forward and backward, 3. Sampled replies are drawn, scored by the reference, rewarded, trained on.
    found["tokens"] = {"reward model": 3 * fitted, "RLHF": (3 + 3) * drawn,
                       "reference log-probs": 2 * PAIRS * compared, "DPO": 3 * fitted}
    return found


def peak(function):
    """The most bytes of arrays that function() held at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def corners(seed, method):
    """The frontier of all policies of a method, the reference among them."""
    points = [seed["reference"], *(np.reshape(seed[method], (-1, 2)))]
    return frontier(*np.transpose(points))


def at(seeds, method, k):
    return np.array([np.interp(k, *corners(s, method).T) for s in seeds])


def total(seed, kind, method):
    """One policy's cost: RLHF pays for the reward model first, DPO for the reference's log-probs."""
    return seed[kind][method] + seed[kind]["reward model" if method == "RLHF" else "reference log-probs"]


def conclude(seeds, size):
    ahead = {k: at(seeds, "RLHF", k) - at(seeds, "DPO", k) for k in LEVELS}
    error = {k: np.std(a, ddof=1) / len(a) ** 0.5 for k, a in ahead.items()}
    tokens, seconds = ({method: [total(s, kind, method) for s in seeds] for method in METHODS}
                       for kind in ("tokens", "seconds"))
    memory = {"RLHF": [max(s["memory"]["RLHF"], s["memory"]["reward model"]) / 2 ** 20 for s in seeds],
              "DPO": [s["memory"]["DPO"] / 2 ** 20 for s in seeds]}
    together = abs(ahead[DECIDES].mean()) + 2 * error[DECIDES] <= SAME
    cheaper = all(d <= r for d, r in zip(tokens["DPO"], tokens["RLHF"]))
    others = ("pi*", "pi* of the reward model", "best of n", COLDER)
    table = [["", *(f"gold at KL {k}" for k in LEVELS), "thousand reply tokens", "samples", "peak MiB", "CPU s"]]
    for method in METHODS:
        samples = PROMPTS * SAMPLES * size["sampling_steps"] * (method == "RLHF")
        table.append([method, *(shown(at(seeds, method, k)) for k in LEVELS), f"{np.mean(tokens[method]) / 1000:.0f}",
                      f"{samples}", f"{np.mean(memory[method]):.1f}", f"{np.mean(seconds[method]):.1f}"])
    table.append(["RLHF - DPO (s.e.)", *(f"{a.mean():+.2f} ({error[k]:.2f})" for k, a in ahead.items()), *[""] * 4])
    for name in others:
        table.append([name, *(shown(at(seeds, name, k)) for k in LEVELS), *[""] * 4])
    for i, beta in enumerate(size["betas"]):
        means = {method: np.mean([s[method][i][-1] for s in seeds], axis=0) for method in METHODS}
        ends = [f"{method} {gold:.2f} at KL {kl:.2f}" for method, (kl, gold) in means.items()]
        table.append([f"ends at beta {beta}", *ends, *[""] * (len(LEVELS) + 2)])
    numbers = {f"gold reward at KL {k}, {name}": spread(at(seeds, name, k))
               for name in (*METHODS, *others) for k in LEVELS}
    numbers |= {f"RLHF - DPO at KL {k}": spread(a) for k, a in ahead.items()}
    numbers |= {f"reply tokens of one policy, {method}": spread(tokens[method]) for method in METHODS}
    numbers |= {f"CPU seconds of one policy, {method}": spread(seconds[method]) for method in METHODS}
    numbers |= {f"peak MiB, {method}": spread(memory[method]) for method in METHODS}
    mean, agreed = ahead[DECIDES].mean(), max((ahead[DECIDES] > 0).sum(), (ahead[DECIDES] < 0).sum())
    has = {name: shown(at(seeds, name, DECIDES)) for name in (*METHODS, "pi*", COLDER)}
    again = np.mean([s["tokens"]["RLHF"] / s["tokens"]["DPO"] for s in seeds])
    winner = "RLHF" if mean > 0 else "DPO"
    cost = np.mean(tokens["DPO"]) / np.mean(tokens["RLHF"])
    sentence = (f"At {DECIDES:g} nat of KL RLHF has {has['RLHF']} of gold reward and DPO {has['DPO']}, where pi* has "
                f"{has['pi*']}: {winner} is ahead by {abs(mean):.2f} (s.e. {error[DECIDES]:.2f}), with {agreed} of "
                f"{len(seeds)} seeds. Without any label the reference, merely colder, has {has[COLDER]}. For one "
                f"policy DPO computes {cost:.2f} of RLHF's tokens and draws no sample; the reward model and the "
                f"reference's log-probs once paid, RLHF's next beta costs {again:.2f} of DPO's.")
    return Conclusion(verdict(together and cheaper), sentence, numbers, table)


def draw(figure, seeds, size):
    whole, gap = figure.subplots(1, 2, width_ratios=(1.5, 1))
    grid = np.linspace(0, 3, 61)

    def read(name):
        return np.array([np.interp(grid, *corners(s, name).T) for s in seeds])

    for name, label, colour, style in (("pi*", "pi* of the gold reward: the envelope", COLOURS[5], "--"),
                                       ("pi* of the reward model", "pi* of the reward model", COLOURS[3], ":"),
                                       ("best of n", "best of n by the reward model", COLOURS[2], "-."),
                                       (COLDER, f"{COLDER}: no labels", COLOURS[4], (0, (5, 1)))):
        whole.plot(grid, read(name).mean(axis=0), color=colour, linewidth=1.5, linestyle=style, label=label)
    for method, colour, marker in zip(METHODS, COLOURS, "os"):
        curve(whole, grid, read(method), f"{method}, frontier", colour, marker="")
        ends = np.mean([[way[-1] for way in s[method]] for s in seeds], axis=0)
        inside = ends[ends[:, 0] <= grid[-1]]
        whole.plot(*inside.T, marker, color=colour, markersize=5, label=f"{method}, where each beta ends")
    whole.set(title=f"Gold reward against KL ({PAIRS:,} pairs)", xlabel="exact KL to the reference (nats per reply)",
              ylabel="expected gold reward")
    whole.legend(loc="lower right", fontsize=8)
    gap.axhline(0, color=COLOURS[5], linewidth=1)
    curve(gap, grid, read("RLHF") - read("DPO"), "RLHF - DPO, each seed and mean", COLOURS[0], marker="")
    gap.set(title="Who is ahead at equal KL", xlabel="exact KL (nats per reply)", ylabel="gold reward, RLHF - DPO")
    gap.legend(loc="best", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9.6, 4.4)))
