"""The exercises: the hole fails, the solution passes, each mistake gets its own hint; and what the grader says."""
import inspect
import re
from unittest import mock

import numpy as np
import pytest

from minilm import check, exercises
from minilm.exercises import golden, grading, tasks
from minilm.exercises.differences import difference_error, slopes
from minilm.exercises.grading import broken as is_broken
from minilm.exercises.outcome import as_arrays, observe, same
from minilm.exercises.reference import Reference, fit
from minilm.exercises.task import HOLE, Property, cases, copies, run_text, solution_text, student_file, variant

TASKS = {name: tasks.load(name) for name in tasks.ORDER}
REFERENCES = {name: Reference(task) for name, task in TASKS.items()}        # computed once, when first needed
MISTAKES = [pytest.param(task, mistake, id=f"{name}-{i}") for name, task in TASKS.items()
            for i, mistake in enumerate(task.mistakes)]


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def grade(task, function, path="", **told):
    """The verdict on a function, with what our code computes once for all tests."""
    return grading.grade(task, function, path, reference=REFERENCES[task.name], **told)


def of_file(task, text):
    """The student's function in the text of a file."""
    return getattr(run_text("exercise", text, "exercise.py"), task.name)


# Every task.

def test_the_hole_is_not_begun(task):
    verdict = grade(task, of_file(task, student_file(task)))
    assert (verdict.solved, verdict.begun) == (False, False) and "hole" in verdict.text


def test_a_function_without_a_part_is_begun_and_wrong_in_the_case_that_needs_the_part():
    def rows_alone(x):
        if x.ndim == 3:
            raise NotImplementedError("three axes")
        return TASKS["softmax"].solution(x)

    def three_axes_alone(x):
        if x.ndim < 3:
            raise NotImplementedError
        return TASKS["softmax"].solution(x)

    for function, case in ((rows_alone, "two leading axes"), (three_axes_alone, "one row")):
        verdict = grade(TASKS["softmax"], function)
        assert verdict.begun and not verdict.solved
        assert verdict.text.startswith(f'wrong in the case "{case}": it raises NotImplementedError'), verdict.text


def test_the_solution_in_the_place_of_the_hole_is_right(task):
    head, _, rest = student_file(task).partition(HOLE)
    assert not rest
    text = solution_text(task)
    body = text.partition('"""\n')[2]
    assert head.endswith(text.removesuffix(body)) and len(body) > 10
    verdict = grade(task, of_file(task, head + body))
    assert verdict.solved and verdict.text.startswith("solved: right in ") and task.read in verdict.text, verdict


def test_the_file_does_not_contain_the_solution_and_names_every_argument_and_result(task):
    text = student_file(task)
    lines = text
    for function in task.given:
        assert text.count(inspect.getsource(function)) == 1
        lines = lines.replace(inspect.getsource(function), "")
    for line in solution_text(task).partition('"""\n')[2].splitlines():
        assert line.strip() not in (other.strip() for other in lines.splitlines()), line
    specification = task.module.__doc__
    for name in task.arguments:
        assert re.search(rf"^    [\w, ]*\b{name}\b[\w, ]*  ", specification, re.MULTILINE), name
    assert "    returns  " in specification
    for words in ("check", "hint", "solution"):
        assert f"python -m minilm.exercises {words} {task.name}" in text


def test_a_task_has_two_hints_and_at_least_five_mistakes_with_words_of_their_own(task):
    assert len(task.hints) == 2 and all(len(hint) > 30 for hint in task.hints) and task.hints[0] != task.hints[1]
    assert len(task.mistakes) >= 5
    assert len({(mistake.right, mistake.wrong) for mistake in task.mistakes}) == len(task.mistakes)
    assert task.name == task.module.__name__.rpartition(".")[2] and len(task.title) > 5


