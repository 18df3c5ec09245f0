"""A choice between two answers, or two ratings

Claim. People's ratings are noisy and differently calibrated; asking which of two answers is better is more reliable.

Test. People rate replies to three questions from 1 to 7, round(4 + offset + scale x (utility + error)), or say which of
two replies they prefer. Scales are between 0.5 and 1.5. The spread of the offsets between people (0 to 3 grades) and
the number of answers per person (1 to 24) vary. Effort is equal: a comparison counts as two ratings, because two
replies are read (240 replies in all; one for one is shown too). There are two kinds of error. Equal errors: the
difference of two ratings has the standard deviation of a Bradley-Terry choice, pi / sqrt 3. Small errors: those of
annotators.draw_annotators, 0.2 to 0.8, added to the noise of a Bradley-Terry choice. A reward linear in token counts is
fitted to comparisons by Bradley-Terry, and to ratings by least squares: raw, standardised per person, or with a fitted
level per person, the best use of ratings. Measured: the share of new pairs of different gold reward that the fit orders
as the gold reward does (gold itself: 1, chance: 0.5). Every method uses the better of two ridge penalties. The result
of a seed is the mean over several groups of people.

Rule. With equal errors, personal offsets with a standard deviation of 2 grades, and 1 or 2 answers per person, a reward
fitted to comparisons orders more pairs as gold does than a reward fitted to the ratings in any of three ways: raw,
standardised, or with a fitted level per person. Effects of a seed: the six differences; margin 0. With one answer per
person the three ways are the same fit. The reliability of single labels, other numbers of answers and the small errors
are findings.

Limits. It is an assumption that a comparison is as hard as two ratings, or harder; only people can tell. The middle of
the scale is the utility 0, and most replies here have more, so many ratings are 7, the more the offsets spread. The
offsets are constant in time, all people share one criterion, and the fit has 24 parameters.

Source. Stiennon et al. 2020, arXiv:2009.01325 and Ouyang et al. 2022, arXiv:2203.02155 (people compare); Bradley and
Terry 1952.

Figure. Left: share of single labels that agree with gold against the spread of the offsets, one line for a choice and
one for each kind of two ratings; middle: share of pairs that a fitted reward orders as gold does, against the spread;
right: the same share against the number of answers per person; one line for each method; dotted: chance, or gold
itself.
"""

import dataclasses
import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from common.linear import bradley_terry, counts, least_squares
from minilm.world.annotators import Annotator
from worlds.replies import ReplyWorld

READ = 240                                      # replies read by all people together
SPREADS, ANSWERS, RIDGES = (0.0, 0.5, 1.0, 2.0, 3.0), (1, 2, 4, 8, 24), (1.0, 10.0)
CLAIMED, FEW = 2.0, (1, 2)                      # the spread and the numbers of answers of the rule
EQUAL = np.pi / 6 ** 0.5                        # of one rating: a difference then has the pi / sqrt 3 of a choice
ERRORS = {"equal errors": lambda rng: EQUAL, "small errors": lambda rng: rng.uniform(0.2, 0.8)}
RATINGS = ("raw ratings", "standardised ratings", "ratings, fitted level per person")
METHODS = ("comparisons", *RATINGS, "as many comparisons as ratings")
LABELS = ("one choice", "two ratings of one person", "two ratings of two people")
SIZES = {"quick": {"seeds": 3, "groups": 1, "judged": 100}, "default": {"seeds": 8, "groups": 12, "judged": 2000}}


class Judgements:
    """Ratings and choices of people about replies of a world; p, y, first, second are indices (B,)."""

    def __init__(self, world, rng):
        self.world = world
        self.rng = rng
        self.log_pi = demonstration_log_frequencies(world, rng)

    def pairs(self, n):
        """n pairs of demonstrated replies: question, first, second."""
        p = self.rng.integers(len(self.world.prompts), size=n)
        first = self.world.draw(self.log_pi, self.rng, p)
        second = self.world.draw(self.log_pi, self.rng, p)
        while (same := first == second).any():
            second[same] = self.world.draw(self.log_pi, self.rng, p[same])
        return p, first, second

    def people(self, n, offsets, kind):
        rng = self.rng
        return [Annotator(offsets * rng.normal(), rng.uniform(0.5, 1.5), ERRORS[kind](rng)) for _ in range(n)]

    def ratings(self, people, p, y):
        world = self.world
        return np.array([person.rate(world.questions[i], world.texts[j], self.rng, world.finished[j])
                         for person, i, j in zip(people, p, y)], float)

    def first_preferred(self, people, kind, p, first, second):
        """Whether the first was preferred. With equal errors a choice has the Bradley-Terry noise and no other."""
        if kind == "equal errors":
            people = [dataclasses.replace(person, noise=0.0) for person in people]
        world = self.world
        return np.array([person.prefers_first(world.questions[i], world.texts[j], world.texts[k], self.rng,
                                              (world.finished[j], world.finished[k]))
                         for person, i, j, k in zip(people, p, first, second)])

    def single_labels(self, count, offsets, kind):
        """The share of single labels, by LABELS, that agree with gold; a tie counts half."""
        gold = self.world.gold
        p, first, second = self.pairs(count)
        ones = self.people(count, offsets, kind)
        others = self.people(count, offsets, kind)
        sign = np.sign(gold[p, first] - gold[p, second])
        rating = self.ratings(ones, p, first)
        own = self.ratings(ones, p, second)
        other = self.ratings(others, p, second)
        choice = 2.0 * self.first_preferred(ones, kind, p, first, second) - 1
        labels = choice, np.sign(rating - own), np.sign(rating - other)
        return [(0.5 + 0.5 * label * sign)[sign != 0].mean() for label in labels]


