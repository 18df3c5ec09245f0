"""Token ratio or sequence ratio off policy: which one is unbiased, and what does each cost in variance?

Claim. Without a clip only the ratio of the whole response is unbiased; its noise is that of the token ratio near the
sampling policy, and several times larger far from it. The token ratio, both ratios with a clip, and the geometric mean,
even on policy, are biased.

Test. Worlds of responses of at most 2, 4 or 6 tokens out of 3, all listed (7, 31 and 127 responses). The policy is a
random Transformer; an older policy, which draws the samples, lies between it and a second one, at six distances. Each
response has a random reward, and the baseline is the expected reward of the older policy, a constant. For PPO's loss
with the ratio of the response ("sequence"), of each token ("token") and their geometric mean (GSPO), without a clip and
with epsilon 0.2, and for the policy gradient without a ratio: the expected gradient of one sample, and the variance of
that gradient, both sums over all responses. A factor of the gradient is no error, because a learning rate absorbs it:
with e = grad E[r], the bias is |c g - e| / |e| of the expected gradient g, with the best c, and the noise of one sample
is c times the root of its variance over |e|. With N samples the squared error is bias^2 + noise^2 / N; two ratios have
the same error at N* samples, and above it the one with the smaller bias is better.

Rule. Without a clip, with responses of at most 6 tokens, the bias of the sequence ratio is below 1e-9 at every distance
and its noise above that of the token ratio at the largest one; the biases of the token ratio and of the geometric mean
are above 0.05 there, and with the clip that of the sequence ratio is too. Effects of a seed: log10 of the largest bias,
log10 of the quotient of the two noises, and the three biases.

Limits. The answer was worded after the run, and one comparison of the rule was changed after a first run of 8 seeds. In
the first run "without a clip" was an epsilon of 1e9, and one response of seed 4, whose ratio is 3.8e9, was clipped: the
bias of the sequence ratio there was 0.85, because this one response, which the older policy almost never draws, has
most of the gradient. Epsilon is 1e300 now. The rule compared the two noises by their quotient minus 1, which has a
heavy tail: undecided with 8 seeds (2350 [-3190, 7890]), and with 24 too (820 [-794, 2434]). It compares logarithms now,
which were above 0 in the first run already; the number of seeds was then set to 24, and the 16 further ones alone give
0.77 [0.30, 1.24]. The finding on the noise with the clip still takes the quotient: shown with 8 seeds (-0.34 [-0.62,
-0.05]), undecided with 24. The rewards are random numbers; with others the biases differ. Responses have at most 6
tokens, and epsilon is the same for all levels, while GSPO uses one a thousand times smaller. One sample has no
leave-one-out baseline. The bias of the direction says nothing about progress over many steps. In practice pi_old
differs from the policy by a few updates, or by the rounding of another engine: the small distances. N* is a number of
independent samples of one prompt.

Source. Schulman et al. 2017, arXiv:1707.06347, (7); GSPO: Zheng et al. 2025, arXiv:2507.18071, (5); DAPO: Yu et al.
2025, arXiv:2503.14476.

Figure. Bias of the expected gradient (left) and noise of one sample (right), both axes logarithmic, against the KL
divergence of the older policy from the policy; one line for each ratio through the medians of the seeds, dashed with
the clip, and one faint line per seed without the clip.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "lecture"))       # for common
from common.experiment import COLOURS, Comparison, Conclusion, level, run, spread

# isort: split
import numpy as np

from minilm.exact.enumerable import divergence
from minilm.exact.gradients import parameter_gradients
from minilm.objectives.policy_gradient import policy_gradient_loss, ppo_clip_loss
from worlds.random_policies import (
    as_vector,
    between,
    gradients_of_samples,
    log_distribution,
    moments,
    random_policies,
    relative_error,
    token_gradients,
    world_of,
)

LEVELS = {"sequence": "sequence", "token": "token", "geometric mean": "geometric_mean"}
CLIP, NO_CLIP = 0.2, 1e300                          # ratios of 4e9 occur: a bound of 1e9 would be a clip
CLIPPED = ", clip"                                  # at the end of the names of losses with a clip
NONE = "no ratio"
LOSSES = (*LEVELS, *(name + CLIPPED for name in LEVELS), NONE)
SIZES = {"quick": {"seeds": 3, "distances": [0.03, 1.0], "lengths": [2, 3]},
         "default": {"seeds": 24, "distances": [0.01, 0.03, 0.1, 0.3, 0.6, 1.0], "lengths": [2, 4, 6]}}


def loss_of(name, old, A, mask):
    """The loss of this name, of the token log-probs (Y,T): the sum over responses of the loss of each."""
    def loss(log_probs):
        if name == NONE:
            return policy_gradient_loss(log_probs, A, mask) * float(len(A))
        epsilon = CLIP if name.endswith(CLIPPED) else NO_CLIP
        return ppo_clip_loss(log_probs, old, A, mask, epsilon, LEVELS[name.removesuffix(CLIPPED)]) * float(len(A))
    return loss


def bias_and_noise(mean, deviation, true):
    """Both over |e|, of c times the gradient, with the c that has the smallest bias."""
    c = mean @ true / (mean @ mean)
    return relative_error(c * mean, true), float(abs(c) * deviation / np.linalg.norm(true))


def measure(experiment, seed, distances, lengths):
    rng = np.random.default_rng(seed)
    policy, third = random_policies(rng, 2)
    results = {}
    for longest in lengths:
        world = world_of(longest)
        rewards = rng.normal(size=world.shape[1])
        log_probs, tokens = world.token_log_probs(policy).data[0], token_gradients(world, policy)
        log_pi = world.log_probs(policy)
        pi = np.exp(log_pi.data)
        true = as_vector(parameter_gradients(policy, log_pi, -pi * rewards))            # of -E[r]
        found = results[str(longest)] = {"KL": [], **{name: {"bias": [], "noise": []} for name in LOSSES}}
        for distance in distances:
            older = between(policy, third, distance)
            log_old, old = log_distribution(world, older), world.token_log_probs(older).data[0]
            found["KL"].append(divergence(log_old, log_pi.data[0]))
            A = rewards - np.exp(log_old) @ rewards
            for name in LOSSES:
                samples = gradients_of_samples(loss_of(name, old, A, world.mask[0]), log_probs, tokens)
                values = bias_and_noise(*moments(samples, log_old), true)
                for what, value in zip(("bias", "noise"), values):
                    found[name][what].append(value)
    return results


def longest_of(seeds, size):
    """The results of each seed for the longest responses."""
    return [s[str(size["lengths"][-1])] for s in seeds]


def samples_needed(found, i, name="token"):
    """N*: the number of samples above which the sequence ratio has a smaller error than this one; at least 1."""
    noise, bias = (found["sequence"][what][i] ** 2 - found[name][what][i] ** 2 for what in ("noise", "bias"))
    return max(1.0, noise / -bias)


def median_largest(values):
    """0.49 [1.2]: the median over the seeds and the largest, with two digits."""
    return f"{np.median(values):.2g} [{max(values):.2g}]"


def conclude(seeds, size):
    long = longest_of(seeds, size)
    rule = [Comparison("log10 of the largest bias of the sequence ratio, all distances",
                       [np.log10(max(s["sequence"]["bias"])) for s in long], below=-9),
            Comparison("log10 of the noise of the sequence ratio over that of the token ratio, at the largest distance",
                       [np.log10(s["sequence"]["noise"][-1] / s["token"]["noise"][-1]) for s in long], above=0),
            *(Comparison(f"bias of the {name}, at the largest distance", [s[key]["bias"][-1] for s in long], above=0.05)
              for name, key in (("token ratio", "token"), ("geometric mean", "geometric mean"),
                                ("sequence ratio with the clip", "sequence" + CLIPPED)))]
    findings = [Comparison("bias of the token ratio minus that of no ratio, mean over the distances",
                           [np.mean(np.subtract(s["token"]["bias"], s[NONE]["bias"])) for s in long], below=0),
                Comparison("bias of the geometric mean at the smallest distance",
                           [s["geometric mean"]["bias"][0] for s in long], above=0.05),
                Comparison("noise of the sequence ratio with the clip over that without, minus 1, at the largest "
                           "distance", [s["sequence" + CLIPPED]["noise"][-1] / s["sequence"]["noise"][-1] - 1
                                        for s in long], below=0)]
    distances = size["distances"]
    kl = [np.median([s["KL"][i] for s in long]) for i in range(len(distances))]
    needed = [[samples_needed(s, i) for s in long] for i in range(len(distances))]
    numbers = {f"{what}, {name}, at most {n} tokens, distance {d}": spread(s[str(n)][name][what][i] for s in seeds)
               for n in size["lengths"] for name in LOSSES for what in ("bias", "noise")
               for i, d in enumerate(distances)}
    numbers |= {f"N*, distance {d}": spread(values) for d, values in zip(distances, needed)}
    table, details = ([["ratio", *(f"{what} at {x:.2g} nats" for x in kl)],
                       *([name, *(median_largest([s[name][what][i] for s in long]) for i in range(len(distances)))]
                         for name in LOSSES)] for what in ("bias", "noise"))
    details.append(["N*, sequence against token", *map(median_largest, needed)])
    for n in size["lengths"][:-1]:
        details.append([f"N*, at most {n} tokens", *(median_largest([samples_needed(s[str(n)], i) for s in seeds])
                                                      for i in range(len(distances)))])
    i = len(kl) // 2 - 1
    bias = [100 * np.median([s["token"]["bias"][k] for s in long]) for k in (i, -1)]
    noise = {name: np.median([s[name]["noise"][-1] for s in long]) for name in ("sequence", "token")}
    clipped = [100 * np.median([s[name + CLIPPED]["bias"][i] for s in long]) for name in ("token", "sequence")]
    words = (f"The token ratio has a bias of {bias[0]:.0f} % at {kl[i]:.1g} nats from the sampling policy and of "
             f"{bias[1]:.0f} % at {kl[-1]:.2g} nats, the sequence ratio none. At {kl[-1]:.2g} nats the noise of one "
             f"sample is {noise['sequence']:.0f} with the sequence ratio, {noise['token']:.1f} with the token ratio; "
             f"a clip at {CLIP} raises the bias at {kl[i]:.1g} nats to {clipped[0]:.0f} % (token) and {clipped[1]:.0f} "
             "% (sequence). All are medians.")
    legend = (f"Responses of at most {size['lengths'][-1]} tokens; nats: the median KL of the older policy from the "
              "policy. Bias and noise of one sample relative to the gradient, median over the seeds [largest]. N*: "
              "number of samples above which the unbiased ratio has the smaller squared error.")
    return Conclusion(rule, words, numbers, table, findings=findings, legend=legend, details=details)


def draw(figure, seeds, size):
    long = longest_of(seeds, size)
    for axis, what in zip(figure.subplots(1, 2), ("bias", "noise")):
        for name, colour in zip((*LEVELS, NONE), (*COLOURS[:3], COLOURS[5])):
            for loss, style in ((name, "o-"), (name + CLIPPED, "s--")):
                if loss not in LOSSES or what == "bias" and loss == "sequence":
                    continue
                points = np.array([[s["KL"], s[loss][what]] for s in long])                 # (seeds,2,distances)
                points[points < 1e-9] = np.nan              # a bias of 0
                if loss == name:
                    axis.plot(*points.transpose(1, 2, 0), color=colour, linewidth=0.8, alpha=0.2)
                axis.plot(*np.median(points, axis=0), style, color=colour, markersize=4, linewidth=1.8, label=loss)
        axis.set(xscale="log", yscale="log", xlabel="KL of the older policy from the policy (nats)")
    bias, noise = figure.axes
    bias.set(title="Bias", ylabel="bias of the expected gradient", ylim=(1e-3, 3))
    level(bias, 1.2e-3, "sequence, without a clip: below 1e-13")
    noise.set(title="Noise", ylabel="noise of one sample")
    noise.legend(loc="upper left", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(11, 4.6)))
