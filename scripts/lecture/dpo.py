"""DPO: two answers, one preferred, train the policy directly

Claim. From pairs of answers, one of them preferred, the policy is trained directly: no reward model, no sampling.

Test. A transformer of 25,632 parameters is instructed with 4,000 demonstrations; 2,000 pairs of its replies are
compared by a Bradley-Terry judge of the gold reward, and DPO takes 200 steps of 64 pairs, for three beta. All 781
replies are listed: gold reward and KL to the instructed model are sums, along the whole training; implied rewards are
tried on 2,000 fresh pairs (those of equal gold left out), ordered as gold does. Whether DPO moves probability onto
replies that are in no pair is seen by what these have of a policy, and by cutting policies to the others. Baselines
that could beat it: finetuning on the chosen replies alone; and, without a label, the reference itself sampled colder
(temperatures from 1 to 0.1). The best possible: pi* of the gold reward. Harder pairs, beta 0.3: 25 % of the labels
flipped (DPO, cDPO, robust DPO); pairs drawn from an older model (a sixth of its training) or uniformly from all
replies. Ways are compared at equal KL, on the concave hull of their points. Beside it one step of plain gradient
descent on all pairs: to first order it moves l(y) by -rate sum_j K(y, y_j) dL/dl(y_j), over the chosen and rejected
y_j of all pairs, K the inner products of their gradients. The mean over the chosen is taken apart into the push of all
chosen and the pull of all rejected replies, in float64, at policies along training, and checked against the step
itself; and beside it what pairs would do that were trained on alone (24 of them): raise the chosen by K(c,c), lower it
by K(c,r).

Refuted. If, with any seed, DPO (the hull over its three beta) has no more gold reward at 0.5 nat of KL than the
instructed model or than finetuning on the chosen replies, or its implied rewards (beta 0.3) order no more than half of
the fresh pairs as gold does; or if over the seeds DPO's lead at 0.5 nat over the colder reference is not above two
standard errors of the paired difference.

Limits. The colder reference came into the rule after a review, which missed a baseline without labels and had measured
this one: by the other conditions the row held, and holds them still; with this one it does not. At less KL DPO is
ahead of it, clearly: the leads at 0.25, 0.5 and 1 nat stand side by side, and a rule that read another level would
have another outcome. A cut policy explains, and is no remedy: it knows of all prompts which replies were compared. In
a trial with seed 0 pairs without end (100,000 in 200 steps of 512) brought nothing at 0.5 nat; at beta 1, whose pi* is
nearer, 200,000 in 1,000 steps of 256 ended 0.03 from it in total variation. The decomposition is of plain gradient
descent on all pairs; training is AdamW on batches of 64, and what moves its log-probs is not shown by it: that push
and pull together have the sign of the next move seen is worth nothing more than the constant "down", whose share
stands beside it. The share of flips is known to cDPO and robust DPO. The stop on each way is chosen by the gold
reward, for all alike; one that gets less far than the KL asked for is read at its best, as finetuning is, whose limit
is the law of the chosen replies: so it is compared at its furthest KL too, where it has more than DPO; its lack at 0.5
nat is one of reach. Uniform pairs are mostly replies that nobody gives.

Source. Rafailov et al. 2023, arXiv:2305.18290; cDPO: Mitchell 2023, a note; robust DPO: Chowdhury et al. 2024,
arXiv:2403.00409; falling log-probs: Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847;
probability moved onto replies that no pair holds: Xu et al. 2024, arXiv:2404.10719.
"""

import functools
import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.model import Config, Transformer
from minilm.objectives.dpo import dpo_loss, robust_dpo_loss
from minilm.packing import pack
from minilm.stages.sft import train_sft
from minilm.stages.dpo import train_dpo, summed_log_probs
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor
from minilm.exact.enumerable import divergence, expectation, optimum
from common.frontier import frontier
from worlds.replies import MODEL, ReplyWorld

