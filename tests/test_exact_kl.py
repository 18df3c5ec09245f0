"""Exact, by enumeration: the expected value and the expected gradient of each KL estimator in kl.py.

The policy is a Transformer with weights of order 1; every response is listed, so expectations are sums.

            expected value    expected gradient, as a loss     in the reward, without gradient
    k1      KL(pi || ref)     0                                grad KL(pi || ref)
    k2      no KL             grad KL(pi || ref)
    k3      KL(pi || ref)     grad KL(ref || pi)               grad KL(pi || ref) - grad KL(ref || pi)

This table is for whole responses. Computed per token and then summed over a response, k3 keeps its expected
value, and k2 and k3 have neither gradient.
"""

import numpy as np
import pytest
from hypothesis import given

from helpers import assert_close, assert_same_gradients, gradient_error, parameter_gradients, rngs, small_transformer
from minilm import Tensor, ops
from minilm.exact.enumerable import EnumerableWorld, divergence
from minilm.exact.expectations import gradient_over_samples
from minilm.objectives.kl import k1, k2, k3
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss

WORLD = EnumerableWorld([[0, 2]], vocab_size=3, max_new_tokens=2)
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def models(rng):
    return small_transformer(rng, vocab_size=3), small_transformer(rng, vocab_size=3)


def log_probs(*of_models):
    return [WORLD.log_probs(model).data for model in of_models]


def expected_gradient(model, loss):
    """sum_y pi(y) grad loss(y), with the samples held fixed; loss maps log_pi (P,Y) to (P,Y)."""
    return parameter_gradients(model, loss(WORLD.log_probs(model)), np.exp(WORLD.log_probs(model).data))


def gradient_of_kl(policy, reference, forward=False):
    """The gradient of KL(pi || ref), or with forward=True of KL(ref || pi), written in ops without kl.py."""
    log_pi, ref = WORLD.log_probs(policy), WORLD.log_probs(reference).data
    kl = ops.sum(np.exp(ref) * (ref - log_pi)) if forward else ops.sum(ops.exp(log_pi) * (log_pi - ref))
    return parameter_gradients(policy, kl)


# Values.

def expectations(log_pi, reference):
    return {name: float((np.exp(log_pi) * k(log_pi, reference).data).sum()) for name, k in ESTIMATORS.items()}


@given(rngs)
def test_k1_and_k3_are_the_kl_in_expectation_and_k2_is_not(rng):
    log_pi, reference = log_probs(*models(rng))
    exact, mean = divergence(log_pi, reference)[0], expectations(log_pi, reference)
    assert exact > 0
    assert_close(mean["k1"], exact)
    assert_close(mean["k3"], exact)
    assert abs(mean["k2"] / exact - 1) > 1e-10


def test_the_error_of_k2_is_large_far_from_the_reference_and_small_near_it():
    """Its relative error is proportional to the distance between policy and reference."""
    policy, other = models(np.random.default_rng(0))
    reference, errors = log_probs(policy)[0], []
    start, direction = ({name: p.data.copy() for name, p in model.parameters().items()} for model in (policy, other))
    for distance in (1.0, 1e-2, 1e-3, 1e-4):
        for name, p in policy.parameters().items():
            p.data[...] = start[name] + distance * direction[name]
        log_pi = log_probs(policy)[0]
        errors.append(abs(expectations(log_pi, reference)["k2"] / divergence(log_pi, reference)[0] - 1))
    assert errors[0] > 0.1
    assert_close(np.divide(errors[2:], errors[1:-1]), [0.1, 0.1], 0.2)


@given(rngs)
def test_some_sample_of_k1_is_negative_and_the_kl_never_is(rng):
    log_pi, reference = log_probs(*models(rng))
    assert k1(log_pi, reference).data.min() < 0 < k1(log_pi, reference).data.max()
    assert divergence(log_pi, reference)[0] > 0
    assert divergence(log_pi, log_pi)[0] == 0


# Gradients, differentiated as a loss.

@given(rngs)
def test_k1_as_a_loss_has_expected_gradient_0(rng):
    policy, reference = models(rng)
    d = expected_gradient(policy, lambda log_pi: k1(log_pi, *log_probs(reference)))
    assert max(np.abs(g).max() for g in d.values()) < 1e-13


@given(rngs)
def test_k2_as_a_loss_has_the_gradient_of_the_kl_from_the_reference(rng):
    policy, reference = models(rng)
    d = expected_gradient(policy, lambda log_pi: k2(log_pi, *log_probs(reference)))
    assert_same_gradients(d, gradient_of_kl(policy, reference))


