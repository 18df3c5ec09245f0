"""minilm/evaluate.py: each measure against its definition."""
import warnings

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs, small_transformer
from minilm import evaluate
from minilm.generate import generate
from minilm.model import RewardModel

PROMPTS = [[1, 2], [3], [4, 5, 6], [1], [2, 6, 3, 1]]
RESPONSES = [[3, 0], [5, 1, 2, 0], [0], [6, 6, 6], [2, 0]]


def by_enumeration(model, prompt):
    """log pi(token | prompt) of every token of the vocabulary."""
    logits = model(np.array([prompt])).data[0, -1]
    return logits - np.log(np.exp(logits).sum())


@given(rng=rngs, n=st.integers(2, 9))
def test_mean_and_error_are_their_definitions(rng, n):
    x = rng.normal(size=n) * 3 + 1
    mean, error = evaluate.mean_and_error(x.tolist())
    assert_close(mean, sum(x) / n)
    assert_close(error, (sum((x - sum(x) / n) ** 2) / (n - 1) / n) ** 0.5)


def test_a_single_number_has_no_standard_error_and_nothing_is_divided_by_0():
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, error = evaluate.mean_and_error([True])
    assert mean == 1 and np.isnan(error)


@pytest.mark.parametrize("values", [[], 1.0, np.ones((2, 3)), np.ones((1, 1))])
def test_other_arrays_than_n_numbers_have_no_mean_and_error(values):
    """Of a table (P,K) the error would be that of P numbers."""
    with pytest.raises(ValueError, match=r"mean_and_error: values .* one shape \(N,\)"):
        evaluate.mean_and_error(values)


def test_a_tie_is_half_a_win():
    assert evaluate.wins([1.0, 0.0, 2.0], [0.0, 1.0, 2.0]).tolist() == [1, 0, 0.5]


@given(rng=rngs)
def test_wins_of_one_side_and_of_the_other_are_all_comparisons(rng):
    a, b = rng.integers(0, 3, (2, 8))
    assert (evaluate.wins(a, b) + evaluate.wins(b, a) == 1).all()


# Divergence.

@given(rng=rngs)
def test_the_divergence_of_a_model_from_itself_is_0(rng):
    model = small_transformer(rng)
    assert (evaluate.sequence_kl(model, model.copy(), PROMPTS, RESPONSES) == 0).all()


@given(rng=rngs, batch_size=st.integers(1, 6))
def test_divergence_and_reward_do_not_depend_on_batch_size_order_and_workers(rng, batch_size):
    policy, reference = small_transformer(rng), small_transformer(rng)
    rewarder = RewardModel(policy, rng)
    for measure in (lambda *args, **options: evaluate.sequence_kl(policy, reference, *args, **options),
                    lambda *args, **options: evaluate.predicted_rewards(rewarder, *args, **options)):
        alone = np.concatenate([measure([p], [r]) for p, r in zip(PROMPTS, RESPONSES)])
        assert_close(measure(PROMPTS, RESPONSES, batch_size), alone)
        assert_close(measure(PROMPTS, RESPONSES, batch_size, workers=2), alone)
        assert_close(measure(PROMPTS[::-1], RESPONSES[::-1], batch_size)[::-1], alone)
        assert len(set(alone.round(12))) == len(alone), "the values differ between responses"


@given(rng=rngs)
def test_the_divergence_of_one_token_is_the_log_ratio_of_its_probabilities(rng):
    """log pi - log pi_ref of the token alone; tokens of the prompt do not count."""
    policy, reference = small_transformer(rng), small_transformer(rng)
    for prompt in PROMPTS:
        exact = by_enumeration(policy, prompt) - by_enumeration(reference, prompt)
        every_token = [[t] for t in range(len(exact))]
        assert_close(evaluate.sequence_kl(policy, reference, [prompt] * len(exact), every_token), exact)


@given(rng=rngs, temperature=st.sampled_from([0.25, 0.5, 2.0]))
def test_the_divergence_of_a_policy_at_a_temperature_is_from_the_reference_at_temperature_1(rng, temperature):
    policy, reference = small_transformer(rng), small_transformer(rng)
    for prompt in PROMPTS:
        scores = by_enumeration(policy, prompt) / temperature
        exact = scores - np.log(np.exp(scores).sum()) - by_enumeration(reference, prompt)
        every_token = [[t] for t in range(len(exact))]
        k1 = evaluate.sequence_kl(policy, reference, [prompt] * len(exact), every_token, temperature=temperature)
        assert_close(k1, exact)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_over_samples_agrees_with_the_exact_divergence(seed):
    rng = np.random.default_rng(seed)
    policy, reference = small_transformer(rng), small_transformer(rng)
    prompts = PROMPTS * 800
    samples = generate(policy, prompts, 1, rng, eos=0).responses()
    k1 = evaluate.sequence_kl(policy, reference, prompts, samples, batch_size=1000)
    mean, error = evaluate.mean_and_error(k1)
    exact = 0
    for prompt in PROMPTS:
        log_pi, log_ref = by_enumeration(policy, prompt), by_enumeration(reference, prompt)
        exact += (np.exp(log_pi) * (log_pi - log_ref)).sum() / len(PROMPTS)
    assert abs(mean - exact) < 5 * error, f"{mean:.4f} +- {error:.4f}, exactly {exact:.4f}"
    assert exact > 10 * error, "the sign is certain"


def test_the_divergence_of_the_best_of_n():
    """n = 2 by hand; without ties the density of the best of n is n u^(n-1), with divergence log n - (n-1)/n."""
    assert evaluate.best_of_n_kl(1) == 0
    assert_close(evaluate.best_of_n_kl(2), np.log(2) - 0.5)
    u = (np.arange(10 ** 6) + 0.5) / 10 ** 6
    density = 16 * u ** 15
    assert_close(evaluate.best_of_n_kl(16), (density * np.log(density)).mean(), 1e-6)


def test_the_divergence_is_summed_over_the_tokens_of_a_response(rng):
    policy, reference = small_transformer(rng), small_transformer(rng)
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        tokens = np.array([prompt + response])
        ratios = policy.log_probs(tokens).data[0] - reference.log_probs(tokens).data[0]
        expected.append(ratios[len(prompt) - 1:].sum())
    assert_close(evaluate.sequence_kl(policy, reference, PROMPTS, RESPONSES), expected)


def test_predicted_rewards_are_of_prompt_and_response(rng):
    model = RewardModel(small_transformer(rng), rng)
    expected = [model.rewards(np.array([p + r]), np.ones((1, len(p + r)))).item()
                for p, r in zip(PROMPTS, RESPONSES)]
    assert_close(evaluate.predicted_rewards(model, PROMPTS, RESPONSES), expected)
