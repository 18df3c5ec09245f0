"""scripts/lecture/worlds/random_policies.py: the moments of an estimator, exactly."""

import itertools

import numpy as np
import pytest

from helpers import assert_close
from minilm import ops
from minilm.exact.expectations import gradient_over_samples
from minilm.exact.gradients import parameter_gradients
from minilm.objectives.policy_gradient import policy_gradient_loss
from worlds.random_policies import (
    as_vector,
    between,
    cosine,
    gradients_of_samples,
    log_distribution,
    moments,
    random_policies,
    relative_error,
    token_gradients,
    world_of,
)

WORLD = world_of(3)
MASK = WORLD.mask[0]
POLICY, OTHER = random_policies(np.random.default_rng(0), 2)
A = np.random.default_rng(1).normal(size=WORLD.shape[1])


def loss(log_probs):
    return policy_gradient_loss(log_probs, A, MASK) * float(len(A))             # the sum over responses


def samples():
    return gradients_of_samples(loss, WORLD.token_log_probs(POLICY).data[0], token_gradients(WORLD, POLICY))


def test_the_gradients_of_the_tokens_of_a_response_add_up_to_that_of_its_log_prob():
    tokens = token_gradients(WORLD, POLICY)
    assert (tokens[MASK == 0] == 0).all()
    for y in range(WORLD.shape[1]):
        assert_close(tokens[y].sum(axis=0), as_vector(parameter_gradients(POLICY, WORLD.log_probs(POLICY)[0, y])))


def test_the_mean_is_the_expected_gradient_over_samples():
    log_old = log_distribution(WORLD, OTHER)
    T = WORLD.token_log_probs(POLICY)
    expected = gradient_over_samples(lambda leaf, drawn: policy_gradient_loss(leaf, A[drawn[0]], MASK[drawn[0]]),
                                     T.data, WORLD.mask, 1, log_old[None])
    mean, _ = moments(samples(), log_old)
    assert_close(mean, as_vector(parameter_gradients(POLICY, T, expected)))


def test_the_variance_of_the_mean_of_two_samples_is_half_of_it():
    log_old = log_distribution(WORLD, OTHER)
    g, p = samples(), np.exp(log_old)
    mean, deviation = moments(g, log_old)
    pairs = itertools.product(range(len(p)), repeat=2)
    assert_close(sum(p[i] * p[j] * (((g[i] + g[j]) / 2 - mean) ** 2).sum() for i, j in pairs), deviation ** 2 / 2)


def total_variation(a, b):
    return np.abs(np.exp(a) - np.exp(b)).sum() / 2


def test_the_distances_of_the_policies_are_those_of_the_docstring():
    uniform = -MASK.sum(axis=-1) * np.log(3)
    from_uniform, between_two = [], []
    for seed in range(8):
        logs = [log_distribution(WORLD, policy) for policy in random_policies(np.random.default_rng(seed), 3)]
        from_uniform += [total_variation(log, uniform) for log in logs]
        between_two += [total_variation(*pair) for pair in itertools.combinations(logs, 2)]
    found = [f"{of(distances):.2f}" for distances in (from_uniform, between_two) for of in (np.median, min)]
    text = " ".join(random_policies.__doc__.split())
    assert "median {} and the least value {}; between two policies of a seed, {} and {}.".format(*found) in text


def test_a_model_between_two_has_their_weights_at_the_ends():
    for distance, end in ((0.0, POLICY), (1.0, OTHER)):
        found = between(POLICY, OTHER, distance).parameters()
        assert all(np.allclose(found[name].data, p.data) for name, p in end.parameters().items())


def test_error_and_cosine():
    a, e = np.array([3.0, 4.0]), np.array([3.0, 0.0])
    assert_close([relative_error(a, e), cosine(a, e)], [4 / 3, 0.6])


def test_arrays_of_different_responses_are_named():
    with pytest.raises(ValueError, match="gradients_of_samples"):
        gradients_of_samples(ops.sum, np.zeros((2, 3)), np.zeros((3, 3, 5)))
    with pytest.raises(ValueError, match="moments"):
        moments(np.zeros((2, 5)), np.zeros(3))
