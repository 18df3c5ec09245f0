"""Each objective fits one batch, with a real transformer in float32 and AdamW.

The losses and their gradients have their own tests. These tests run everything between tokens and weights.
"""

import numpy as np

from minilm.generate import generate
from minilm.layers import sequence_log_probs
from minilm.model import Config, RewardModel, Transformer
from minilm.objectives.dpo import dpo_loss, dpo_metrics
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss
from minilm.objectives.reward import reward_loss, reward_metrics
from minilm.objectives.sft import sft_loss
from minilm.optim import AdamW
from minilm.tensor import no_grad

VOCABULARY, PROMPT, RESPONSE, EOS = 16, 3, 6, 0


def transformer(seed):
    config = Config(vocab_size=VOCABULARY, width=32, layers=2, heads=4, context=16)
    return Transformer(config, np.random.default_rng(seed))


def batch(seed, B):
    """Random prompts, and random responses of several lengths that end with EOS: tokens (B,T), and the mask (B,T-1)
    of the response for model.log_probs(tokens)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (B, PROMPT + RESPONSE))
    mask = np.zeros(tokens.shape)
    for i, length in enumerate(rng.integers(2, RESPONSE + 1, B)):
        end = PROMPT + length
        tokens[i, end - 1:] = EOS
        mask[i, PROMPT:end] = 1
    return tokens, mask[:, 1:]


def learn(parameters, loss, steps, learning_rate=1e-2):
    """Trains with AdamW on one batch. Returns the loss before each step and after the last one."""
    optimizer = AdamW(parameters, learning_rate=learning_rate, weight_decay=0.0)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.clip(1.0)
        optimizer.step()
        values.append(value.item())
    with no_grad():
        return values + [loss().item()]


def test_sft_fits_its_responses():
    model = transformer(0)
    tokens, mask = batch(1, 8)
    values = learn(model.parameters(), lambda: sft_loss(model.log_probs(tokens), mask), 40)
    assert abs(values[0] - np.log(VOCABULARY)) < 0.3, "the first predictions are near uniform"
    assert values[-1] < 0.05, f"{values[0]:.3f} -> {values[-1]:.3f}"

    greedy = generate(model, tokens[:, :PROMPT].tolist(), RESPONSE, np.random.default_rng(0), EOS, temperature=0)
    expected = [row[PROMPT:PROMPT + int(m.sum())].tolist() for row, m in zip(tokens, mask)]
    assert greedy.responses() == expected


def test_the_reward_model_fits_its_comparisons():
    model = RewardModel(transformer(0), np.random.default_rng(1))
    tokens, _ = batch(2, 16)
    tokens[8:, :PROMPT] = tokens[:8, :PROMPT]               # a chosen and a rejected response to each prompt
    real = np.ones(tokens.shape)
    real[:, 1:] = np.cumsum(tokens == EOS, axis=1)[:, :-1] == 0

    def halves():
        rewards = model.rewards(tokens, real)
        return rewards[:8], rewards[8:]

    values = learn(model.parameters(), lambda: reward_loss(*halves()), 20)
    assert abs(values[0] - np.log(2)) < 0.2, "the head starts small"
    assert values[-1] < 0.05, f"{values[0]:.3f} -> {values[-1]:.3f}"
    assert reward_metrics(*(r.data for r in halves()))["accuracy"] == 1


def test_the_policy_gradient_on_fixed_samples_raises_the_expected_reward():
    """Every step trains on the same samples of the first policy. The test measures new samples."""
    model, wanted = transformer(0), 5
    prompts = np.random.default_rng(3).integers(1, VOCABULARY, (8, PROMPT)).repeat(16, axis=0)

    def sample(seed):
        drawn = generate(model, prompts.tolist(), RESPONSE, np.random.default_rng(seed), EOS)
        rewards = ((drawn.tokens == wanted) * drawn.mask).sum(axis=1)
        return drawn, rewards

    drawn, rewards = sample(4)
    before = sample(5)[1]
    tokens = np.concatenate([prompts, drawn.tokens], axis=1)
    A = advantages(rewards.reshape(8, 16), np.zeros((8, 16)), beta=0.0).reshape(-1)
    values = learn(model.parameters(),
                   lambda: policy_gradient_loss(model.log_probs(tokens)[:, PROMPT - 1:], A, drawn.mask), 6)
    after = sample(5)[1]
    error = np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / len(before))
    assert values[-1] < values[0]
    assert after.mean() - before.mean() > 5 * error, f"{before.mean():.2f} -> {after.mean():.2f} +- {error:.2f}"


def test_dpo_starts_at_exactly_log_2_and_fits_its_preferences():
    """Policy and reference start as the same array of log-probs."""
    model = transformer(0)
    tokens, mask = batch(6, 16)
    tokens[8:, :PROMPT] = tokens[:8, :PROMPT]

    def halves():
        sums = sequence_log_probs(model.log_probs(tokens), mask)
        return sums[:8], sums[8:]

    with no_grad():
        reference = [log_pi.data for log_pi in halves()]
    values = learn(model.parameters(), lambda: dpo_loss(*halves(), *reference, beta=0.5), 20)
    assert values[0] == np.log(np.float32(2))
    assert values[-1] < 0.05, f"{values[0]:.3f} -> {values[-1]:.3f}"
    assert dpo_metrics(*(log_pi.data for log_pi in halves()), *reference, beta=0.5)["rewards/accuracies"] == 1
