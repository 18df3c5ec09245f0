"""The KL estimators and metrics, each against its formula. Their expectations: test_exact_kl.py."""

import numpy as np
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm import Tensor
from minilm.gradcheck import gradcheck
from minilm.objectives.kl import k1, k2, k3, kl_metrics


@given(rngs, st.integers(1, 6))
def test_each_estimator_is_its_formula(rng, B):
    policy, reference = rng.normal(size=(2, B))
    ratio = np.exp(reference) / np.exp(policy)              # Schulman's r = p/q: his p is our reference
    assert_close(k1(policy, reference), -np.log(ratio))
    assert_close(k2(policy, reference), np.log(ratio) ** 2 / 2)
    assert_close(k3(policy, reference), ratio - 1 - np.log(ratio))
    assert (k2(policy, reference).data >= 0).all() and (k3(policy, reference).data >= 0).all()


@given(rngs, st.integers(1, 6))
def test_each_estimator_is_differentiable(rng, B):
    policy, reference = Tensor(rng.normal(size=B), requires_grad=True), rng.normal(size=B)
    for k in (k1, k2, k3):
        gradcheck(lambda p: k(p, reference), policy)


def test_only_k3_overflows_and_only_when_the_policy_is_far_below_the_reference():
    """At log-ratios of 1000 and -1000."""
    policy, reference = np.array([1000.0, -1000.0]), np.zeros(2)
    assert k1(policy, reference).data.tolist() == [1000, -1000]
    assert k2(policy, reference).data.tolist() == [5e5, 5e5]
    with np.errstate(over="ignore"):
        assert k3(policy, reference).data.tolist() == [999, np.inf]


def test_k3_is_never_negative_and_keeps_its_digits_near_0_in_float32():
    x = np.geomspace(1e-6, 1, 1000, dtype=np.float32)
    assert (k3(x, np.zeros(1000, np.float32)).data >= 0).all() and (k3(-x, np.zeros(1000, np.float32)).data >= 0).all()
    policy = Tensor(np.array([1e-5], np.float32), requires_grad=True)
    k3(policy, np.zeros(1, np.float32)).backward()
    assert_close(policy.grad[0] / 1e-5, 1 - 0.5e-5, 1e-6)


# Metrics.

@given(rngs, st.integers(1, 4), st.integers(1, 6), st.integers(0, 4), st.sampled_from(["left", "right"]))
def test_metrics_do_not_depend_on_padding(rng, B, T, amount, side):
    """On either side, and even if it is NaN."""
    policy, reference = rng.normal(size=(2, B, T))
    mask = rng.random((B, T)) < 0.6
    mask[0, 0] = True
    widths = ((0, 0), (amount, 0) if side == "left" else (0, amount))
    poisoned = np.where(mask, policy, np.nan)
    metrics = kl_metrics(np.pad(poisoned, widths, constant_values=np.nan), np.pad(reference, widths),
                         np.pad(mask, widths))
    total = sum(policy[i] - reference[i] for i in np.ndindex(B, T) if mask[i])
    assert metrics.keys() == {"kl_sequence", "kl_token"}
    assert all(type(value) is float for value in metrics.values())
    assert_close(metrics["kl_sequence"], total / B)
    assert_close(metrics["kl_token"], total / mask.sum())


def test_the_two_metrics_differ_by_the_number_of_tokens_in_a_response():
    metrics = kl_metrics(np.zeros((2, 3)), np.array([[-1.0, -1, -1], [1, 9, 9]]), np.array([[1, 1, 1], [1, 0, 0]]))
    assert metrics == {"kl_sequence": (3 - 1) / 2, "kl_token": (3 - 1) / 4}


def test_metrics_of_an_empty_response_are_0():
    assert kl_metrics(np.ones((1, 2)), np.zeros((1, 2)), np.zeros((1, 2))) == {"kl_sequence": 0.0, "kl_token": 0.0}
