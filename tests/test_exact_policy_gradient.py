"""Exact, by enumeration: the expected gradient of the sampled policy gradient, against the gradient of J.

The policy is a Transformer with weights of order 1. The gradient of the estimator is summed over all groups of
responses that can be drawn, each with its probability, and backpropagated to all parameters. The exact gradient
is that of J itself.
"""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helpers import assert_same_gradients, gradient_error, parameter_gradients, rngs, small_transformer
from minilm.exact.enumerable import EnumerableWorld, objective, objective_gradient
from minilm.exact.expectations import gradient_over_samples
from minilm.model import Transformer
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, ppo_clip_loss, reward_to_go

TWO_PROMPTS, ONE_PROMPT = [[1], [0, 2]], [[0, 2]]


@dataclasses.dataclass
class Problem:
    """The problem of maximising J with a policy, all of whose responses are listed."""

    world: EnumerableWorld
    policy: Transformer
    reference: np.ndarray       # log-probs of the tokens, (P,Y,T)
    rewards: np.ndarray         # (P,Y)
    beta: float
    temperature: float = 1.0

    def token_log_probs(self):
        return self.world.token_log_probs(self.policy, self.temperature)

    def summed(self, token_log_probs):
        return np.where(self.world.mask > 0, token_log_probs, 0).sum(axis=-1)

    @functools.cached_property
    def token_kl(self):
        return self.token_log_probs().data - self.reference

    def exact_gradient(self):
        """The gradient of -J, the mean over prompts."""
        log_pi = self.world.log_probs(self.policy, self.temperature)
        d = objective_gradient(log_pi.data, self.summed(self.reference), self.rewards, self.beta)
        return parameter_gradients(self.policy, log_pi, -d / len(d))

    def expected_gradient(self, loss, K, drawn_from=None):
        """The expectation over draws of the gradient of loss(log_probs (P*K,T), prompts, drawn, mask (P*K,T))."""
        prompts = np.arange(len(self.rewards))[:, None]

        def of_draw(log_probs, drawn):
            return loss(log_probs, prompts, drawn, self.world.mask[prompts, drawn].reshape(log_probs.shape))
        log_probs = self.token_log_probs()
        return parameter_gradients(self.policy, log_probs, gradient_over_samples(
            of_draw, log_probs.data, self.world.mask, K, drawn_from))

    def advantages(self, prompts, drawn, baseline):
        return advantages(self.rewards[prompts, drawn], self.summed(self.token_kl)[prompts, drawn],
                          self.beta, baseline).reshape(-1)

    def estimator(self, baseline):
        def loss(log_probs, prompts, drawn, mask):
            return policy_gradient_loss(log_probs, self.advantages(prompts, drawn, baseline), mask)
        return loss

    def estimator_to_go(self, baseline, kl_ahead=False):
        """kl_ahead: the KL of the token itself is left out."""
        def loss(log_probs, prompts, drawn, mask):
            token_kl = self.token_kl[prompts, drawn]
            A = reward_to_go(self.rewards[prompts, drawn], token_kl, self.world.mask[prompts, drawn], self.beta,
                             baseline)
            A = A + self.beta * token_kl if kl_ahead else A
            return policy_gradient_loss(log_probs, A.reshape(log_probs.shape), mask)
        return loss

    def clipped(self, old, baseline, level, epsilon=0.2):
        """PPO; old: log-probs of the tokens (P,Y,T) under the policy that draws the samples."""
        def loss(log_probs, prompts, drawn, mask):
            return ppo_clip_loss(log_probs, old[prompts, drawn].reshape(log_probs.shape),
                                 self.advantages(prompts, drawn, baseline), mask, epsilon, level)
        return loss


def problem(seed, prompts=ONE_PROMPT, beta=0.5, temperature=1.0):
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    world = EnumerableWorld(prompts, vocab_size=3, max_new_tokens=2)
    policy, reference = (small_transformer(rng, vocab_size=3) for _ in range(2))
    return Problem(world, policy, world.token_log_probs(reference, temperature).data, rng.normal(size=world.shape),
                   beta, temperature)


# On policy.

@settings(max_examples=6)
@given(rngs, st.floats(0, 2), st.integers(1, 2), st.sampled_from([ONE_PROMPT, TWO_PROMPTS]))
def test_without_a_baseline_the_expected_estimator_is_the_exact_gradient(rng, beta, K, prompts):
    p = problem(rng, prompts, beta)
    assert_same_gradients(p.expected_gradient(p.estimator("none"), 1 if len(prompts) > 1 else K), p.exact_gradient())