def measure(experiment, seed, groups, judged):
    world = ReplyWorld(words=1)
    rng = np.random.default_rng(seed)
    x = counts(world)
    judgements = Judgements(world, rng)
    p, first, second = judgements.pairs(4000)
    gold = world.gold[p, first] - world.gold[p, second]
    tests = (x[p, first] - x[p, second])[gold != 0]
    first_better = gold[gold != 0] > 0

    def accuracy(w):
        return ((tests @ w > 0) == first_better).mean()

    results = {f"{label}, {kind}": [] for label in LABELS for kind in ERRORS}
    for kind in ERRORS:
        for offsets in SPREADS:
            for label, share in zip(LABELS, judgements.single_labels(judged, offsets, kind)):
                results[f"{label}, {kind}"].append(share)
        scores = np.zeros((len(METHODS), len(RIDGES), len(ANSWERS), len(SPREADS)))
        for _, i, j in np.ndindex(groups, len(ANSWERS), len(SPREADS)):
            group = judgements.people(READ // ANSWERS[i], SPREADS[j], kind)
            person = np.arange(READ) % len(group)
            people = [group[a] for a in person]
            p = rng.integers(len(world.prompts), size=READ)
            y = world.draw(judgements.log_pi, rng, p)
            fits = rating_fits(x[p, y], judgements.ratings(people, p, y), person)
            p, first, second = judgements.pairs(READ)
            sign = np.where(judgements.first_preferred(people, kind, p, first, second), 1, -1)[:, None]
            differences = sign * (x[p, first] - x[p, second])
            for k, ridge in enumerate(RIDGES):
                weights = [bradley_terry(differences[:READ // 2], ridge), *(least_squares(*fit, ridge) for fit in fits),
                           bradley_terry(differences, ridge)]
                scores[:, k, i, j] += np.array([accuracy(w) for w in weights]) / groups
        results[kind] = scores
    return results


def demonstration_log_frequencies(world, rng):
    """log of the frequency of each reply among 10,000 demonstrations, (P,Y)."""
    frequency = np.zeros(world.shape)
    np.add.at(frequency, world.index(*world.demonstrations(rng, 10_000)), 1)
    with np.errstate(divide="ignore"):
        return np.log(frequency / frequency.sum(axis=1, keepdims=True))


def rating_fits(x, ratings, person):
    """The three uses of ratings, RATINGS: features (B,F) and targets (B,). person (B,): who gave each rating."""
    gave = np.eye(person.max() + 1)[person]                 # (B,A)
    weights = gave / gave.sum(axis=0)                       # of the mean over the ratings of a person
    level_of = weights.T @ ratings                          # (A,)
    x_of = weights.T @ x                                    # (A,F)
    deviation = np.sqrt(weights.T @ (ratings - level_of[person]) ** 2)[person]
    raw = x - x.mean(axis=0), ratings - ratings.mean()
    if len(gave.T) == len(ratings):                         # one rating per person: nothing to calibrate with
        return [raw] * 3
    standardised = raw[0], (ratings - level_of[person]) / np.where(deviation > 0, deviation, 1)
    # Subtracting the means of each person from both sides is least squares with one constant per person.
    return [raw, standardised, (x - x_of[person], ratings - level_of[person])]


def accuracies(seeds, kind):
    """(seeds, methods, answers, spreads), each method with the ridge that is better in the mean of the seeds."""
    scores = np.array([s[kind] for s in seeds])                         # (seeds, methods, ridges, answers, spreads)
    best = scores.mean(axis=0).argmax(axis=1)                           # (methods, answers, spreads)
    return np.take_along_axis(scores, best[None, :, None], axis=2)[:, :, 0]


def conclude(seeds, size):
    claimed = SPREADS.index(CLAIMED)
    found = {kind: accuracies(seeds, kind) for kind in ERRORS}

    def lead(answers, rating, kind="equal errors"):
        """Accuracy of comparisons minus that of a use of the ratings, (seeds,)."""
        scores = found[kind][:, :, ANSWERS.index(answers), claimed]
        return scores[:, 0] - scores[:, METHODS.index(rating)]

    def name(answers, rating):
        return f"share of pairs ordered as gold, comparisons minus {rating}, {answers} answer{'s' * (answers > 1)} each"

    rule = [Comparison(name(answers, rating), lead(answers, rating), above=0) for answers in FEW for rating in RATINGS]
    findings = [Comparison(name(24, rating), lead(24, rating), above=0) for rating in (RATINGS[0], RATINGS[2])]
    findings.append(Comparison(f"{name(2, RATINGS[2])}, small errors", lead(2, RATINGS[2], "small errors"), above=0))
    labels = {label: np.array([s[f"{label}, equal errors"][claimed] for s in seeds]) for label in LABELS}
    findings += [Comparison(f"share of single labels that agree with gold, one choice minus {label}",
                            labels[LABELS[0]] - labels[label], above=0) for label in LABELS[1:]]
    numbers = {f"{method}; {kind}, offsets {offsets}, {answers} answers each": spread(found[kind][:, w, i, j])
               for kind in ERRORS for w, method in enumerate(METHODS)
               for i, answers in enumerate(ANSWERS) for j, offsets in enumerate(SPREADS)}
    numbers |= {f"{label} agrees with gold; {kind}, offsets {offsets}": spread(s[f"{label}, {kind}"][j] for s in seeds)
                for label in LABELS for kind in ERRORS for j, offsets in enumerate(SPREADS)}
    table = [["errors", "offsets", "answers each", *METHODS]]
    for kind in ERRORS:
        for offsets in (0.0, 1.0, 2.0, 3.0):
            for answers in (1, 2, 24):
                i, j = ANSWERS.index(answers), SPREADS.index(offsets)
                cells = (mean_range(found[kind][:, w, i, j], 3) for w in range(len(METHODS)))
                table.append([kind, f"{offsets:g}", f"{answers}", *cells])
    two = found["equal errors"][:, :, ANSWERS.index(2), claimed]
    words = (f"With equal errors, offsets with a standard deviation of {CLAIMED:g} grades and 2 answers per person, "
             f"comparisons order "
             f"{mean(two[:, 0], 3)} of the pairs as gold does, raw ratings {mean(two[:, 1], 3)}, and ratings with a "
             f"fitted level per person {mean(two[:, 3], 3)}.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    label, by_spread, by_answers = figure.subplots(1, 3)
    found = accuracies(seeds, "equal errors")
    for name, colour, marker in zip(LABELS, (COLOURS[0], COLOURS[3], COLOURS[1]), "ovs"):
        curve(label, SPREADS, [s[f"{name}, equal errors"] for s in seeds], name, colour, marker)
    level(label, 0.5, "chance")
    label.set(title="A single label (equal errors)", xlabel="spread of the offsets (grades)",
              ylabel="share that agrees with gold (a tie: half)", ylim=(0.4, 0.9))
    label.legend(loc="lower left", fontsize=8)
    i = ANSWERS.index(2)
    j = SPREADS.index(CLAIMED)
    for w, (method, colour, marker) in enumerate(zip(METHODS, COLOURS, "os^vD")):
        style = {"linestyle": "--"} if w == len(METHODS) - 1 else {}
        curve(by_spread, SPREADS, found[:, w, i], f"{method} ({READ if w else READ // 2})", colour, marker, **style)
        curve(by_answers, ANSWERS, found[:, w, :, j], method, colour, marker, **style)
    for axis in by_spread, by_answers:
        level(axis, 1.0, "gold itself")
        axis.set_ylim(0.68, 1.03)
    by_spread.set(title="Reward, two answers per person", xlabel="spread of the offsets (grades)",
                  ylabel="share of pairs ordered as gold (chance: 0.5)")
    figure.legend(*by_spread.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    by_answers.set(title=f"The same, offsets spread by {CLAIMED:g}", xlabel="answers per person", xscale="log")
    by_answers.set_xticks(ANSWERS, [f"{n}" for n in ANSWERS])
    by_answers.minorticks_off()


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9.6, 4.8)))
