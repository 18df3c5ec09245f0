"""Reinforcement learning with one ingredient removed at a time

Claim. Reinforcement learning is hard to get right.

Test. An SFT model of 25,632 parameters; a reward model from 1,000 comparisons of its replies; the policy gradient on
its rewards, beta 0.3, 64 replies per step. The run is repeated with one ingredient removed: the baseline (none; and
none with every reward 3 higher, which comparisons cannot distinguish), the KL penalty (beta 0), the warm start (random
weights), the learning rate (ten times higher; ten times lower), the masks (prompt and padding counted as response, in
loss and KL; and EOS taken for padding, which happens if both are one token). Measured: J = gold reward - 0.3 KL, exact,
because all 781 replies to each of 9 questions are listed; and the metrics that a run reports from its samples. Levels:
pi* of the proxy reward and of the gold reward. Control (is RL hard, or training?): DPO on 1,000 comparisons (beta 0.3,
200 steps of 64), and DPO without those of the ingredients that it has: the warm start, the learning rate, the KL
penalty (beta 0.03; DPO has no loss at 0).

Rule. For at least three of the five ingredients (baseline, KL penalty, warm start from the SFT model, learning rate,
masks of the response tokens), the mean over its removals lowers J = gold reward - 0.3 KL at the end of the run;
"removing" the learning rate means ten times higher, and ten times lower. Effect of a seed for one ingredient: J of the
complete run minus J without it, the mean over its removals. "At least three" is shown if three intervals lie above 0 at
the level 1 - 0.05/5 = 99% (Bonferroni). The figure and the words use the same level for one removal alone.

Limits. Five necessary ingredients do not make RL harder than other training: DPO loses more without the two that it
shares (warm start, learning rate). A small world is forgiving: a random policy finds good replies by chance, which is
unlikely in a large one, and has time to learn. Most of the loss at beta 0 is the KL in J; the loss in gold reward alone
is a finding. The learning rate of the complete run comes from a few trials, as it would in practice. Counting the
tokens of the prompt alone would change only the reported KL, because leave-one-out advantages add up to zero over the
replies to a prompt. A missing baseline costs little where the centring term of the reward model has already centred
the rewards.

Source. Henderson et al. 2018, arXiv:1709.06560; Huang et al. 2024, arXiv:2403.17031 (EOS taken for padding, and
other details); Ahmadian et al. 2024, arXiv:2402.14740 (leave-one-out).

Figure. One column for each of five ingredients, with the complete run in grey and one colour for each removal; top row:
J at the end, one point per seed; rows below: proxy reward, estimated KL (symlog axis; with padding counted the
estimate is negative), entropy, gradient norm (symlog axis) and the share of prompts with equal rewards, against the
step, as the mean and the range over the seeds.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, level, mean, mean_range, run, spread
from common.recipes import finetune_by_dpo, proxy_rewards, sft_model

# isort: split
import numpy as np

from minilm.data import make_batch
from minilm.exact.enumerable import expectation, objective, optimum
from minilm.generate import generate
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, policy_gradient_metrics
from minilm.optim import warmup_cosine
from minilm.stages.rlhf import train_rlhf
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, stage
from minilm.tensor import no_grad
from worlds.replies import EOS, LONGEST, MODEL, ReplyWorld

# P prompts, K samples per prompt.
BETA, RATE, P, K = 0.3, 2e-3, 16, 4
ABLATIONS = {"baseline": ("no baseline", "no baseline, rewards + 3"), "KL": ("beta = 0",),
             "warm start": ("from random weights",), "learning rate": ("rate x 10", "rate / 10"),
             "masks": ("padding counted", "EOS not counted")}
NEEDED = 3                              # of the ingredients
LEVEL = 1 - 0.05 / len(ABLATIONS)       # of every interval of J, in the rule, the words, the table and the figure
RAISING, RAISED = ABLATIONS["baseline"][1:], 3.0
NAMES = ("complete", *(name for names in ABLATIONS.values() for name in names))
# The differences to the complete run: options of stages.rlhf, or the tokens that are counted as response.
OPTIONS = {"no baseline": {"baseline": "none"}, "no baseline, rewards + 3": {"baseline": "none"},
           "beta = 0": {"beta": 0.0}, "rate x 10": {"learning_rate": 10 * RATE},
           "rate / 10": {"learning_rate": RATE / 10}}
COUNTED = {"padding counted": lambda tokens, mask: np.ones(mask.shape),
           "EOS not counted": lambda tokens, mask: mask * (tokens != EOS)}
METRICS = {"reward": "proxy reward", "kl_sequence": "estimated KL\n(nats; symlog axis)",
           "entropy": "entropy\n(nats per token)", "grad_norm": "gradient norm\n(symlog axis)",
           "frac_reward_zero_std": "prompts with\nequal rewards"}
# Of the control, DPO: its beta and learning rate.
DPO_RATE = 3e-4
DPO = {"complete": (BETA, DPO_RATE), "beta / 10": (BETA / 10, DPO_RATE), "from random weights": (BETA, DPO_RATE),
       "rate x 10": (BETA, 10 * DPO_RATE), "rate / 10": (BETA, DPO_RATE / 10)}
SIZES = {"quick": {"seeds": 3, "tuning": 4, "steps": 3}, "default": {"seeds": 8, "tuning": 300, "steps": 150}}


@stage
def wrongly_masked(training, reference, reward, prompts, steps, counts):
    """stages.rlhf with a wrong mask: counts(tokens, mask), both (B,T), gives the tokens counted as response."""
    while training.step < steps:
        batch_prompts = [prompts[i] for i in training.rng.integers(len(prompts), size=P) for _ in range(K)]
        samples = generate(training.model, batch_prompts, LONGEST, training.rng, EOS)
        responses = samples.responses()
        batch = make_batch(batch_prompts, responses, pad=EOS)
        counted = counts(batch.tokens, batch.mask)[:, 1:]
        with no_grad():
            k1 = training.model.log_probs(batch.tokens).data - reference.log_probs(batch.tokens).data
        kl = (k1 * counted).sum(axis=1).reshape(P, K)
        rewards = np.asarray(reward(batch_prompts, responses)).reshape(P, K)
        A = advantages(rewards, kl, BETA).reshape(-1)

        def loss(policy, _):
            return policy_gradient_loss(policy.log_probs(batch.tokens), A, counted), None

        rate = warmup_cosine(training.step, steps, RATE, warmup=min(5, steps // 10 + 1), floor=0.3)
        metrics = train_step(training, loss, [None], rate, "wrongly masked rlhf", drawn=[batch.tokens])
        yield {**metrics, **policy_gradient_metrics(rewards, kl, counted),
               "entropy": samples.entropies[samples.mask > 0].mean()}


def train(name, policy, model, reward, prompts, rng, steps):
    """Train the policy in the run of this name; returns the metrics of every step."""
    training = TrainState(policy, rng, weight_decay=0.0)
    if name in COUNTED:
        return list(wrongly_masked(training, model, reward, prompts, steps, COUNTED[name]))

    def given(prompts, responses):
        return reward(prompts, responses) + (RAISED if name in RAISING else 0)
    options = {"beta": BETA, "learning_rate": RATE, **OPTIONS.get(name, {})}
    return list(train_rlhf(training, model, given, prompts, steps, P, K, LONGEST, EOS, **options))


def measure(experiment, seed, tuning, steps):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, tuning, experiment.dtype)
    reference = world.log_distributions(model)
    proxy = proxy_rewards(world, model, rng, 1000, tuning // 2)

    def J(log_pi):
        return objective(log_pi, reference, world.gold, BETA).mean()

    def start(name):
        return experiment.transformer(rng, **MODEL) if name == "from random weights" else model.copy()

    levels = {"SFT model": J(reference), "pi* of the proxy reward": J(optimum(reference, proxy, BETA)[0]),
              "pi* of gold": J(optimum(reference, world.gold, BETA)[0])}
    results = {"levels": levels, "J": {}, "gold": {}, "metrics": {}, "DPO": {}}
    for name in NAMES:
        policy = start(name)
        history = train(name, policy, model, world.reward(proxy), world.prompts, rng, steps)
        log_pi = world.log_distributions(policy)
        results["J"][name] = J(log_pi)
        results["gold"][name] = expectation(log_pi, world.gold).mean()
        results["metrics"][name] = {key: [float(m[key]) for m in history] for key in METRICS}
        experiment.say(f"seed {seed}, {name}: J {results['J'][name]:.2f}, gold {results['gold'][name]:.2f}")
    pairs = world.comparisons(reference, world.gold, rng, 1000)
    for name, (beta, rate) in DPO.items():
        policy = start(name)
        finetune_by_dpo(world, policy, reference, pairs, rng, 4 * steps // 3, beta, rate)
        results["DPO"][name] = J(world.log_distributions(policy))
    return results


def loss(seeds, name, what="J"):
    """What is lost against the complete run, (seeds,)."""
    return np.array([s[what]["complete"] - s[what][name] for s in seeds])


def matters(seeds, name, what="J"):
    """Whether the interval of the loss lies above 0, at LEVEL."""
    return Comparison(name, loss(seeds, name, what), above=0).outcome(LEVEL) == "shown"


def of_ingredients(seeds, what):
    """A comparison per ingredient: the mean loss over its ways of removal."""
    name_of = {"J": "J", "gold": "gold reward"}[what]
    changed = {"learning rate": "with the learning rate ten times higher, and lower"}
    return [Comparison(f"loss of {name_of} {changed.get(ingredient, f'without the {ingredient}')}",
                       np.mean([loss(seeds, name, what) for name in names], axis=0), above=0)
            for ingredient, names in ABLATIONS.items()]


def reported(s, name, key):
    """A metric of every step; raised rewards are lowered again."""
    return np.array(s["metrics"][name][key]) - (RAISED if key == "reward" and name in RAISING else 0)


def symptom(seeds, name):
    """The metric with the largest difference to the complete run, in standard errors, over the last fifth."""
    def late(s, run, key):
        return reported(s, run, key)[-max(1, len(s["metrics"][run][key]) // 5):].mean()

    values = {key: np.array([[late(s, run, key) for run in (name, "complete")] for s in seeds]) for key in METRICS}

    def standard_errors(key):
        difference = values[key] @ (1, -1)
        return abs(difference.mean()) / (difference.std(ddof=1) / len(seeds) ** 0.5 + 1e-9)
    key = max(METRICS, key=standard_errors)
    return "{} {:.2f}, complete {:.2f}".format(key, *values[key].mean(axis=0))


def conclude(seeds, size):
    rule = of_ingredients(seeds, "J")
    shown = sum(comparison.outcome(LEVEL) == "shown" for comparison in rule)
    findings = of_ingredients(seeds, "gold")
    findings += [Comparison(f"loss of J by DPO, {name}", loss(seeds, name, "DPO"), above=0)
                 for name in DPO if name != "complete"]
    numbers = {f"{what}, {name}": spread(s[what][name] for s in seeds) for what in ("J", "gold") for name in NAMES}
    numbers |= {f"J, {name}": spread(s["levels"][name] for s in seeds) for name in seeds[0]["levels"]}
    numbers |= {f"J, DPO, {name}": spread(s["DPO"][name] for s in seeds) for name in DPO}
    table = [["run", "J", "lost", "gold reward", "lost", f"{LEVEL:.0%} interval of J above 0",
              "metric that differs most"]]
    for name in NAMES:
        cells = [[mean_range([s[what][name] for s in seeds]), mean(loss(seeds, name, what))] for what in ("J", "gold")]
        table.append([name, *cells[0], *cells[1], *(("", "") if name == "complete" else (
            "yes" if matters(seeds, name) else "no", symptom(seeds, name)))])
    table += [[name, mean_range([s["levels"][name] for s in seeds]), *[""] * 5] for name in seeds[0]["levels"]]
    table += [[f"DPO, {name}", mean_range([s["DPO"][name] for s in seeds]), mean(loss(seeds, name, "DPO")), *[""] * 4]
              for name in DPO]
    worst = max(NAMES[1:], key=lambda name: loss(seeds, name).mean())
    alone = [name for name in NAMES[1:] if matters(seeds, name)]
    which = "each" if shown == len(ABLATIONS) else f"{shown}"
    words = (f"For {which} of the {len(ABLATIONS)} ingredients, the mean over its removals lowers J ({NEEDED} are "
             f"needed); of the {len(NAMES) - 1} removals alone, {len(alone)} lower it ({LEVEL:.0%} intervals). The "
             f"complete run raises J from "
             f"{mean([s['levels']['SFT model'] for s in seeds])} to {mean([s['J']['complete'] for s in seeds])}; the "
             f"worst run, '{worst}', ends at {mean([s['J'][worst] for s in seeds])}.")
    return Conclusion(rule, words, numbers, table, findings=findings, at_least=NEEDED)


def smooth(values, width=10):
    """The mean of the last `width` values, of fewer at the start."""
    total = np.cumsum(np.pad(values, (1, 0)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def draw(figure, seeds, size):
    ends, *rows = figure.subplots(1 + len(METRICS), len(ABLATIONS), sharey="row")
    for column, (ingredient, names) in enumerate(ABLATIONS.items()):
        axis = ends[column]
        for x, (name, colour) in enumerate(zip(("complete", *names), (COLOURS[5], *COLOURS))):
            J = [s["J"][name] for s in seeds]
            filled = name == "complete" or matters(seeds, name)
            axis.plot(np.linspace(x - 0.2, x + 0.2, len(J)), J, "o", color=colour, markersize=4, label=name,
                      fillstyle="full" if filled else "none")
            axis.plot([x - 0.35, x + 0.35], [np.mean(J)] * 2, color=colour, linewidth=1.8)
            for axes, key in zip(rows, METRICS):
                by_seed = [smooth(reported(s, name, key)) for s in seeds]
                steps = np.arange(1, size["steps"] + 1)
                axes[column].fill_between(steps, np.min(by_seed, axis=0), np.max(by_seed, axis=0), color=colour,
                                          alpha=0.15, linewidth=0)
                axes[column].plot(steps, np.mean(by_seed, axis=0), color=colour, linewidth=1.5)
        for name_of_level in ("SFT model", "pi* of gold"):
            level(axis, np.mean([s["levels"][name_of_level] for s in seeds]), "")
        axis.set(xlim=(-0.6, 2.6), xticks=[])
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), title=ingredient, fontsize=10, title_fontsize=11)
    for axes, label in zip((ends, *rows), ("J at the end\n(dotted: pi*, SFT)", *METRICS.values())):
        axes[0].set_ylabel(label)
        if "symlog" in label:
            axes[0].set_yscale("symlog", linthresh=1)
            axes[0].set_ylim(top=max(2, axes[0].get_ylim()[1]))         # a tick at 1 at least
        for axis in axes:
            axis.locator_params(axis="x", nbins=3)
            axis.tick_params(labelbottom=axes is rows[-1])
    figure.suptitle(f"Filled: the {LEVEL:.0%} interval of the lost J lies above 0; hollow: it does not. "
                    "Bands: least to greatest of the seeds")
    figure.supxlabel("step", fontsize=10)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(11, 10)))
