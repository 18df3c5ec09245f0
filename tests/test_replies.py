"""The world of short replies: every table against values made by hand."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helpers import assert_close, assert_same_gradients, parameter_gradients, rngs, small_transformer
from minilm.exact.enumerable import EnumerableWorld
from minilm.generate import generate
from minilm.ops import stable_sigmoid
from minilm.world import annotators
from worlds.replies import COURTESY, EOS, LONGEST, MODEL, VOCABULARY, WORDS, ReplyWorld


@pytest.fixture(scope="module")
def world():
    return ReplyWorld(words=2)


def test_every_question_is_there_once_and_its_answer_is_its_last_word(world):
    assert sorted(q.content for q in world.questions) == sorted(f"{a} {b}" for a in WORDS for b in WORDS)
    assert all(q.answer == q.content.split()[-1] for q in world.questions)


def test_gold_equals_the_gold_reward_of_the_annotators_for_the_text(world):
    rng = np.random.default_rng(0)
    for p, y in zip(rng.integers(world.shape[0], size=50), rng.integers(world.shape[1], size=50)):
        assert world.gold[p, y] == annotators.gold_reward(world.questions[p], world.texts[y], world.finished[y])
    assert world.finished.tolist() == [EOS in response for response in world.responses] and not world.finished.all()
    right = [3 + WORDS.index(world.questions[0].answer)]
    _, y = world.index([world.prompts[0]] * 3, [right + [EOS], [COURTESY, *right, EOS], [COURTESY, EOS]])
    gold = world.gold[0, y]
    assert gold[1] > gold[0] > gold[2]


@given(rngs, st.sampled_from([{}, {"key_smear": True}, {"layers": 2, "kv_heads": 1}]))
@settings(max_examples=3)
def test_log_probs_and_their_gradients_equal_those_of_each_reply_computed_alone(rng, config):
    world = ReplyWorld(words=1)
    model = small_transformer(rng, vocab_size=VOCABULARY, **config)
    for temperature in 1.0, 0.4:
        expected = EnumerableWorld.log_probs(world, model, temperature)
        assert_close(world.log_distributions(model, temperature), expected.data, 1e-12)
    cotangent = rng.normal(size=world.shape)
    assert_same_gradients(parameter_gradients(model, world.log_probs(model), cotangent),
                          parameter_gradients(model, EnumerableWorld.log_probs(world, model), cotangent))


def test_draws_and_comparisons_follow_their_distributions(world):
    rng = np.random.default_rng(1)
    log_pi = rng.normal(size=world.shape) * 2
    log_pi -= np.logaddexp.reduce(log_pi, axis=1, keepdims=True)
    drawn = world.draw(log_pi, rng, np.full(200_000, 3))
    frequency = np.bincount(drawn, minlength=world.shape[1]) / 200_000
    assert np.abs(frequency - np.exp(log_pi[3])).max() < 5 * 0.5 / 200_000 ** 0.5

    utility = rng.normal(size=world.shape)
    p, chosen, rejected = world.comparisons(log_pi, utility, rng, 40_000, prompts=[2, 5], flip_rate=0.2)
    assert set(p) == {2, 5} and (chosen != rejected).all()
    d = utility[p, chosen] - utility[p, rejected]
    # The better reply of a pair that differs by |d| is preferred with probability 0.2 + 0.6 sigma(|d|).
    assert abs((d > 0).mean() - (0.2 + 0.6 * stable_sigmoid(np.abs(d))).mean()) < 0.01


def test_without_flips_the_better_reply_is_preferred_when_the_difference_is_large(world):
    log_pi = np.full(world.shape, -np.log(world.shape[1]))
    p, chosen, rejected = world.comparisons(log_pi, world.gold * 1e4, np.random.default_rng(0), 500)
    assert (world.gold[p, chosen] >= world.gold[p, rejected]).all()


def test_every_generated_reply_has_an_index_in_the_tables(world):
    model = small_transformer(np.random.default_rng(0), vocab_size=VOCABULARY)
    samples = generate(model, world.prompts * 20, LONGEST, np.random.default_rng(1), EOS)
    p, y = world.index(world.prompts * 20, samples.responses())
    assert world.tokens_of(p, y) == (world.prompts * 20, samples.responses())
    assert_close(samples.log_probs.sum(axis=1), world.log_distributions(model)[p, y], 1e-12)
    assert (world.reward(world.gold)(world.prompts * 20, samples.responses()) == world.gold[p, y]).all()


def test_demonstrations_are_correct_with_the_given_probability_and_not_too_long(world):
    prompts, responses = world.demonstrations(np.random.default_rng(0), 3000, right=0.4)
    p, y = world.index(prompts, responses)
    answers = [next(token for token in response if token > 2) for response in responses]
    correct = [answer == prompt[-1] for prompt, answer in zip(prompts, answers)]
    assert world.finished[y].all() and abs(np.mean(correct) - (0.4 + 0.6 / 3)) < 0.04
    assert MODEL["vocab_size"] == VOCABULARY


def test_the_demonstration_distribution_matches_the_frequency_of_draws(world):
    pi = world.demonstration_distribution(right=0.4)
    count = 40_000
    p, y = world.index(*world.demonstrations(np.random.default_rng(2), count, right=0.4))
    drawn = np.zeros(world.shape)
    np.add.at(drawn, (p, y), 1)
    assert (drawn[pi == 0] == 0).all()
    expected = pi[pi > 0] * count / world.shape[0]
    chi_squared, cells = ((drawn[pi > 0] - expected) ** 2 / expected).sum(), (pi > 0).sum()
    assert abs(chi_squared - cells) < 5 * (2 * cells) ** 0.5       # its mean and five standard deviations


def test_pairs_ordered_by_gold_have_the_better_reply_first_and_none_of_equal_gold(rng):
    world = ReplyWorld(words=1)
    log_pi = np.full(world.shape, -np.log(world.shape[1]))
    p, better, worse = world.ordered_by_gold(log_pi, rng, 200)
    assert (world.gold[p, better] > world.gold[p, worse]).all() and 100 < len(p) <= 200
