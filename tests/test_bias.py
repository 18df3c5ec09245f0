"""minilm/exact/bias.py: the exact expected gradient of anybody's loss of samples, against that of -J.

What is found here again was found before, with other code, in test_exact_policy_gradient.py, test_exact_kl.py and
test_exact_gradients.py.
"""

import numpy as np
import pytest

from helpers import assert_close, small_transformer
from minilm import Tensor, ops
from minilm.exact.bias import bias
from minilm.exact.enumerable import EnumerableWorld
from minilm.exact.gradients import compare_with_exact_gradient
from minilm.model import Config, Transformer
from minilm.objectives.kl import k1, k3
from minilm.objectives.kl_in_the_loss import k3_times_ratio, token_kl_loss
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, ppo_clip_loss, reward_to_go

WORLD = EnumerableWorld([[0, 2]], vocab_size=3, max_new_tokens=2)
TWO_PROMPTS = EnumerableWorld([[1], [0, 2]], vocab_size=3, max_new_tokens=2)
BETA = 0.5


def models(seed=0):
    """A policy, a reference, and an older policy."""
    rng = np.random.default_rng(seed)
    return [small_transformer(rng, vocab_size=3) for _ in range(3)]


def rewards_of(world, seed=0):
    return np.random.default_rng(seed + 100).normal(size=world.shape)


def policy_gradient(baseline="leave_one_out", token_mean=None):
    def loss(log_probs, drawn):
        A = advantages(drawn.rewards, drawn.kl, BETA, baseline).reshape(-1)
        return policy_gradient_loss(log_probs, A, drawn.mask, token_mean)
    return loss


def to_go(log_probs, drawn):
    shape = *drawn.rewards.shape, -1
    A = reward_to_go(drawn.rewards, (drawn.old - drawn.reference).reshape(shape), drawn.mask.reshape(shape), BETA)
    return policy_gradient_loss(log_probs, A.reshape(log_probs.shape), drawn.mask)


def clipped(level, epsilon):
    """R is of the policy itself: that of an older one would be another reward."""
    def loss(log_probs, drawn):
        k1_now = np.where(drawn.mask, log_probs.data - drawn.reference, 0).sum(axis=1)
        A = drawn.rewards.reshape(-1) - BETA * k1_now
        return ppo_clip_loss(log_probs, drawn.old, A, drawn.mask, epsilon, level)
    return loss


def with_old_kl(log_probs, drawn):
    """The sequence ratio without a clip, and the KL in R is that of the policy that drew the samples, as in RLHF."""
    A = (drawn.rewards - BETA * drawn.kl).reshape(-1)
    return ppo_clip_loss(log_probs, drawn.old, A, drawn.mask, 1e9, "sequence")


def divergence_from_old(log_probs, drawn):
    """Its expected gradient is that of KL(pi || pi_old)."""
    old = summed(drawn.old, drawn.mask).data
    return ops.mean(k3_times_ratio(summed(log_probs, drawn.mask), old, old))


def summed(log_probs, mask):
    return ops.sum(ops.where(mask, log_probs, 0.0), axis=-1)


def k3_of_responses(log_probs, drawn):
    old, reference = (summed(a, drawn.mask).data for a in (drawn.old, drawn.reference))
    return ops.mean(k3_times_ratio(summed(log_probs, drawn.mask), old, reference)) * BETA


def k3_of_tokens(log_probs, drawn):
    return token_kl_loss(k3(log_probs, drawn.reference), drawn.mask)


def find(loss, world=WORLD, seed=0, **options):
    policy, reference, _ = models(seed)
    options = {"rewards": rewards_of(world, seed), "beta": BETA, **options}
    return bias(loss, world, policy, reference, **options)


def assert_unbiased(found, factor=1.0):
    assert_close([found.cosine, found.ratio], [1.0, factor])
    if factor == 1:
        assert found.relative_error < 1e-10


# Right losses are found right, wrong ones wrong.

@pytest.mark.parametrize("world", [WORLD, TWO_PROMPTS], ids=["one prompt", "two"])
@pytest.mark.parametrize("loss, K", [(policy_gradient("none"), 1), (policy_gradient(), 2), (to_go, 2)])
def test_losses_that_are_unbiased_are_found_unbiased(loss, K, world):
    assert_unbiased(find(loss, world, samples=K))


@pytest.mark.parametrize("K", [2, 3])
def test_the_mean_baseline_has_the_ratio_1_minus_1_over_K(K):
    assert_unbiased(find(policy_gradient("mean"), samples=K), 1 - 1 / K)


def test_a_constant_length_has_the_ratio_1_over_the_constant():
    assert_unbiased(find(policy_gradient(token_mean=4), samples=2), 1 / 4)


