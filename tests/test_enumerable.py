"""The enumerable world: the list of responses is complete, and each exact quantity equals a loop over it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, distributions, parameter_gradients, rngs, small_transformer
from minilm import ops
from minilm.evaluate import predicted_rewards, sequence_kl
from minilm.exact import enumerable
from minilm.exact.enumerable import EnumerableWorld
from minilm.generate import generate
from minilm.gradcheck import gradcheck
from minilm.model import RewardModel

PROMPTS = [[1], [0, 2]]


def small_world():
    """Two prompts of unequal length, seven responses to each."""
    return EnumerableWorld(PROMPTS, vocab_size=3, max_new_tokens=2)


def policy(rng, **config):
    return small_transformer(rng, vocab_size=3, **config)


# The list.

@pytest.mark.parametrize("V, R, eos", [(3, 2, 0), (4, 3, 0), (4, 3, 2), (2, 5, 1), (5, 1, 4)])
def test_every_response_is_listed_once(V, R, eos):
    responses = EnumerableWorld([[0]], V, R, eos).responses

    def is_response(tokens):
        return (tokens[-1] == eos or len(tokens) == R) and eos not in tokens[:-1]
    every = [list(t) for n in range(1, R + 1) for t in itertools.product(range(V), repeat=n) if is_response(list(t))]
    assert sorted(responses) == sorted(every)


@given(rngs, st.sampled_from([{}, {"key_smear": True}, {"layers": 2, "kv_heads": 1}]), st.floats(0.3, 3))
def test_the_probabilities_of_any_policy_add_up_to_1(rng, config, temperature):
    log_pi = small_world().log_probs(policy(rng, **config), temperature).data
    assert_close(np.exp(log_pi).sum(axis=1), np.ones(2), 1e-13)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_one_token_at_a_time(temperature):
    world, model = small_world(), policy(np.random.default_rng(0))
    log_pi = world.log_probs(model, temperature).data
    for (p, prompt), (y, response) in itertools.product(enumerate(world.prompts), enumerate(world.responses)):
        expected = 0.0
        for t, token in enumerate(response):
            logits = model(np.array([prompt + response[:t]])).data[0, -1] / temperature
            expected += np.log(np.exp(logits[token]) / np.exp(logits).sum())
        assert_close(log_pi[p, y], expected, 1e-12)


def test_token_log_probs_add_up_under_the_mask():
    world, model = small_world(), policy(np.random.default_rng(0))
    tokens = world.token_log_probs(model).data
    assert_close((tokens * world.mask).sum(axis=-1), world.log_probs(model).data)
    assert world.mask.sum(axis=-1).tolist() == [[len(y) for y in world.responses]] * 2


def test_generate_draws_responses_with_these_probabilities():
    """20,000 draws: chi-squared over the seven responses has the mean 6. With a temperature 6% off it is about 60."""
    world, model = small_world(), policy(np.random.default_rng(1))
    drawn = generate(model, [PROMPTS[1]] * 20_000, 2, np.random.default_rng(2), eos=0, temperature=0.8).responses()
    expected = 20_000 * np.exp(world.log_probs(model, 0.8).data[1])
    counts = np.array([drawn.count(y) for y in world.responses])
    assert counts.sum() == 20_000 and ((counts - expected) ** 2 / expected).sum() < 20


def test_rewards_are_those_of_the_reward_model():
    world, rng = small_world(), np.random.default_rng(0)
    model = RewardModel(policy(rng), rng)
    rewards = world.rewards(model).data
    for p, prompt in enumerate(world.prompts):
        assert_close(rewards[p], predicted_rewards(model, [prompt] * 7, world.responses))


@pytest.mark.parametrize("prompts, V, R, eos, message", [
    ([[1]], 10, 9, 0, "too many"), ([[1]], 50257, 1024, 0, "too many"), ([[1]], 2, 99_999, 0, "too many"),
    ([[3]], 3, 2, 0, "prompt"), ([[-1]], 3, 2, 0, "prompt"), ([], 3, 2, 0, "prompt"),
    ([[1]], 3, 0, 0, "max_new_tokens"), ([[1]], 3, 2, 3, "eos"), ([[1], []], 3, 2, 0, "dialogue")])
def test_a_world_that_cannot_be_listed_raises(prompts, V, R, eos, message):
    with pytest.raises(ValueError, match=message):
        EnumerableWorld(prompts, V, R, eos)


def test_a_model_over_another_vocabulary_raises():
    with pytest.raises(ValueError, match="model over 7 tokens"):
        small_world().log_probs(small_transformer(np.random.default_rng(0)))


def test_take_picks_the_values_of_the_responses_drawn_prompt_by_prompt():
    world = EnumerableWorld([[1], [0, 2]], vocab_size=3, max_new_tokens=2)
    values = np.arange(2 * 7 * 3).reshape(2, 7, 3)
    drawn = np.array([[6, 0], [2, 2]])
    assert world.take(values, drawn).tolist() == [values[p, y].tolist() for p, y in [(0, 6), (0, 0), (1, 2), (1, 2)]]
    assert world.take(values[..., 0], drawn).shape == (4,)


# Exact quantities, by loops.

@given(distributions(2), rngs, st.floats(0, 2))
def test_entropy_divergence_variation_and_objective_are_their_definitions(drawn, rng, beta):
    log_pi, ref = drawn
    r = rng.normal(size=log_pi.shape)
    for p in range(2):
        pi, q = np.exp(log_pi[p]), np.exp(ref[p])
        kl = sum(a * np.log(a / b) for a, b in zip(pi, q))
        assert_close(enumerable.entropy(log_pi)[p], -sum(a * np.log(a) for a in pi))
        assert_close(enumerable.divergence(log_pi, ref)[p], kl)
        assert_close(enumerable.total_variation(log_pi, ref)[p], sum(max(a - b, 0) for a, b in zip(pi, q)))
        assert_close(enumerable.objective(log_pi, ref, r, beta)[p], sum(a * b for a, b in zip(pi, r[p])) - beta * kl)
    assert (enumerable.divergence(log_pi, ref) > 0).all() and (enumerable.divergence(log_pi, log_pi) == 0).all()
    assert (0 <= enumerable.entropy(log_pi)).all() and (enumerable.entropy(log_pi) <= np.log(7)).all()


def test_responses_of_probability_0_contribute_nothing():
    log_pi = np.log(np.array([[0.5, 0.5, 1.0]])) + np.array([[0, 0, -np.inf]])
    assert_close(enumerable.entropy(log_pi), [np.log(2)])
    assert_close(enumerable.divergence(log_pi, np.log(np.full((1, 3), 1 / 3))), [np.log(1.5)])


@given(distributions(2), rngs)
def test_the_gradient_of_j_agrees_with_differences_of_each_log_prob_alone(drawn, rng):
    """The moved probabilities do not add up to 1, so the last beta in objective_gradient is tested too."""
    log_pi, reference = drawn
    rewards, numeric, step = rng.normal(size=log_pi.shape), np.empty_like(log_pi), 1e-6
    for i in np.ndindex(log_pi.shape):
        sides = []
        for sign in (1, -1):
            moved = log_pi.copy()
            moved[i] += sign * step
            sides.append(enumerable.objective(moved, reference, rewards, 0.4).sum())
        numeric[i] = (sides[0] - sides[1]) / (2 * step)
    assert_close(enumerable.objective_gradient(log_pi, reference, rewards, 0.4), numeric, 1e-6)


def test_the_gradient_of_j_through_the_transformer():
    """Three ways agree: objective_gradient, backward through J written in ops, and differences of J."""
    rng = np.random.default_rng(3)
    world, model, beta = small_world(), policy(rng), 0.4
    reference, rewards = world.log_probs(policy(rng)).data, rng.normal(size=world.shape)

    def J(*_):
        log_pi = world.log_probs(model)
        return ops.sum(ops.exp(log_pi) * (rewards - beta * (log_pi - reference)))

    assert_close(J(), enumerable.objective(world.log_probs(model).data, reference, rewards, beta).sum())
    by_ops = parameter_gradients(model, J())
    log_pi = world.log_probs(model)
    by_hand = parameter_gradients(model, log_pi, enumerable.objective_gradient(log_pi.data, reference, rewards, beta))
    for name, gradient in by_ops.items():
        assert_close(by_hand[name], gradient, name=name)
    gradcheck(J, *model.parameters().values())


@given(distributions(2), rngs, st.floats(0.2, 2))
def test_the_optima_are_their_definitions(drawn, rng, beta):
    reference, log_mu = drawn
    rewards = rng.normal(size=reference.shape)
    best, log_Z = enumerable.optimum(reference, rewards, beta)
    ipo = enumerable.ipo_optimum(reference, log_mu, rewards, beta)
    for p in range(2):
        pi_ref, mu, r = np.exp(reference[p]), np.exp(log_mu[p]), rewards[p]
        weights = [a * np.exp(r_y / beta) for a, r_y in zip(pi_ref, r)]
        assert_close(np.exp(best[p]), weights / np.sum(weights))
        assert_close(log_Z[p], np.log(sum(weights)))
        wins = [sum(m / (1 + np.exp(other - r_y)) for m, other in zip(mu, r)) for r_y in r]
        weights = pi_ref * np.exp(np.divide(wins, beta))
        assert_close(np.exp(ipo[p]), weights / weights.sum())


@given(distributions(1), rngs, st.integers(1, 3))
def test_best_of_n_is_the_distribution_of_the_first_best_of_n_draws(drawn, rng, n):
    log_pi = drawn[0]
    scores = rng.integers(0, 4, size=(2, 7)) / 2                    # with ties
    best = np.exp(enumerable.best_of_n(log_pi, scores, n))
    for p in range(2):
        expected = np.zeros(7)
        for drawn in itertools.product(range(7), repeat=n):
            expected[drawn[np.argmax(scores[p, list(drawn)])]] += np.exp(log_pi[p, list(drawn)].sum())
        assert_close(best[p], expected)


def test_best_of_n_keeps_its_digits_where_scores_are_rare_or_impossible():
    with np.errstate(divide="ignore"):
        log_pi = np.log(np.array([[1 - 1e-12, 1e-12, 0.0]]))
    best = np.exp(enumerable.best_of_n(log_pi, np.array([[0.0, 1.0, 2.0]]), 2))
    assert_close(best[0, 1] / 2e-12, 1.0)
    assert best[0, 2] == 0
    with np.errstate(divide="ignore"):
        again = np.log(best)
    twice = enumerable.best_of_n(again, np.array([[0.0, 1.0, 2.0]]), 3)
    assert_close(np.exp(twice), np.exp(enumerable.best_of_n(log_pi, np.array([[0.0, 1.0, 2.0]]), 6)))
    with pytest.raises(ValueError, match="best_of_n: n is 0"):
        enumerable.best_of_n(log_pi, np.zeros((1, 3)), 0)


def test_the_expectation_of_sequence_kl_is_the_divergence():
    rng = np.random.default_rng(6)
    world, model, reference = small_world(), policy(rng), policy(rng)
    log_pi, ref = world.log_probs(model).data, world.log_probs(reference).data
    for p, prompt in enumerate(world.prompts):
        k1 = sequence_kl(model, reference, [prompt] * 7, world.responses)
        assert_close((np.exp(log_pi[p]) * k1).sum(), enumerable.divergence(log_pi, ref)[p])


def test_values_of_another_world_and_draws_for_other_prompts_are_refused():
    world = EnumerableWorld([[1], [2]], 3, 2)
    P, Y = world.shape
    drawn = np.array([[0, 1], [2, 3]])
    values = np.arange(P * Y * 3).reshape(P, Y, 3)
    assert np.array_equal(world.take(values, drawn), [values[0, 0], values[0, 1], values[1, 2], values[1, 3]])
    for wrong in (np.zeros((P + 1, Y)), np.zeros((P, Y + 1)), np.zeros((Y, Y)), np.zeros(Y)):
        with pytest.raises(ValueError, match="take: values .*, drawn .*; they must be"):
            world.take(wrong, drawn)
    for wrong in (drawn[0], drawn[:1], np.tile(drawn, (2, 1)), drawn[..., None]):
        with pytest.raises(ValueError, match="take: values .*, drawn .*; they must be"):
            world.take(values, wrong)


def test_a_score_of_nan_is_not_the_best_of_n():
    log_pi = np.log(np.full((1, 3), 1 / 3))
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"best_of_n: scores, entry \(0, 1\), is"):
            enumerable.best_of_n(log_pi, np.array([[0, wrong, 1]]), 2)
