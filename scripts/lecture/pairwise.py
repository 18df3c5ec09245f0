"""Which of two answers is better is more reliable than two ratings

Claim. People's ratings are noisy and differently calibrated; asking which of two answers is better is more reliable.

Test. People rate replies to three questions from 1 to 7, round(4 + offset + scale x (worth + error)), or say which of
two they prefer. Scales are between 0.5 and 1.5; how far people's offsets spread (0 to 3 grades) and how many answers
each gives (1 to 24) is varied. Equal effort: a comparison counts as two ratings, for two replies are read (240 replies
in all; one for one is shown too). Two kinds of error: as large in a difference of two ratings as in a choice by the
Bradley-Terry law (standard deviation pi / sqrt 3), and that of annotators.draw_annotators, 0.2 to 0.8, beside the
law's own in a choice. A reward linear in counts of tokens is fitted to comparisons by Bradley-Terry, and by least
squares to ratings: raw, standardised for each person, or with a level of each person's own fitted too, the best that
ratings offer. Measured: the share of fresh pairs of different gold that the fit orders as gold does (gold itself: 1,
chance: 0.5). Every way takes the better of two ridges. A seed is the mean over several groups of people.

Refuted. Errors being equal, offsets spread by 2 grades and each person giving 1 or 2 answers: refuted if any way to
use the ratings comes within two standard errors over seeds of the comparisons, or above them. (Where the lecture's
reason applies, and to the best use of ratings.)

Limits. That comparing is as hard as rating twice, or harder, is put in by hand; only people can tell. The scale's
middle is the worth 0, most replies here are worth more: ratings pile up at 7, and the more so the more offsets spread.
Offsets do not drift, everybody shares one criterion, and the fit has 24 numbers to find.

Source. Stiennon et al. 2020, arXiv:2009.01325 and Ouyang et al. 2022, arXiv:2203.02155 (people compare); Bradley and
Terry 1952.
"""

import dataclasses
import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.world.annotators import Annotator
from common.linear import bradley_terry, counts, least_squares
from worlds.replies import ReplyWorld

READ = 240                                      # replies read by all people together
SPREADS, ANSWERS, RIDGES = (0.0, 0.5, 1.0, 2.0, 3.0), (1, 2, 4, 8, 24), (1.0, 10.0)
CLAIMED, FEW = 2.0, (1, 2)                      # the spread and the answers that the rule is about
ALIKE = np.pi / 6 ** 0.5                        # of one rating: a difference then has the logistic law's pi / sqrt 3
ERRORS = {"equal errors": lambda rng: ALIKE, "small errors": lambda rng: rng.uniform(0.2, 0.8)}
RATINGS = ("raw ratings", "standardised ratings", "ratings, own level fitted")
WAYS = ("comparisons", *RATINGS, "as many comparisons as ratings")
LABELS = ("one choice", "two ratings of one person", "two ratings of two people")
SIZES = {"quick": {"seeds": 3, "groups": 1, "judged": 100}, "default": {"seeds": 5, "groups": 12, "judged": 2000}}


