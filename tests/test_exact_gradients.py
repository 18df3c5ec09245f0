"""minilm/exact/gradients.py: an estimator's expected gradient against the exact one, at weights of order 1."""

import re

import numpy as np
import pytest

from helpers import assert_close
from minilm import ops
from minilm.exact import gradients
from minilm.exact.enumerable import EnumerableWorld
from minilm.exact.gradients import compare_gradients, compare_with_exact_gradient, parameter_gradients, redraw_weights
from minilm.model import Config, Transformer
from minilm.objectives.kl import k2, k3
from minilm.optim import AdamW

WORLD = EnumerableWorld([[0, 2]], vocab_size=4, max_new_tokens=3)
SMALL = EnumerableWorld([[0, 2]], vocab_size=3, max_new_tokens=2)


def policy_and_reference(seed, world=WORLD, order_1=True):
    rng = np.random.default_rng(seed)
    config = Config(vocab_size=world.vocab_size, width=8, layers=1, heads=2, context=8)
    models = [Transformer(config, rng, np.float64) for _ in range(2)]
    return [redraw_weights(model, rng) for model in models] if order_1 else models


def kl_from(reference, world=WORLD):
    """KL(pi || pi_ref), whose gradient the losses below should have."""
    log_ref = world.log_probs(reference).data
    return lambda log_pi: ops.sum(ops.exp(log_pi) * (log_pi - log_ref))


def per_token(estimator, reference, world=WORLD):
    """The estimator of each token, summed over the response."""
    log_ref = world.token_log_probs(reference).data

    def loss(log_probs, drawn):
        selected = world.take(world.mask, drawn) > 0
        return ops.sum(ops.where(selected, estimator(log_probs, world.take(log_ref, drawn)), 0.0))
    return loss


def of_responses(estimator, reference, world=WORLD, factor=1.0):
    log_ref = world.log_probs(reference).data

    def loss(log_probs, drawn):
        log_pi = ops.sum(ops.where(world.take(world.mask, drawn) > 0, log_probs, 0.0), axis=-1)
        return ops.mean(estimator(log_pi, world.take(log_ref, drawn))) * factor
    return loss


def compare(seed, loss, order_1=True, world=WORLD, **options):
    policy, reference = policy_and_reference(seed, world, order_1)
    return compare_with_exact_gradient(loss(reference), kl_from(reference, world), world, policy, **options)


# The comparison finds right losses right, and wrong ones wrong.

@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_k2_of_responses_has_the_gradient_of_the_kl(seed, samples):
    shapes = set()

    def recorded(reference):
        loss = of_responses(k2, reference, SMALL)

        def with_shape(log_probs, drawn):
            shapes.add(drawn.shape)
            return loss(log_probs, drawn)
        return with_shape

    found = compare(seed, recorded, world=SMALL, samples=samples)
    assert shapes == {(1, samples)}
    assert_close([found.cosine, found.ratio], [1.0, 1.0])
    assert found.relative_error < 1e-10


def test_a_factor_changes_the_ratio_and_not_the_cosine():
    found = compare(0, lambda ref: of_responses(k2, ref, factor=-0.5))
    assert_close([found.cosine, found.ratio, found.relative_error], [-1.0, 0.5, 1.5])


@pytest.mark.filterwarnings("ignore:the policy is near uniform")
@pytest.mark.parametrize("weights", ["fresh", "of order 1"])
def test_the_table_of_per_token_k3_in_the_docstring_is_computed(weights):
    """With fresh weights a wrong gradient looks right; at order 1 it does not."""
    found = [compare(seed, lambda ref: per_token(k3, ref), weights == "of order 1") for seed in range(4)]
    row, = re.findall(rf"^    {weights} +(\d.*)$", gradients.__doc__, re.MULTILINE)
    numbers = [float(word) for word in row.split()[:8]]
    assert np.abs(np.subtract(numbers[:4], [c.cosine for c in found])).max() < 0.00051
    assert np.abs(np.subtract(numbers[4:], [c.ratio for c in found])).max() < 0.0051
    looks_right = [c.cosine > 0.99 and 0.95 < c.ratio < 1.05 for c in found]
    assert all(looks_right) if weights == "fresh" else not all(looks_right)


def test_per_token_k3_is_wrong_in_a_parameter_that_is_named():
    policy, reference = policy_and_reference(0)
    found = compare(0, lambda ref: per_token(k3, ref))
    assert found.relative_error > 1 and found.worst in policy.parameters()


# The warning.

def test_a_policy_of_order_1_gives_no_warning(recwarn):
    compare(0, lambda ref: per_token(k3, ref))
    assert not recwarn.list


def test_the_warning_says_what_to_do():
    with pytest.warns(UserWarning, match=r"total variation 0\.0\d+, .*redraw_weights\(policy, rng\)"):
        compare(0, lambda ref: of_responses(k2, ref), order_1=False)


# The parts.

def test_redrawn_weights_are_of_order_1_norms_included_and_the_policy_is_far_from_uniform():
    policy, _ = policy_and_reference(0)
    for name, p in policy.parameters().items():
        assert 0.2 < np.abs(p.data).mean() < 1.2, name
    log_pi = WORLD.log_probs(policy).data[0]
    assert np.exp(log_pi).max() > 2 * np.exp(log_pi).mean()


def test_parameter_gradients_are_copies_that_an_optimisers_next_backward_does_not_change():
    policy, _ = policy_and_reference(0)
    AdamW(policy.parameters())
    first = parameter_gradients(policy, ops.sum(WORLD.log_probs(policy)))
    kept = {name: g.copy() for name, g in first.items()}
    parameter_gradients(policy, ops.sum(WORLD.log_probs(policy)) * 2.0)
    for name, gradient in first.items():
        np.testing.assert_array_equal(gradient, kept[name])


def test_the_comparison_is_its_definition():
    actual = {"a": np.array([1.0, 2.0]), "b": np.array([[3.0]])}
    expected = {"a": np.array([1.0, 0.0]), "b": np.array([[4.0]])}
    found = compare_gradients(actual, expected)
    assert_close([found.cosine, found.ratio], [13 / (14 * 17) ** 0.5, (14 / 17) ** 0.5])
    assert (found.relative_error, found.worst) == (0.5, "a")
    assert compare_gradients({"a": np.zeros(2)}, {"a": np.ones(2)}).cosine == 0


@pytest.mark.parametrize("actual, expected, message", [
    ({"a": np.ones(1)}, {"b": np.ones(1)}, "one side has no gradient for a, b"),
    ({"a": None}, {"a": np.ones(1)}, "one side has no gradient for a"),
    ({"a": np.ones(1)}, {"a": np.zeros(1)}, "expected gradient is 0")])
def test_gradients_that_cannot_be_compared_raise(actual, expected, message):
    with pytest.raises(ValueError, match=message):
        compare_gradients(actual, expected)