BETAS, HARD = (1.0, 0.3, 0.1), 0.3           # HARD: of the runs with flips and with pairs of others
FLIPS, FRESH = 0.25, 2000
LEVELS, DECIDES = (0.25, 0.5, 1.0), 0.5      # nats at which ways are compared; the one of the rule
ENVELOPE, TEMPERATURES = tuple(np.geomspace(5, 0.05, 30)), tuple(np.linspace(1, 0.1, 19))
TERMS = ("all chosen replies push", "all rejected replies pull",
         "a pair alone: its chosen pushes", "a pair alone: its rejected pulls")
CLEAN, EVERY = f"DPO, beta {HARD}", "DPO, every beta"
HARDER = ("flips: DPO", "flips: cDPO", "flips: robust DPO", "pairs of an older model", "uniform pairs")
IMITATION, COLDER = "finetuned on the chosen", "the reference, colder"
CUT, CUT_COLDER = (f"{name}, of compared replies" for name in (CLEAN, COLDER))
# looks: at the policy on its way, after the one before the first step; early: further ones, after so many steps, for
# gold at little KL; alone: pairs of which each is taken by itself
SIZES = {"quick": {"seeds": 3, "tuning": 6, "demonstrations": 200, "pairs": 100, "steps": 2, "looks": 1, "early": [1],
                   "alone": 2},
         "default": {"seeds": 4, "tuning": 300, "demonstrations": 4000, "pairs": 2000, "steps": 200, "looks": 8,
                     "early": [6, 12, 18], "alone": 24}}


