"""Should DPO take the sum or the mean of the log-probs over the tokens, and what does beta do?

Claim. Take the sum: it is log pi(y|x), so DPO aims at pi* = pi_ref exp(r/beta) / Z, and a larger beta keeps pi* closer
to the reference. With the mean, each response has a beta of its own, beta divided by its length; DPO then aims at
another policy, which gives longer responses even if the reward does not depend on length.

Test. (i) A policy is a free distribution over 48 responses to each of 4 prompts: 6 qualities, each in 8 lengths (1 to 8
tokens). The reward is the quality, drawn from N(0, 1). The reference draws length and quality independently, so reward
and length are independent. Comparisons are unlimited: the expected loss is a sum over all pairs of responses, labelled
by the Bradley-Terry model. Gradient descent on it, with dpo_loss (beta 1) and with length_normalised_dpo_loss (beta 4),
is compared with the two optima (derived in mean_optimum). Then the optima are compared over 20 beta, and at equal KL,
for rewards without and with a preference for length (0.1 per token). (ii) A transformer of 25,632 parameters, finetuned
on demonstrations, is trained for 200 steps on 2,000 pairs of its replies, with beta 0.3 for the sum, and 0.3 times the
mean length of its replies for the mean. The reward is 2 for a right answer and 0 otherwise. Gold reward, KL and length
are sums over all 781 replies to each of 9 questions.

Rule. With free distributions and unlimited comparisons, descent with the sum ends at pi* and descent with the mean at
pi_ref exp(|y| (r + c)/beta); at 0.5 nat of KL the optimum of the mean gives longer responses than the reference, that
of the sum does not, and the sum has more reward. Margins: total variation below 0.01 for both ends; the change of the
expected length is within 0.001 tokens for the sum, above 0.1 tokens for the mean; lead in reward above 0.01.

Limits. That the sum has the most reward at equal KL follows from the definition of pi*; the experiment shows by how
much. The length bias is proved for rewards that do not depend on length, unlimited comparisons and a free policy. If
the annotators prefer length, no difference in length between the two optima was found at equal KL. Nor was one found
for the transformer: its replies have at most 4 tokens, its optimum of the mean is hardly longer, and after training on
few pairs both losses give shorter replies than the reference. The mean also changes the size of the gradient, so a beta
that was chosen for the sum is wrong for the mean. SimPO has the mean, no reference, and a margin; it is not tested.

Source. Rafailov et al. 2023, arXiv:2305.18290; length-normalised DPO: Lambert et al. 2024, arXiv:2411.15124, (6);
SimPO: Meng et al. 2024, arXiv:2405.14734; length and DPO: Park et al. 2024, arXiv:2403.19159.

Figure. Log of the ratio to the reference against the length of a response, one line for each reward, for the sum and
the mean; expected length against KL; expected reward against KL; KL against beta (log axes), for the sum and the mean.
"""

import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "lecture"))       # for common
from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from common.recipes import sft_model
from minilm import ops
from minilm.exact.enumerable import divergence, expectation, optimum, total_variation
from minilm.exact.expectations import comparisons, descend, gradient_over_comparisons
from minilm.objectives.dpo import dpo_loss, length_normalised_dpo_loss
from minilm.stages.dpo import train_dpo
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor
from minilm.world.annotators import is_right
from worlds.replies import ReplyWorld

PROMPTS, QUALITIES, LONGEST = 4, 6, 8
LOSSES = {"sum": dpo_loss, "mean": length_normalised_dpo_loss}
DESCENT = {"sum": 1.0, "mean": 4.0}         # beta of the runs on the expected loss
BETAS = tuple(np.geomspace(0.2, 30, 20))
NAT, PER_TOKEN = 0.5, 0.1                   # the KL at which optima are compared; the preference for length
BETA = 0.3                                  # of the transformer, with the sum
SIZES = {"quick": {"seeds": 3, "steps": 20, "tuning": 6, "pairs": 100, "dpo_steps": 4},
         "default": {"seeds": 8, "steps": 300, "tuning": 300, "pairs": 2000, "dpo_steps": 200}}


class FreePolicy:
    """Any distribution over the responses: one logit each. It is the model and the world of expectations.descend."""

    def __init__(self, log_pi):
        self.logits = Tensor(log_pi.copy(), requires_grad=True)

    def parameters(self):
        return {"logits": self.logits}

    def log_probs(self, _):
        return ops.log_softmax(self.logits)