@pytest.mark.parametrize("task, mistake", MISTAKES)
def test_a_mistake_is_noticed_and_gets_its_own_hint_and_no_other(task, mistake):
    verdict = grade(task, variant(task, mistake))
    assert not verdict.solved and verdict.begun
    assert {other.hint for other in task.mistakes if other.hint in verdict.text} == {mistake.hint}, verdict.text
    assert f"\nHint: {mistake.hint}\n" in verdict.text


@pytest.mark.parametrize("name, changes", [
    ("softmax", {"axis=-1": "axis=0"}), ("softmax_vjp", {"axis=-1": "axis=0"}),
    ("token_log_probs", {"axis=-1, keepdims=True": "axis=0", "axis=-1": "axis=0", "highest[:, 0]": "highest"}),
    ("sft_gradient", {"axis=-1": "axis=1"}), ("policy_gradient", {"axis=-1": "axis=1"}),
    ("rms_norm_backward", {"axis=-1": "axis=0"}), ("best_of_n", {"axis=1": "axis=0"}),
    ("leave_one_out", {"axis=1": "axis=0"}), ("policy_gradient_loss", {"axis=1": "axis=0"}),
    ("categorical", {"axis=-1": "axis=0", "cumulative[:, -1:]": "cumulative[-1:]"})])
def test_a_wrong_axis_in_all_reductions_is_one_mistake(name, changes):
    text = solution_text(TASKS[name])
    for right, wrong in changes.items():
        assert right in text
        text = text.replace(right, wrong)
    given = student_file(TASKS[name]).partition(f"def {name}(")[0]
    verdict = grade(TASKS[name], of_file(TASKS[name], given + text))
    assert re.search(r"\nHint: .*(first axis|axis 0|axis 1|over the rows)", verdict.text), verdict.text
    assert "two mistakes" not in verdict.text


def unbroadcast_by_means(dy, shape):
    stretched = tuple(i for i, n in enumerate(shape) if n == 1)
    return dy.mean(axis=tuple(range(dy.ndim - len(shape)))).mean(axis=stretched, keepdims=True)


def whole_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def adamw_with_exchanged_betas(p, g, m, v, t, lr, b1, b2, eps, decay):
    return TASKS["adamw"].solution(p, g, m, v, t, lr, b2, b1, eps, decay)


def mask_with_the_prompt_added(tokens, prompt_lengths, lengths):
    return TASKS["shift_and_mask"].solution(tokens, prompt_lengths, prompt_lengths + lengths)