@pytest.mark.parametrize("loss", [policy_gradient("group"), policy_gradient(token_mean="response")],
                         ids=["standard deviation", "mean of each response"])
@pytest.mark.parametrize("seed", range(2))
def test_grpos_standard_deviation_and_its_mean_over_tokens_change_the_direction(loss, seed):
    """The angle between the two gradients is more than 0.014, that of the cosine 0.9999."""
    assert find(loss, seed=seed, samples=2).cosine < 0.9999


def test_off_policy_the_sequence_ratio_is_unbiased_and_the_token_ratio_is_not():
    old = models()[2]
    assert_unbiased(find(clipped("sequence", 1e9), drawn_from=old))
    for level in ("token", "geometric_mean"):
        assert find(clipped(level, 1e9), drawn_from=old).cosine < 0.999
    assert find(clipped("sequence", 0.2), drawn_from=old).cosine < 0.999        # and the clip is a bias too


@pytest.mark.parametrize("seed", range(2))
def test_with_the_kl_of_the_older_policy_in_R_the_gradient_lacks_that_of_the_kl_to_it(seed):
    """With several updates on the same samples the KL in R is that of pi_old. The rest is beta KL(pi || pi_old)."""
    old = models(seed)[2]
    assert find(with_old_kl, seed=seed, drawn_from=old).cosine < 0.99
    assert_unbiased(find(lambda *given: with_old_kl(*given) + divergence_from_old(*given) * BETA, seed=seed,
                         drawn_from=old))
    assert_unbiased(find(with_old_kl, seed=seed))
    assert find(divergence_from_old, seed=seed).ratio < 1e-10, "at pi = pi_old its gradient is 0"


@pytest.mark.parametrize("drawn_from", [None, models()[2]], ids=["on policy", "off policy"])
def test_k3_of_responses_times_the_ratio_has_the_gradient_of_the_kl(drawn_from):
    assert_unbiased(find(k3_of_responses, rewards=None, drawn_from=drawn_from))


@pytest.mark.parametrize("seed", range(3))
def test_k3_of_tokens_has_the_bias_that_the_general_comparison_finds(seed):
    policy, reference, _ = models(seed)
    token_log_ref, log_ref = WORLD.token_log_probs(reference).data, WORLD.log_probs(reference).data

    def loss(log_probs, drawn):
        terms = k3(log_probs, WORLD.take(token_log_ref, drawn))
        return ops.sum(ops.where(WORLD.take(WORLD.mask, drawn) > 0, terms, 0.0))
    expected = compare_with_exact_gradient(
        loss, lambda log_pi: ops.sum(ops.exp(log_pi) * (log_pi - log_ref)), WORLD, policy)
    found = bias(k3_of_tokens, WORLD, policy, reference)
    assert_close([found.cosine, found.ratio, found.relative_error],
                 [expected.cosine, expected.ratio, expected.relative_error])
    assert found.relative_error > 0.01


def test_a_temperature_is_that_of_the_draws_and_of_all_scores():
    assert_unbiased(find(policy_gradient(), samples=2, temperature=0.5))
    assert abs(find(k3_of_tokens, temperature=0.5).ratio - find(k3_of_tokens).ratio) > 0.01


# Functions of arrays.

def in_numpy(log_probs, drawn):
    assert type(log_probs) is np.ndarray
    A = drawn.rewards.reshape(-1, 1) - BETA * drawn.kl.reshape(-1, 1)
    gradient = -np.where(drawn.mask, A, 0) / len(log_probs)
    return (gradient * log_probs).sum(), gradient


def test_a_function_of_arrays_gives_its_gradient_itself():
    assert_unbiased(find(in_numpy, arrays=True))
    assert_unbiased(find(lambda *given: [3 * x for x in in_numpy(*given)], arrays=True), 3.0)


@pytest.mark.parity
def test_a_loss_in_pytorch_is_a_function_of_arrays():
    torch = pytest.importorskip("torch")

    def loss(log_probs, drawn):
        leaf = torch.tensor(log_probs, requires_grad=True)
        x = (leaf - torch.tensor(drawn.reference)).where(torch.tensor(drawn.mask), 0.0)
        value = ((-x).expm1() + x).sum()
        value.backward()
        return value.item(), leaf.grad.numpy()
    ours, theirs = find(k3_of_tokens), find(loss, arrays=True)
    assert_close([theirs.cosine, theirs.ratio], [ours.cosine, ours.ratio])


