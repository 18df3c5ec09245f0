"""DPO: the policy is trained directly on pairs of answers

Claim. From pairs of answers, one of them preferred, the policy is trained directly: no reward model, no sampling.

Test. A transformer of 25,632 parameters is finetuned on 4,000 demonstrations (the SFT model, which is the reference).
2,000 pairs of its replies are compared; the preferences follow the Bradley-Terry model of the gold reward. DPO trains
for 200 steps of 64 pairs, for three beta. All 781 replies are listed, so gold reward and KL to the reference are exact
at every point of training. Implied rewards are tested on 2,000 new pairs (those of equal gold are left out). Baselines:
SFT on the chosen replies alone, and, without any label, the reference at lower temperatures (1 to 0.1). The best
possible is pi* of the gold reward. Harder pairs at beta 0.3: 25 % of the labels flipped (DPO, cDPO, robust DPO); pairs
sampled from an earlier checkpoint of the SFT model (a sixth of its training) or uniformly from all replies. Methods are
compared at equal KL, on the concave hull of their points (common/frontier.py). DPO can move probability to replies that
occur in no pair. This is measured by the probability of these replies, and by restricting policies to the others.
Further, one step of plain gradient descent on all pairs: to first order it changes log pi(y) by
-rate sum_j K(y, y_j) dL/d log pi(y_j), where y_j runs over the chosen and rejected replies of all pairs, and K is the
inner product of the gradients of two log-probs. The mean over the chosen replies is split into the contributions of all
chosen and of all rejected replies, in float64, at several points of training, and is checked against the step itself.
For 24 pairs it is also computed for a step on that pair alone.

Rule. Trained on pairs alone (beta 0.3), the policy ends with more gold reward than the SFT model; at 0.5 nat of KL, DPO
has more gold reward than SFT on the chosen replies; and its implied rewards order more than half of the new pairs as
the gold reward does. Margin 0 for the rewards, 0.5 for the share. DPO at 0.5 nat is the best of its three beta. No
reward model is trained and no reply is sampled during training. A stricter comparison, with the SFT model at a lower
temperature at equal KL, is reported as a finding.

Limits. An earlier rule also required a lead over the reference at a lower temperature at 0.5 nat. That comparison asks
whether DPO is better than a method without labels, which the claim does not say. It is kept as a finding at 0.25, 0.5
and 1 nat, and its sign depends on the level. The restricted policy explains the loss; it is no remedy, because it
needs to know which replies were compared. In a trial with seed 0, unlimited pairs (100,000 in 200 steps of 512) gained
nothing at 0.5 nat; at beta 1, with a closer pi*, 200,000 pairs in 1,000 steps of 256 ended at a total variation of
0.03 from it. The decomposition is for plain gradient descent on all pairs; training uses AdamW on batches of 64 pairs,
and the decomposition does not explain its changes. Predicting the sign of the next change from the two contributions
is no better than always predicting "down". cDPO and robust DPO know the share of flips. The point of each path that is
used at a given KL is selected by the gold reward, for all methods alike. A method that does not reach the KL is read at
its best point: SFT on the chosen replies converges to their distribution, so it is also compared at its largest KL.
Uniform pairs mostly contain replies that the model never gives.

Source. Rafailov et al. 2023, arXiv:2305.18290; cDPO: Mitchell 2023, a note; robust DPO: Chowdhury et al. 2024,
arXiv:2403.00409; falling log-probs: Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847;
probability moved to replies outside the pairs: Xu et al. 2024, arXiv:2404.10719.

Figure. Gold reward against KL along training (square-root axis), one line for each beta and each rival; gold reward at
0.5 nat of KL, one row for each kind of pairs or method; the change of the log-probs of chosen and rejected replies
against the step; the derivative of the log-prob of a chosen reply in the learning rate against the step (symlog axis).
"""

import functools
import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from common.dpo_step import TERMS, as_table, decomposition, in_a_pair
from common.frontier import frontier
from minilm.exact.enumerable import divergence, expectation, optimum
from minilm.objectives.dpo import dpo_loss, robust_dpo_loss
from minilm.stages.dpo import train_dpo
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from worlds.replies import MODEL, ReplyWorld

