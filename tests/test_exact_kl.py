"""Proofs by enumeration: the table of KL estimators. What each is in expectation, and what its gradient is.

The policy is a Transformer over a world whose every response is listed; expectations are sums.

                value          differentiated as a loss        in the reward, without gradient
    k1          KL(pi||ref)    0                               grad KL(pi||ref)
    k2          another        grad KL(pi||ref)
    k3          KL(pi||ref)    grad KL(ref||pi)                grad KL(pi||ref) - grad KL(ref||pi)

of whole responses. Per token and then summed, k3 keeps its value, and k2 and k3 have neither gradient.
"""

import numpy as np
import pytest
from hypothesis import given

from helpers import gradient_error, assert_close, assert_same_gradients, parameter_gradients, rngs, small_transformer
from minilm import Tensor, ops
from minilm.objectives.kl import k1, k2, k3
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss
from minilm.exact.enumerable import EnumerableWorld, divergence
from minilm.exact.expectations import gradient_over_samples

WORLD = EnumerableWorld([[0, 2]], vocab_size=3, max_new_tokens=2)
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def models(rng):
    return small_transformer(rng, vocab_size=3), small_transformer(rng, vocab_size=3)


def log_probs(*of_models):
    return [WORLD.log_probs(model).data for model in of_models]


def expected_gradient(model, loss):
    """sum_y pi(y) grad loss(y), at samples held fixed; loss of log-probs (P,N) -> (P,N)."""
    return parameter_gradients(model, loss(WORLD.log_probs(model)), np.exp(WORLD.log_probs(model).data))


def gradient_of_kl(policy, reference, forward=False):
    """Of KL(pi || ref), or of KL(ref || pi): written in ops, and nothing of kl.py in it."""
    l, ref = WORLD.log_probs(policy), WORLD.log_probs(reference).data
    kl = ops.sum(np.exp(ref) * (ref - l)) if forward else ops.sum(ops.exp(l) * (l - ref))
    return parameter_gradients(policy, kl)


# Values.

def expectations(l, reference):
    return {name: float((np.exp(l) * k(l, reference).data).sum()) for name, k in ESTIMATORS.items()}


@given(rngs)
def test_k1_and_k3_are_the_kl_in_expectation_and_k2_is_not(rng):
    """With the sign reversed, reference for policy, none of them would be."""
    l, reference = log_probs(*models(rng))
    exact, mean = divergence(l, reference)[0], expectations(l, reference)
    assert exact > 0
    assert_close(mean["k1"], exact)
    assert_close(mean["k3"], exact)
    assert abs(mean["k2"] / exact - 1) > 1e-10


def test_the_error_of_k2_is_large_far_from_the_reference_and_small_near_it():
    """Its relative error is of the order of the distance between the two."""
    policy, other = models(np.random.default_rng(0))
    reference, errors = log_probs(policy)[0], []
    start, direction = ({name: p.data.copy() for name, p in model.parameters().items()} for model in (policy, other))
    for distance in (1.0, 1e-2, 1e-3, 1e-4):
        for name, p in policy.parameters().items():
            p.data[...] = start[name] + distance * direction[name]
        l = log_probs(policy)[0]
        errors.append(abs(expectations(l, reference)["k2"] / divergence(l, reference)[0] - 1))
    assert errors[0] > 0.1
    assert_close(np.divide(errors[2:], errors[1:-1]), [0.1, 0.1], 0.2)


@given(rngs)
def test_some_sample_of_k1_is_negative_and_the_kl_never_is(rng):
    """Some sample of k1 always is."""
    l, reference = log_probs(*models(rng))
    assert k1(l, reference).data.min() < 0 < k1(l, reference).data.max()
    assert divergence(l, reference)[0] > 0
    assert divergence(l, l)[0] == 0


# Gradients, differentiated as a loss.

@given(rngs)
def test_k1_as_a_loss_has_expected_gradient_0(rng):
    policy, reference = models(rng)
    d = expected_gradient(policy, lambda l: k1(l, *log_probs(reference)))
    assert max(np.abs(g).max() for g in d.values()) < 1e-13


@given(rngs)
def test_k2_as_a_loss_has_the_gradient_of_the_kl_from_the_reference(rng):
    policy, reference = models(rng)
    assert_same_gradients(expected_gradient(policy, lambda l: k2(l, *log_probs(reference))), gradient_of_kl(policy, reference))


