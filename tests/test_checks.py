"""minilm/checks.py: each check returns what is used afterwards, or names the argument and its value."""
import math

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from minilm import Tensor, checks, ops


@given(value=st.floats(0, 1e9, exclude_min=True))
def test_a_number_within_its_range_is_returned(value):
    assert checks.number("f", "beta", value, above=0) == value
    assert checks.number("f", "beta", np.float32(0.5), above=0, at_most=0.5) == 0.5


@pytest.mark.parametrize("value, limits, words", [
    (0, {"above": 0}, "beta is 0; it must be a finite number above 0"), (-1.5, {"at_least": 0}, "at least 0"),
    (math.inf, {"above": 0}, "inf"), (math.nan, {}, "nan; it must be a finite number"),
    (1, {"at_least": 0, "below": 1}, "at least 0 and below 1"), (2, {"at_most": 1}, "at most 1")])
def test_a_number_out_of_range_is_named_with_its_value(value, limits, words):
    with pytest.raises(ValueError, match=f"f: beta is .*{words.split('beta is ')[-1]}"):
        checks.number("f", "beta", value, **limits)


@pytest.mark.parametrize("value", [None, "0.1", True, np.bool_(True), [0.1], np.ones(2)])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="f: beta is .*; it must be a number"):
        checks.number("f", "beta", value)


def test_an_integer_is_no_float_and_no_bool():
    assert checks.integer("f", "top_k", np.int64(3), at_least=1) == 3
    for value in (3.0, True, "3", None):
        with pytest.raises(TypeError, match="f: top_k is .*; it must be an integer"):
            checks.integer("f", "top_k", value)
    with pytest.raises(ValueError, match="f: top_k is 0; it must be at least 1"):
        checks.integer("f", "top_k", 0, at_least=1)
    with pytest.raises(ValueError, match="f: eos is 9; it must be at least 0 and below 9"):
        checks.integer("f", "eos", 9, at_least=0, below=9)


def test_a_flag_is_true_or_false():
    assert checks.flag("f", "causal", False) is False and checks.flag("f", "causal", np.True_) is True
    for wrong in (0, 1, None, "yes", np.ones(2, bool)):
        with pytest.raises(TypeError, match="f: causal is .*; it must be True or False"):
            checks.flag("f", "causal", wrong)


def test_a_value_in_an_error_is_short_however_long_it_is():
    for call in (lambda: checks.number("f", "beta", 10 ** 400), lambda: checks.number("f", "beta", "x" * 10 ** 5),
                 lambda: checks.integer("f", "layers", -10 ** 4000, at_least=1),
                 lambda: checks.choice("f", "baseline", "x" * 10 ** 5, ["none", "mean"])):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert len(str(caught.value)) < 200


def test_a_choice_is_one_of_its_words():
    assert checks.choice("f", "level", "token", ("token", "sequence")) == "token"
    with pytest.raises(ValueError, match="f: level is 'x'; it must be 'token', 'prompt' or 'sequence'"):
        checks.choice("f", "level", "x", ("token", "prompt", "sequence"))


@given(bits=st.lists(st.booleans(), max_size=5), dtype=st.sampled_from([bool, int, "uint8", "float32", float]))
def test_a_mask_of_any_type_of_zeros_and_ones_selects_the_ones(bits, dtype):
    selected = checks.mask("f", np.array(bits, dtype), (len(bits),))
    assert selected.dtype == bool and selected.tolist() == bits


@pytest.mark.parametrize("wrong", [2, 0.5, 255, -100, np.nan, np.inf])
def test_a_mask_of_other_values_is_refused_wherever_they_stand(wrong):
    for place in range(4):
        values = np.array([1.0, 0.0, 1.0, 1.0])
        values[place] = wrong
        with pytest.raises(ValueError, match=r"f: mask holds .*; it must hold 0 and 1 alone"):
            checks.mask("f", values)
    with pytest.raises(ValueError, match=r"f: mask has shape \(2,\); it must be \(1, 2\)"):
        checks.mask("f", np.ones(2), (1, 2))


def test_arrays_of_one_shape_have_that_shape_and_nothing_is_broadcast():
    assert checks.same_shape("f", policy=Tensor(np.ones((2, 3))), reference=np.zeros((2, 3))) == (2, 3)
    for other in ((2, 1), (3,), (1, 2, 3), ()):
        with pytest.raises(ValueError, match=r"f: policy \(2, 3\), reference .*; they must have one shape"):
            checks.same_shape("f", policy=Tensor(np.ones((2, 3))), reference=np.zeros(other))


