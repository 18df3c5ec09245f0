"""The KL estimators, by enumeration: what each is in expectation, and what its gradient is, which is another thing.

Every response of a policy over three tokens is listed, so that each expectation is a sum.
"""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm import Tensor, ops
from minilm.gradcheck import gradcheck, relative_error
from minilm.objectives.kl import k1, k2, k3, kl_metrics
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss

# At most two tokens out of three, 0 being EOS; the logits (3,3) of a token depend on the one before it.
TOKENS = np.array([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])
MASK = np.array([[1, 0], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1]])
CONTEXTS = np.stack([np.zeros(7, int), TOKENS[:, 0]], axis=1)
SHAPE = (3, 3)


def token_log_probs(logits):
    """(responses, T), of a Tensor of logits; masked-out places hold whatever they hold."""
    return ops.log_softmax(logits)[CONTEXTS, TOKENS]


def log_probs(logits):
    """(responses,), of a Tensor of logits."""
    return ops.sum(token_log_probs(logits) * MASK, axis=-1)


def plain_log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def plain_log_probs(z):
    """The same in NumPy, also for complex logits."""
    return (plain_log_softmax(z)[CONTEXTS, TOKENS] * MASK).sum(axis=-1)


def kl(p, q):
    """sum p log(p/q) over responses, from their log-probs."""
    return (np.exp(p) * (p - q)).sum()


def exact_gradient(function, logits):
    """By complex steps: exact to rounding, and nothing of minilm in it."""
    d = np.empty(logits.shape)
    for i in np.ndindex(logits.shape):
        z = logits.astype(complex)
        z[i] += 1e-30j
        d[i] = function(z).imag / 1e-30
    return d


def expected_gradient(loss, logits):
    """sum over responses of pi(y) grad loss(y): the samples are held fixed, the loss (responses,) is not."""
    leaf = Tensor(logits, requires_grad=True)
    loss(leaf).backward(np.exp(plain_log_probs(logits)))
    return leaf.grad


@st.composite
def worlds(draw):
    """Logits of a policy and of a reference, O(1) apart."""
    rng = draw(rngs)
    return rng.normal(size=SHAPE), rng.normal(size=SHAPE)


def test_the_enumeration_is_complete():
    """Twice: their probabilities add up to 1 whatever the logits, and the two ways to write them agree."""
    logits = np.random.default_rng(0).normal(size=SHAPE)
    assert_close(np.exp(plain_log_probs(logits)).sum(), 1.0, 1e-14)
    assert_close(log_probs(Tensor(logits)), plain_log_probs(logits), 1e-14)
    assert_close(exact_gradient(lambda z: np.exp(plain_log_probs(z)).sum(), logits), np.zeros(SHAPE))


# Values.

def expectations(policy, reference):
    return {k.__name__: (np.exp(policy) * k(policy, reference).data).sum() for k in (k1, k2, k3)}


@given(worlds())
def test_k1_and_k3_are_the_kl_in_expectation_and_k2_is_not(world):
    """KL sign reversed: with reference and policy swapped, none of them would be."""
    policy, reference = (plain_log_probs(z) for z in world)
    exact, mean = kl(policy, reference), expectations(policy, reference)
    assert exact > 0
    assert_close(mean["k1"], exact)
    assert_close(mean["k3"], exact)
    assert mean["k2"] != exact


def test_k2_is_off_by_much_far_from_the_reference_and_by_little_near_it():
    """Its relative error is of the order of the distance between the two."""
    logits, direction = np.random.default_rng(0).normal(size=(2, *SHAPE))
    errors = []
    for distance in (1.0, 1e-1, 1e-2, 1e-3):
        policy, reference = plain_log_probs(logits + distance * direction), plain_log_probs(logits)
        errors.append(abs(expectations(policy, reference)["k2"] / kl(policy, reference) - 1))
    assert errors[0] > 0.1
    assert_close(np.divide(errors[2:], errors[1:-1]), [0.1, 0.1], 0.2)


@given(rngs, st.integers(1, 6))
def test_each_estimator_is_its_formula(rng, B):
    policy, reference = rng.normal(size=(2, B))
    ratio = np.exp(reference) / np.exp(policy)              # Schulman's r
    assert_close(k1(policy, reference), -np.log(ratio))
    assert_close(k2(policy, reference), np.log(ratio) ** 2 / 2)
    assert_close(k3(policy, reference), ratio - 1 - np.log(ratio))
    assert (k2(policy, reference).data >= 0).all() and (k3(policy, reference).data >= 0).all()


@given(worlds())
def test_negative_kl(world):
    """A sample of k1 may be negative, and some always is; the exact value never is."""
    policy, reference = (plain_log_probs(z) for z in world)
    assert k1(policy, reference).data.min() < 0 < k1(policy, reference).data.max()
    assert kl(policy, reference) > 0
    assert kl(policy, policy) == 0