BETAS, HARD = (1.0, 0.3, 0.1), 0.3           # HARD: of the runs with flips and with other pairs
FLIPS, FRESH = 0.25, 2000
LEVELS, DECIDES = (0.25, 0.5, 1.0), 0.5      # nats at which methods are compared; the level of the rule
ENVELOPE = tuple(np.geomspace(5, 0.05, 30))
TEMPERATURES = tuple(np.linspace(1, 0.1, 19))
RUNS = tuple(f"DPO, beta {beta}" for beta in BETAS)
CLEAN, EVERY = f"DPO, beta {HARD}", "DPO, every beta"
HARDER = ("flips: DPO", "flips: cDPO", "flips: robust DPO", "pairs of an earlier model", "uniform pairs")
IMITATION, LOWER = "SFT on the chosen replies", "reference at a lower temperature"
CUT, CUT_LOWER = (f"{name}, restricted to compared replies" for name in (CLEAN, LOWER))
# points: evaluations of the policy during training, after the one before the first step; early: further ones, after
# these steps, for gold at small KL; alone: pairs for which a step on the pair alone is computed
SIZES = {"quick": {"seeds": 3, "tuning": 6, "demonstrations": 200, "pairs": 100, "steps": 2, "points": 1, "early": [1],
                   "alone": 2},
         "default": {"seeds": 6, "tuning": 300, "demonstrations": 4000, "pairs": 2000, "steps": 200, "points": 8,
                     "early": [6, 12, 18], "alone": 24}}


