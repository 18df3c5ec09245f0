"""Exact, by enumeration: the expected gradient of each form of the KL penalty in kl_in_the_loss.py.

The policy is a Transformer with weights of order 1; every response is listed, so expectations are sums. Samples are
drawn from pi_old; on policy it is pi.
"""

import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import given

from helpers import assert_close, assert_same_gradients, gradient_error, parameter_gradients, rngs
from minilm import ops
from minilm.exact.enumerable import EnumerableWorld, divergence
from minilm.model import Config, Transformer
from minilm.objectives import kl_in_the_loss
from minilm.objectives.kl import k1, k2, k3
from minilm.objectives.kl_in_the_loss import k3_times_mean_ratio, k3_times_ratio

WORLD = EnumerableWorld([[0, 2]], vocab_size=3, max_new_tokens=4)
MASK = WORLD.mask


class Case:
    """Policy, reference and pi_old (None: the policy), with their log-probs of tokens (P,Y,T)."""

    def __init__(self, policy, reference, old=None):
        self.policy = policy
        self.reference_model = reference
        self.reference = WORLD.token_log_probs(reference).data
        self.old = WORLD.token_log_probs(old or policy).data
        self.log_ref, self.log_old = (np.where(MASK > 0, a, 0).sum(axis=-1) for a in (self.reference, self.old))
        self.log_pi = WORLD.log_probs(policy).data

    @property
    def kl(self):
        return divergence(self.log_pi, self.log_ref)[0]

    def expected(self, term):
        """E_old[ grad of the sum over tokens of term(log_probs) ], for a term of tokens, (P,Y,T)."""
        weights = np.exp(self.log_old)[..., None] * MASK
        return parameter_gradients(self.policy, term(WORLD.token_log_probs(self.policy)), weights)

    def true(self):
        """grad KL(pi || pi_ref), in ops alone."""
        log_pi = WORLD.log_probs(self.policy)
        return parameter_gradients(self.policy, ops.sum(ops.exp(log_pi) * (log_pi - self.log_ref)))

    def forms(self):
        """The gradient of each form of the table."""
        T = WORLD.token_log_probs(self.policy).data
        rows = (-1, MASK.shape[-1])

        def mean_ratio(t):
            arrays = (a.reshape(rows) for a in (self.old, self.reference, MASK))
            return k3_times_mean_ratio(t.reshape(rows), *arrays).reshape(MASK.shape)

        constant = np.exp(T - self.old)
        return {"(1)": parameter_gradients(self.policy, k3_times_ratio(WORLD.log_probs(self.policy), self.log_old,
                                                                       self.log_ref), np.exp(self.log_old)),
                "(2)": self.expected(lambda t: k3_times_ratio(t, self.old, self.reference)),
                "(3)": self.expected(lambda t: t * (constant * (T - self.reference))),
                "(4)": self.expected(lambda t: k2(t, self.reference)),
                "(5)": self.expected(lambda t: k3(t, self.reference)),
                "(6)": self.expected(mean_ratio)}


def between(start, end, distance):
    """The model with weights start + distance (end - start)."""
    model, there = start.copy(), end.parameters()
    for name, p in model.parameters().items():
        p.data[...] += distance * (there[name].data - p.data)
    return model


@functools.cache
def models(seed):
    """Three random models. Their logits are ten times those of fresh weights, so the policies are far from uniform."""
    rng = np.random.default_rng(seed)
    config = Config(vocab_size=3, width=8, layers=1, heads=2, context=8)
    drawn = [Transformer(config, rng, np.float64) for _ in range(3)]
    for model in drawn:
        model.parameters()["unembedding"].data *= 10
    return drawn


def case(seed, distance=1.0, off_policy=0.0):
    """A policy at this distance from the reference on the way to another one, and pi_old on the way to a third."""
    there, reference, third = models(seed)
    policy = between(reference, there, distance)
    return Case(policy, reference, between(policy, third, off_policy) if off_policy else None)


def error(actual, expected):
    """|a - e| / |e| over all parameters."""
    a, e = (np.concatenate([side[name].reshape(-1) for name in expected]) for side in (actual, expected))
    return np.linalg.norm(a - e) / np.linalg.norm(e)


def norm(gradient):
    return np.linalg.norm(np.concatenate([g.reshape(-1) for g in gradient.values()]))


def cosine(one, other):
    return sum((one[name] * other[name]).sum() for name in other) / norm(one) / norm(other)


# On policy: the table.