# What a loss gets.

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_loss_gets_the_values_of_the_responses_drawn_and_every_outcome_once(temperature):
    policy, reference, old = models()
    rewards, seen = rewards_of(TWO_PROMPTS), []

    def loss(log_probs, drawn):
        seen.append(tuple(drawn.indices.reshape(-1)))
        assert drawn.indices.shape == drawn.rewards.shape == drawn.kl.shape == (2, 1)
        for n, (p, y) in enumerate(zip(range(2), drawn.indices[:, 0])):
            assert drawn.rewards[p, 0] == rewards[p, y]
            assert (drawn.mask[n] == TWO_PROMPTS.mask[p, y]).all() and drawn.mask.dtype == bool
            for ours, model in ((log_probs.data, policy), (drawn.old, old), (drawn.reference, reference)):
                np.testing.assert_array_equal(ours[n], TWO_PROMPTS.token_log_probs(model, temperature).data[p, y])
            summed = (TWO_PROMPTS.log_probs(model, temperature).data[p, y] for model in (old, reference))
            assert_close(drawn.kl[p, 0], next(summed) - next(summed))
        return policy_gradient_loss(log_probs, drawn.rewards.reshape(-1), drawn.mask)
    bias(loss, TWO_PROMPTS, policy, reference, rewards, drawn_from=old, temperature=temperature)
    assert len(seen) == len(set(seen)) == TWO_PROMPTS.shape[1] ** 2


def test_the_true_gradient_is_a_mean_over_prompts():
    """A loss that is a sum over prompts has the ratio 2."""
    def loss(log_probs, drawn):
        return policy_gradient("none")(log_probs, drawn) * 2.0
    assert_unbiased(find(loss, TWO_PROMPTS), 2.0)


# Errors.

def test_too_many_outcomes_are_counted_and_the_error_says_what_to_reduce():
    Y = WORLD.shape[1]
    with pytest.raises(ValueError, match=rf"{Y ** 6:,} outcomes; the limit is 100,000, .*fewer samples"):
        find(policy_gradient(), samples=6)
    with pytest.raises(ValueError, match=f"{Y ** 2:,} outcomes; the limit is 40"):
        find(policy_gradient(), samples=2, most_outcomes=40)


@pytest.mark.parametrize("change, message", [
    ({"rewards": np.zeros((1, 3))}, r"rewards \(1, 3\) must be \(P,Y\) = \(1, 7\), one for each response"),
    ({"rewards": np.full((1, 7), np.nan)}, "rewards, entry .* is nan"), ({"beta": -1.0}, "beta is -1")])
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"bias: {message}"):
        find(policy_gradient(), samples=2, **change)


def test_a_gradient_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"gradient has shape \(2,\); the log-probs have \(1, 3\)"):
        find(lambda log_probs, drawn: (0.0, np.zeros(2)), arrays=True)


@pytest.mark.parametrize("arrays, returned, words", [
    (False, lambda t: 1.0, r"1\.0 \(float\)"), (False, lambda t: None, "None"),
    (False, lambda t: t * 2.0, r"Tensor of shape \(1, 3\)"),
    (False, lambda t: Tensor(1.0), "Tensor"), (False, lambda t: (1.0, t.data), "tuple"),
    (True, lambda t: 1.0, r"1\.0 \(float\)"), (True, lambda t: (1.0,), "tuple"), (True, lambda t: (t, t), "tuple")])
def test_a_loss_that_returns_something_else_is_named(arrays, returned, words):
    with pytest.raises(ValueError, match=f"^bias: the loss returned .*{words}.*; it must be a scalar Tensor"):
        find(lambda log_probs, drawn: returned(log_probs), arrays=arrays)


@pytest.mark.parametrize("arrays", [False, True])
def test_a_gradient_that_is_not_finite_raises_with_its_place(arrays):
    def loss(log_probs, drawn):
        rare = np.where(drawn.indices == 2, np.nan, 1.0) * drawn.mask
        return (0.0, rare) if arrays else ops.sum(log_probs * rare)
    with pytest.raises(ValueError, match=r"bias: the expected gradient .*entry \(0, 2, 0\), is nan; it must be finite"):
        find(loss, arrays=arrays)


def test_a_policy_near_uniform_gives_a_warning_at_the_line_of_the_call():
    config, rng = Config(vocab_size=3, width=8, layers=1, heads=2, context=8), np.random.default_rng(0)
    policy, reference = (Transformer(config, rng, np.float64) for _ in range(2))
    with pytest.warns(UserWarning, match="the policy is near uniform") as caught:
        bias(k3_of_tokens, WORLD, policy, reference)
    assert caught[0].filename == __file__


def test_k1_as_a_loss_has_no_direction_at_all():
    """Its expected gradient is 0 up to rounding."""
    found = find(lambda log_probs, drawn: ops.sum(ops.where(drawn.mask, k1(log_probs, drawn.reference), 0.0)))
    assert found.ratio < 1e-12