class Paths:
    """Training runs of one seed, evaluated along the way. fresh: p, better, worse (3,B) of new pairs."""

    def __init__(self, world, model, rng, settings):
        self.world = world
        self.model = model
        self.rng = rng
        self.settings = settings
        self.reference = world.log_distributions(model)
        self.fresh = world.ordered_by_gold(self.reference, rng, FRESH)

    def point(self, log_pi, compared):
        """Everything that is measured of a policy (P,Y)."""
        change = log_pi - self.reference
        p, chosen, rejected = compared
        new, better, worse = self.fresh
        paired = in_a_pair(self.world, *compared)
        cut = within(log_pi, paired)
        gold = self.world.gold
        return {"KL": divergence(log_pi, self.reference).mean(), "gold": expectation(log_pi, gold).mean(),
                "KL, cut": divergence(cut, self.reference).mean(), "gold, cut": expectation(cut, gold).mean(),
                "in no pair": 1 - expectation(log_pi, paired).mean(),
                "chosen": change[p, chosen].mean(), "rejected": change[p, rejected].mean(),
                "fitted": (change[p, chosen] > change[p, rejected]).mean(),
                "ordered": (change[new, better] > change[new, worse]).mean()}

    def along(self, policy, compared, stage, watch=None):
        """The points along a stage that trains the policy; watch(policy) is called at the regular ones."""
        evaluated = [self.point(self.reference, compared)]
        if watch:
            watch(policy)
        for step, _ in enumerate(stage, 1):
            if step in evaluated_at(**self.settings):
                evaluated.append(self.point(self.world.log_distributions(policy), compared))
            if watch and step % (self.settings["steps"] // self.settings["points"]) == 0:
                watch(policy)
        return {name: [values[name] for values in evaluated] for name in evaluated[0]}

    def dpo(self, compared, beta=HARD, loss=dpo_loss, watch=None):
        policy = self.model.copy()
        p, chosen, rejected = compared
        references = (self.reference[p, y].astype(policy.dtype) for y in (chosen, rejected))
        stage = train_dpo(TrainState(policy, self.rng), *self.world.tokens_of(*compared), *references,
                          self.settings["steps"], 64, beta, learning_rate=3e-4, loss=loss)
        return self.along(policy, compared, stage, watch)

    def imitation(self, compared):
        """SFT on the chosen replies."""
        policy = self.model.copy()
        prompts, chosen = self.world.tokens_of(*compared[:2])
        stage = train_sft(TrainState(policy, self.rng), prompts, chosen, self.settings["steps"], 64, 3e-4)
        return self.along(policy, compared, stage)

    def curve(self, policies):
        """KL and gold reward of several policies (P,Y)."""
        return {"KL": [divergence(log_pi, self.reference).mean() for log_pi in policies],
                "gold": [expectation(log_pi, self.world.gold).mean() for log_pi in policies]}


def finetuned(experiment, world, rng, demonstrations, tuning):
    """The SFT model, and log pi (P,Y) of an earlier checkpoint, after a sixth of its training."""
    model = experiment.transformer(rng, **MODEL)
    demonstrated = world.demonstrations(rng, demonstrations)
    for step, _ in enumerate(train_sft(TrainState(model, rng), *demonstrated, tuning, 64, 3e-3), 1):
        if step == tuning // 6:
            earlier = world.log_distributions(model)
    return model, earlier


def measure(experiment, seed, tuning, demonstrations, pairs, steps, points, early, alone):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    model, earlier = finetuned(experiment, world, rng, demonstrations, tuning)
    paths = Paths(world, model, rng, {"steps": steps, "points": points, "early": early})
    reference = paths.reference
    uniform = np.full(world.shape, -np.log(world.shape[1]))
    clean, flipped = (world.comparisons(reference, world.gold, rng, pairs, flip_rate=rate) for rate in (0, FLIPS))
    parts = []

    def decompose(policy):
        parts.append(decomposition(policy, world, reference, clean, HARD, alone))

    results = {name: paths.dpo(clean, beta, watch=decompose if beta == HARD else None)
               for name, beta in zip(RUNS, BETAS)}
    results[IMITATION] = paths.imitation(clean)
    experiment.say(f"seed {seed}, {CLEAN}: mean change of log pi(chosen) at steps "
                   f"{evaluated_at(steps, points, early)}: {np.round(results[CLEAN]['chosen'], 2).tolist()} nats")
    smoothed = functools.partial(dpo_loss, label_smoothing=FLIPS)
    robust = functools.partial(robust_dpo_loss, flip_rate=FLIPS)
    harder = [flipped] * 3 + [world.comparisons(log_pi, world.gold, rng, pairs) for log_pi in (earlier, uniform)]
    for name, compared, loss in zip(HARDER, harder, (dpo_loss, smoothed, robust, dpo_loss, dpo_loss)):
        results[name] = paths.dpo(compared, loss=loss)

    paired = in_a_pair(world, *clean)
    lower = [world.log_distributions(model, t) for t in TEMPERATURES]
    results["pi*"] = paths.curve([optimum(reference, world.gold, beta)[0] for beta in ENVELOPE])
    results[LOWER] = paths.curve(lower)
    results[CUT_LOWER] = paths.curve([within(log_pi, paired) for log_pi in lower])
    results["pi* in no pair"] = 1 - expectation(optimum(reference, world.gold, HARD)[0], paired).mean()
    results[CUT] = {name: results[CLEAN][f"{name}, cut"] for name in ("KL", "gold")}
    terms, errors = zip(*parts)
    return {**results, "terms": terms, "error": max(errors), "equal": 1 - paths.fresh.shape[1] / FRESH}


def evaluated_at(steps, points, early, **_):
    """The steps after which the policy is evaluated."""
    return sorted({*early, *range(0, steps + 1, steps // points)})


def within(log_pi, allowed):
    """log pi(y | y is allowed), from log_pi (P,Y) and allowed (P,Y)."""
    restricted = np.where(allowed, log_pi, -np.inf)
    return restricted - np.logaddexp.reduce(restricted, axis=1, keepdims=True)


def at(seeds, name, k):
    """Gold reward at a KL of k (or one k per seed): on the frontier of the points of this name and the reference."""
    names = RUNS if name == EVERY else [name]
    values = []
    for s, x in zip(seeds, np.broadcast_to(k, len(seeds))):
        points = [s[CLEAN][what][:1] + sum((s[n][what] for n in names), []) for what in ("KL", "gold")]
        values.append(np.interp(x, *frontier(*points).T))
    return np.array(values)


def last(seeds, name, what):
    """A quantity at the end of training, (seeds,)."""
    return np.array([s[name][what][-1] for s in seeds])


def conclude(seeds, size):
    start = np.array([s[CLEAN]["gold"][0] for s in seeds])
    largest = np.array([max(s[IMITATION]["KL"]) for s in seeds])
    rule = [Comparison(f"gold reward at the end of {CLEAN}, minus that of the SFT model",
                       last(seeds, CLEAN, "gold") - start, above=0),
            Comparison(f"lead of DPO over {IMITATION} at {DECIDES} nat (gold reward)",
                       at(seeds, EVERY, DECIDES) - at(seeds, IMITATION, DECIDES), above=0),
            Comparison("share of new pairs that the implied rewards order as gold does",
                       last(seeds, CLEAN, "ordered"), above=0.5)]
    findings = [Comparison(f"lead of DPO over the {LOWER}, without labels, at {k} nat (gold reward)",
                           at(seeds, EVERY, k) - at(seeds, LOWER, k), above=0) for k in LEVELS]
    findings += [Comparison(f"lead of {CLEAN} over {IMITATION} at the largest KL of the latter (gold reward)",
                            at(seeds, CLEAN, largest) - at(seeds, IMITATION, largest), above=0),
                 Comparison(f"change of the log-probs of chosen replies by {CLEAN} (nats)",
                            last(seeds, CLEAN, "chosen"), above=0)]
    terms = np.array([s["terms"] for s in seeds])           # (seeds, points + 1, TERMS)
    words = (f"At {DECIDES} nat of KL the gold reward is {mean(at(seeds, EVERY, DECIDES))} for DPO and "
             f"{mean(at(seeds, IMITATION, DECIDES))} for {IMITATION} (its best point, because it reaches only "
             f"{mean(largest)} nat); the SFT model has {mean(start)}, and {mean(at(seeds, LOWER, DECIDES))} at a lower "
             "temperature, without labels.")
    return Conclusion(rule, words, _numbers(seeds, largest, terms, size), _table(seeds, largest), findings=findings,
                      legend=LEGEND, details=as_table(terms, _moments(terms)))


NAMES = (EVERY, *RUNS, IMITATION, *HARDER, CUT, LOWER, CUT_LOWER, "pi*")
LEGEND = ("Gold: expected gold reward; a method that does not reach a KL is read at its best point. Restricted: to "
          "compared replies. Chosen, change: mean of log pi - log pi_ref, chosen replies. Pairs fitted: share in which "
          f"it is larger for the chosen reply. New pairs ordered: share of {FRESH:,} in which it is larger for the one "
          f"with more gold. Flips: {FLIPS:.0%} of labels; cDPO and robust DPO know this share.")


def _moments(terms):
    """{name: index of the evaluation} of the start, the largest fall by the two terms together, and the end."""
    return {"the start": 0, "the largest fall": terms[..., :2].sum(axis=-1).mean(axis=0).argmin(), "the end": -1}


def _numbers(seeds, largest, terms, size):
    numbers = {f"gold reward at KL {k}, {name}": spread(at(seeds, name, k)) for name in NAMES for k in LEVELS}
    numbers |= {f"gold reward at the largest KL of {IMITATION}, {name}": spread(at(seeds, name, largest))
                for name in NAMES}
    numbers |= {f"largest KL, {name}": spread(max(s[name]["KL"]) for s in seeds)
                for name in NAMES if name not in (EVERY, "pi*")}
    numbers |= {f"{what} at the end, {name}": spread(last(seeds, name, what)) for name in (*RUNS, IMITATION, *HARDER)
                for what in ("KL", "gold", "chosen", "rejected", "ordered")}
    numbers |= {f"probability of replies in no pair, {name}": spread(values) for name, values in
                ((f"{CLEAN}, at the end", last(seeds, CLEAN, "in no pair")),
                 ("reference", [s[CLEAN]["in no pair"][0] for s in seeds]),
                 (f"pi*, beta {HARD}", [s["pi* in no pair"] for s in seeds]))}
    numbers["share of new pairs of equal gold, left out"] = spread(s["equal"] for s in seeds)
    for when, i in _moments(terms).items():
        numbers |= {f"d log pi(chosen) / d rate at {when}: {term}": spread(terms[:, i, j])
                    for j, term in enumerate(TERMS)}
    steps = np.array(evaluated_at(**size)) % (size["steps"] // size["points"])
    next_change = np.diff(np.array([s[CLEAN]["chosen"] for s in seeds])[:, steps == 0])
    predicted = np.sign(terms[:, :-1, :2].sum(axis=-1))
    numbers["share of points where the sum of both terms has the sign of the next change"] = spread(
        (predicted == np.sign(next_change)).mean(axis=1))
    numbers["share of points where the next change is down"] = spread((next_change < 0).mean(axis=1))
    numbers["relative error of the decomposition"] = spread(s["error"] for s in seeds)
    return numbers


def _table(seeds, largest):
    ends = {"gold": "gold at the end", "chosen": "chosen, change (nats)", "fitted": "pairs fitted",
            "ordered": "new pairs ordered"}
    table = [["", *(f"gold at KL {k}" for k in LEVELS), f"gold at KL {np.mean(largest):.2f}", "largest KL",
              *ends.values()]]
    for name in NAMES:
        trained = name in (*RUNS, IMITATION, *HARDER)
        table.append([name.replace(" to compared replies", ""),
                      *(mean_range(at(seeds, name, k)) for k in (*LEVELS, largest)),
                      mean_range([max(s[name]["KL"]) for s in seeds]) if name not in (EVERY, "pi*") else "",
                      *(mean_range(last(seeds, name, what)) if trained else "" for what in ends)])
    return table


def draw(figure, seeds, size):
    (reward, harder), (fall, why) = figure.subplots(2, 2)
    along(reward, seeds, "pi*", "pi*: the best possible", COLOURS[5], linestyle="--")
    along(reward, seeds, LOWER, f"{LOWER}: no labels", COLOURS[4], linestyle=":")
    for name, colour, marker in zip((*RUNS, IMITATION), COLOURS, "os^D"):
        along(reward, seeds, name, name, colour, marker=marker)
    reward.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))  # beta 1 ends near 0
    reward.set(title="Gold reward against KL, along training", xticks=(0, 0.1, 0.5, 1, 2), xlim=(0, 2.5),
               xlabel="exact KL to the reference (nats per reply; square-root axis)", ylabel="expected gold reward")
    reward.set_ylim(bottom=reward.get_ylim()[0] - 0.4)      # space for the legend
    reward.legend(loc="lower right", fontsize=8)

    names = (CLEAN, CUT, *HARDER, IMITATION, LOWER)
    for i, name in enumerate(names):
        values, colour = at(seeds, name, DECIDES), COLOURS[0 if name in HARDER else 1]
        label = {CLEAN: "clean pairs, or none", HARDER[0]: "flipped or other pairs"}.get(name)
        harder.plot(values, [i] * len(values), "o", color=colour, alpha=0.5, markersize=4, label=label)
        harder.plot([values.mean()], [i], "|", color=colour, markersize=14, markeredgewidth=2)
    for value, label, side in ((np.mean([s[CLEAN]["gold"][0] for s in seeds]), "reference", "left"),
                               (at(seeds, "pi*", DECIDES).mean(), "pi*", "right")):
        harder.axvline(value, color=COLOURS[5], linestyle=":", linewidth=1.2)
        harder.annotate(f" {label} ", (value, -0.75), ha=side, va="center", fontsize=8, alpha=0.75)
    harder.set(title=f"Gold reward at {DECIDES} nat of KL", xlabel="expected gold reward", yticks=range(len(names)),
               yticklabels=["DPO, clean pairs", "the same, compared replies only", *names[2:-1],
                            "reference, lower temperature"],
               ylim=(len(names) - 0.5, -1.1))
    harder.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8)

    for beta, colour, marker in zip(BETAS, COLOURS, "os^"):
        steps = evaluated_at(**size)
        chosen = [s[f"DPO, beta {beta}"]["chosen"] for s in seeds]
        curve(fall, steps, chosen, f"chosen, beta {beta}", colour, marker=marker)
    curve(fall, steps, [s[CLEAN]["rejected"] for s in seeds], f"rejected, beta {HARD}", COLOURS[5], linestyle="--")
    level(fall, 0, "")
    fall.set(title="Log-probs of the replies in the pairs", xlabel="step",
             ylabel="mean change from the reference (nats)")
    fall.legend(loc="lower left", fontsize=8)

    terms = np.array([s["terms"] for s in seeds])
    steps = np.linspace(0, size["steps"], size["points"] + 1)
    curve(why, steps, terms[..., 2:].sum(axis=-1), "one pair alone, both replies", COLOURS[3], marker="^")
    curve(why, steps, terms[..., 0], TERMS[0], COLOURS[2])
    curve(why, steps, terms[..., :2].sum(axis=-1), "all pairs together", COLOURS[5], marker="D")
    curve(why, steps, terms[..., 1], TERMS[1], COLOURS[4], marker="s")
    level(why, 0, "")
    why.set(title=f"One plain gradient step, beta {HARD}", xlabel="step",
            ylabel="d log pi(chosen) / d learning rate (symlog axis)")
    why.set_yscale("symlog", linthresh=0.1)
    low, high = why.get_ylim()
    why.set_ylim(low, 30 * high)                            # space for the legend
    why.legend(loc="upper right", fontsize=8, ncols=2)


def along(axis, seeds, name, label, colour, **style):
    """Gold reward against KL: each seed at its own KL, faint, and the means of both."""
    kl, gold = (np.array([s[name][what] for s in seeds]) for what in ("KL", "gold"))
    axis.plot(kl.T, gold.T, color=colour, linewidth=0.8, alpha=0.35)
    axis.plot(kl.mean(axis=0), gold.mean(axis=0), color=colour, markersize=4, linewidth=1.8, label=label, **style)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10.5, 8.0)))
