"""minilm/objectives/kl_in_the_loss.py against its formulas. Expectations: test_exact_kl_in_the_loss.py."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, normal, rngs
from minilm import Tensor
from minilm.gradcheck import gradcheck
from minilm.objectives.kl import k1, k3
from minilm.objectives.kl_in_the_loss import k3_times_mean_ratio, k3_times_ratio, token_kl_loss

shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))


def sample(rng, shape):
    """Log-probs as a leaf, those of pi_old and of the reference, and a mask whose rows may be empty."""
    return normal(rng, *shape), *rng.normal(size=(2, *shape)), rng.random(shape) < 0.6


def gradient(function, policy, *arguments, weights=1.0):
    leaf = Tensor(np.array(policy), requires_grad=True)
    value = function(leaf, *arguments)
    value.backward(np.broadcast_to(weights, value.shape) * 1.0)
    return value.data, leaf.grad


@given(rngs, shapes)
def test_k3_times_the_ratio_and_its_gradient_are_the_closed_form(rng, shape):
    policy, old, reference, _ = sample(rng, shape)
    value, d = gradient(k3_times_ratio, policy.data, old, reference)
    rho, x = np.exp(policy.data - old), policy.data - reference
    assert_close(value, rho * (np.exp(-x) - 1 + x))
    assert_close(d, rho * x)
    gradcheck(lambda p: k3_times_ratio(p, old, reference), policy)


def test_at_ratio_1_it_has_the_value_of_k3_and_the_gradient_k1(rng):
    policy, _, reference, _ = sample(rng, (3, 4))
    value, d = gradient(k3_times_ratio, policy.data, policy.data, reference)
    assert_close(value, k3(policy.data, reference).data)
    assert_close(d, k1(policy.data, reference).data)


@given(rngs, shapes)
def test_k3_times_the_mean_ratio_and_its_gradient_are_the_closed_form(rng, shape):
    policy, old, reference, mask = sample(rng, shape)
    arrays = [np.where(mask, a, np.nan) for a in (policy.data, old, reference)]
    value, d = gradient(k3_times_mean_ratio, *arrays, mask, weights=mask)
    expected, expected_d = np.zeros(shape), np.zeros(shape)
    for n in range(shape[0]):
        chosen = np.flatnonzero(mask[n])
        if len(chosen):
            x = policy.data[n, chosen] - reference[n, chosen]
            g = np.exp(np.mean(policy.data[n, chosen] - old[n, chosen]))
            expected[n, chosen] = g * (np.exp(-x) - 1 + x)
            expected_d[n, chosen] = g * (1 - np.exp(-x)) + expected[n, chosen].sum() / len(chosen)
    assert_close(value, expected)
    assert_close(d, expected_d)
    gradcheck(lambda p: token_kl_loss(k3_times_mean_ratio(p, old, reference, mask), mask), policy)


@pytest.mark.parametrize("function", [k3_times_ratio, k3_times_mean_ratio])
def test_float32_stays_float32_with_constants_of_float64(function, rng):
    policy, old, reference, mask = sample(rng, (3, 4))
    small = Tensor(policy.data.astype(np.float32), requires_grad=True)
    rest = (mask,) if function is k3_times_mean_ratio else ()
    value = function(small, old.astype(np.float32), reference.astype(np.float32), *rest)
    value.backward(np.ones((3, 4), np.float32))
    assert value.dtype == small.grad.dtype == np.float32
    expected, d = gradient(function, policy.data, old, reference, *rest)
    assert_close(value, expected, 1e-5)
    assert_close(small.grad, d, 1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("apart", [10.0, 49.9, 50.1, 80.0, 100.0, 1000.0])
@pytest.mark.parametrize("function", [k3_times_ratio, k3_times_mean_ratio])
def test_a_sample_that_only_the_policy_gives_little_probability_has_a_finite_term(function, apart, dtype):
    """rho k3 = pi_ref/pi_old - rho (1 - k1), also where rho is 0 in floating point and exp(-k1) infinite."""
    log_probs = [np.array([[x]], dtype) for x in (-1 - apart, -1.5, -1.0)]
    rest = (np.ones((1, 1)),) if function is k3_times_mean_ratio else ()
    with np.errstate(all="raise", under="ignore"):
        value, d = gradient(function, *log_probs, *rest)
    rho = np.exp(np.float64(0.5) - apart)
    tolerance = 1e-10 if dtype == np.float64 else 1e-4
    assert value.dtype == dtype and abs(value.item() - (np.exp(0.5) - rho * (1 + apart))) < tolerance
    assert abs(d.item() + rho * apart) < tolerance


def test_the_mean_ratio_of_several_tokens_is_finite_where_only_its_factors_are_not():
    """g = exp(-800) is 0, and exp(-k1) of the first token exp(801); their product is e."""
    old, k1_of_tokens, mask = np.full((1, 2), -1.0), np.array([[-801.0, 0.5]]), np.ones((1, 2))
    policy = old - 800.0
    value, d = gradient(k3_times_mean_ratio, policy, old, policy - k1_of_tokens, mask)
    assert_close(value, [[np.e, 0.0]])
    assert_close(d, [[np.e / 2 - np.e, np.e / 2]])


@pytest.mark.parametrize("token_mean", [None, "response", "batch", 2.5])
@given(rng=rngs, shape=shapes)
def test_the_terms_are_averaged_as_the_policy_gradient_averages(token_mean, rng, shape):
    terms, _, _, mask = sample(rng, shape)
    N, lengths = shape[0], mask.sum(axis=1)
    divisors = {None: [N] * N, "response": N * lengths.clip(1), "batch": [max(lengths.sum(), 1)] * N,
                2.5: [2.5 * N] * N}[token_mean]
    value, d = gradient(token_kl_loss, np.where(mask, terms.data, np.nan), mask, token_mean)
    assert_close(d, mask / np.array(divisors)[:, None])
    assert_close(value, (np.where(mask, terms.data, 0) / np.array(divisors)[:, None]).sum())


@pytest.mark.filterwarnings("error")
def test_an_empty_response_has_no_kl():
    arrays = np.zeros((3, 2, 3))
    value, d = gradient(lambda p: token_kl_loss(k3_times_mean_ratio(p, *arrays[1:], np.zeros((2, 3))),
                                                np.zeros((2, 3)), "response"), arrays[0])
    assert value == 0 and (d == 0).all()
