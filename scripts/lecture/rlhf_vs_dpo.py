"""RLHF and DPO compared: the same pairs, the same reference

Claim. RLHF and DPO aim at the same policy, pi* of the reward that the preferences follow, so from the same comparisons
and the same reference they reach the same gold reward at the same KL; and DPO costs less, because it needs no reward
model and no samples.

Test. A transformer of 25,632 parameters is finetuned on 4,000 demonstrations (the SFT model, which is the reference);
2,000 pairs of its replies to 9 questions are compared by the Bradley-Terry model of the gold reward. RLHF: a reward
model is trained on these pairs (300 steps of 64), then a policy for each of four beta (100 steps of 16 x 4 samples).
DPO: a policy for each beta from the pairs (300 steps of 64). All 781 replies are listed, so gold reward and KL are
exact. Each policy is evaluated several times during training. The frontier of all points of a method (the upper concave
hull, common/frontier.py) is read at equal KL. Levels: pi* of the gold reward (the best possible), pi* of the reward
model (the limit of its RL), best of n replies by the reward model, and the reference at lower temperatures (1 to 0.1),
which needs no labels. Learning rates and numbers of steps were chosen on another seed, that of DPO among four values.
Costs: reply tokens through a model (a backward pass counts as two forward passes), samples, peak memory of a step, CPU
seconds.

Rule. At a KL of 1 nat, the gold rewards of RLHF and DPO differ by less than 0.1, and training one policy takes fewer
tokens with DPO than with RLHF. Effects of a seed: the difference, margins -0.1 and 0.1; the ratio of tokens, margin 1.

Limits. There are 24 seeds, because with another matrix kernel of OpenBLAS one of the first 12 reward models was much
worse, and the outcome undecided. Both methods select their best points among the same number of beta by the gold
reward, which nobody knows in practice. One model size, one number of pairs and one optimiser were used. The questions
and replies are few, so RL samples all of them. With unlimited pairs and exact gradients both methods reach pi*
(tests/test_exact_optimum.py). The difference measured here arises within a few hundred steps; dpo.py shows that DPO
moves probability to replies that occur in no pair. The cost follows from the numbers of steps, which were chosen. A
gold reward above that of pi* of the reward model is not a better optimum: RL stopped before it exploited the reward
model.

Source. Rafailov et al. 2023, arXiv:2305.18290 (DPO; their frontier is figure 2); Xu et al. 2024, arXiv:2404.10719
(the same question for large models: PPO is ahead); the concave hull: scripts/lecture/common/frontier.py.

Figure. Left: expected gold reward against KL to the reference, one line for each of RLHF, DPO, pi* of the gold reward,
pi* of the reward model, best of n, and the reference at lower temperatures; right: the lead of RLHF over DPO in
gold reward at equal KL, each seed and the mean.
"""

import sys
import time
import tracemalloc

from common.experiment import COLOURS, Comparison, Conclusion, curve, mean, mean_range, run, spread
from common.recipes import reward_table, sft_model

# isort: split
import numpy as np

from common.frontier import frontier
from minilm.evaluate import predicted_rewards
from minilm.exact.enumerable import best_of_n, divergence, expectation, optimum
from minilm.model import RewardModel
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from worlds.replies import EOS, LONGEST, ReplyWorld

METHODS = ("RLHF", "DPO")
LEVELS, DECIDES = (0.25, 0.5, 1.0, 2.0), 1.0            # nats at which frontiers are read; the level of the rule
SAME = 0.1                                              # gold rewards that differ by less count as equal
ENVELOPE = tuple(np.geomspace(5, 0.05, 30))
LOWER, TEMPERATURES = "reference at a lower temperature", tuple(np.linspace(1, 0.1, 19))
DRAWS = tuple(2 ** k for k in range(8))
PAIRS, BATCH, PROMPTS, SAMPLES = 2000, 64, 16, 4
# points: evaluations of a policy during training
SIZES = {"quick": {"seeds": 3, "tuning": 5, "pair_steps": 3, "sampling_steps": 2, "betas": [0.5, 0.1], "points": 1},
         "default": {"seeds": 24, "tuning": 300, "pair_steps": 300, "sampling_steps": 100,
                     "betas": [1.0, 0.5, 0.2, 0.1], "points": 5}}