def test_arrays_have_the_axes_that_are_asked_for_and_none_is_empty():
    assert checks.same_shape("f", axes="PK", rewards=np.ones((2, 3)), kl=np.ones((2, 3)), entropies=None) == (2, 3)
    for shape in ((3,), (1, 2, 3), (), (0, 3), (2, 0)):
        with pytest.raises(ValueError, match=r"f: rewards .*they must have one shape \(P,K\).*; reshape them"):
            checks.same_shape("f", axes="PK", hint="reshape them", rewards=np.ones(shape), kl=np.ones(shape))
    with pytest.raises(ValueError, match=r"one shape \(B,\), without an axis of length 0"):
        checks.same_shape("f", axes="B", rewards=[])


def test_numbers_are_arrays_of_one_shape_and_finite():
    a, b = checks.numbers("f", "B", a=[1.0, 2.0], b=np.array([3, 4]))
    assert a.tolist() == [1, 2] and b.tolist() == [3, 4]
    with pytest.raises(ValueError, match="f: b, entry 1, is inf"):
        checks.numbers("f", "B", a=[1.0, 2.0], b=[1.0, np.inf])
    with pytest.raises(ValueError, match="they must have one shape"):
        checks.numbers("f", "B", a=[1.0, 2.0], b=[[1.0], [2.0]])


@pytest.mark.parametrize("wrong", [0.5, -1.0, np.nan, np.inf])
def test_a_number_below_the_smallest_that_is_allowed_is_named_with_its_place(wrong):
    assert checks.finite("f", "lengths", [1, 2], "pair", at_least=1).tolist() == [1, 2]
    with pytest.raises(ValueError, match=f"f: lengths, pair 1, is {wrong:g}[.0]*; it must be finite and at least 1"):
        checks.finite("f", "lengths", [1.0, wrong], "pair", at_least=1)


@pytest.mark.parametrize("wrong", [None, [None, 1], "01", ["1", "0"], [[1], [1, 0]], [1j, 0], [object()], {1: 0}, b"1",
                                   Tensor(np.ones(2)), np.zeros(2, "M8[s]"), [10 ** 400]], ids=lambda w: str(w)[:9])
def test_what_holds_no_numbers_is_named_and_asked_for_numbers(wrong):
    for check in (lambda: checks.mask("f", wrong, name="x"), lambda: checks.finite("f", "x", wrong),
                  lambda: checks.numbers("f", "N", x=wrong, y=wrong), lambda: checks.indices("f", "x", wrong, 3)):
        with pytest.raises(TypeError, match="^f: x .*(; it must hold (numbers|integers|0 and 1)|not take a Tensor)"):
            check()


def test_an_empty_list_is_an_array_of_integers_where_indices_are_asked_for():
    table = Tensor(np.ones((3, 2)))
    assert checks.indices("f", "x", [], 3).dtype == np.int64 and ops.embed(table, []).shape == (0, 2)


def test_an_index_is_an_integer_from_0_and_below_the_count():
    assert checks.indices("f", "targets", np.array([[0, 4]]), 5).tolist() == [[0, 4]]
    for wrong in (-1, 5, -100):
        with pytest.raises(IndexError, match=f"f: targets holds {wrong}; it must hold integers from 0 to 4"):
            checks.indices("f", "targets", [0, wrong], 5)
    for wrong in ([0.0, 1.0], [True, False], ["1"]):
        with pytest.raises(TypeError, match="f: targets holds .*; it must hold integers"):
            checks.indices("f", "targets", wrong, 5)


def test_the_first_number_that_is_not_finite_is_named_with_its_place():
    assert checks.finite("f", "rewards", [1.0, 2.0]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="train_rlhf: rewards, sample 1, is nan; it must be finite"):
        checks.finite("train_rlhf", "rewards", [1.0, np.nan, np.inf], "sample")
    with pytest.raises(ValueError, match=r"f: weights, entry \(1, 0\), is -inf"):
        checks.finite("f", "weights", np.array([[0, 1], [-np.inf, 0]]))


def test_token_ids_are_integers_of_the_vocabulary():
    assert checks.token_ids("f", "prompt 3", [0, 6], 7).tolist() == [0, 6]
    assert checks.token_ids("f", "prompt 3", [], 7).size == 0
    for wrong in (-1, 7, -100):
        with pytest.raises(IndexError, match=f"f: prompt 3 holds {wrong}, which is not in the vocabulary of 7"):
            checks.token_ids("f", "prompt 3", [1, wrong], 7)
    with pytest.raises(TypeError, match="f: prompt 3 holds float64; it must hold integers"):
        checks.token_ids("f", "prompt 3", [1.9, 2.2], 7)


@given(value=st.floats(1e-3, 1e6) | st.sampled_from([1, np.float32(0.5), 1e-3, 1e6]))
def test_a_temperature_of_the_range_is_returned_and_0_only_where_it_means_greedy(value):
    assert checks.temperature("f", value) == value == checks.temperature("f", value, greedy=True)
    assert checks.temperature("f", 0, greedy=True) == 0
    with pytest.raises(ValueError, match="^f: temperature is 0; it must be a finite number at least 0.001 and at most"):
        checks.temperature("f", 0)
    for wrong in (-value, np.nextafter(1e-3, 0), 1e7, math.nan, math.inf):
        with pytest.raises(ValueError, match="f: temperature is .*, or 0 for greedy decoding$"):
            checks.temperature("f", wrong, greedy=True)