@given(rngs)
def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(rng):
    """KL(ref || pi): k3 is an unbiased estimate of KL(pi || ref), but its gradient is not."""
    policy, reference = models(rng)
    d = expected_gradient(policy, lambda log_pi: k3(log_pi, *log_probs(reference)))
    assert_same_gradients(d, gradient_of_kl(policy, reference, forward=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_of_the_two_kls_are_not_the_same(seed):
    policy, reference = models(np.random.default_rng(seed))
    assert gradient_error(gradient_of_kl(policy, reference, forward=True), gradient_of_kl(policy, reference)) > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_k3_times_the_ratio_as_a_loss_has_the_gradient_of_the_kl(seed):
    """The ratio pi(y)/pi_old(y) has value 1; its gradient adds the dependence of the samples on pi."""
    policy, reference = models(np.random.default_rng(seed))
    old, = log_probs(policy)
    d = expected_gradient(policy, lambda log_pi: ops.exp(log_pi - old) * k3(log_pi, *log_probs(reference)))
    assert_same_gradients(d, gradient_of_kl(policy, reference))


# Inside the reward, without gradient.

def in_the_reward(policy, penalty):
    """The expected gradient of policy_gradient.py with the penalty (P,Y) as KL, and rewards of 0."""
    def loss(leaf, drawn):
        A = advantages(np.zeros((1, 1)), penalty[[0], drawn[0]][None], beta=1.0, baseline="none")[0]
        return policy_gradient_loss(leaf, A, WORLD.mask[0, drawn[0]])
    tokens = WORLD.token_log_probs(policy)
    return parameter_gradients(policy, tokens, gradient_over_samples(loss, tokens.data, WORLD.mask, samples=1))


@given(rngs)
def test_k1_inside_the_reward_gives_the_gradient_of_the_kl(rng):
    policy, reference = models(rng)
    penalty = k1(*log_probs(policy, reference)).data
    assert_same_gradients(in_the_reward(policy, penalty), gradient_of_kl(policy, reference))


@pytest.mark.parametrize("seed", range(3))
def test_k3_inside_the_reward_gives_the_difference_of_two_gradients(seed):
    """E[k3 grad log pi] = E[(k1 + ref/pi) grad log pi] = grad KL(pi || ref) - grad KL(ref || pi)."""
    policy, reference = models(np.random.default_rng(seed))
    d = in_the_reward(policy, k3(*log_probs(policy, reference)).data)
    backward, forward = gradient_of_kl(policy, reference), gradient_of_kl(policy, reference, forward=True)
    assert_same_gradients(d, {name: backward[name] - forward[name] for name in backward})
    assert gradient_error(d, backward) > 1e-2


# Per token, and then summed.

@pytest.mark.parametrize("k", [k2, k3])
@pytest.mark.parametrize("seed", range(4))
def test_k2_and_k3_summed_over_tokens_have_neither_gradient(k, seed):
    """They have the gradient of the KLs of single tokens, averaged over contexts drawn from pi, with fixed
    probabilities. KL(pi || ref) also depends on pi through the contexts; KL(ref || pi) averages over those of ref."""
    policy, reference = models(np.random.default_rng(seed))
    tokens, ref = WORLD.token_log_probs(policy), WORLD.token_log_probs(reference).data
    pi = np.exp(WORLD.log_probs(policy).data)
    d = parameter_gradients(policy, k(tokens, ref), pi[..., None] * WORLD.mask)
    assert gradient_error(d, gradient_of_kl(policy, reference)) > 1e-2
    assert gradient_error(d, gradient_of_kl(policy, reference, forward=True)) > 1e-2
    assert_same_gradients(d, parameter_gradients(policy, kl_of_tokens(policy, reference, forward=k is k3)))


def kl_of_tokens(policy, reference, forward):
    """The sum over contexts of their fixed probability times the KL of the next token: a Tensor.

    The contexts are the prompt [0, 2], and the prompt followed by 1 or 2 (0 ends the response).
    """
    contexts = np.array([[0, 2, 0], [0, 2, 1], [0, 2, 2]])
    log_pi, ref = (ops.log_softmax(model(contexts)) for model in (policy, reference))
    where = ([0, 1, 2], [1, 2, 2])                          # row and position: row 0 ends with the prompt
    log_pi, ref = log_pi[where], ref.data[where]                      # (3,V)
    visits = np.array([1.0, *np.exp(log_pi.data)[0, 1:]])[:, None]
    kl = np.exp(ref) * (ref - log_pi) if forward else ops.exp(log_pi) * (log_pi - ref)
    return ops.sum(visits * kl)


@pytest.mark.parametrize("seed", range(3))
def test_per_token_k3_in_contexts_of_the_reference_has_the_gradient_of_the_forward_kl(seed):
    """So the contexts make the difference. The token in each context is drawn from pi."""
    policy, reference = models(np.random.default_rng(seed))
    visits = np.array([1.0, *np.exp(ops.log_softmax(reference(np.array([[0, 2]]))).data)[0, 1, 1:]])
    contexts, where = np.array([[0, 2, 0], [0, 2, 1], [0, 2, 2]]), ([0, 1, 2], [1, 2, 2])
    log_pi, ref = ops.log_softmax(policy(contexts))[where], ops.log_softmax(reference(contexts)).data[where]
    d = parameter_gradients(policy, k3(log_pi, ref), visits[:, None] * np.exp(log_pi.data))
    assert_same_gradients(d, gradient_of_kl(policy, reference, forward=True))


@given(rngs)
def test_k3_summed_over_tokens_keeps_its_expected_value(rng):
    policy, reference = models(rng)
    tokens, ref = WORLD.token_log_probs(policy).data, WORLD.token_log_probs(reference).data
    pi, exact = np.exp(WORLD.log_probs(policy).data), divergence(*log_probs(policy, reference))[0]
    assert_close((pi[..., None] * WORLD.mask * k3(tokens, ref).data).sum(), exact)


def test_the_sum_of_k1_over_tokens_is_k1_of_the_response():
    """So k1 can be stored per token, as TRL logs it, and summed for the reward."""
    policy, reference = models(np.random.default_rng(0))
    per_token = k1(WORLD.token_log_probs(policy), WORLD.token_log_probs(reference).data).data
    assert_close((per_token * WORLD.mask).sum(axis=-1), k1(Tensor(log_probs(policy)[0]), log_probs(reference)[0]).data)
