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

from helpers import assert_close, assert_same_gradients, gradient_error, parameter_gradients, rngs, small_transformer
from minilm import Tensor
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

    def estimator(self, baseline, token_mean=None):
        def loss(log_probs, prompts, drawn, mask):
            return policy_gradient_loss(log_probs, self.advantages(prompts, drawn, baseline), mask, token_mean)
        return loss

    def lengths(self):
        """|y| of each response, (P,Y)."""
        return self.world.mask.sum(axis=-1)

    def gradient_of_mean(self, values):
        """The gradient of minus the expectation of fixed values (P,Y), the mean over prompts."""
        log_pi = self.world.log_probs(self.policy, self.temperature)
        return parameter_gradients(self.policy, log_pi, -np.exp(log_pi.data) * values / len(values))

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


def problem(seed, prompts=ONE_PROMPT, beta=0.5, temperature=1.0, one_token=False):
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    world = EnumerableWorld(prompts, vocab_size=3, max_new_tokens=1 if one_token else 2)
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


# Means over tokens.

def error(actual, expected):
    """|a - c e| / |c e| of the multiple c of e that is nearest to a."""
    c = sum((actual[name] * e).sum() for name, e in expected.items()) / sum((e * e).sum() for e in expected.values())
    return gradient_error(actual, {name: c * e for name, e in expected.items()})


@pytest.mark.parametrize("prompts", [ONE_PROMPT, TWO_PROMPTS])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_a_constant_length_leaves_the_direction_of_the_exact_gradient(baseline, prompts):
    """Dr. GRPO: the mean baseline and a constant, together (1 - 1/K) / C of the exact gradient."""
    p = problem(7, prompts)
    factor = {"leave_one_out": 1, "mean": 1 / 2}[baseline] / 5
    assert_same_gradients(p.expected_gradient(p.estimator(baseline, 5), 2), p.exact_gradient(), factor)


@pytest.mark.parametrize("seed", range(2))
def test_the_mean_of_each_response_has_the_gradient_of_the_reward_per_token(seed):
    """Without a baseline, of E[R / |y|]; with the leave-one-out baseline, of E[(R - J) / |y|]; R and J fixed."""
    p = problem(seed, TWO_PROMPTS)
    log_pi = p.world.log_probs(p.policy).data
    R = p.rewards - p.beta * p.summed(p.token_kl)
    J = (np.exp(log_pi) * R).sum(axis=1, keepdims=True)
    for baseline, K, values in (("none", 1, R), ("leave_one_out", 2, R - J)):
        found = p.expected_gradient(p.estimator(baseline, "response"), K)
        assert_same_gradients(found, p.gradient_of_mean(values / p.lengths()))
        assert error(found, p.exact_gradient()) > 0.02


@pytest.mark.parametrize("reward", [-1.0, 1.0])
def test_the_mean_of_each_response_makes_responses_longer_if_all_rewards_are_negative_and_shorter_if_positive(reward):
    """The exact gradient is 0, because all rewards are equal. To first order a step along the expected gradient of the
    loss changes E[1/|y|] by the inner product of the two gradients."""
    p = problem(8, beta=0.0)
    p.rewards[:] = reward
    assert max(np.abs(g).max() for g in p.expected_gradient(p.estimator("none"), 1).values()) < 1e-12
    found = p.expected_gradient(p.estimator("none", "response"), 1)
    inverse_length = p.gradient_of_mean(1 / p.lengths())            # of -E[1/|y|], as found is of minus the objective
    assert_same_gradients(found, inverse_length, reward)
    before = (np.exp(p.world.log_probs(p.policy).data) * p.lengths()).sum()
    for name, gradient in found.items():
        p.policy.parameters()[name].data -= 1e-3 * gradient
    after = (np.exp(p.world.log_probs(p.policy).data) * p.lengths()).sum()
    assert (after > before) == (reward < 0)


def test_a_longer_response_below_the_average_loses_less_than_a_shorter_one():
    """A = -1 for both: the gradient in each token of the longer response is smaller, under "response" alone."""
    mask = np.arange(4) < np.array([[1], [4]])
    for mean, ratio in ((None, 1), ("batch", 1), (8, 1), ("response", 4)):
        leaf = Tensor(np.full((2, 4), -1.0), requires_grad=True)
        policy_gradient_loss(leaf, np.full(2, -1.0), mask, mean).backward()
        assert leaf.grad[0, 0] > 0
        assert_close(leaf.grad[0, 0], ratio * leaf.grad[1, 0])


def test_the_bias_of_the_mean_over_a_batch_falls_with_the_number_of_samples_and_that_of_each_response_does_not():
    """With one sample both are the same; the sum has no bias."""
    p = problem(3)
    exact = p.exact_gradient()
    biases = {mean: [error(p.expected_gradient(p.estimator("none", mean), K), exact) for K in (1, 2, 4)]
              for mean in (None, "batch", "response")}
    assert max(biases[None]) < 1e-10
    assert_close(biases["batch"][0], biases["response"][0])
    assert biases["batch"][0] > 1.5 * biases["batch"][1] > 1.5 ** 2 * biases["batch"][2] > 0.01
    assert_close(biases["response"], [biases["response"][0]] * 3)


# Off policy.

@pytest.mark.parametrize("seed", range(2))
def test_off_policy_the_sequence_ratio_corrects_for_old_samples_and_the_token_ratio_does_not(seed):
    """Without clipping, with samples from another policy: E_old[rho(y) R(y) grad log pi(y)] = grad J. The geometric
    mean of the token ratios does not correct either."""
    p = problem(seed)
    old = p.world.token_log_probs(small_transformer(np.random.default_rng(seed + 10), vocab_size=3)).data

    def gradient(level):
        return p.expected_gradient(p.clipped(old, "none", level, epsilon=1e9), 1, p.summed(old))
    assert_same_gradients(gradient("sequence"), p.exact_gradient())
    for level in ("token", "geometric_mean"):
        assert error(gradient(level), p.exact_gradient()) > 0.02


@pytest.mark.parametrize("seed", range(2))
def test_the_geometric_mean_has_on_policy_the_gradient_of_the_mean_of_each_response(seed):
    p = problem(seed)
    loss = p.clipped(p.token_log_probs().data, "leave_one_out", "geometric_mean")
    mean = p.estimator("leave_one_out", "response")
    assert_same_gradients(p.expected_gradient(loss, 2), p.expected_gradient(mean, 2))


@pytest.mark.parametrize("seed", range(2))
def test_the_token_ratio_is_exact_off_policy_if_every_response_has_one_token(seed):
    """So the token ratio lacks the contexts and the later tokens, and nothing else."""
    p = problem(seed, one_token=True)
    old = p.world.token_log_probs(small_transformer(np.random.default_rng(seed + 10), vocab_size=3)).data
    for level in ("token", "sequence", "geometric_mean"):
        found = p.expected_gradient(p.clipped(old, "none", level, epsilon=1e9), 1, p.summed(old))
        assert_same_gradients(found, p.exact_gradient())