def dpo_loss_from_the_reference(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return TASKS["dpo_loss"].solution(reference_chosen, reference_rejected, policy_chosen, policy_rejected, beta)


@pytest.mark.parametrize("name, function, words", [
    ("unbroadcast", unbroadcast_by_means, "Means instead of sums"), ("softmax", whole_softmax, "Maximum and sum are"),
    ("unbroadcast", lambda dy, shape: dy.sum(axis=0), "summed over its first axis, whatever"),
    ("adamw", adamw_with_exchanged_betas, "b1 and b2 are exchanged"),
    ("shift_and_mask", mask_with_the_prompt_added, "The prompt's length is added to `lengths`"),
    ("dpo_loss", dpo_loss_from_the_reference, "delta has the wrong sign: chosen and rejected, or policy and reference"),
    ("log_sigmoid", lambda z: np.minimum(z, 0) - np.log(1 + np.exp(-np.abs(z))), r"1 \+ exp\(-40\) rounds to 1"),
    ("rms_norm_backward", lambda x, weight, dy, eps: TASKS["rms_norm_backward"].solution(x, weight, dy, 0.0),
     "eps is missing"),
    ("leave_one_out", lambda R: (R - R.mean(axis=1, keepdims=True)) / R.std(axis=1, keepdims=True), "as in GRPO"),
    ("sft_loss", lambda log_probs, mask: -log_probs.mean(), "The mask is left out"),
    ("categorical", lambda p, u: (p.cumsum(axis=1) <= u[:, None]).sum(axis=1), "u is not scaled by the sum")])
def test_one_mistake_is_named_once_however_it_is_written(name, function, words):
    text = grade(TASKS[name], function).text
    assert re.search(rf"\nHint: .*{words}", text) and "two mistakes" not in text and "In " not in text, text


def test_gradients_equal_finite_differences():
    graded = [task for task in TASKS.values() if task.scalar is not None]
    assert len(graded) >= 8
    for task in graded:
        assert len(task.wrt) == len(task.returns)
        for words, arguments in {**cases(task), **golden.cases(task)}.items():
            results = as_arrays(task.solution(*arguments))
            assert difference_error(slopes(task, arguments, results), results) < 1e-6, (task.name, words)


def test_a_wrong_gradient_is_not_equal_to_finite_differences():
    task = TASKS["dpo_gradient"]
    arguments = cases(task)["four pairs"]
    for mistake in task.mistakes:
        wrong = as_arrays(variant(task, mistake)(*arguments))
        assert difference_error(slopes(task, arguments, wrong), wrong) > 1e-3, mistake.hint


def all_at_once(hidden, unembedding, targets, chunk):
    return TASKS["chunked_log_probs"].solution(hidden, unembedding, targets, len(hidden))


def test_a_property_holds_for_the_solution_and_a_mistake_breaks_it():
    with_properties = [task for task in TASKS.values() if task.properties]
    assert len(with_properties) >= 6
    for task in with_properties:
        assert not [part.statement for part in task.properties(task.solution) if is_broken(part)]
        broken = set()
        functions = [variant(task, mistake) for mistake in task.mistakes]
        if task.name == "chunked_log_probs":        # all logits at once have the right numbers
            functions.append(all_at_once)
        for function in functions:
            try:
                with np.errstate(all="ignore"):
                    broken |= {part.statement for part in task.properties(function) if is_broken(part)}
            except Exception:                       # many mistakes raise for other inputs
                continue
        assert broken == {part.statement for part in task.properties(task.solution)}, task.name


def test_numbers_that_are_right_with_a_broken_property_are_not_solved():
    task = TASKS["chunked_log_probs"]
    verdict = grade(task, all_at_once)
    assert not verdict.solved and "all numbers are right, but this does not hold: for 2000 tokens" in verdict.text
    assert re.search(r": memory / memory of all logits is [1-9]\.\d+, and must be at most 0\.2$", verdict.text)


def test_a_function_that_overwrites_an_argument_is_told_its_name(task):
    for i, name in enumerate(task.arguments):
        if not all(isinstance(arguments[i], np.ndarray) and arguments[i].size for arguments in cases(task).values()):
            continue

        def in_place(*arguments, i=i):
            results = task.solution(*copies(arguments))
            arguments[i][...] = arguments[i] == 0
            return results

        verdict = grade(task, in_place)
        assert not verdict.solved and f"your function changed its argument {name}" in verdict.text


@pytest.mark.parametrize("got, at_most, holds", [(1.0, False, True), (1 + 1e-6, False, False), (0.5, False, False),
                                                 (0.5, True, True), (1.5, True, False), (np.nan, True, False)])
def test_a_property_compares_both_ways_unless_it_is_a_limit(got, at_most, holds):
    text = is_broken(Property("x is 1", np.array([1.0, got]), np.ones(2), at_most=at_most))
    assert (text == "") == holds
    assert holds or f"number [1] is {got!r}, and must be {'at most ' * at_most}1.0" in text


def test_golden_vectors_are_cases_wherever_check_finds_them(tmp_path):
    used = [task for task in TASKS.values() if task.golden]
    assert len(used) >= 5
    for task in used:
        (words, arguments), = golden.cases(task).items()
        for found, expected in zip(as_arrays(task.solution(*arguments)), golden.expected(task), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert words == f"golden vector {task.golden[0]}"
        count = len(cases(task))
        assert grade(task, task.solution).text.startswith(f"solved: right in {count + 1} cases")
        with mock.patch.object(check, "FOLDERS", (tmp_path,)):
            assert golden.cases(task) == {}
            assert grading.grade(task, task.solution).text.startswith(f"solved: right in {count} cases")


def test_the_cases_are_the_same_each_time_and_can_be_tried(task):
    for words, arguments in cases(task).items():
        again = exercises.inputs(task.name, words)
        for x, y in zip(arguments, again, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x is not y or not isinstance(x, np.ndarray)
    first = exercises.inputs(task.name)
    np.testing.assert_array_equal(first[0], next(iter(cases(task).values()))[0])
    with pytest.raises(LookupError, match="has no case 'nosuch'; there are '"):
        exercises.inputs(task.name, "nosuch")


def test_a_right_code_that_stands_elsewhere_is_no_mistake_of_the_solution():
    from minilm.exercises.task import Mistake
    with pytest.raises(ValueError, match="stands in the solution 0 times"):
        variant(TASKS["softmax"], Mistake("", "nosuch", ""))
    with pytest.raises(LookupError, match="no task 'nosuch'; there are exp_vjp, "):
        tasks.load("nosuch")


# What the grader says.

SOFTMAX = TASKS["softmax"]
right = SOFTMAX.solution


def stop(x):
    raise SystemExit(0)


@pytest.mark.parametrize("function, words", [
    (lambda x: None, 'wrong in the case "one row": it returns None: is the return missing?'),
    (lambda x: (right(x), 1), "it returns a tuple of 2; it must return p alone"),
    (lambda x: "p", "p is str of <U1; it must be an array of real numbers"),
    (lambda x: [[1, 2], [3]], "p is list; it must be an array of numbers"),
    (lambda x: right(x) + 0j, "p is ndarray of complex128; it must be an array of real numbers"),
    (lambda x: right(x)[..., None], "p has shape (3, 1); it must be (3,)"),
    (lambda x: right(x.astype(np.float32)), "It holds float32, which rounds; compute in float64"),
    (lambda x: (10 * right(x)).astype(int), "It holds integers: was it made of integers, and so rounded?"),
    (lambda x: right(x) * np.nan, "number [0] of p is nan; expected 0.2447284710547976"),
    (lambda x: right(x) + (np.arange(x.shape[-1]) == 2) * 1e-6, "number [2] of p is 0.0900315"),
    (lambda x: right(x, 1), "it raises TypeError: "), (stop, "it raises SystemExit: 0"),
    (lambda x: x / 0 * right(x), "NumPy warned: divide by zero encountered in divide")])
def test_the_first_thing_that_is_wrong_is_said(function, words):
    verdict = grade(SOFTMAX, function)
    assert not verdict.solved and words in verdict.text, verdict.text
    assert "\nThe inputs: x = [ 0.,  1., -1.]\n" in verdict.text
    assert verdict.text.endswith("\nTo try it:\n    python -i FILE\n    from minilm.exercises import inputs\n"
                                 '    softmax(*inputs("softmax", "one row"))')


def test_several_results_are_a_tuple_and_integers_are_integers():
    task = TASKS["matmul_vjp"]
    assert "it returns one ndarray; it must return the tuple (dx, dw)" in grade(task, lambda x, w, dy: dy @ w.T).text
    assert "it returns 3 values; it must return the tuple (dx, dw)" in grade(task, lambda *a: a).text
    assert grade(task, lambda *a: list(task.solution(*a))).solved
    task = TASKS["categorical"]
    assert "tokens holds float64; it must hold integers" in grade(task, lambda p, u: 1.0 * task.solution(p, u)).text


def test_a_mask_may_hold_booleans_or_numbers():
    task = TASKS["shift_and_mask"]
    for kind in (bool, int, float):
        assert grade(task, lambda *a, kind=kind: (task.solution(*a)[0], task.solution(*a)[1].astype(kind))).solved


def test_the_line_of_an_error_and_of_a_warning_is_named():
    text = ("import numpy as np\n\ndef softmax(x):\n    e = np.exp(800 + x)\n    return e / helper(e)\n\n"
            "def helper(e):\n{}\n")
    function = run_text("exercise", text.format("    return e[7]"), "my.py").softmax
    assert "it raises IndexError in line 8: index 7 is out of bounds" in grade(SOFTMAX, function, "my.py").text
    function = run_text("exercise", text.format("    return e.sum()"), "my.py").softmax
    assert "NumPy warned: overflow encountered in exp (line 4)" in grade(SOFTMAX, function, "my.py").text


def test_a_number_that_no_mistake_gives_has_finite_differences_and_no_hint():
    task = TASKS["rms_norm_backward"]
    verdict = grade(task, lambda *a: (1.7 * task.solution(*a)[0], *task.solution(*a)[1:]))
    number = r"(0\.\d+)"
    found = re.search(rf"number \[0, 0\] of dx is {number}; expected {number}\. By finite differences, "
                      rf"\(L\(x \+ h\) - L\(x - h\)\) / 2h, it is {number}", verdict.text)
    got, expected, slope = map(float, found.groups())
    assert abs(slope - expected) < 1e-7 < 0.1 < abs(got - expected)
    assert "Hint" not in verdict.text and "Perhaps" not in verdict.text


@pytest.mark.parametrize("name, change, words", [
    ("leave_one_out", lambda A: 0.75 * A, "\nIn every case A is 0.75 times the right A: look for a factor.\n"),
    ("softmax", lambda p: -p, "\nIn every case p is -1 times the right p: the sign is reversed.\n"),
    ("log_sigmoid", lambda y: y - 0.25, "\nIn every case log sigmoid is too small by 0.25: look for a term.\n"),
    ("log_sigmoid", lambda y: y + 0.25, "\nIn every case log sigmoid is too large by 0.25: look for a term.\n"),
    ("sft_loss", lambda loss: 3 * loss, "\nIn every case loss is 3 times the right loss: look for a factor.\n"),
    ("log_sigmoid", lambda y: y * (1 - 1e-7 * (y < -1)), "\nIn every case log sigmoid is right to about 7 digits. "),
    ("matmul_vjp", lambda results: (results[0], 2 * results[1]), "\nIn every case dw is 2 times the right dw: look"),
    ("matmul_vjp", lambda results: (3 * results[0], 2 * results[1]), "\nIn every case dx is 3 times the right dx: "),
    ("softmax", lambda p: 0 * p, ""), ("softmax", lambda p: np.nan * p, ""),
    ("categorical", lambda tokens: 1 - tokens, "")])
def test_what_the_numbers_show_by_themselves_is_said_where_no_mistake_is_known(name, change, words):
    task = TASKS[name]
    verdict = grade(task, lambda *arguments: change(task.solution(*arguments)))
    assert not verdict.solved and "Hint" not in verdict.text
    assert words in verdict.text and ("In every case" in verdict.text) == bool(words), verdict.text


@pytest.mark.parametrize("factors, words", [
    ({1: 0.6}, '\nIn this case A is 0.6 times the right A, but not in the case "two prompts".\n'),
    ({1: 0.6, 2: 0.7}, '\nIn this case A is 0.6 times the right A, but not in the case "two prompts".\n'),
    ({1: 0.6, 2: 0.6}, '\nIn this case A is 0.6 times the right A, but not in the case "as many prompts as samp'),
    ({1: 0.6, 2: 0.6, 3: 0.6}, "\nIn every case A is 0.6 times the right A: look for a factor.\n")])
def test_a_factor_that_one_case_has_is_not_said_of_all(factors, words):
    task = TASKS["leave_one_out"]
    verdict = grade(task, lambda rewards: task.solution(rewards) * factors.get(len(rewards), 1.0))
    assert words in verdict.text and verdict.text.count("times the right A") == 1, verdict.text


def test_a_factor_of_all_cases_is_surer_than_a_mistake_that_fits_one():
    task = TASKS["leave_one_out"]               # of three samples, the mean of all gives 2/3 of the right numbers
    verdict = grade(task, lambda rewards: 2 / 3 * task.solution(rewards))
    assert "In every case A is 0.666667 times the right A" in verdict.text and "Perhaps" not in verdict.text


def test_a_case_that_cannot_be_compared_has_no_factor_in_common():
    task = TASKS["leave_one_out"]
    for wrong in (lambda A: A * np.nan, lambda A: A[0], lambda A: None):
        verdict = grade(task, lambda rewards, wrong=wrong: (wrong if len(rewards) == 2 else np.negative)(
            0.6 * task.solution(rewards)))
        assert '\nIn this case A is -0.6 times the right A, but not in the case "two prompts".\n' in verdict.text
    task = TASKS["sft_loss"]                    # one number in each case: alone it is no evidence
    verdict = grade(task, lambda log_probs, mask: task.solution(log_probs, mask) * len(mask) ** 3)
    assert "times the right" not in verdict.text


def test_randomness_and_overflow_are_named():
    rng = np.random.default_rng(0)
    verdict = grade(SOFTMAX, lambda x: right(x) * rng.random())
    assert "Two calls with the same arguments give different results" in verdict.text
    verdict = grade(TASKS["log_sigmoid"], lambda z: np.log(np.exp(z) / (1 + np.exp(z))))
    assert "exp of a number above 709 is infinite" in verdict.text


def test_a_mask_of_booleans_is_compared_in_booleans_and_one_of_numbers_in_numbers():
    task = TASKS["shift_and_mask"]
    for kind, words in ((bool, "of mask is False; expected True"), (float, "of mask is 0.0; expected 1.0")):
        assert words in grade(task, lambda t, *_, kind=kind: (t[:, 1:], np.zeros(t[:, 1:].shape, kind))).text
    assert "number [0] of p is False; expected 0.24" in grade(SOFTMAX, lambda x: np.zeros(x.shape, bool)).text


def test_a_zero_is_shown_without_a_sign():
    assert "number [0] of p is 0.0; expected" in grade(SOFTMAX, lambda x: -0.0 * right(x)).text
    assert np.signbit(TASKS["log_sigmoid"].solution(np.array(1000.0)))
    text = grade(TASKS["log_sigmoid"], lambda z: TASKS["log_sigmoid"].solution(z) + (z == 1000)).text
    assert "number [1] of log sigmoid is 1.0; expected 0.0\n" in text
    text = grade(TASKS["swiglu_backward"], lambda gate, up, dy: (-0.0 * gate, -0.0 * gate)).text
    assert "-0." not in re.sub(r"-0\.\d*[1-9]", "", text), text


def test_several_changed_arguments_are_told_in_the_plural():
    task = TASKS["adamw"]

    def in_place(p, g, m, v, *numbers):
        result = task.solution(p, g, m, v, *numbers)
        m += 1
        v += 1
        return result

    assert "your function changed its arguments m and v: the caller still needs them. " in grade(task, in_place).text


def test_wrong_numbers_and_a_changed_argument_are_both_said():
    def wrong(x):
        x[0] = 0
        return x

    text = grade(SOFTMAX, wrong).text
    assert "number [0] of p is 0.0; expected" in text or "p has" in text
    text = grade(TASKS["decode_step"], lambda x, wq, wk, wv, keys, values: (keys.fill(0), keys, values)[1:] * 2).text
    assert "it must return the tuple (o, keys, values)" in text and "It also changes its argument keys, which" in text


def test_two_mistakes_at_once_are_both_named():
    for task in TASKS.values():
        one = task.mistakes[0]
        for other in task.mistakes[1:]:
            if fit(task, one, other):
                verdict = grade(task, variant(task, one, other))
                named = {mistake.hint for mistake in task.mistakes if mistake.hint in verdict.text}
                assert verdict.solved or 1 <= len(named) <= 2, (one.hint, other.hint)
    task = TASKS["dpo_gradient"]
    one, other = (mistake for mistake in task.mistakes if "in front" in mistake.hint and "^2" not in mistake.hint
                  or "gradient of the sum" in mistake.hint)
    verdict = grade(task, variant(task, one, other))
    assert f"Hint: two mistakes at once.\n  - {one.hint}\n  - {other.hint}\n" in verdict.text


def softmax_like(mistake, case, elsewhere):
    """A softmax with the numbers of a mistake in one case, and other wrong numbers elsewhere."""
    wrong = variant(SOFTMAX, mistake)
    return lambda x: wrong(x) if np.array_equal(x, cases(SOFTMAX)[case][0]) else elsewhere(x)


def test_the_numbers_of_a_mistake_in_one_case_alone_are_a_possibility():
    whole = next(mistake for mistake in SOFTMAX.mistakes if mistake.wrong == "e.sum()")
    verdict = grade(SOFTMAX, softmax_like(whole, "three rows", lambda x: right(x) if x.ndim == 1 else right(x) ** 1.1))
    assert f"\nPerhaps, because it gives the same numbers in this case: {whole.hint}\n" in verdict.text
    verdict = grade(SOFTMAX, softmax_like(whole, "three rows", right))
    assert whole.hint not in verdict.text       # the mistake would be wrong in the other cases, too


def test_of_several_possibilities_those_that_fit_the_most_cases_are_named():
    task = TASKS["leave_one_out"]
    likely = [mistake for mistake in task.mistakes if "- rewards.mean(" in mistake.wrong and "std" not in mistake.wrong]
    mean_of_all, flat = (variant(task, likely[i]) for i in (0, 1))

    def wrong(rewards):
        if len(rewards) == 1:                   # there three mistakes give the same numbers
            return mean_of_all(rewards)
        return rewards.astype(int)

    verdict = grade(task, wrong)
    assert "\nPerhaps one of these, which give the same numbers in this case:\n  - " in verdict.text
    assert len(likely) == 3 and all(f"\n  - {mistake.hint}\n" in verdict.text for mistake in likely), verdict.text
    verdict = grade(task, lambda rewards: flat(rewards) if len(rewards) == 3 else wrong(rewards))
    assert f"\nPerhaps, because it gives the same numbers in this case: {likely[1].hint}\n" in verdict.text


def test_a_first_verdict_is_told_before_the_search_for_the_mistake():
    told, at = [], []
    verdict = grade(SOFTMAX, lambda x: None, at=at.append, found=told.append)
    assert told[0].text == verdict.text and at == ['in the case "one row"']
    told.clear()
    final = grade(SOFTMAX, variant(SOFTMAX, SOFTMAX.mistakes[0]), found=told.append)
    assert "Hint" in final.text and "Hint" not in told[0].text


def test_calls_that_raise_are_the_same_if_their_exceptions_are():
    arguments = (np.zeros(3),)
    division, index, again = (observe(SOFTMAX, function, arguments) for function in
                              (lambda x: 1 // 0, lambda x: x[7], lambda x: [1 // 0]))
    assert same(SOFTMAX, division, again) and not same(SOFTMAX, division, index)
    assert not same(SOFTMAX, division, observe(SOFTMAX, right, arguments))


def test_nan_and_infinity_are_compared_as_they_are():
    outcome = observe(SOFTMAX, lambda x: np.array([np.nan, np.inf, 1.0]), (np.zeros(3),))
    for other, equal in (([np.nan, np.inf, 1.0], True), ([np.nan, np.inf, 1 + 1e-12], True),
                        ([np.nan, -np.inf, 1.0], False), ([0.0, np.inf, 1.0], False),
                        ([np.nan, np.inf, 1 + 1e-6], False)):
        array = np.array(other)
        assert same(SOFTMAX, outcome, observe(SOFTMAX, lambda x, a=array: a, (np.zeros(3),))) is equal