def measure(row, seed, tuning, demonstrations, pairs, steps, looks, early, alone):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=2)
    model = Transformer(Config(**MODEL), rng)
    shown_how = world.demonstrations(rng, demonstrations)
    for step, _ in enumerate(train_sft(TrainState(model, rng), *shown_how, tuning, 64, 3e-3), 1):
        if step == tuning // 6:
            older = world.log_distributions(model)
    reference = world.log_distributions(model)
    uniform = np.full(world.shape, -np.log(world.shape[1]))
    clean, flipped = (world.comparisons(reference, world.gold, rng, pairs, flip_rate=rate) for rate in (0, FLIPS))
    p, first, second = world.comparisons(reference, world.gold, rng, FRESH)
    lead = world.gold[p, first] - world.gold[p, second]
    fresh = np.array([p, *np.where(lead > 0, (first, second), (second, first))])[:, lead != 0]

    def place(laws):
        return {"KL": [divergence(l, reference).mean() for l in laws],
                "gold": [expectation(l, world.gold).mean() for l in laws]}

    def look(l, compared):
        moved = l - reference
        p, chosen, rejected = compared
        paired = in_a_pair(world, *compared)
        cut = within(l, paired)
        return {"KL": divergence(l, reference).mean(), "gold": expectation(l, world.gold).mean(),
                "KL, cut": divergence(cut, reference).mean(), "gold, cut": expectation(cut, world.gold).mean(),
                "in no pair": 1 - expectation(l, paired).mean(),
                "chosen": moved[p, chosen].mean(), "rejected": moved[p, rejected].mean(),
                "fitted": (moved[p, chosen] > moved[p, rejected]).mean(),
                "ordered": (moved[fresh[0], fresh[1]] > moved[fresh[0], fresh[2]]).mean()}

    def trained(compared, beta=HARD, loss=dpo_loss, watch=None):
        policy, (p, chosen, rejected) = model.copy(), compared
        references = (reference[p, y].astype(np.float32) for y in (chosen, rejected))
        stage = train_dpo(TrainState(policy, rng), *world.tokens_of(*compared), *references, steps, 64, beta,
                                  learning_rate=3e-4, loss=loss)
        return followed(policy, compared, stage, watch)

    def followed(policy, compared, stage, watch=None):
        way = [look(reference, compared)]
        if watch:
            watch(policy)
        for step, _ in enumerate(stage, 1):
            if step in looked_at(steps, looks, early):
                way.append(look(world.log_distributions(policy), compared))
            if watch and step % (steps // looks) == 0:
                watch(policy)
        return {name: [point[name] for point in way] for name in way[0]}

    parts = []

    def decompose(policy):
        parts.append(decomposition(policy, world, reference, clean, alone))

    found = {f"DPO, beta {beta}": trained(clean, beta, watch=decompose if beta == HARD else None) for beta in BETAS}
    policy = model.copy()
    prompts, replies = world.tokens_of(*clean[:2])
    imitating = train_sft(TrainState(policy, rng), prompts, replies, steps, 64, 3e-4)
    found[IMITATION] = followed(policy, clean, imitating)
    row.say(f"seed {seed}, log-probs of chosen replies: {np.round(found[CLEAN]['chosen'], 2).tolist()}")
    smoothed = functools.partial(dpo_loss, label_smoothing=FLIPS)
    robust = functools.partial(robust_dpo_loss, flip_rate=FLIPS)
    harder = [flipped] * 3 + [world.comparisons(l, world.gold, rng, pairs) for l in (older, uniform)]
    for name, of, loss in zip(HARDER, harder, (dpo_loss, smoothed, robust, dpo_loss, dpo_loss)):
        found[name] = trained(of, loss=loss)
    found["pi*"] = place([optimum(reference, world.gold, beta)[0] for beta in ENVELOPE])
    colder, paired = [world.log_distributions(model, t) for t in TEMPERATURES], in_a_pair(world, *clean)
    found[COLDER], found[CUT_COLDER] = place(colder), place([within(l, paired) for l in colder])
    found["pi* in no pair"] = 1 - expectation(optimum(reference, world.gold, HARD)[0], paired).mean()
    found[CUT] = {what: found[CLEAN][f"{what}, cut"] for what in ("KL", "gold")}
    terms, errors = zip(*parts)
    return {**found, "terms": terms, "error": max(errors), "equal": 1 - fresh.shape[1] / FRESH}


def looked_at(steps, looks, early, **_):
    return sorted({*early, *range(0, steps + 1, steps // looks)})


def in_a_pair(world, p, chosen, rejected):
    """Which replies are in a pair of their prompt, (P,N)."""
    paired = np.zeros(world.shape, bool)
    paired[p, chosen] = paired[p, rejected] = True
    return paired


def within(l, allowed):
    """log pi (P,N) given that the reply is one of those allowed (P,N)."""
    allowed_of_it = np.where(allowed, l, -np.inf)
    return allowed_of_it - np.logaddexp.reduce(allowed_of_it, axis=1, keepdims=True)


def decomposition(policy, world, reference, pairs, alone):
    """The mean d l(chosen) / d rate of a step of gradient descent on the loss of these pairs, by TERMS, and the
    relative error of the first two together against that step itself, taken forth and back."""
    policy = policy.over({name: Tensor(w.data.astype(np.float64), requires_grad=True)
                          for name, w in policy.parameters().items()})
    p, chosen, rejected = pairs
    weights = list(policy.parameters().values())

    def gradient(cotangent):
        """Of sum(cotangent * l), cotangent (P,N) mostly 0: one flat vector."""
        for w in weights:
            w.grad = None
        of, y = np.nonzero(cotangent)
        summed_log_probs(policy, pack(*world.tokens_of(of, y))).backward(cotangent[of, y])
        return np.concatenate([w.grad.reshape(-1) for w in weights])

    def spread_over(y, values):
        table = np.zeros(world.shape)
        np.add.at(table, (p, y), values)
        return table

    l = world.log_distributions(policy)
    leaves = [Tensor(l[p, y], requires_grad=True) for y in (chosen, rejected)]
    dpo_loss(*leaves, *(reference[p, y] for y in (chosen, rejected)), beta=HARD).backward()
    downhill = [gradient(spread_over(y, -leaf.grad)) for y, leaf in zip((chosen, rejected), leaves)]
    watched = gradient(spread_over(chosen, np.full(len(p), 1 / len(p))))
    terms = [watched @ push for push in downhill]

    single = []
    for i in range(alone):
        of_chosen, of_rejected = (gradient(spread_over(y, np.arange(len(p)) == i)) for y in (chosen, rejected))
        # Without the others the mean over pairs is the pair itself.
        single.append(-leaves[0].grad[i] * len(p) * np.array([of_chosen @ of_chosen, -of_chosen @ of_rejected]))

    sides, rate = [], 1e-6
    for sign in (1, -2):                                    # forth, and then twice as far back
        start = 0
        for w in weights:
            w.data += sign * rate * sum(downhill)[start:start + w.size].reshape(w.shape)
            start += w.size
        sides.append(world.log_distributions(policy)[p, chosen].mean())
    measured = (sides[0] - sides[1]) / (2 * rate)
    return [*terms, *np.mean(single, axis=0)], abs(sum(terms) - measured) / sum(map(abs, terms))


def at(seeds, name, k):
    """Gold reward at a KL of k (or one k a seed): on the frontier of the points of this name and the reference's."""
    names = [f"DPO, beta {beta}" for beta in BETAS] if name == EVERY else [name]
    points = [[s[CLEAN][what][:1] + sum((s[n][what] for n in names), []) for what in ("KL", "gold")] for s in seeds]
    return np.array([np.interp(x, *frontier(*of).T) for x, of in zip(np.broadcast_to(k, len(seeds)), points)])


def conclude(seeds, size):
    runs = [*(f"DPO, beta {beta}" for beta in BETAS), IMITATION, *HARDER]
    start = np.array([s[CLEAN]["gold"][0] for s in seeds])
    ordered = [s[CLEAN]["ordered"][-1] for s in seeds]
    had = {name: at(seeds, name, DECIDES) for name in (EVERY, *runs, CUT, COLDER, CUT_COLDER, "pi*")}
    lead = {k: at(seeds, EVERY, k) - at(seeds, COLDER, k) for k in LEVELS}
    error = {k: np.std(a, ddof=1) / len(a) ** 0.5 for k, a in lead.items()}
    holds = ((had[EVERY] > np.maximum(start, had[IMITATION])).all() and min(ordered) > 0.5
             and lead[DECIDES].mean() > 2 * error[DECIDES])
    furthest = {name: [max(s[name]["KL"]) for s in seeds] for name in had if name not in (EVERY, "pi*")}
    near, has = furthest[IMITATION], {name: shown(values) for name, values in had.items()}
    there, best = (at(seeds, name, near) for name in (CLEAN, IMITATION))
    ends = {"gold": "gold at the end", "chosen": "chosen, nats moved", "fitted": "pairs fitted",
            "ordered": "fresh pairs ordered"}
    table = [["", *(f"gold at KL {k}" for k in LEVELS), f"gold at KL {np.mean(near):.2f}",
              "furthest KL", *ends.values()]]
    for name in had:
        table.append([name, *(shown(at(seeds, name, k)) for k in (*LEVELS, near)),
                      shown(furthest[name]) if name in furthest else "",
                      *(shown([s[name][what][-1] for s in seeds]) if name in runs else "" for what in ends)])
    table.append([f"{EVERY} - {COLDER} (s.e.)", *(f"{a.mean():+.2f} ({error[k]:.2f})" for k, a in lead.items()),
                  *[""] * 6])
    numbers = {f"gold reward at KL {k}, {name}": spread(at(seeds, name, k)) for name in had for k in LEVELS}
    numbers |= {f"gold reward at the furthest KL of {IMITATION}, {name}": spread(at(seeds, name, near))
                for name in had}
    numbers |= {f"furthest KL, {name}": spread(values) for name, values in furthest.items()}
    numbers |= {f"{what} at the end, {name}": spread(s[name][what][-1] for s in seeds)
                for name in runs for what in ("KL", "gold", "chosen", "rejected", "ordered")}
    numbers |= {f"gold reward at KL {k}, {EVERY} - {COLDER}": spread(a) for k, a in lead.items()}
    strays = [s[CLEAN]["in no pair"][-1] for s in seeds]
    before, allowed = [s[CLEAN]["in no pair"][0] for s in seeds], [s["pi* in no pair"] for s in seeds]
    numbers |= {f"probability of replies in no pair, {name}": spread(values) for name, values in
                ((f"{CLEAN}, at the end", strays), ("reference", before), (f"pi*, beta {HARD}", allowed))}
    numbers["share of fresh pairs of equal gold, left out"] = spread(s["equal"] for s in seeds)
    terms = np.array([s["terms"] for s in seeds])           # (seeds, looks + 1, 4)
    together = terms[..., :2].sum(axis=-1)
    lowest = together.mean(axis=0).argmin()
    for when, i in (("start", 0), ("the deepest fall", lowest), ("end", -1)):
        numbers |= {f"d l(chosen) / d rate at {when}: {term}": spread(terms[:, i, j]) for j, term in enumerate(TERMS)}
        table.append([f"d l(chosen) / d rate at {when}",
                      *(f"{term} {terms[:, i, j].mean():+.2f}" for j, term in enumerate(TERMS)), *[""] * 5])
    looked = np.array(looked_at(**size))
    seen = np.diff(np.array([s[CLEAN]["chosen"] for s in seeds])[:, looked % (size["steps"] // size["looks"]) == 0])
    foretold = (np.sign(together[:, :-1]) == np.sign(seen)).mean(axis=1)
    down = (seen < 0).mean(axis=1)
    numbers["share of looks at which the sum has the sign of the next move"] = spread(foretold)
    numbers["share of looks at which the next move is down"] = spread(down)
    numbers["relative error of the decomposition"] = spread(s["error"] for s in seeds)
    moved = [s[CLEAN]["chosen"][-1] for s in seeds]
    push, pull = terms[:, lowest, :2].mean(axis=0)
    step = lowest * size["steps"] // size["looks"]
    alone = terms[:, lowest, 2:].sum(axis=-1).mean()
    leads = [f"{lead[k].mean():+.2f} (s.e. {error[k]:.2f})" for k in LEVELS]
    sentence = (f"At {DECIDES} nat of KL DPO has {has[EVERY]} of gold reward and the reference, merely colder, "
                f"{has[COLDER]}; its lead at {', '.join(map(str, LEVELS))} nat is {', '.join(leads)}. It began at "
                f"{shown(start)}; pi* has {has['pi*']}. With beta {HARD} DPO has {has[CLEAN]}. Finetuning on the "
                f"chosen has {has[IMITATION]}, its furthest KL {np.mean(near):.2f}: there DPO has {shown(there)}, "
                f"less with {(there < best).sum()} of {len(seeds)} seeds. DPO's last policy gives replies that are in "
                f"no pair {shown(strays)} of its probability, the reference {shown(before)}, pi* at the same beta "
                f"{shown(allowed, 3)}; without these replies DPO has {has[CUT]}, the colder reference "
                f"{has[CUT_COLDER]}. It orders {shown(ordered)} of fresh pairs as gold does. With 25 % flips: DPO "
                f"{has[HARDER[0]]}, cDPO {has[HARDER[1]]}, robust {has[HARDER[2]]}; pairs of an older model "
                f"{has[HARDER[3]]}, uniform ones {has[HARDER[4]]}. The log-probs of chosen replies move by "
                f"{shown(moved)} nats. A step of plain gradient descent at step {step} moves them, per unit of rate, "
                f"by {push:+.2f} through all chosen together and by {pull:+.2f} through all rejected, a pair alone "
                f"its own by {alone:+.1f}; the sum has the sign of the next move at {np.mean(foretold):.2f} of looks, "
                f"where the constant \"down\" is right at {np.mean(down):.2f}.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    (reward, harder), (fall, why) = figure.subplots(2, 2)
    along(reward, seeds, "pi*", "pi*: the best possible", COLOURS[5], linestyle="--")
    along(reward, seeds, COLDER, f"{COLDER}: no labels", COLOURS[4], linestyle=":")
    for name, colour, marker in zip((*(f"DPO, beta {beta}" for beta in BETAS), IMITATION), COLOURS, "os^D"):
        along(reward, seeds, name, name, colour, marker=marker)
    reward.set(title="Gold reward against KL, along training", xlabel="exact KL to the reference (nats per reply)",
               ylabel="expected gold reward", xlim=(-0.05, 2.5), ylim=(1.3, 2.95))
    reward.legend(loc="lower right", fontsize=8)

    names = (CLEAN, CUT, *HARDER, IMITATION, COLDER)
    for i, name in enumerate(names):
        values, colour = at(seeds, name, DECIDES), COLOURS[0 if name in HARDER else 1]
        harder.plot(values, [i] * len(values), "o", color=colour, alpha=0.5, markersize=4)
        harder.plot([values.mean()], [i], "|", color=colour, markersize=14, markeredgewidth=2)
    for value, label, side in ((np.mean([s[CLEAN]["gold"][0] for s in seeds]), "reference", "left"),
                               (at(seeds, "pi*", DECIDES).mean(), "pi*", "right")):
        harder.axvline(value, color=COLOURS[5], linestyle=":", linewidth=1.2)
        harder.annotate(f" {label} ", (value, -0.75), ha=side, va="center", fontsize=8, alpha=0.75)
    harder.set(title=f"What each has, at most {DECIDES} nat", xlabel=f"gold reward with at most {DECIDES} nat of KL",
               yticks=range(len(names)), yticklabels=["DPO, clean pairs", "cut to compared replies", *names[2:]],
               ylim=(len(names) - 0.5, -1.1))

    for beta, colour, marker in zip(BETAS, COLOURS, "os^"):
        steps, moved = looked_at(**size), [s[f"DPO, beta {beta}"]["chosen"] for s in seeds]
        curve(fall, steps, moved, f"chosen, beta {beta}", colour, marker=marker)
    curve(fall, steps, [s[CLEAN]["rejected"] for s in seeds], f"rejected, beta {HARD}", COLOURS[5], linestyle="--")
    level(fall, 0, "")
    fall.set(title="Log-probs of the pairs' replies", xlabel="step", ylabel="mean change from the reference (nats)")
    fall.legend(loc="lower left", fontsize=8)

    terms, steps = np.array([s["terms"] for s in seeds]), np.linspace(0, size["steps"], size["looks"] + 1)
    alone, together = terms[..., 2:].sum(axis=-1), terms[..., :2].sum(axis=-1)
    curve(why, steps, alone, "a pair alone, both its replies", COLOURS[3], marker="^")
    curve(why, steps, terms[..., 0], TERMS[0], COLOURS[2])
    curve(why, steps, together, "all pairs together", COLOURS[5], marker="D")
    curve(why, steps, terms[..., 1], TERMS[1], COLOURS[4], marker="s")
    level(why, 0, "")
    why.set(title=f"One plain gradient step, beta {HARD}", xlabel="step",
            ylabel="d l(chosen) / d learning rate")
    why.set_yscale("symlog", linthresh=0.1)
    why.set_ylim(-30, 1e4)                                  # room for the legend
    why.legend(loc="upper right", fontsize=8, ncols=2)


def along(axis, seeds, name, label, colour, **style):
    """Gold against KL: each seed at its own KL, faint, and the mean of both."""
    kl, gold = (np.array([s[name][what] for s in seeds]) for what in ("KL", "gold"))
    axis.plot(kl.T, gold.T, color=colour, linewidth=0.8, alpha=0.35)
    axis.plot(kl.mean(axis=0), gold.mean(axis=0), color=colour, markersize=4, linewidth=1.8, label=label, **style)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10.5, 8.0)))
