"""DPO and its variants: each against its formula, at its first value, and at its minimum."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import assert_close, normal, rngs, small_transformer
from minilm import Tensor, ops
from minilm.gradcheck import gradcheck, relative_error
from minilm.layers import sequence_log_probs
from minilm.objectives.dpo import dpo_loss, dpo_metrics, ipo_loss, length_normalised_dpo_loss, robust_dpo_loss

sizes = st.integers(1, 8)
betas = st.floats(0.05, 2)
epsilons = st.floats(0, 0.45)
LOSSES = {"dpo": dpo_loss, "robust": robust_dpo_loss, "ipo": ipo_loss}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pairs(rng, B):
    """Summed log-probs: policy's chosen and rejected as leaves, the reference's as arrays."""
    return normal(rng, B), normal(rng, B), rng.normal(size=B), rng.normal(size=B)


def at_delta(*deltas):
    """Arguments whose deltas are these numbers."""
    deltas = np.array(deltas, float)
    return Tensor(deltas, requires_grad=True), Tensor(np.zeros_like(deltas), requires_grad=True), 0 * deltas, 0 * deltas


def swapped(chosen, rejected, ref_chosen, ref_rejected):
    return rejected, chosen, ref_rejected, ref_chosen


def deltas(chosen, rejected, ref_chosen, ref_rejected):
    return chosen.data - rejected.data - ref_chosen + ref_rejected


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def check(loss, arguments, expected, dexpected):
    """The value, the gradient of chosen, and that the gradient of rejected is its negative."""
    loss.backward()
    assert_close(loss, expected)
    assert_close(arguments[0].grad, dexpected)
    np.testing.assert_array_equal(arguments[1].grad, -arguments[0].grad)


# Value and gradient.

@given(rngs, sizes, betas, epsilons)
def test_dpo_and_cdpo_are_the_closed_form(rng, B, beta, eps):
    arguments = pairs(rng, B)
    z = beta * deltas(*arguments)
    check(dpo_loss(*arguments, beta=beta, label_smoothing=eps), arguments,
          np.mean(-(1 - eps) * np.log(sigmoid(z)) - eps * np.log(sigmoid(-z))),
          -beta * (sigmoid(-z) - eps) / B)          # (1-eps) sigma(-z) - eps sigma(z), simplified


@given(rngs, sizes, betas, epsilons)
@example(np.random.default_rng(0), 3, 0.3, 0.2)
def test_robust_dpo_is_the_closed_form(rng, B, beta, eps):
    arguments = pairs(rng, B)
    z = beta * deltas(*arguments)
    # log sigma(z) = z + log sigma(-z) leaves one logarithm: softplus(-z) - eps z / (1 - 2 eps)
    check(robust_dpo_loss(*arguments, beta=beta, flip_rate=eps), arguments,
          np.mean(-np.log(sigmoid(z)) - eps * z / (1 - 2 * eps)),
          -beta * (sigmoid(-z) + eps / (1 - 2 * eps)) / B)


@given(rngs, sizes, betas)
def test_ipo_is_the_closed_form(rng, B, beta):
    arguments = pairs(rng, B)
    short = deltas(*arguments) - 1 / (2 * beta)
    check(ipo_loss(*arguments, beta=beta), arguments, np.mean(short ** 2), 2 * short / B)


@given(rngs, sizes, betas)
def test_length_normalised_dpo_is_the_closed_form(rng, B, beta):
    chosen, rejected, ref_chosen, ref_rejected = arguments = pairs(rng, B)
    n_c, n_r = rng.integers(1, 9, (2, B))
    z = beta * ((chosen.data - ref_chosen) / n_c - (rejected.data - ref_rejected) / n_r)
    loss = length_normalised_dpo_loss(*arguments, n_c, n_r, beta=beta)
    loss.backward()
    assert_close(loss, np.mean(-np.log(sigmoid(z))))
    assert_close(chosen.grad, -beta * sigmoid(-z) / n_c / B)
    assert_close(rejected.grad, beta * sigmoid(-z) / n_r / B)


@given(rngs, sizes, betas, epsilons)
def test_the_gradients_agree_with_finite_differences(rng, B, beta, eps):
    chosen, rejected, *reference = pairs(rng, B)
    lengths = rng.integers(1, 9, (2, B))
    for function in (lambda c, r: dpo_loss(c, r, *reference, beta=beta),
                     lambda c, r: dpo_loss(c, r, *reference, beta=beta, label_smoothing=eps),
                     lambda c, r: robust_dpo_loss(c, r, *reference, beta=beta, flip_rate=eps),
                     lambda c, r: ipo_loss(c, r, *reference, beta=beta),
                     lambda c, r: length_normalised_dpo_loss(c, r, *reference, *lengths, beta=beta)):
        gradcheck(function, chosen, rejected)


@each_loss
def test_the_loss_is_a_mean_over_pairs_however_they_are_split(loss):
    arguments = pairs(np.random.default_rng(3), 5)
    whole = loss(*arguments)
    whole.backward()
    expected = [t.grad for t in arguments[:2]]
    total = 0
    for t in arguments[:2]:
        t.grad = None
    for piece in (slice(0, 1), slice(1, 5)):
        part = loss(*(a[piece] for a in arguments)) * ((piece.stop - piece.start) / 5)
        part.backward()
        total += part.item()
    assert_close(total, whole.data)
    assert_close([t.grad for t in arguments[:2]], expected)


# The start.

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_loss_is_log_2_to_the_last_bit_where_policy_and_reference_are_the_same_array(dtype):
    rng = np.random.default_rng(0)
    for B in range(1, 65):
        chosen, rejected = (-50 * rng.random((2, B))).astype(dtype)
        for beta in (0.01, 0.1, 0.5, 3.0):
            value = dpo_loss(Tensor(chosen), Tensor(rejected), chosen, rejected, beta=beta).data
            assert value.dtype == dtype and value == np.log(dtype(2)), f"B {B}, beta {beta}: {value!r}"


def test_a_copy_of_the_policy_as_reference_starts_at_log_2_to_the_last_bit():
    """So the reference is computed exactly as the policy is: no dropout, no other rounding."""
    rng = np.random.default_rng(0)
    policy = small_transformer(rng, np.float32, layers=2, context=9)
    reference = policy.copy()
    tokens, mask = rng.integers(0, 7, (6, 9)), rng.random((6, 8)) < 0.6

    def sums(model):
        log_probs = sequence_log_probs(model.log_probs(tokens), mask)
        return log_probs[:3], log_probs[3:]

    ref_chosen, ref_rejected = (log_probs.data for log_probs in sums(reference))
    assert dpo_loss(*sums(policy), ref_chosen, ref_rejected).data == np.log(np.float32(2))


@given(rngs, sizes, betas, epsilons)
def test_the_variants_start_at_the_values_in_their_docstrings(rng, B, beta, eps):
    chosen, rejected = -50 * rng.random((2, B))
    same = Tensor(chosen), Tensor(rejected), chosen, rejected
    assert_close(dpo_loss(*same, beta=beta, label_smoothing=eps).data, np.log(2), 1e-13)
    assert_close(robust_dpo_loss(*same, beta=beta, flip_rate=eps).data, np.log(2), 1e-13)
    assert_close(ipo_loss(*same, beta=beta).data, 1 / (4 * beta ** 2), 1e-13)
    lengths = np.arange(1, B + 1)
    assert length_normalised_dpo_loss(*same, lengths, lengths[::-1], beta=beta).data == np.log(2)


# Identities.

@given(rngs, sizes, betas, st.floats(-20, 20), st.sampled_from(["chosen", "rejected"]))
def test_a_constant_added_to_policy_and_reference_of_one_side_does_not_change_the_loss(rng, B, beta, constant, side):
    """Like log Z(x), a term that is the same in policy and reference cancels."""
    chosen, rejected, ref_chosen, ref_rejected = (t.data if isinstance(t, Tensor) else t for t in pairs(rng, B))
    c, r = (constant, 0) if side == "chosen" else (0, constant)
    for loss in LOSSES.values():
        assert_close(loss(chosen + c, rejected + r, ref_chosen + c, ref_rejected + r, beta=beta).data,
                     loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta).data)


@given(rngs, sizes, betas)
def test_swapping_chosen_and_rejected_turns_delta_into_minus_delta(rng, B, beta):
    """softplus(-z) - softplus(z) = -z, and (delta - t)^2 - (-delta - t)^2 = -4 t delta with t = 1/(2 beta)."""
    arguments = pairs(rng, B)
    delta = deltas(*arguments).mean()

    def difference(loss, **options):
        return loss(*arguments, beta=beta, **options).data - loss(*swapped(*arguments), beta=beta, **options).data

    assert_close(difference(dpo_loss), -beta * delta)
    assert_close(difference(dpo_loss, label_smoothing=0.2), -0.6 * beta * delta)
    assert_close(difference(robust_dpo_loss, flip_rate=0.2), -beta * delta / 0.6)
    assert_close(difference(ipo_loss), -2 / beta * delta)


@given(rngs, sizes, betas, epsilons)
def test_cdpo_mixes_the_loss_of_both_orders(rng, B, beta, eps):
    arguments = pairs(rng, B)
    plain, other = dpo_loss(*arguments, beta=beta), dpo_loss(*swapped(*arguments), beta=beta)
    assert_close(dpo_loss(*arguments, beta=beta, label_smoothing=eps).data,
                 (1 - eps) * plain.data + eps * other.data)


# Flipped labels.

def expected_under_flips(loss, arguments, eps):
    """The exact expectation of a loss and its gradients: every pattern of flips, each by its probability."""
    B = len(arguments[2])
    for t in arguments[:2]:
        t.grad = None
    value = 0.0
    for flips in itertools.product([False, True], repeat=B):
        probability = np.prod([eps if flip else 1 - eps for flip in flips])
        flip = np.array(flips)
        both = (arguments, swapped(*arguments))
        seen = [ops.where(flip, b, a) if isinstance(a, Tensor) else np.where(flip, b, a) for a, b in zip(*both)]
        weighed = loss(*seen) * float(probability)
        weighed.backward()
        value += weighed.item()
    return value, [t.grad for t in arguments[:2]]


@given(rngs, epsilons)
def test_the_expected_robust_loss_of_flipped_labels_is_the_loss_of_clean_ones(rng, eps):
    arguments, beta = pairs(rng, 3), 0.7
    clean, dclean = expected_under_flips(lambda *a: dpo_loss(*a, beta=beta), arguments, 0.0)
    robust, drobust = expected_under_flips(lambda *a: robust_dpo_loss(*a, beta=beta, flip_rate=eps), arguments, eps)
    assert_close(robust, clean, 1e-12)
    assert_close(drobust, dclean, 1e-12)


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_cdpo_does_not_undo_flips(eps):
    arguments, beta = pairs(np.random.default_rng(1), 3), 0.7
    clean, dclean = expected_under_flips(lambda *a: dpo_loss(*a, beta=beta), arguments, 0.0)
    for smoothing in (0.0, eps):
        value, d = expected_under_flips(lambda *a: dpo_loss(*a, beta=beta, label_smoothing=smoothing), arguments, eps)
        assert relative_error(value, clean)[0] > 0.01
        assert relative_error(np.array(d), np.array(dclean))[0] > 0.05


@pytest.mark.parametrize("function, option", [(dpo_loss, "label_smoothing"), (robust_dpo_loss, "flip_rate")])
@pytest.mark.parametrize("eps", [-0.1, 0.5, 0.9, float("nan")])
def test_a_rate_of_wrong_labels_out_of_range_raises(function, option, eps):
    with pytest.raises(ValueError, match=option):
        function(*pairs(np.random.default_rng(0), 2), **{option: eps})


# Optima.

def assert_minimum(loss, beta, around, **options):
    """The gradient at delta = around is 0, and the loss is larger on both sides."""
    arguments = at_delta(around)
    value = loss(*arguments, beta=beta, **options)
    value.backward()
    sides = [loss(*at_delta(around + step), beta=beta, **options).item() for step in (-0.1, 0.1)]
    assert abs(arguments[0].grad[0]) < 1e-12 and value.item() < min(sides)


@given(betas, st.floats(0.01, 0.45))
def test_cdpo_has_its_minimum_at_a_finite_delta(beta, eps):
    assert_minimum(dpo_loss, beta, np.log((1 - eps) / eps) / beta, label_smoothing=eps)


@given(betas)
def test_ipo_has_its_minimum_at_1_over_2_beta(beta):
    assert_minimum(ipo_loss, beta, 1 / (2 * beta))
    assert ipo_loss(*at_delta(1 / (2 * beta)), beta=beta).item() == 0


@given(betas, st.floats(0.05, 0.45))
def test_the_robust_loss_is_unbounded_below(beta, eps):
    """It falls by eps/(1 - 2 eps) for each unit of beta delta, without end; the other losses are never negative."""
    values = [robust_dpo_loss(*at_delta(z / beta), beta=beta, flip_rate=eps).item() for z in (0, 100, 1e3, 1e6)]
    assert values == sorted(values, reverse=True)
    assert_close(values[1:], -eps / (1 - 2 * eps) * np.array([100, 1e3, 1e6]), 1e-12)
    assert dpo_loss(*at_delta(1e6), beta=beta, label_smoothing=eps).item() > 0


# Lengths.

@given(rngs, st.integers(1, 4), st.integers(2, 4), betas)
def test_dpo_and_ipo_sum_log_probs_over_tokens_and_length_normalised_dpo_averages_them(rng, T, times, beta):
    """Every token repeated: delta is multiplied in DPO and IPO (sums), and does not change if length-normalised."""
    tokens = -rng.exponential(size=(4, 3, T))                   # chosen, rejected, and their references, B = 3
    mask = rng.random((2, 3, T)) < 0.7
    mask[..., 0] = True
    mask = np.concatenate([mask, mask])                         # chosen, rejected; chosen, rejected

    def sums(n):
        return [sequence_log_probs(np.repeat(log_probs, n, axis=-1), np.repeat(m, n, axis=-1)).data
                for log_probs, m in zip(tokens, mask)]

    once, duplicated = sums(1), sums(times)
    delta = once[0] - once[1] - once[2] + once[3]
    assert_close(dpo_loss(*duplicated, beta=beta).data, np.mean(np.log1p(np.exp(-beta * times * delta))))
    assert_close(ipo_loss(*duplicated, beta=beta).data, np.mean((times * delta - 0.5 / beta) ** 2))
    lengths = mask[:2].sum(axis=-1)
    assert_close(length_normalised_dpo_loss(*duplicated, *(times * lengths), beta=beta).data,
                 length_normalised_dpo_loss(*once, *lengths, beta=beta).data)


def test_an_empty_response_has_a_sum_of_0_and_no_mean():
    """DPO can use the sum 0; the mean of no tokens does not exist."""
    chosen, rejected = np.array([0.0, -2.0]), np.array([-1.0, -1.0])
    assert np.isfinite(dpo_loss(chosen, rejected, chosen, rejected).item())
    with pytest.raises(ValueError, match="length"):
        length_normalised_dpo_loss(chosen, rejected, chosen, rejected, np.array([0, 3]), np.array([1, 1]))


def test_float32_log_probs_take_lengths_of_any_dtype():
    log_chosen, log_rejected, *reference = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for lengths in (np.array([2, 3, 4]), np.array([2.0, 3.0, 4.0]), [2, 3, 4]):
        chosen = Tensor(log_chosen, requires_grad=True)
        loss = length_normalised_dpo_loss(chosen, Tensor(log_rejected), *reference, lengths, lengths)
        loss.backward()
        assert loss.dtype == chosen.grad.dtype == np.float32


# Stability, dtypes, errors.

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("delta, value, slope", [(1000.0, 0.0, 0.0), (-1000.0, 1000.0, -1.0)])
def test_loss_and_gradient_are_finite_at_differences_of_1000(dtype, delta, value, slope):
    arguments = [Tensor(np.array([x], dtype), requires_grad=True) for x in (delta, 0)] + [np.zeros(1, dtype)] * 2
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        plain = dpo_loss(*arguments, beta=1.0)
        plain.backward()
        cdpo = dpo_loss(*arguments, beta=1.0, label_smoothing=0.25)
        robust = robust_dpo_loss(*arguments, beta=1.0, flip_rate=0.25)
    assert plain.dtype == arguments[0].grad.dtype == dtype
    assert_close(plain.data, value, 1e-7)
    assert_close(arguments[0].grad, [slope], 1e-7)
    assert_close(arguments[1].grad, [-slope], 1e-7)
    assert_close(cdpo.data, 0.75 * value + 0.25 * (1000 - value), 1e-6)
    assert_close(robust.data, 1.5 * value - 0.5 * (1000 - value), 1e-6)


def test_the_far_tail_keeps_its_digits():
    arguments = at_delta(30.0)
    loss = dpo_loss(*arguments, beta=1.0)
    loss.backward()
    np.testing.assert_allclose(loss.data, np.log1p(np.exp(-30.0)), rtol=1e-14)
    np.testing.assert_allclose(arguments[0].grad, [-np.exp(-30.0) / (1 + np.exp(-30.0))], rtol=1e-14)


@each_loss
def test_float32_log_probs_take_a_beta_in_numpy_float64(loss):
    """beta may come from a NumPy array, a sweep or a schedule."""
    chosen, rejected, *reference = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    arguments = Tensor(chosen), Tensor(rejected), *reference
    assert_close(loss(*arguments, beta=np.float64(0.5)), loss(*arguments, beta=0.5), 1e-6)


@each_loss
@pytest.mark.parametrize("shapes", [[(0,)] * 4, [(2,), (2,), (2,), (3,)], [(2,), (2,), (1,), (2,)], [(2, 1)] * 4,
                                    [()] * 4])
def test_anything_but_four_arrays_of_sums_raises(loss, shapes):
    with pytest.raises(ValueError, match="log-probs"):
        loss(*(np.zeros(s) for s in shapes))


# Metrics, and two surprises in them.

@given(st.lists(st.tuples(*[st.integers(-3, 0)] * 4), min_size=1, max_size=8))
@example([(-3, -1, -2, -2), (0, -3, -2, -1)])
def test_metrics_against_their_definitions(rows):
    metrics = dpo_metrics(*np.array(rows, np.float64).T, beta=0.5)
    implied = [((c - ref_chosen) / 2, (r - ref_rejected) / 2) for c, r, ref_chosen, ref_rejected in rows]
    expected = {"rewards/chosen": np.mean([c for c, _ in implied]),
                "rewards/rejected": np.mean([r for _, r in implied]),
                "rewards/margins": np.mean([c - r for c, r in implied]),
                "rewards/accuracies": np.mean([c > r for c, r in implied]),
                "rewards/ties": np.mean([c == r for c, r in implied]),
                "logps/chosen": np.mean([row[0] for row in rows]), "logps/rejected": np.mean([row[1] for row in rows])}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert type(metrics[name]) is float
        assert_close(metrics[name], value)


def test_strict_accuracy_is_zero_at_step_0_and_ties_are_one():
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 5))
    metrics = dpo_metrics(chosen, rejected, chosen, rejected)
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/ties"] == 1


def test_the_chosen_log_prob_may_fall_while_the_loss_does():
    """Two responses with log-probs that depend on one parameter, like responses that share most of their tokens.
    Each step lowers the loss and lowers both log-probs, the rejected one faster."""
    theta = Tensor(np.array([1.0]), requires_grad=True)
    reference = np.array([-1.0]), np.array([-2.0])
    losses, implied_rewards = [], []
    for _ in range(5):
        chosen, rejected = theta * -1.0, theta * -2.0
        loss = dpo_loss(chosen, rejected, *reference, beta=1.0)
        losses.append(loss.item())
        implied_rewards.append(dpo_metrics(chosen.data, rejected.data, *reference, beta=1.0)["rewards/chosen"])
        theta.grad = None
        loss.backward()
        theta.data -= theta.grad
    assert (np.diff(losses) < 0).all() and (np.diff(implied_rewards) < 0).all() and implied_rewards[-1] < 0
