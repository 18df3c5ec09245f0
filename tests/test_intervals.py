"""scripts/lecture/common/intervals.py: t quantiles against printed tables, coverage by simulation, three outcomes."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "lecture"))
from common import intervals  # noqa: E402
from common.intervals import Comparison, confidence_interval, decider, outcome, t_probability, t_quantile  # noqa: E402

# Quantiles of Student's t as any printed table has them (Fisher and Yates 1938, table III): degrees, 0.975, 0.995.
PRINTED = [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032),
           (6, 2.447, 3.707), (7, 2.365, 3.499), (8, 2.306, 3.355), (9, 2.262, 3.250), (10, 2.228, 3.169),
           (15, 2.131, 2.947), (20, 2.086, 2.845), (30, 2.042, 2.750), (60, 2.000, 2.660), (120, 1.980, 2.617)]


@pytest.mark.parametrize("degrees, at_975, at_995", PRINTED)
def test_quantiles_are_those_of_printed_tables(degrees, at_975, at_995):
    assert t_quantile(0.975, degrees) == pytest.approx(at_975, abs=6e-4)
    assert t_quantile(0.995, degrees) == pytest.approx(at_995, abs=6e-4)


def test_quantiles_have_the_closed_forms_of_one_and_two_degrees_of_freedom():
    for p in (0.6, 0.9, 0.975, 0.9995):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-10)
    assert t_quantile(0.5, 4) == pytest.approx(0, abs=1e-12)


def test_the_probability_is_the_integral_of_the_density():
    for degrees in (1, 2, 3, 4, 7, 12):
        t = np.linspace(0, 2.5, 100_001)
        constant = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        density = constant * (1 + t ** 2 / degrees) ** (-(degrees + 1) / 2)
        integral = 2 * np.sum((density[1:] + density[:-1]) / 2) * (t[1] - t[0])
        assert t_probability(2.5, degrees) == pytest.approx(integral, abs=1e-8)


@pytest.mark.parametrize("probability, degrees", [(0.4, 3), (1.0, 3), (0.975, 0)])
def test_a_quantile_outside_its_domain_raises_with_the_values(probability, degrees):
    with pytest.raises(ValueError, match=rf"t_quantile\({probability}, {degrees}\)"):
        t_quantile(probability, degrees)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_covers_the_expected_effect_at_its_level(n, level):
    rng = np.random.default_rng(n)
    samples = rng.normal(3.0, 2.0, size=(4000, n))
    covered = np.mean([low <= 3.0 <= high for low, high in (confidence_interval(x, level) for x in samples)])
    assert abs(covered - level) < 3.5 * math.sqrt(level * (1 - level) / 4000)


def test_the_interval_by_hand():
    low, high = confidence_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0) and high - low == pytest.approx(2 * 4.30265 / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("effects", [[], [5.0], [1.0, math.inf], [-math.inf, 2.0, 3.0]])
def test_no_one_or_an_infinite_effect_has_no_interval_and_decides_nothing(effects):
    assert confidence_interval(effects) == (-math.inf, math.inf)
    comparison = Comparison("effect", effects, above=0)
    assert comparison.outcome() == outcome([comparison]) == "undecided"
    assert comparison.summary()["interval"] == [None, None]
    assert all(value is None or math.isfinite(value) for value in comparison.summary()["by_seed"])


def test_equal_effects_have_the_interval_of_one_number_and_a_tie_with_the_margin_is_not_above_it():
    assert confidence_interval([0.25] * 4) == (0.25, 0.25) and confidence_interval([0.1] * 3) == (0.1, 0.1)
    assert Comparison("effect", [0.1] * 3, above=0.1).outcome() == "not shown", "no rounding of the mean"
    assert Comparison("effect", [0.25] * 4, above=0.2).outcome() == "shown"
    assert Comparison("effect", [0.25] * 4, above=0.25).outcome() == "not shown"
    assert Comparison("effect", [0.25] * 4, below=0.25).outcome() == "not shown"


@pytest.mark.parametrize("effects, expected", [([2, 2.1, 1.9], "shown"), ([-2, -2.1, -1.9], "not shown"),
                                               ([2, -2, 1], "undecided"), ([0.9, 1.0, 1.1], "undecided")])
def test_an_interval_beyond_the_margin_is_shown_on_the_other_side_not_shown_across_it_undecided(effects, expected):
    assert Comparison("effect", effects, above=1.0 if expected != "not shown" else 0).outcome() == expected
    mirrored = Comparison("effect", [-x for x in effects], below=-1.0 if expected != "not shown" else 0)
    assert mirrored.outcome() == expected


def test_two_margins_ask_for_an_interval_between_them():
    def between(*effects):
        return Comparison("gap", effects, above=-0.05, below=0.05).outcome()

    assert between(0.01, 0.0, -0.01) == "shown"
    assert between(0.2, 0.21, 0.19) == between(-0.2, -0.21, -0.19) == "not shown"
    assert between(0.04, 0.05, 0.06) == between(-0.2, 0.2, 0.0) == "undecided"


def test_shown_needs_every_comparison_and_not_shown_one():
    good = Comparison("a", [2, 2.1, 1.9], above=0)
    bad = Comparison("b", [-2, -2.1, -1.9], above=0)
    open_ = Comparison("c", [-1, 1, 0.5], above=0)
    assert outcome([good, good]) == "shown"
    assert outcome([good, bad]) == outcome([open_, bad]) == "not shown"
    assert outcome([good, open_]) == "undecided"


def test_not_shown_among_several_comparisons_is_corrected_for_their_number():
    rng = np.random.default_rng(0)
    worse = Comparison("a", rng.normal(-1, 0.8, size=4), above=0)
    while confidence_interval(worse.effects)[1] > -0.01:
        worse.effects = [effect - 0.01 for effect in worse.effects]
    good = Comparison("b", [2, 2.1, 1.9, 2], above=0)
    assert outcome([worse]) == "not shown" and outcome([worse] + 9 * [good]) == "undecided"


def test_false_not_shown_stays_below_five_percent_among_five_comparisons_at_their_margins():
    rng = np.random.default_rng(1)
    outcomes = [outcome([Comparison("a", effects, above=0) for effects in rng.normal(size=(5, 4))])
                for _ in range(2000)]
    assert np.mean([o == "not shown" for o in outcomes]) < 0.05
    assert np.mean([o == "shown" for o in outcomes]) < 0.05


def test_a_condition_that_is_not_shown_leaves_the_outcome_undecided():
    rule = [Comparison("a", [2, 2.1, 1.9], above=0)]
    assert outcome(rule, [Comparison("learned", [1.0, 1.0, 1.0], above=0.9)]) == "shown"
    for accuracies in ([0.1, 0.1, 0.1], [0.1, 1.0, 1.0]):
        assert outcome(rule, [Comparison("learned", accuracies, above=0.9)]) == "undecided"


def test_at_least_k_comparisons_are_counted_at_the_corrected_level():
    high, low, wide = ([x + d for d in (-0.1, 0, 0.1)] for x in (2, -2, 0))
    def rule(*effects):
        return outcome([Comparison(str(i), values, above=0) for i, values in enumerate(effects)], at_least=2)
    assert [rule(high, high, low), rule(high, low, low), rule(high, wide, low)] == ["shown", "not shown", "undecided"]
    # 95 % intervals that lie above 0, and do not at the level 1 - 0.05 / 3.
    narrow = [0.75, 1.0, 0.65]
    assert Comparison("narrow", [x - 0.2 for x in narrow], above=0).outcome() == "shown"
    assert rule(*([[x - 0.2 for x in narrow]] * 3)) == "undecided"
    assert outcome([Comparison("a", high, above=0)], at_least=1) == "shown"
    assert outcome([Comparison("a", high, above=0)], [Comparison("learned", low, above=0)], at_least=1) == "undecided"


def test_a_comparison_without_margin_or_with_an_undefined_effect_raises():
    with pytest.raises(ValueError, match="'lead' has no margin: give above, below, or both"):
        Comparison("lead", [1.0, 2.0])
    with pytest.raises(ValueError, match="'lead' has effects that are not numbers"):
        Comparison("lead", [1.0, math.nan], above=0)


def test_the_summary_holds_plain_values():
    summary = Comparison("lead (gold reward)", np.float32([1, 2, 3]), above=0, below=9).summary()
    assert summary["by_seed"] == [1.0, 2.0, 3.0] and summary["mean"] == 2.0 and summary["outcome"] == "undecided"
    assert summary["asked"] == "above 0 and below 9" and all(type(end) is float for end in summary["interval"])


def test_the_smallest_step_is_positive_exactly_where_a_sequence_rises_throughout():
    assert intervals.smallest_step([1, 2, 4]) == 1
    assert intervals.smallest_step([1, 3, 2.5]) == -0.5


def test_numbers_have_three_significant_digits_and_no_exponent():
    assert [intervals.as_number(x) for x in (0.0, -0.07345, 1.0, 0.00001234, 12.0, None)] == [
        "0", "-0.0735", "1", "0.0000123", "12", "none"]


# The comparison that determines the outcome.

EFFECTS = st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=2, max_size=5)
COMPARISONS = st.lists(EFFECTS.map(lambda effects: Comparison("c", effects, above=0.5)), min_size=1, max_size=5)


@given(COMPARISONS, st.integers(1, 5))
def test_the_decider_alone_has_the_outcome_of_the_rule_at_its_level(comparisons, at_least):
    """With as many seeds in each comparison, as in every experiment."""
    seeds = min(len(c.effects) for c in comparisons)
    comparisons = [Comparison("c", c.effects[:seeds], above=0.5) for c in comparisons]
    for k in (None, min(at_least, len(comparisons))):
        found, level = decider(comparisons, at_least=k)
        assert found.outcome(level) == outcome(comparisons, at_least=k)


def test_of_several_comparisons_the_decider_has_the_corrected_level():
    """The 95 % interval shows it; the interval at level 1 - 0.05 / 3 leaves it undecided."""
    narrow = [Comparison("narrow", [0.55, 0.8, 0.45], above=0)] * 3
    found, level = decider(narrow, at_least=2)
    assert (round(level, 6), found.outcome(0.95), found.outcome(level)) == (0.983333, "shown", "undecided")


def test_a_condition_that_is_not_met_is_the_decider():
    rule = [Comparison("rule", [1.0, 1.1], above=0)]
    learned = Comparison("learned", [0.1, 0.2], above=0.9)
    assert decider(rule, [learned]) == (learned, 0.95)
    assert decider(rule) == (rule[0], 0.95)