@given(rngs, st.integers(1, 6))
def test_each_estimator_is_differentiable(rng, B):
    policy, reference = Tensor(rng.normal(size=B), requires_grad=True), rng.normal(size=B)
    for k in (k1, k2, k3):
        gradcheck(lambda p: k(p, reference), policy)


def test_only_k3_overflows_and_only_when_the_policy_is_far_below_the_reference():
    """Log-ratios of +-1000, as section 5 of the design has it."""
    policy, reference = np.array([1000.0, -1000.0]), np.zeros(2)
    assert k1(policy, reference).data.tolist() == [1000, -1000]
    assert k2(policy, reference).data.tolist() == [5e5, 5e5]
    with np.errstate(over="ignore"):
        assert k3(policy, reference).data.tolist() == [999, np.inf]


# Gradients.

@given(worlds())
def test_k1_as_a_loss_has_no_gradient_in_expectation(world):
    logits, reference = world[0], plain_log_probs(world[1])
    assert_close(expected_gradient(lambda z: k1(log_probs(z), reference), logits), np.zeros(SHAPE))


@given(worlds())
def test_k2_as_a_loss_has_the_gradient_of_the_kl_from_the_reference(world):
    logits, reference = world[0], plain_log_probs(world[1])
    assert_close(expected_gradient(lambda z: k2(log_probs(z), reference), logits),
                 exact_gradient(lambda z: kl(plain_log_probs(z), reference), logits))


@given(worlds())
def test_k3_differentiated_as_a_loss_gives_the_forward_kls_gradient(world):
    """KL(ref || pi), the other direction: an unbiased estimator of a KL whose gradient is not that KL's."""
    logits, reference = world[0], plain_log_probs(world[1])
    d = expected_gradient(lambda z: k3(log_probs(z), reference), logits)
    assert_close(d, exact_gradient(lambda z: kl(reference, plain_log_probs(z)), logits))
    assert relative_error(d, exact_gradient(lambda z: kl(plain_log_probs(z), reference), logits))[0] > 1e-2


@given(worlds(), st.floats(0.1, 3))
def test_k1_inside_the_reward_gives_the_gradient_of_the_kl(world, beta):
    """No reward but -beta k1, through policy_gradient.py: the expected gradient is beta grad KL(pi || ref)."""
    logits, reference = world[0], plain_log_probs(world[1])
    drift = k1(plain_log_probs(logits), reference).data
    A = advantages(np.zeros((len(drift), 1)), drift[:, None], beta, baseline="none")[:, 0]
    leaf, probabilities = Tensor(logits, requires_grad=True), np.exp(plain_log_probs(logits))
    for y, p in enumerate(probabilities):
        policy_gradient_loss(token_log_probs(leaf)[y:y + 1], A[y:y + 1], MASK[y:y + 1]).backward(p)
    assert_close(leaf.grad, beta * exact_gradient(lambda z: kl(plain_log_probs(z), reference), logits))


@pytest.mark.parametrize("k", [k2, k3])
@pytest.mark.parametrize("seed", range(4))
def test_per_token_and_then_summed_k2_and_k3_give_neither_gradient(k, seed):
    """They give that of the KLs of single tokens, in contexts whose probability is taken as given: what
    the first token does to the second one's context is lost."""
    logits, reference = np.random.default_rng(seed).normal(size=(2, *SHAPE))
    ref = plain_log_softmax(reference)
    d = expected_gradient(lambda z: ops.sum(k(token_log_probs(z), ref[CONTEXTS, TOKENS]) * MASK, axis=-1), logits)

    for direction in (lambda z: kl(plain_log_probs(z), plain_log_probs(reference)),
                      lambda z: kl(plain_log_probs(reference), plain_log_probs(z))):
        assert relative_error(d, exact_gradient(direction, logits))[0] > 1e-2

    visits = np.array([1, *np.exp(plain_log_softmax(logits))[0, 1:]])[:, None]      # of each context

    def token_kls(z):
        p, q = (plain_log_softmax(z), ref) if k is k2 else (ref, plain_log_softmax(z))
        return (visits * np.exp(p) * (p - q)).sum()
    assert_close(d, exact_gradient(token_kls, logits))


# Metrics.

@given(rngs, st.integers(1, 4), st.integers(1, 6), st.integers(0, 4), st.sampled_from(["left", "right"]))
def test_metrics_count_pads(rng, B, T, amount, side):
    """They do not, on either side, not even NaN."""
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


def test_all_masked_row_divides_by_zero():
    assert kl_metrics(np.ones((1, 2)), np.zeros((1, 2)), np.zeros((1, 2))) == {"kl_sequence": 0.0, "kl_token": 0.0}