class Methods:
    """The training stages of both methods, from the same model and the same pairs."""

    def __init__(self, world, model, rng, pairs):
        self.world = world
        self.model = model
        self.rng = rng
        self.pairs = pairs

    def reward_model(self, steps):
        reward_model = RewardModel(self.model.copy(), self.rng)
        for _ in train_reward_model(TrainState(reward_model, self.rng), *self.pairs, steps, BATCH, 1e-3):
            pass
        return reward_model

    def rlhf(self, policy, reward_model, reference, beta, steps):
        def reward(prompts, responses):
            return predicted_rewards(reward_model, prompts, responses)
        return train_rlhf(TrainState(policy, self.rng), reference, reward, self.world.prompts, steps, PROMPTS, SAMPLES,
                          LONGEST, EOS, beta, 2e-3)

    def log_probs(self):
        """log pi_ref of the chosen and of the rejected replies."""
        return [reference_log_probs(self.model, self.pairs[0], replies) for replies in self.pairs[1:]]

    def dpo(self, policy, log_probs, beta, steps):
        return train_dpo(TrainState(policy, self.rng), *self.pairs, *log_probs, steps, BATCH, beta, 3e-4)

    def memory(self, log_probs):
        """Bytes in the first steps, with everything that a method holds."""
        model = self.model
        return {"reward model": peak(lambda: self.reward_model(2)),
                "RLHF": peak(lambda: list(self.rlhf(model.copy(), self.reward_model(0), model.copy(), 0.1, 2))),
                "DPO": peak(lambda: list(self.dpo(model.copy(), [a.copy() for a in log_probs], 0.1, 2)))}


def timed(function):
    """The result of function(), and its CPU seconds."""
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


def path(stage, every, evaluate):
    """What evaluate() returns every so many steps of a stage; the CPU seconds without it; the mean reply length."""
    points = []
    lengths = []
    seconds = 0.0
    began = time.process_time()
    for step, metrics in enumerate(stage, 1):
        lengths.append(metrics.get("completions/mean_length", 0))
        if step % every == 0:
            seconds += time.process_time() - began
            points.append(evaluate())
            began = time.process_time()
    return points, seconds, np.mean(lengths)


