"""The outcome of an experiment: confidence intervals over seeds, and nothing else.

A rule is one or several comparisons. A comparison has one number per seed, its effect, and says where the
expected effect must lie: above a margin, below a margin, or between two. With mean m, standard deviation
s (ddof 1) and n seeds, the expected effect lies in

    m - q s / sqrt(n)  ...  m + q s / sqrt(n),      q = t_quantile(1 - (1 - level) / 2, n - 1)

with probability `level`, if the effects of the seeds are independent and normal (Student 1908).

    shown       the 95% interval of every comparison lies inside its margins
    not shown   the interval of some comparison lies outside its margins, at level 1 - 0.05 / (comparisons)
    undecided   otherwise, and always where a condition of the experiment is not met

"Shown" needs no correction for several comparisons: all must hold, so the rule is shown by error at most
as often as one of them (intersection-union test; Berger 1982). "Not shown" needs one comparison out of
several, hence Bonferroni. Each error then has a probability of at most 2.5% ("shown": one side of a 95%
interval) and 5% ("not shown") per experiment; among 23 experiments one such error would be no surprise.

Degenerate cases: one seed, no seed, or an infinite effect have no interval, so the outcome is undecided.
If all seeds give the same number, the interval is that number. An interval that touches a margin is not
inside it. Tests: tests/test_intervals.py.
"""

import dataclasses
import functools
import math

import numpy as np

from minilm import checks

OUTCOMES = ("shown", "not shown", "undecided")
TRIAL = "a trial"                       # the outcome of every experiment at --quick, and of its comparisons
LEVEL = 0.95


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) for Student's t with whole degrees of freedom: the finite sums of Abramowitz and Stegun
    1964, 26.7.3 and 26.7.4, with theta = arctan(t / sqrt(degrees))."""
    theta = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):        # powers of the cosine up to degrees - 2
        total += term
        term *= cosine ** 2 * (k - 1) / k
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = probability >= 1/2, by bisection of theta, which is bounded."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile({probability}, {degrees}): needs 0.5 <= probability < 1, degrees >= 1")
    low = 0.0
    high = math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        t = math.sqrt(degrees) * math.tan(middle)
        if (1 + t_probability(t, degrees)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def confidence_interval(effects: list[float], level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of the expected effect; the whole line for fewer than two effects, or an infinite one."""
    n = len(effects)
    if n < 2 or not np.isfinite(effects).all():
        return -math.inf, math.inf
    if min(effects) == max(effects):
        return float(effects[0]), float(effects[0])         # without the rounding of mean and deviation
    half = t_quantile(1 - (1 - level) / 2, n - 1) * float(np.std(effects, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(effects))
    return mean - half, mean + half


@dataclasses.dataclass
class Comparison:
    """name: what the effect is, with its unit; effects: one number per seed; above, below: the margins."""

    name: str
    effects: list[float]
    above: float | None = None
    below: float | None = None

    def __post_init__(self):
        self.effects = [float(effect) for effect in self.effects]
        if self.above is None and self.below is None:
            raise ValueError(f"comparison {self.name!r} has no margin: give above, below, or both")
        for name in ("above", "below"):
            if getattr(self, name) is not None:
                checks.number(f"comparison {self.name!r}", name, getattr(self, name))
        if any(map(math.isnan, self.effects)):
            raise ValueError(f"comparison {self.name!r} has effects that are not numbers: {self.effects}")

    def outcome(self, level: float = LEVEL) -> str:
        """One of OUTCOMES, for this comparison alone."""
        low, high = confidence_interval(self.effects, level)
        lower = -math.inf if self.above is None else self.above
        upper = math.inf if self.below is None else self.below
        if low > lower and high < upper:
            return "shown"
        return "not shown" if high <= lower or low >= upper else "undecided"

    def asked(self) -> str:
        """The margins in words."""
        margins = {"above": self.above, "below": self.below}
        return " and ".join(f"{word} {as_number(m)}" for word, m in margins.items() if m is not None)

    def summary(self) -> dict:
        """Plain values for JSON; an infinite end of the interval is None."""
        ends = [end if math.isfinite(end) else None for end in confidence_interval(self.effects)]
        finite = [effect if math.isfinite(effect) else None for effect in self.effects]
        mean = float(np.mean(self.effects)) if self.effects and None not in finite else None
        return {"name": self.name, "by_seed": finite, "mean": mean, "interval": ends, "asked": self.asked(),
                "outcome": self.outcome()}


def outcome(comparisons: list[Comparison], conditions: list[Comparison] = (),
            at_least: int | None = None) -> str:
    """One of OUTCOMES: the rule at the head of this file. at_least: the comparisons that must hold, by default all.

    If fewer than all n must hold, each comparison is tested at level 1 - 0.05 / n (Bonferroni). The rule is then
    shown if at_least of them are shown, and not shown if more than n - at_least are not shown.
    """
    if any(condition.outcome() != "shown" for condition in conditions):
        return "undecided"
    n = len(comparisons)
    if at_least is not None:
        checks.integer("outcome", "at_least", at_least, at_least=1, below=n + 1)
    corrected = [comparison.outcome(1 - (1 - LEVEL) / n) for comparison in comparisons]
    if at_least is not None and at_least < n:
        if corrected.count("shown") >= at_least:
            return "shown"
        return "not shown" if corrected.count("not shown") > n - at_least else "undecided"
    if all(comparison.outcome() == "shown" for comparison in comparisons):
        return "shown"
    return "not shown" if "not shown" in corrected else "undecided"


def decider(comparisons: list[Comparison], conditions: list[Comparison] = (),
            at_least: int | None = None) -> tuple[Comparison, float]:
    """(comparison, level): the comparison that determines `outcome`, and the level of its interval.

    A condition that is not met determines the outcome. Otherwise comparisons are ordered by the distance of the mean
    from the nearest margin, in half-widths of the interval: above 1 is shown, at most -1 is not shown. If k of them
    must hold, the k-th largest determines the outcome: the smallest if all must hold.
    """
    for condition in conditions:
        if condition.outcome() != "shown":
            return condition, LEVEL
    n = len(comparisons)
    needed = n if at_least is None else at_least
    corrected = 1 - (1 - LEVEL) / n
    level = corrected if needed < n or outcome(comparisons) == "not shown" else LEVEL
    found = sorted(comparisons, key=lambda comparison: _half_widths(comparison, level))[n - needed]
    return found, corrected if found.outcome() == "not shown" else level


def _half_widths(comparison, level):
    """The distance of the mean from the nearest margin in half-widths; below 0 outside; 0 without an interval."""
    low, high = confidence_interval(comparison.effects, level)
    if not math.isfinite(high - low):
        return 0.0
    sides = [(low + high) / 2 - comparison.above] if comparison.above is not None else []
    sides += [comparison.below - (low + high) / 2] if comparison.below is not None else []
    if low == high:
        return math.inf if min(sides) > 0 else -math.inf
    return min(sides) / ((high - low) / 2)


def smallest_step(values: list[float]) -> float:
    """The smallest difference between neighbours: above 0 if and only if the sequence rises at every step."""
    return float(np.diff(values).min())


def as_number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and no exponent."""
    if value is None:
        return "none"
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False, trim="-")