def mean_optimum(reference, rewards, lengths, beta):
    """The log-probs (P,Y) at which DPO with the mean ends: log of pi_ref exp(|y| (r + c)/beta), one c for each prompt.

    Let h = log(pi/pi_ref). A term of the expected loss is smallest if beta (h(y)/|y| - h(y')/|y'|) = r(y) - r(y'): step
    4 of minilm/objectives/dpo.py with h(y)/|y| in place of h(y). So h(y) = |y| (r(y) + c)/beta, with the c for which
    the probabilities add up to 1. Their sum grows with c and is 1 between -max r and -min r, so c is found by
    bisection. Responses with r(y) > -c gain, the long ones most.

    If length and reward are independent under pi_ref, the expected length does not fall. Let s = (r + c)/beta and
    M_k(s) = E_ref[|y|^k exp(s |y|)], so M_k' = M_{k+1}. The probabilities add up to 1: E_ref[M_0(s)] = 1. The expected
    length is E_ref[M_1(s)]. As a function of M_0, M_1 has the slope M_2/M_1 and the second derivative
    (M_3 M_1 - M_2^2)/M_1^3, which is at least 0 by the Cauchy-Schwarz inequality. So M_1 is convex in M_0, and by
    Jensen's inequality E_ref[M_1(s)] is at least the value of M_1 at M_0 = 1, which is M_1(0) = E_ref[|y|].
    """
    low, high = -rewards.max(axis=1, keepdims=True), -rewards.min(axis=1, keepdims=True)
    for _ in range(60):
        c = (low + high) / 2
        above = np.logaddexp.reduce(reference + lengths * (rewards + c) / beta, axis=1, keepdims=True) > 0
        low, high = np.where(above, low, c), np.where(above, c, high)
    log_pi = reference + lengths * (rewards + c) / beta
    return log_pi - np.logaddexp.reduce(log_pi, axis=1, keepdims=True)


def best(side, reference, rewards, lengths, beta):
    """The log-probs (P,Y) at which DPO with the sum or with the mean ends, with unlimited comparisons."""
    return (optimum(reference, rewards, beta)[0] if side == "sum"
            else mean_optimum(reference, rewards, lengths, beta))


def at_kl(side, reference, rewards, lengths, kl):
    """(beta, log pi) of the optimum with this mean KL over the prompts. The KL falls with beta."""
    low, high = np.log(1e-3), np.log(1e3)
    for _ in range(40):
        beta = np.exp((low + high) / 2)
        log_pi = best(side, reference, rewards, lengths, beta)
        larger = divergence(log_pi, reference).mean() > kl
        low, high = (np.log(beta), high) if larger else (low, np.log(beta))
    return beta, log_pi


def free_world(rng):
    """The reference, the qualities and the lengths (P,Y) of the responses: y = (length - 1) QUALITIES + quality."""
    length = rng.dirichlet(np.full(LONGEST, 2.0), size=PROMPTS)
    quality = rng.dirichlet(np.full(QUALITIES, 2.0), size=PROMPTS)
    reference = np.log(length[:, :, None] * quality[:, None, :]).reshape(PROMPTS, -1)
    lengths = np.tile(np.repeat(np.arange(1.0, LONGEST + 1), QUALITIES), (PROMPTS, 1))
    return reference, np.tile(rng.normal(size=(PROMPTS, QUALITIES)), LONGEST), lengths


def unlimited(rng, steps):
    """Everything that is measured with free distributions."""
    reference, rewards, lengths = world = free_world(rng)
    pairs = comparisons(reference, rewards)
    results = {"length": expectation(reference, lengths).mean(), "reward": expectation(reference, rewards).mean()}

    def values(log_pi):
        return {"KL": divergence(log_pi, reference).mean(), "reward": expectation(log_pi, rewards).mean(),
                "length": expectation(log_pi, lengths).mean()}

    for side, loss in LOSSES.items():
        beta = DESCENT[side]
        expected = functools.partial(loss, beta=beta)
        others = (reference, lengths) if side == "mean" else (reference,)
        policy = FreePolicy(reference)
        *_, end = descend(policy, policy, lambda log_pi: gradient_over_comparisons(expected, pairs, log_pi, *others),
                          steps, 0.05)
        equal_kl, log_pi = at_kl(side, *world, NAT)
        liked = at_kl(side, reference, rewards + PER_TOKEN * lengths, lengths, NAT)[1]
        sweep = [values(best(side, *world, b)) for b in BETAS]
        results[side] = {
            "distance": total_variation(end, best(side, *world, beta)).max(),
            "distance to pi*": total_variation(end, optimum(reference, rewards, beta)[0]).mean(),
            "beta": equal_kl, "equal KL": values(log_pi), "long liked": values(liked),
            "ratio": (log_pi - reference)[0].reshape(LONGEST, QUALITIES).T,
            **{name: [v[name] for v in sweep] for name in sweep[0]}}
    return {**results, "rewards": rewards[0, :QUALITIES]}