@functools.cache
def at_distance(distance):
    """(case, its forms, the true gradient) of eight pairs."""
    cases = [case(seed, distance) for seed in range(8)]
    return [(c, c.forms(), c.true()) for c in cases]


@pytest.mark.parametrize("column, distance", [*enumerate([0.03, 0.1, 0.3, 1.0])])
def test_the_table_in_the_docstring_is_computed(column, distance):
    """Errors agree to the two digits that are written there."""
    found = at_distance(distance)
    rows = dict(re.findall(r"^    (median KL, in nats|\(1\)|\(2\) \(3\) \(4\)|\(5\)|\(6\)) {4,}([\d.b].*\d)$",
                           kl_in_the_loss.__doc__, re.MULTILINE))
    written = float(rows["median KL, in nats"].split()[column])
    assert written == pytest.approx(np.median([c.kl for c, *_ in found]), 0.15)
    errors = {name: [error(forms[name], true) for _, forms, true in found] for name in found[0][1]}
    assert max(errors["(1)"]) < float(rows["(1)"].split("below")[column + 1])
    for names in ("(2) (3) (4)", "(5)", "(6)"):
        median, largest = map(float, rows[names].split()[2 * column:2 * column + 2])
        for name in names.split():
            assert median == pytest.approx(np.median(errors[name]), 0.05)
            assert largest == pytest.approx(max(errors[name]), 0.05)


def test_a_small_step_down_k3_times_the_token_ratio_can_increase_the_kl():
    """In one of the pairs, its expected gradient has a negative cosine with that of the KL."""
    c, forms, true = min(at_distance(1.0), key=lambda found: cosine(found[1]["(2)"], found[2]))
    cosine_and_kl = re.search(r"8 pairs, ([\d.]+) nats apart, .* has the cosine (-[\d.]+)", kl_in_the_loss.__doc__)
    assert [*map(float, cosine_and_kl.groups())] == pytest.approx([c.kl, cosine(forms["(2)"], true)], abs=0.0051)
    for gradient, falls in ((true, True), (forms["(2)"], False)):
        moved = c.policy.copy()
        for name, p in moved.parameters().items():
            p.data -= 1e-5 * gradient[name]
        assert (divergence(WORLD.log_probs(moved).data, c.log_ref)[0] < c.kl) == falls


def test_the_errors_on_policy_are_proportional_to_the_distance_from_the_reference():
    """So near the reference each form is the gradient of the KL to first order."""
    for seed in range(3):
        near, nearer = (case(seed, distance) for distance in (1e-3, 1e-4))
        for name in ("(2)", "(5)", "(6)"):
            errors = [error(c.forms()[name], c.true()) for c in (near, nearer)]
            assert errors[1] / errors[0] == pytest.approx(0.1, 0.1), name
            assert errors[0] < 0.005


# The expected gradients that the docstring derives.

def of_next_tokens(c, weights, forward=False):
    """grad of the sum over responses and tokens of weights (P,Y) KL_t, in the contexts of the responses.

    KL_t is that of the whole distributions of the next token, or with forward=True the one with pi_ref first.
    """
    reference = ops.log_softmax(c.reference_model(WORLD.tokens)).data[:, :-1]
    log_pi = ops.log_softmax(c.policy(WORLD.tokens))[:, :-1]
    kl = np.exp(reference) * (reference - log_pi) if forward else ops.exp(log_pi) * (log_pi - reference)
    kl = ops.sum(kl, axis=-1)
    return parameter_gradients(c.policy, kl, (weights[..., None] * MASK).reshape(kl.shape))


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_the_forms_of_tokens_have_the_gradients_of_the_next_tokens_kl(seed):
    c = case(seed)
    forms, pi = c.forms(), np.exp(c.log_pi)
    for name in ("(2)", "(3)", "(4)"):
        assert_same_gradients(forms[name], of_next_tokens(c, pi))
    assert_same_gradients(forms["(5)"], of_next_tokens(c, pi, forward=True))


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_the_geometric_mean_adds_to_k3_of_tokens_no_multiple_of_what_it_lacks(seed):
    """(1/|y|) grad log pi(y|x) sum_s k3_s."""
    c = case(seed)
    forms, T = c.forms(), WORLD.token_log_probs(c.policy)
    share = (k3(T.data, c.reference).data * MASK).sum(axis=-1, keepdims=True) / MASK.sum(axis=-1, keepdims=True)
    added = parameter_gradients(c.policy, T, np.exp(c.log_pi)[..., None] * MASK * share)
    assert_same_gradients(forms["(6)"], {name: forms["(5)"][name] + added[name] for name in added})
    true = c.true()
    assert abs(cosine(added, {name: true[name] - forms["(5)"][name] for name in true})) < 0.999