@given(rngs)
def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl(rng):
    """KL(ref || pi), the other direction: an unbiased estimator of a KL whose gradient is not that KL's."""
    policy, reference = models(rng)
    d = expected_gradient(policy, lambda l: k3(l, *log_probs(reference)))
    assert_same_gradients(d, gradient_of_kl(policy, reference, forward=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_of_the_two_kls_are_not_the_same(seed):
    policy, reference = models(np.random.default_rng(seed))
    assert gradient_error(gradient_of_kl(policy, reference, forward=True), gradient_of_kl(policy, reference)) > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_k3_times_the_ratio_as_a_loss_has_the_gradient_of_the_kl(seed):
    """The repair: pi(y)/pi_old(y), 1 in value, brings back the gradient of how y was drawn."""
    policy, reference = models(np.random.default_rng(seed))
    old, = log_probs(policy)
    d = expected_gradient(policy, lambda l: ops.exp(l - old) * k3(l, *log_probs(reference)))
    assert_same_gradients(d, gradient_of_kl(policy, reference))


# Inside the reward, without gradient.

def in_the_reward(policy, penalty):
    """The expected gradient of policy_gradient.py with the penalty (P,N) for its KL, and no other reward."""
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
    """They give that of the KLs of single tokens, in the contexts of pi, whose probability is taken as
    given. KL(pi || ref) depends on pi through these contexts too; KL(ref || pi) is over contexts of ref."""
    policy, reference = models(np.random.default_rng(seed))
    tokens, ref = WORLD.token_log_probs(policy), WORLD.token_log_probs(reference).data
    pi = np.exp(WORLD.log_probs(policy).data)
    d = parameter_gradients(policy, k(tokens, ref), pi[..., None] * WORLD.mask)
    assert gradient_error(d, gradient_of_kl(policy, reference)) > 1e-2
    assert gradient_error(d, gradient_of_kl(policy, reference, forward=True)) > 1e-2
    assert_same_gradients(d, parameter_gradients(policy, kl_of_tokens(policy, reference, forward=k is k3)))


def kl_of_tokens(policy, reference, forward):
    """sum over contexts of their probability, held fixed, times the KL of the next token: a Tensor.

    The contexts are the prompt [0, 2], and the prompt with 1 or 2 behind it (behind 0 nothing comes).
    """
    contexts = np.array([[0, 2, 0], [0, 2, 1], [0, 2, 2]])
    l, ref = (ops.log_softmax(model(contexts)) for model in (policy, reference))
    where = ([0, 1, 2], [1, 2, 2])                          # row, and position: the prompt's own law is row 0's
    l, ref = l[where], ref.data[where]                      # (3,V)
    visits = np.array([1.0, *np.exp(l.data)[0, 1:]])[:, None]
    kl = np.exp(ref) * (ref - l) if forward else ops.exp(l) * (l - ref)
    return ops.sum(visits * kl)


@pytest.mark.parametrize("seed", range(3))
def test_per_token_k3_in_contexts_of_the_reference_has_the_gradient_of_the_forward_kl(seed):
    """So what goes wrong is where the contexts come from. In each, the token is drawn from pi."""
    policy, reference = models(np.random.default_rng(seed))
    visits = np.array([1.0, *np.exp(ops.log_softmax(reference(np.array([[0, 2]]))).data)[0, 1, 1:]])
    contexts, where = np.array([[0, 2, 0], [0, 2, 1], [0, 2, 2]]), ([0, 1, 2], [1, 2, 2])
    l, ref = ops.log_softmax(policy(contexts))[where], ops.log_softmax(reference(contexts)).data[where]
    d = parameter_gradients(policy, k3(l, ref), visits[:, None] * np.exp(l.data))
    assert_same_gradients(d, gradient_of_kl(policy, reference, forward=True))


@given(rngs)
def test_k3_summed_over_tokens_keeps_its_expected_value(rng):
    policy, reference = models(rng)
    tokens, ref = WORLD.token_log_probs(policy).data, WORLD.token_log_probs(reference).data
    pi, exact = np.exp(WORLD.log_probs(policy).data), divergence(*log_probs(policy, reference))[0]
    assert_close((pi[..., None] * WORLD.mask * k3(tokens, ref).data).sum(), exact)


def test_the_sum_of_k1_over_tokens_is_k1_of_the_response():
    """So k1 may be kept per token, as TRL logs it, and summed for the reward."""
    policy, reference = models(np.random.default_rng(0))
    per_token = k1(WORLD.token_log_probs(policy), WORLD.token_log_probs(reference).data).data
    assert_close((per_token * WORLD.mask).sum(axis=-1), k1(Tensor(log_probs(policy)[0]), log_probs(reference)[0]).data)