def few_pairs(world, model, rng, pairs, steps):
    """A transformer after DPO on pairs labelled by a reward for right answers alone: changes from the reference."""
    reference = world.log_distributions(model)
    lengths = np.tile([float(len(reply)) for reply in world.responses], (len(world.prompts), 1))
    rewards = world.table(lambda question, text, finished: 2.0 * is_right(question, text))
    start = [expectation(reference, values).mean() for values in (rewards, lengths)]
    p, *replies = compared = world.comparisons(reference, rewards, rng, pairs)
    references = [reference[p, y].astype(model.dtype) for y in replies]
    found = {"length": start[1], "reward": start[0]}
    for side, loss in LOSSES.items():
        beta = BETA * (start[1] if side == "mean" else 1)
        policy = model.copy()
        for _ in train_dpo(TrainState(policy, rng), *world.tokens_of(*compared), *references, steps, 64, beta,
                           loss=loss):
            pass
        for name, log_pi in ((f"{side}, trained", world.log_distributions(policy)),
                             (f"{side}, optimum", best(side, reference, rewards, lengths, beta))):
            reward, length = (expectation(log_pi, values).mean() for values in (rewards, lengths))
            found[name] = {"KL": divergence(log_pi, reference).mean(), "reward": reward - start[0],
                           "length": length - start[1]}
    return found


def measure(experiment, seed, steps, tuning, pairs, dpo_steps):
    rng = np.random.default_rng(seed)
    results = unlimited(rng, steps)
    experiment.say(f"seed {seed}, expected length at {NAT} nat: reference {results['length']:.2f}, sum "
                   f"{results['sum']['equal KL']['length']:.2f}, mean {results['mean']['equal KL']['length']:.2f}")
    world = ReplyWorld(words=2)
    return {**results, "transformer": few_pairs(world, sft_model(world, rng, tuning, experiment.dtype), rng, pairs,
                                                dpo_steps)}


def values_of(seeds, side, *names):
    """The entry of these names, in the results of one side, for each seed."""
    return np.array([functools.reduce(lambda found, name: found[name], names, s[side]) for s in seeds])


def conclude(seeds, size):
    values = functools.partial(values_of, seeds)
    start = np.array([s["length"] for s in seeds])
    longer = {side: values(side, "equal KL", "length") - start for side in LOSSES}
    reward = {side: values(side, "equal KL", "reward") for side in LOSSES}
    rule = [Comparison("total variation between the end of descent with the sum and pi*", values("sum", "distance"),
                       below=0.01),
            Comparison("total variation between the end of descent with the mean and its optimum",
                       values("mean", "distance"), below=0.01),
            Comparison(f"change of the expected length at {NAT} nat, sum (tokens)", longer["sum"], above=-1e-3,
                       below=1e-3),
            Comparison(f"change of the expected length at {NAT} nat, mean (tokens)", longer["mean"], above=0.1),
            Comparison(f"expected reward at {NAT} nat, sum minus mean", reward["sum"] - reward["mean"], above=0.01)]
    trained = {side: np.array([s["transformer"][f"{side}, trained"]["length"] for s in seeds]) for side in LOSSES}
    quality = {side: values(side, "long liked", "reward") for side in LOSSES}
    long = {side: values(side, "long liked", "length") for side in LOSSES}
    findings = [Comparison("total variation between the end of descent with the mean and pi*, at the same beta",
                           values("mean", "distance to pi*"), above=0.01),
                Comparison("smallest fall of the KL from one beta to the next larger one, sum (nats)",
                           [-np.diff(s["sum"]["KL"]).max() for s in seeds], above=0),
                Comparison(f"length preferred by {PER_TOKEN} per token: expected length at {NAT} nat, mean minus sum "
                           "(tokens)", long["mean"] - long["sum"], above=0),
                Comparison(f"length preferred by {PER_TOKEN} per token: quality at {NAT} nat, sum minus mean",
                           quality["sum"] - quality["mean"], above=0),
                Comparison("transformer, few pairs: expected length, mean minus sum (tokens)",
                           trained["mean"] - trained["sum"], above=0)]
    ratio = values("mean", "beta") / values("sum", "beta")
    words = (f"At {NAT} nat of KL the optimum of the mean gives {mean(longer['mean'])} tokens more than the reference "
             f"({mean(start)}) and that of the sum {mean(np.abs(longer['sum']))}; the expected reward is "
             f"{mean(reward['sum'])} for the sum and {mean(reward['mean'])} for the mean. The mean needs a beta "
             f"{mean(ratio, 1)} times as large for this KL.")
    numbers = {"length of the reference": spread(start), f"beta of the mean / beta of the sum at {NAT} nat":
               spread(ratio), **_numbers(seeds)}
    return Conclusion(rule, words, numbers, _table(values), findings=findings, legend=LEGEND, details=_details(seeds))


