"""Reinforcement learning is hard to get right: the same run, one ingredient less at a time

Claim. Reinforcement learning is hard to get right.

Test. A transformer of 25,632 parameters, instructed with 4,000 demonstrations; a reward model from 1,000 comparisons
of its replies; the policy gradient on it, beta 0.3, 64 replies a step. The same again with an ingredient removed:
the baseline (none; and none with every reward 3 higher, which comparisons cannot tell apart), the KL penalty (beta
0), the warm start (from random weights), the learning rate (ten times higher; ten times lower), the masks (prompt
and padding counted as response, in loss and KL; and EOS taken for padding, as happens where both are one token).
Measured: J = gold reward - 0.3 KL, exact, for all 781 replies to each of 9 questions are listed; and the metrics
that a run reports of itself, from its samples. Levels: pi* for the learned and for the gold reward. Control: is it
RL that is hard, or training? DPO on 1,000 comparisons (beta 0.3, 200 steps of 64), and the same with what it has of
these ingredients removed: the warm start, the learning rate, the KL penalty (beta 0.03: at 0 DPO has no loss).

Refuted. If fewer than 3 of the 5 ingredients matter. One matters if removing it (in either of its ways) lowers J at
the end, seed by seed against the healthy run, by more than two standard errors of the mean difference over the
seeds.

Limits. That five ingredients are needed does not make RL harder than other training: of those that DPO has too (start
and rate), DPO forgives less. A small world forgives: a random policy meets good replies by chance, which a real one
hardly does, and has time to catch up. Most of what beta = 0 loses is the KL in J; gold reward alone stands beside it.
The healthy learning rate comes from a few trials, as it would in practice. The prompt's tokens alone would falsify
only the reported KL, for advantages of leave-one-out add up to zero over a prompt's replies; nor does a missing
baseline cost much where the reward model's centring term has done its work already. Two standard errors of five seeds
are no strong evidence.

Source. Henderson et al. 2018, arXiv:1709.06560; Huang et al. 2024, arXiv:2403.17031 (EOS taken for padding, and
other details); Ahmadian et al. 2024, arXiv:2402.14740 (leave-one-out).
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import finetune_by_dpo, proxy_rewards, sft_model

import numpy as np

from minilm.data import make_batch
from minilm.generate import generate
from minilm.model import Config, Transformer
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, policy_gradient_metrics
from minilm.optim import warmup_cosine
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState, train_step, stage
from minilm.tensor import no_grad
from minilm.exact.enumerable import expectation, objective, optimum
from worlds.replies import EOS, LONGEST, MODEL, ReplyWorld

BETA, RATE, P, K = 0.3, 2e-3, 16, 4
ABLATIONS = {"baseline": ("no baseline", "no baseline, rewards + 3"), "KL": ("beta = 0",),
             "warm start": ("from random weights",), "learning rate": ("rate x 10", "rate / 10"),
             "masks": ("padding counts", "EOS does not")}
RAISING, RAISED = ABLATIONS["baseline"][1:], 3.0
NAMES = ("healthy", *(name for names in ABLATIONS.values() for name in names))
# What differs from the healthy run: options of stages.rlhf, or what is taken for response by mistake.
OPTIONS = {"no baseline": {"baseline": "none"}, "no baseline, rewards + 3": {"baseline": "none"},
           "beta = 0": {"beta": 0.0}, "rate x 10": {"learning_rate": 10 * RATE},
           "rate / 10": {"learning_rate": RATE / 10}}
COUNTED = {"padding counts": lambda tokens, mask: np.ones(mask.shape),
           "EOS does not": lambda tokens, mask: mask * (tokens != EOS)}
METRICS = {"reward": "learned reward", "kl_sequence": "KL (nats)", "entropy": "entropy\n(nats per token)",
           "grad_norm": "gradient norm", "frac_reward_zero_std": "prompts with\nequal rewards"}
# Of the control, which is DPO: its beta and learning rate.
DIRECT_RATE = 3e-4
DIRECT = {"healthy": (BETA, DIRECT_RATE), "beta / 10": (BETA / 10, DIRECT_RATE),
          "from random weights": (BETA, DIRECT_RATE), "rate x 10": (BETA, 10 * DIRECT_RATE),
          "rate / 10": (BETA, DIRECT_RATE / 10)}
SIZES = {"quick": {"seeds": 3, "tuning": 4, "steps": 3}, "default": {"seeds": 5, "tuning": 300, "steps": 150}}


@stage
def wrongly_masked(training, reference, reward, prompts, steps, counts):
    """stages.rlhf, but counts(tokens, mask), (B,T) both, says what is response; the mask is where it really is."""
    while training.step < steps:
        asked = [prompts[i] for i in training.rng.integers(len(prompts), size=P) for _ in range(K)]
        samples = generate(training.model, asked, LONGEST, training.rng, EOS)
        answers = samples.responses()
        batch = make_batch(asked, answers, pad=EOS)
        counted = counts(batch.tokens, batch.mask)[:, 1:]
        with no_grad():
            k1 = training.model.log_probs(batch.tokens).data - reference.log_probs(batch.tokens).data
        kl, rewards = (k1 * counted).sum(axis=1).reshape(P, K), np.asarray(reward(asked, answers)).reshape(P, K)
        A = advantages(rewards, kl, BETA).reshape(-1)

        def loss(policy, _):
            return policy_gradient_loss(policy.log_probs(batch.tokens), A, counted), None

        rate = warmup_cosine(training.step, steps, RATE, warmup=min(5, steps // 10 + 1), floor=0.3)
        metrics, _ = train_step(training, loss, [None], rate, "wrongly masked rlhf")
        yield {**metrics, **policy_gradient_metrics(rewards, kl, counted),
               "entropy": samples.entropies[samples.mask > 0].mean()}


def history_of(name, policy, model, reward, prompts, rng, steps):
    """Train the policy in the run of this name; the metrics of every step."""
    training = TrainState(policy, rng, weight_decay=0.0)
    if name in COUNTED:
        return list(wrongly_masked(training, model, reward, prompts, steps, COUNTED[name]))

    def given(asked, answers):
        return reward(asked, answers) + (RAISED if name in RAISING else 0)
    options = {"beta": BETA, "learning_rate": RATE, **OPTIONS.get(name, {})}
    return list(train_rlhf(training, model, given, prompts, steps, P, K, LONGEST, EOS, **options))


def measure(row, seed, tuning, steps):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=2)
    model = sft_model(world, rng, tuning)
    reference = world.log_distributions(model)
    learned = proxy_rewards(world, model, rng, 1000, tuning // 2)

    def J(l):
        return objective(l, reference, world.gold, BETA).mean()

    levels = {"instructed": J(reference), "pi* of the learned reward": J(optimum(reference, learned, BETA)[0]),
              "pi* of gold": J(optimum(reference, world.gold, BETA)[0])}
    found = {"levels": levels, "J": {}, "gold": {}, "metrics": {}, "DPO": {}}
    for name in NAMES:
        policy = Transformer(Config(**MODEL), rng) if name == "from random weights" else model.copy()
        history = history_of(name, policy, model, world.reward(learned), world.prompts, rng, steps)
        l = world.log_distributions(policy)
        found["J"][name], found["gold"][name] = J(l), expectation(l, world.gold).mean()
        found["metrics"][name] = {key: [float(m[key]) for m in history] for key in METRICS}
        row.say(f"seed {seed}, {name}: J {found['J'][name]:.2f}, gold {found['gold'][name]:.2f}")
    pairs = world.comparisons(reference, world.gold, rng, 1000)
    for name, (beta, rate) in DIRECT.items():
        policy = Transformer(Config(**MODEL), rng) if name == "from random weights" else model.copy()
        finetune_by_dpo(world, policy, reference, pairs, rng, 4 * steps // 3, beta, rate)
        found["DPO"][name] = J(world.log_distributions(policy))
    return found


def costs(seeds, name, what="J"):
    """The mean loss against the healthy run, seed by seed, and its standard error."""
    lost = [s[what]["healthy"] - s[what][name] for s in seeds]
    return float(np.mean(lost)), float(np.std(lost, ddof=1) / len(lost) ** 0.5)


def matters(seeds, name, what="J"):
    lost, error = costs(seeds, name, what)
    return lost > 2 * error


def reported(s, name, key):
    """A metric of every step; of raised rewards, what they were before."""
    return np.array(s["metrics"][name][key]) - (RAISED if key == "reward" and name in RAISING else 0)


def symptom(seeds, name):
    """The metric in which the run differs most from the healthy one, in standard errors, over its last fifth."""
    def late(s, run, key):
        return reported(s, run, key)[-max(1, len(s["metrics"][run][key]) // 5):].mean()

    values = {key: np.array([[late(s, run, key) for run in (name, "healthy")] for s in seeds]) for key in METRICS}

    def departs(key):
        difference = values[key] @ (1, -1)
        return abs(difference.mean()) / (difference.std(ddof=1) / len(seeds) ** 0.5 + 1e-9)
    key = max(METRICS, key=departs)
    return "{} {:.2f}, healthy {:.2f}".format(key, *values[key].mean(axis=0))


def conclude(seeds, size):
    needed, of_gold = ([ingredient for ingredient, names in ABLATIONS.items()
                        if any(matters(seeds, name, what) for name in names)] for what in ("J", "gold"))
    by = [name for ingredient in needed for name in ABLATIONS[ingredient] if matters(seeds, name)]
    harmless = [name for name in NAMES[1:] if not matters(seeds, name)]
    numbers = {f"{what}, {name}": spread(s[what][name] for s in seeds) for what in ("J", "gold") for name in NAMES}
    numbers |= {f"J, {name}": spread(s["levels"][name] for s in seeds) for name in seeds[0]["levels"]}
    table = [["run", "J", "lost (se)", "gold reward", "lost (se)", "matters", "seen best in"]]
    for name in NAMES:
        cells = [[shown([s[what][name] for s in seeds]), "{:.2f} ({:.2f})".format(*costs(seeds, name, what))]
                 for what in ("J", "gold")]
        table.append([name, *cells[0], *cells[1], *(("", "") if name == "healthy" else (
            "yes" if matters(seeds, name) else "no", symptom(seeds, name)))])
    table += [[name, shown([s["levels"][name] for s in seeds]), *[""] * 5] for name in seeds[0]["levels"]]
    direct = {name: "{:.2f} ({:.2f})".format(*costs(seeds, name, "DPO")) for name in list(DIRECT)[1:]}
    numbers |= {f"J, DPO, {name}": spread(s["DPO"][name] for s in seeds) for name in DIRECT}
    table += [[f"DPO, {name}", shown([s["DPO"][name] for s in seeds]), direct.get(name, ""), *[""] * 4]
              for name in DIRECT]
    worst = max(NAMES[1:], key=lambda name: costs(seeds, name)[0])
    sentence = (f"{len(needed)} of {len(ABLATIONS)} ingredients matter ({', '.join(needed) or 'none'}), on gold "
                f"reward alone, without the KL of J, {len(of_gold)} ({', '.join(of_gold) or 'none'}): the healthy "
                f"run goes from J = {shown([s['levels']['instructed'] for s in seeds])} to "
                f"{shown([s['J']['healthy'] for s in seeds])}, the worst, '{worst}', ends at "
                f"{shown([s['J'][worst] for s in seeds])}. The runs that show it: {', '.join(by) or 'none'}. "
                f"DPO loses, without the same: {', '.join(f'{name} {lost}' for name, lost in direct.items())}. "
                f"No loss beyond two standard errors: {', '.join(harmless) or 'none'}.")
    return Conclusion(verdict(len(needed) >= 3), sentence, numbers, table)


def smooth(values, width=10):
    """The mean of the last `width` values, fewer at the start."""
    total = np.cumsum(np.pad(values, (1, 0)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def draw(figure, seeds, size):
    ends, *rows = figure.subplots(1 + len(METRICS), len(NAMES) - 1, sharey="row")
    for column, name in enumerate(NAMES[1:]):
        pair = (("healthy", COLOURS[5]), (name, COLOURS[4 if matters(seeds, name) else 0]))
        axis = ends[column]
        for x, (other, colour) in enumerate(pair):
            J = [s["J"][other] for s in seeds]
            axis.plot(np.linspace(x - 0.12, x + 0.12, len(J)), J, "o", color=colour, markersize=3, alpha=0.6)
            axis.plot([x - 0.25, x + 0.25], [np.mean(J)] * 2, color=colour, linewidth=1.8)
        for at in ("instructed", "pi* of gold"):
            level(axis, np.mean([s["levels"][at] for s in seeds]), "")
        axis.set(xlim=(-0.6, 1.6), xticks=[])
        axis.set_title(name.replace(", ", ",\n"), fontsize=9)
        for axes, key in zip(rows, METRICS):
            axis = axes[column]
            for other, colour in pair:
                by_seed = [smooth(reported(s, other, key)) for s in seeds]
                curve(axis, np.arange(1, size["steps"] + 1), by_seed, other, colour, marker="")
            if key in ("kl_sequence", "grad_norm"):
                axis.set_yscale("symlog", linthresh=1)
            axis.tick_params(labelsize=7, labelbottom=axes is rows[-1])
    for axes, label in zip((ends, *rows), ("J at the end\n(dotted: pi*, start)", *METRICS.values())):
        axes[0].tick_params(labelsize=7)
        axes[0].set_ylabel(label, fontsize=8)
    figure.suptitle("What each run reports of itself, beside the healthy run (grey); red: it costs more than two "
                    "standard errors of J, blue: it does not", fontsize=10)
    figure.supxlabel("step", fontsize=9)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(11, 8)))