def measure(experiment, seed, tuning, pair_steps, sampling_steps, betas, points):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, tuning, experiment.dtype)
    reference = world.log_distributions(model)
    p, chosen, rejected = world.comparisons(reference, world.gold, rng, PAIRS)
    pairs = world.tokens_of(p, chosen, rejected)
    methods = Methods(world, model, rng, pairs)

    def point(log_pi):
        return [divergence(log_pi, reference).mean(), expectation(log_pi, world.gold).mean()]

    seconds = {}
    reward_model, seconds["reward model"] = timed(lambda: methods.reward_model(pair_steps))
    log_probs, seconds["reference log-probs"] = timed(methods.log_probs)
    proxy = reward_table(world, reward_model)
    results = {"reference": point(reference), "memory": methods.memory(log_probs), "seconds": seconds,
               "pi*": [point(optimum(reference, world.gold, beta)[0]) for beta in ENVELOPE],
               "pi* of the reward model": [point(optimum(reference, proxy, beta)[0]) for beta in ENVELOPE],
               LOWER: [point(world.log_distributions(model, t)) for t in TEMPERATURES],
               "best of n": [point(best_of_n(reference, proxy, n)) for n in DRAWS]}
    lengths = {}
    for method, steps in zip(METHODS, (sampling_steps, pair_steps)):
        runs = []
        for beta in betas:
            policy = model.copy()
            stage = (methods.rlhf(policy, reward_model, model, beta, steps) if method == "RLHF" else
                     methods.dpo(policy, log_probs, beta, steps))
            runs.append(path(stage, steps // points, lambda: point(world.log_distributions(policy))))
        results[method], run_seconds, run_lengths = map(list, zip(*runs))
        seconds[method] = np.mean(run_seconds)
        lengths[method] = np.mean(run_lengths)
        ends = "  ".join(f"{gold:.2f} at {kl:.2f}" for kl, gold in (run[-1] for run in results[method]))
        experiment.say(f"seed {seed}, {method}: gold at KL {ends}")
    compared = np.mean([len(reply) for replies in pairs[1:] for reply in replies])
    trained = 2 * BATCH * pair_steps * compared
    # A trained token costs 3 (forward and backward). A sampled reply is sampled, scored by the reference, rewarded,
    # and trained on.
    results["tokens"] = {"reward model": 3 * trained,
                         "RLHF": (3 + 3) * lengths["RLHF"] * PROMPTS * SAMPLES * sampling_steps,
                         "reference log-probs": 2 * PAIRS * compared, "DPO": 3 * trained}
    return results


def peak(function):
    """The largest number of bytes in arrays during function()."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def corners(seed, method):
    """The frontier of all points of a method, with that of the reference."""
    points = [seed["reference"], *(np.reshape(seed[method], (-1, 2)))]
    return frontier(*np.transpose(points))


def at(seeds, method, k):
    """Gold reward at KL k, (seeds,)."""
    return np.array([np.interp(k, *corners(s, method).T) for s in seeds])


def total(seed, kind, method):
    """The cost of one policy, with the reward model (RLHF) or the log-probs of the reference (DPO)."""
    return seed[kind][method] + seed[kind]["reward model" if method == "RLHF" else "reference log-probs"]


def conclude(seeds, size):
    lead = {k: at(seeds, "RLHF", k) - at(seeds, "DPO", k) for k in LEVELS}
    tokens = {method: np.array([total(s, "tokens", method) for s in seeds]) for method in METHODS}
    seconds = {method: [total(s, "seconds", method) for s in seeds] for method in METHODS}
    memory = {"RLHF": [max(s["memory"]["RLHF"], s["memory"]["reward model"]) / 2 ** 20 for s in seeds],
              "DPO": [s["memory"]["DPO"] / 2 ** 20 for s in seeds]}
    ratio = tokens["DPO"] / tokens["RLHF"]
    next_beta = [s["tokens"]["DPO"] / s["tokens"]["RLHF"] for s in seeds]
    rule = [Comparison(f"gold reward at {DECIDES:g} nat of KL, RLHF minus DPO", lead[DECIDES], above=-SAME, below=SAME),
            Comparison("reply tokens of one policy, DPO divided by RLHF", ratio, below=1)]
    findings = [Comparison(f"lead of RLHF over DPO at {k:g} nat (gold reward)", lead[k], above=0) for k in LEVELS]
    findings += [Comparison(f"lead of {method} over the {LOWER}, without labels, at {DECIDES:g} nat (gold reward)",
                            at(seeds, method, DECIDES) - at(seeds, LOWER, DECIDES), above=0) for method in METHODS]
    findings.append(Comparison("reply tokens of a policy for one more beta, DPO divided by RLHF", next_beta, below=1))

    others = ("pi*", "pi* of the reward model", "best of n", LOWER)
    table = [["", *(f"gold at KL {k}" for k in LEVELS), "thousand reply tokens", "samples", "peak MiB", "CPU s"]]
    for method in METHODS:
        samples = PROMPTS * SAMPLES * size["sampling_steps"] * (method == "RLHF")
        table.append([method, *(mean_range(at(seeds, method, k)) for k in LEVELS), mean(tokens[method] / 1000, 0),
                      f"{samples}", mean(memory[method], 1), mean(seconds[method], 1)])
    table.append(["RLHF - DPO", *(mean_range(lead[k]) for k in LEVELS), *[""] * 4])
    for name in others:
        table.append([name, *(mean_range(at(seeds, name, k)) for k in LEVELS), *[""] * 4])
    for i, beta in enumerate(size["betas"]):
        means = {method: np.mean([s[method][i][-1] for s in seeds], axis=0) for method in METHODS}
        ends = [f"{method} {gold:.2f} at KL {kl:.2f}" for method, (kl, gold) in means.items()]
        table.append([f"ends at beta {beta}", *ends, *[""] * (len(LEVELS) + 2)])
    numbers = {f"gold reward at KL {k}, {name}": spread(at(seeds, name, k))
               for name in (*METHODS, *others) for k in LEVELS}
    numbers |= {f"RLHF - DPO at KL {k}": spread(values) for k, values in lead.items()}
    numbers |= {f"reply tokens of one policy, {method}": spread(tokens[method]) for method in METHODS}
    numbers |= {f"CPU seconds of one policy, {method}": spread(seconds[method]) for method in METHODS}
    numbers |= {f"peak MiB, {method}": spread(memory[method]) for method in METHODS}
    words = (f"At {DECIDES:g} nat of KL the gold reward is {mean(at(seeds, 'RLHF', DECIDES))} for RLHF and "
             f"{mean(at(seeds, 'DPO', DECIDES))} for DPO; the best possible, pi* of the gold reward, has "
             f"{mean(at(seeds, 'pi*', DECIDES))}. Training "
             f"one policy takes {mean(ratio)} times as many tokens with DPO as with RLHF.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    whole, gap = figure.subplots(1, 2, width_ratios=(1.5, 1))
    grid = np.linspace(0, 3, 61)

    def read(name):
        return np.array([np.interp(grid, *corners(s, name).T) for s in seeds])

    for name, label, colour, style in (("pi*", "pi* of the gold reward: the best possible", COLOURS[5], "--"),
                                       ("pi* of the reward model", "pi* of the reward model", COLOURS[3], ":"),
                                       ("best of n", "best of n by the reward model", COLOURS[2], "-."),
                                       (LOWER, f"{LOWER}: no labels", COLOURS[4], (0, (5, 1)))):
        whole.plot(grid, read(name).mean(axis=0), color=colour, linewidth=1.5, linestyle=style, label=label)
    for method, colour, marker in zip(METHODS, COLOURS, "os"):
        curve(whole, grid, read(method), f"{method}, frontier", colour, marker="")
        ends = np.mean([[path[-1] for path in s[method]] for s in seeds], axis=0)
        inside = ends[ends[:, 0] <= grid[-1]]
        whole.plot(*inside.T, marker, color=colour, markersize=5, label=f"{method}, end of each beta")
    whole.set(title=f"Gold reward against KL ({PAIRS:,} pairs)", xlabel="exact KL to the reference (nats per reply)",
              ylabel="expected gold reward")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    gap.axhline(0, color=COLOURS[5], linewidth=1)
    curve(gap, grid, read("RLHF") - read("DPO"), "RLHF - DPO, each seed and mean", COLOURS[0], marker="")
    gap.set(title="Difference at equal KL", xlabel="exact KL (nats per reply)", ylabel="gold reward, RLHF - DPO")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10, 4.8)))