@pytest.mark.parametrize("seed", range(3))
def test_if_all_responses_have_n_tokens_the_geometric_mean_adds_1_over_n_of_what_k3_of_tokens_lacks(seed):
    """A policy without an end: the tokens 1 and 2 alone, 4 of them in each response."""
    policy, reference, _ = models(seed)
    n, responses = 4, np.array([*itertools.product([1, 2], repeat=4)])
    tokens = np.concatenate([np.tile([0, 2], (len(responses), 1)), responses], axis=1)

    def token_log_probs(model):
        log_p = ops.log_softmax(model(tokens)[:, 1:-1, 1:])
        return log_p[np.arange(len(responses))[:, None], np.arange(n), responses - 1]
    T, token_ref = token_log_probs(policy), token_log_probs(reference).data
    pi = np.exp(T.data.sum(axis=1, keepdims=True))
    log_pi = ops.sum(T, axis=1)
    true = parameter_gradients(policy, ops.sum(ops.exp(log_pi) * (log_pi - token_ref.sum(axis=1))))
    of_tokens = parameter_gradients(policy, k3(token_log_probs(policy), token_ref), pi * np.ones(T.shape))
    mean_ratio = k3_times_mean_ratio(token_log_probs(policy), T.data, token_ref, np.ones(T.shape))
    assert pi.sum() == pytest.approx(1) and gradient_error(of_tokens, true) > 0.02
    assert_same_gradients(parameter_gradients(policy, mean_ratio, pi * np.ones(T.shape)),
                          {name: g + (true[name] - g) / n for name, g in of_tokens.items()})


@pytest.mark.parametrize("seed", range(3))
def test_the_two_directions_of_the_next_tokens_kl_agree_to_second_order_and_their_gradients_to_first(seed):
    """The gradients are of the order of the distance, and their difference of its square."""
    differences, sizes = [], []
    for distance in (1e-3, 1e-4):
        c = case(seed, distance)
        one, other = (of_next_tokens(c, np.exp(c.log_pi), forward) for forward in (False, True))
        sizes.append(norm(one))
        differences.append(norm({name: one[name] - other[name] for name in one}))
    assert sizes[1] / sizes[0] == pytest.approx(0.1, 0.1)
    assert differences[1] / differences[0] == pytest.approx(0.01, 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_part_that_is_missing_is_the_effect_on_later_contexts(seed):
    """grad KL = E[sum_t grad KL_t] + E[sum_t grad log pi(y_t) sum_{s > t} k1_s]: the reward-to-go without the token."""
    c = case(seed)
    T = WORLD.token_log_probs(c.policy)
    x = np.where(MASK > 0, T.data - c.reference, 0)
    later = np.flip(np.cumsum(np.flip(x, -1), -1), -1) - x
    second = parameter_gradients(c.policy, T, np.exp(c.log_pi)[..., None] * MASK * later)
    first = of_next_tokens(c, np.exp(c.log_pi))
    assert_same_gradients({name: first[name] + second[name] for name in first}, c.true())
    assert error(first, c.true()) > 0.02


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_the_token_ratio_has_the_gradient_of_the_next_tokens_kl_in_old_contexts(seed):
    c = case(seed, off_policy=0.3)
    forms = c.forms()
    assert_same_gradients(forms["(1)"], c.true())
    for name in ("(2)", "(3)"):
        assert_same_gradients(forms[name], of_next_tokens(c, np.exp(c.log_old)))
    for name in ("(4)", "(5)"):
        assert gradient_error(forms[name], of_next_tokens(c, np.exp(c.log_old), forward=name == "(5)")) > 0.02


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_every_form_of_tokens_is_biased_and_its_error_does_not_vanish_near_the_reference(seed):
    for distance in (1.0, 1e-3):
        c = case(seed, distance, off_policy=0.3)
        forms, true = c.forms(), c.true()
        assert error(forms["(1)"], true) < 1e-10
        assert min(error(forms[name], true) for name in ("(2)", "(3)", "(4)", "(5)", "(6)")) > 0.02


@given(rngs)
def test_the_expected_value_of_k3_times_the_ratio_of_responses_is_the_kl_whoever_draws_them(rng):
    pi, ref, old = (z - np.logaddexp.reduce(z) for z in rng.normal(size=(3, 12)))
    assert_close((np.exp(old) * k3_times_ratio(pi, old, ref).data).sum(), (np.exp(pi) * k1(pi, ref).data).sum())