@pytest.mark.parametrize("settings, words", [
    ((1, 0, None), "top_k is 0; it must be at least 1"), ((1, 2.0, None), "top_k is 2.0"),
    ((1, True, None), "top_k is True"), ((1, None, 0), "top_p is 0; it must be a finite number above 0"),
    ((1, None, 1.5), "top_p is 1.5"), (("1", None, None), "temperature is '1'")])
def test_sampling_settings_are_refused_by_name(settings, words):
    checks.sampling("f", 0, 1, 1)
    checks.sampling("f", 1, None, None)
    with pytest.raises((TypeError, ValueError), match=f"f: {words}"):
        checks.sampling("f", *settings)


def test_uniform_numbers_are_drawn_from_a_generator_or_given_in_any_float_type():
    drawn = checks.uniforms("f", np.random.default_rng(3), (2, 3))
    assert np.array_equal(drawn, np.random.default_rng(3).random((2, 3)))
    for numbers in (drawn, drawn.tolist(), drawn.astype(np.float32), np.zeros((2, 3), int)):
        checked = checks.uniforms("f", numbers, (2, 3))
        assert checked.dtype == np.float64 and np.array_equal(checked, np.asarray(numbers, float))


@given(place=st.integers(0, 5),
       wrong=st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1) | st.just(math.nan))
@example(place=0, wrong=1.0)
def test_a_uniform_number_outside_0_to_1_is_refused_wherever_it_stands(place, wrong):
    numbers = np.full((2, 3), 0.5)
    numbers.reshape(-1)[place] = wrong
    with pytest.raises(ValueError, match="f: a uniform number is .*; it must be at least 0 and below 1"):
        checks.uniforms("f", numbers, (2, 3))


@pytest.mark.parametrize("rng, error, words", [
    (0, TypeError, "uniform numbers are 0 .int.; they must be an array .2, 3., or a numpy Generator that draws them"),
    (None, TypeError, "uniform numbers are None"),
    ("a", TypeError, "uniform numbers are 'a'"),
    (np.zeros((3, 2)), ValueError, r"uniform numbers of shape \(3, 2\); expected \(2, 3\)"),
    (np.zeros((2, 3), bool), TypeError, "uniform numbers are bool"),
    (np.zeros((2, 3), complex), TypeError, "uniform numbers are complex128")], ids=str)
def test_what_is_neither_a_generator_nor_uniform_numbers_of_the_shape_is_refused(rng, error, words):
    with pytest.raises(error, match=f"f: {words}"):
        checks.uniforms("f", rng, (2, 3))


@given(ids=st.lists(st.integers(0, 9), min_size=1))
def test_end_tokens_are_marked_in_a_table_of_the_vocabulary(ids):
    for given_as in (list, tuple, set, frozenset, np.array):
        assert np.flatnonzero(checks.end_tokens("f", given_as(ids), 10)).tolist() == sorted(set(ids))
    assert np.flatnonzero(checks.end_tokens("f", ids[0], 10)).tolist() == [ids[0]]
    assert not checks.end_tokens("f", None, 10).any()
    for wrong in (-1, 10, [*ids, -1]):
        with pytest.raises(ValueError, match="f: eos is (-1|10); it must be at least 0 and below 10"):
            checks.end_tokens("f", wrong, 10)
    with pytest.raises(ValueError, match="f: eos is .*; give None if no token ends a response"):
        checks.end_tokens("f", set(), 10)


@pytest.mark.parametrize("logits", [np.zeros(3), np.zeros((2, 3, 4)), np.zeros((2, 3), int), [[0.0, 1.0]],
                                    Tensor(np.zeros((2, 3))), np.zeros((2, 0)), np.zeros((2, 3), np.float16),
                                    np.zeros((2, 3), np.longdouble)], ids=lambda x: type(x).__name__)
def test_logits_are_an_array_of_floats_with_a_row_for_each_draw(logits):
    with pytest.raises(TypeError, match=r"f: logits is .*; it must be an array \(B,V\) of floats, V at least 1"):
        checks.draws("f", logits, np.zeros(2), 1)
    with pytest.raises(TypeError, match="f: p is .*; it must be an array"):
        checks.rows("f", "p", logits)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="f: the largest logit, row 1, is (nan|inf); it must be finite"):
            checks.draws("f", np.array([[0.0, 1.0], [0.0, bad]]), np.zeros(2), 1)
    assert checks.draws("f", np.zeros((2, 3), np.float32), [0.1, 0.2], 1).tolist() == [0.1, 0.2]