def measure(row, seed, groups, judged):
    world, rng = ReplyWorld(words=1), np.random.default_rng(seed)
    x, l = counts(world), written(world, rng)

    def pairs(n):
        """n pairs of replies as people write them: which question, first, second."""
        p = rng.integers(len(world.prompts), size=n)
        first, second = world.draw(l, rng, p), world.draw(l, rng, p)
        while (same := first == second).any():
            second[same] = world.draw(l, rng, p[same])
        return p, first, second

    def people(n, offsets, error):
        return [Annotator(offsets * rng.normal(), rng.uniform(0.5, 1.5), error(rng)) for _ in range(n)]

    def rated(who, p, y):
        return np.array([a.rate(world.questions[i], world.texts[j], rng, world.finished[j])
                         for a, i, j in zip(who, p, y)], float)

    def preferred(who, kind, p, first, second):
        """Which were preferred. With equal errors a person's choice has the law's error and no other."""
        who = [dataclasses.replace(a, noise=0.0) for a in who] if kind == "equal errors" else who
        return np.array([a.prefers_first(world.questions[i], world.texts[j], world.texts[k], rng,
                                         (world.finished[j], world.finished[k]))
                         for a, i, j, k in zip(who, p, first, second)])

    p, first, second = pairs(4000)
    better = world.gold[p, first] - world.gold[p, second]
    differ = better != 0
    tests, better = (x[p, first] - x[p, second])[differ], better[differ] > 0

    def accuracy(w):
        return ((tests @ w > 0) == better).mean()

    found = {f"{label}, {kind}": [] for label in LABELS for kind in ERRORS}
    for kind, error in ERRORS.items():
        for offsets in SPREADS:
            # A label by itself: how often it says what gold says; a tie is half a hit.
            p, first, second = pairs(judged)
            ones, others = people(judged, offsets, error), people(judged, offsets, error)
            d = np.sign(world.gold[p, first] - world.gold[p, second])
            r, own, others = rated(ones, p, first), rated(ones, p, second), rated(others, p, second)
            choice = 2.0 * preferred(ones, kind, p, first, second) - 1
            for label, says in zip(LABELS, (choice, np.sign(r - own), np.sign(r - others))):
                found[f"{label}, {kind}"].append((0.5 + 0.5 * says * d)[d != 0].mean())
        scores = np.zeros((len(WAYS), len(RIDGES), len(ANSWERS), len(SPREADS)))
        for _, i, j in np.ndindex(groups, len(ANSWERS), len(SPREADS)):
            group = people(READ // ANSWERS[i], SPREADS[j], error)
            who = np.arange(READ) % len(group)
            p = rng.integers(len(world.prompts), size=READ)
            y = world.draw(l, rng, p)
            fits = used(x[p, y], rated([group[a] for a in who], p, y), who)
            p, first, second = pairs(READ)
            sign = np.where(preferred([group[a] for a in who], kind, p, first, second), 1, -1)[:, None]
            chosen = sign * (x[p, first] - x[p, second])
            for k, ridge in enumerate(RIDGES):
                ws = [bradley_terry(chosen[:READ // 2], ridge), *(least_squares(*fit, ridge) for fit in fits),
                      bradley_terry(chosen, ridge)]
                scores[:, k, i, j] += np.array([accuracy(w) for w in ws]) / groups
        found[kind] = scores
    return found


def written(world, rng):
    """log of how often people write each reply to each question, (P,N), counted."""
    times = np.zeros(world.shape)
    np.add.at(times, world.index(*world.demonstrations(rng, 10_000)), 1)
    with np.errstate(divide="ignore"):
        return np.log(times / times.sum(axis=1, keepdims=True))


def used(x, ratings, who):
    """The three ways to use ratings, RATINGS: features (B,F) and what is fitted to them (B,)."""
    of = np.eye(who.max() + 1)[who]                     # (B,A): whose rating
    share = of / of.sum(axis=0)
    level_of, x_of = share.T @ ratings, share.T @ x
    deviation = np.sqrt(share.T @ (ratings - level_of[who]) ** 2)[who]
    raw, centred = ratings - ratings.mean(), x - x.mean(axis=0)
    if len(of.T) == len(ratings):                       # one rating each: nothing to calibrate by
        return [(centred, raw)] * 3
    # Taking each person's means from both sides is least squares with a number for each person.
    return [(centred, raw), (centred, (ratings - level_of[who]) / np.where(deviation > 0, deviation, 1)),
            (x - x_of[who], ratings - level_of[who])]


def scores(seeds, kind):
    """(seeds, ways, answers, spreads), each way with the ridge that suits it better in the mean of the seeds."""
    all_of_them = np.array([s[kind] for s in seeds])                    # (seeds, ways, ridges, answers, spreads)
    best = all_of_them.mean(axis=0).argmax(axis=1)                      # (ways, answers, spreads)
    return np.take_along_axis(all_of_them, best[None, :, None], axis=2)[:, :, 0]


def conclude(seeds, size):
    j, found = SPREADS.index(CLAIMED), {kind: scores(seeds, kind) for kind in ERRORS}
    ahead = {}
    for answers in FEW:
        of = found["equal errors"][:, :, ANSWERS.index(answers), j]
        ahead[answers] = [of[:, 0] - of[:, 1 + way] for way in range(len(RATINGS))]
    holds = all(a.mean() > 2 * a.std(ddof=1) / len(a) ** 0.5 for lead in ahead.values() for a in lead)
    numbers = {f"{way}; {kind}, offsets {offsets}, {answers} answers each": spread(found[kind][:, w, i, j])
               for kind in ERRORS for w, way in enumerate(WAYS)
               for i, answers in enumerate(ANSWERS) for j, offsets in enumerate(SPREADS)}
    numbers |= {f"{label} is as gold; {kind}, offsets {offsets}": spread(s[f"{label}, {kind}"][j] for s in seeds)
                for label in LABELS for kind in ERRORS for j, offsets in enumerate(SPREADS)}
    table = [["errors", "offsets", "answers each", *WAYS]]
    for kind in ERRORS:
        for offsets in (0.0, 1.0, 2.0, 3.0):
            for answers in (1, 2, 24):
                i, at = ANSWERS.index(answers), SPREADS.index(offsets)
                cells = (shown(found[kind][:, w, i, at], 3) for w in range(len(WAYS)))
                table.append([kind, f"{offsets:g}", f"{answers}", *cells])

    def regions(kind):
        """Where comparisons are ahead of raw ratings, and of all ways to use them."""
        mean = found[kind].mean(axis=0)
        return [int((mean[0] > mean[1]).sum()), int((mean[0] > mean[1:4].max(axis=0)).sum()), mean[0].size]

    def at(kind, offsets, answers, ways=(0, 1, 3)):
        return [shown(found[kind][:, way, ANSWERS.index(answers), SPREADS.index(offsets)], 3) for way in ways]

    (raw, every, cells), small = regions("equal errors"), regions("small errors")
    worst = {answers: min(lead, key=np.mean) for answers, lead in ahead.items()}
    told = ["with {} answer{} each comparisons order {} of the pairs as gold does, raw ratings {}, ratings with an "
            "own level fitted {}".format(a, "s" * (a > 1), *at("equal errors", CLAIMED, a)) for a in FEW]
    errors = [f"{worst[a].mean():+.3f} (s.e. {worst[a].std(ddof=1) / len(seeds) ** 0.5:.3f}) with {a}" for a in FEW]
    sentence = (f"Errors being equal and offsets spread by {CLAIMED:g} grades, {told[-1]}. Fewer: "
                f"{'; '.join(told[:-1])}. Comparisons less the best use of ratings: {', '.join(errors)}. At a spread "
                + "of 3 and one answer each it is {} against {} of raw ratings; without offsets and with 24 answers "
                "each {} against {}. "
                .format(*at("equal errors", 3.0, 1, (0, 1)), *at("equal errors", 0.0, 24, (0, 1)))
                + f"Of {cells} settings comparisons are ahead of raw ratings in {raw} and of every use of ratings in "
                f"{every}, with the small errors of the world's annotators in {small[0]} and {small[1]}. As a label "
                "by itself one choice is as gold in "
                f"{shown([s['one choice, equal errors'][j] for s in seeds])}, two ratings of two people in "
                f"{shown([s['two ratings of two people, equal errors'][j] for s in seeds])}, of one person in "
                f"{shown([s['two ratings of one person, equal errors'][j] for s in seeds])}.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    (label, by_spread, by_answers), found = figure.subplots(1, 3), scores(seeds, "equal errors")
    for name, colour, marker in zip(LABELS, (COLOURS[0], COLOURS[3], COLOURS[1]), "ovs"):
        curve(label, SPREADS, [s[f"{name}, equal errors"] for s in seeds], name, colour, marker)
    level(label, 0.5, "chance")
    label.set(title="A label by itself (equal errors)", xlabel="spread of people's offsets (grades)",
              ylabel="share as gold has it (a tie: half)", ylim=(0.48, 0.82))
    label.legend(loc="lower left", bbox_to_anchor=(0, 0.06), fontsize=8)
    i, j = ANSWERS.index(2), SPREADS.index(CLAIMED)
    for w, (way, colour, marker) in enumerate(zip(WAYS, COLOURS, "os^vD")):
        style = {"linestyle": "--"} if w == len(WAYS) - 1 else {}
        curve(by_spread, SPREADS, found[:, w, i], f"{way} ({READ if w else READ // 2})", colour, marker, **style)
        curve(by_answers, ANSWERS, found[:, w, :, j], way, colour, marker, **style)
    for axis in by_spread, by_answers:
        level(axis, 1.0, "gold itself")
        axis.set_ylim(0.68, 1.02)
    by_spread.set(title="A reward from two answers a person", xlabel="spread of people's offsets (grades)",
                  ylabel="share of pairs ordered as gold (chance: 0.5)")
    by_spread.legend(loc="lower left", fontsize=8)
    by_answers.set(title=f"The same, offsets spread by {CLAIMED:g}", xlabel="answers a person", xscale="log")
    by_answers.set_xticks(ANSWERS, [f"{n}" for n in ANSWERS])
    by_answers.minorticks_off()


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(12, 4.4)))