TRANSFORMERS = tuple(f"{side}, {what}" for what in ("trained", "optimum") for side in LOSSES)
LEGEND = ("Optima for free distributions, where reward and length are independent under the reference. The second "
          "table: a transformer after DPO on few pairs, and the optimum of unlimited pairs in its world; changes from "
          "the reference.")


def _numbers(seeds):
    numbers = {f"{name} at {NAT} nat{where}, {side}": spread(values_of(seeds, side, kind, name)) for side in LOSSES
               for kind, where in (("equal KL", ""), ("long liked", ", length preferred"))
               for name in ("reward", "length")}
    return numbers | {f"transformer: {name}, {which}": spread(s["transformer"][which][name] for s in seeds)
                      for which in TRANSFORMERS for name in ("KL", "reward", "length")}


def _table(values):
    names = ("KL", "reward", "length")
    table = [["beta", *(f"{name}, {side}" for side in LOSSES for name in names)]]
    for i in range(0, len(BETAS), 3):
        table.append([f"{BETAS[i]:.2g}", *(mean_range(values(side, name)[:, i]) for side in LOSSES for name in names)])
    return table


def _details(seeds):
    names = ("KL", "reward", "length")
    return [["transformer", *names],
            *([which, *(mean_range([s["transformer"][which][name] for s in seeds]) for name in names)]
              for which in TRANSFORMERS)]


def draw(figure, seeds, size):
    (ratio, length), (reward, beta) = figure.subplots(2, 2)
    rewards = np.array(seeds[0]["rewards"])
    order = np.argsort(rewards)[[0, QUALITIES // 2, -1]]
    for side, style in zip(LOSSES, ("-", "--")):
        for y, colour in zip(order, COLOURS[2:]):
            ratio.plot(np.arange(1, LONGEST + 1), seeds[0][side]["ratio"][y], style, color=colour, linewidth=1.8,
                       label=f"reward {rewards[y]:+.1f}, {side}")
    level(ratio, 0, "")
    ratio.set(title=f"Optima at {NAT} nat, one prompt", xlabel="length of the response (tokens)",
              ylabel="log(pi / pi_ref), nats")
    ratio.legend(loc="lower left", fontsize=8, ncols=2)
    for side, colour, marker, style in zip(LOSSES, COLOURS, "os", ("-", "--")):
        curves = {name: np.array([s[side][name] for s in seeds]) for name in ("KL", "reward", "length")}
        for name in ("length", "reward"):
            curves[name] -= np.array([[s[name]] for s in seeds])
        for axis, name in ((length, "length"), (reward, "reward")):
            axis.plot(curves["KL"].T, curves[name].T, color=colour, linewidth=0.8, alpha=0.35)
            axis.plot(curves["KL"].mean(axis=0), curves[name].mean(axis=0), style, color=colour, marker=marker,
                      markersize=4, linewidth=1.8, label=side)
        curve(beta, BETAS, curves["KL"], side, colour, marker, linestyle=style)
    length.set(title="Length, at every beta", xlabel="KL to the reference (nats)",
               ylabel="change of the expected length (tokens)", xlim=(0, 1.5), ylim=(-0.1, 1.4))
    reward.set(title="Reward, at every beta", xlabel="KL to the reference (nats)", ylabel="gain in expected reward",
               xlim=(0, 1.5))
    beta.set(title="What beta does", xlabel="beta (log axis)", ylabel="KL to the reference (nats, log axis)",
             xscale="log", yscale="log")
    for axis in (length, reward, beta):
        axis.legend(fontsize=8, loc="upper right" if axis is beta else "upper left")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10, 7.5)))