@pytest.mark.parametrize("K, prompts", [(2, ONE_PROMPT), (3, ONE_PROMPT), (2, TWO_PROMPTS)])
@pytest.mark.parametrize("seed", range(2))
def test_with_leave_one_out_the_expected_estimator_is_the_exact_gradient(seed, K, prompts):
    p = problem(seed, prompts)
    assert_same_gradients(p.expected_gradient(p.estimator("leave_one_out"), K), p.exact_gradient())


@pytest.mark.parametrize("K, prompts", [(2, ONE_PROMPT), (3, ONE_PROMPT), (2, TWO_PROMPTS)])
@pytest.mark.parametrize("seed", range(2))
def test_with_the_mean_the_expected_estimator_is_1_minus_1_over_K_of_the_exact_gradient(seed, K, prompts):
    p = problem(seed, prompts)
    assert_same_gradients(p.expected_gradient(p.estimator("mean"), K), p.exact_gradient(), factor=1 - 1 / K)


@pytest.mark.parametrize("K, prompts", [(2, ONE_PROMPT), (3, ONE_PROMPT), (2, TWO_PROMPTS)])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_group_normalisation_changes_the_direction_of_the_expected_gradient(beta, seed, K, prompts):
    """No multiple of the exact gradient is near it. (GRPO has beta = 0 here, and its KL in the loss.)"""
    p = problem(seed, prompts, beta)
    exact, group = p.exact_gradient(), p.expected_gradient(p.estimator("group"), K)
    scale = sum((group[name] * g).sum() for name, g in exact.items()) / sum((g * g).sum() for g in exact.values())
    assert gradient_error(group, {name: scale * g for name, g in exact.items()}) > 0.02


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_is_exact_if_samples_are_scored_at_the_temperature_they_are_drawn_at(temperature):
    """J is that of the policy at this temperature: draws, log-ratio and KL are all computed at it."""
    p = problem(5, temperature=temperature)
    assert_same_gradients(p.expected_gradient(p.estimator("leave_one_out"), 2), p.exact_gradient())
    scored_at_1 = problem(5)                                # the same models, and the same draws
    drawn_from = p.world.log_probs(p.policy, temperature).data
    wrong = scored_at_1.expected_gradient(scored_at_1.estimator("leave_one_out"), 2, drawn_from)
    assert gradient_error(wrong, p.exact_gradient()) > 0.02


@pytest.mark.parametrize("baseline, K, factor", [("none", 1, 1), ("leave_one_out", 2, 1), ("mean", 2, 1 / 2)])
def test_reward_to_go_has_the_exact_gradient_in_expectation(baseline, K, factor):
    p = problem(4, beta=0.8)
    assert_same_gradients(p.expected_gradient(p.estimator_to_go(baseline), K), p.exact_gradient(), factor)


def test_reward_to_go_without_the_kl_of_the_token_itself_is_biased():
    """So the test above notices this error: the KL of token t depends on token t."""
    p = problem(4, beta=0.8)
    wrong = p.expected_gradient(p.estimator_to_go("none", kl_ahead=True), 1)
    assert gradient_error(wrong, p.exact_gradient()) > 0.02


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("baseline, K, factor", [("none", 1, 1), ("leave_one_out", 2, 1), ("mean", 2, 1 / 2)])
def test_ppos_clip_at_ratio_1_has_the_exact_gradient_in_expectation(baseline, K, factor, level):
    p = problem(6)
    loss = p.clipped(p.token_log_probs().data, baseline, level)
    assert_same_gradients(p.expected_gradient(loss, K), p.exact_gradient(), factor)


@given(rngs)
def test_with_no_reward_a_step_along_the_expected_estimator_lowers_the_exact_kl(rng):
    p = problem(rng, beta=1.0)
    p.rewards[:] = 0

    def kl():
        return -objective(p.world.log_probs(p.policy).data, p.summed(p.reference), p.rewards, 1.0)
    before = kl()
    for name, gradient in p.expected_gradient(p.estimator("leave_one_out"), 2).items():
        p.policy.parameters()[name].data -= 1e-4 * gradient
    assert kl() < before


# Off policy.

@pytest.mark.parametrize("seed", range(2))
def test_off_policy_the_sequence_ratio_corrects_for_old_samples_and_the_token_ratio_does_not(seed):
    """Without clipping, with samples from another policy: E_old[rho(y) R(y) grad log pi(y)] = grad J."""
    p = problem(seed)
    old = p.world.token_log_probs(small_transformer(np.random.default_rng(seed + 10), vocab_size=3)).data

    def gradient(level):
        return p.expected_gradient(p.clipped(old, "none", level, epsilon=1e9), 1, p.summed(old))
    assert_same_gradients(gradient("sequence"), p.exact_gradient())
    assert gradient_error(gradient("token"), p.exact_gradient()) > 0.02
