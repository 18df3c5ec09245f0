"""All stages, from random weights to an assistant, with plain.py alone, on a task that the eye can check.

    python -m minilm.toy            or python -m minilm.plain; a number behind it is the random seed

A line of text is a question and a reply. The reply is the question reversed, "bag=gab", or copied, "bag=bag",
in small or in capital letters. People want the letters reversed, and they prefer capitals.

    pretraining      text: half of the replies are reversed, half are copied       -> the base model
    finetuning       demonstrations: all replies are reversed                      -> the SFT model
    reward model     pairs of replies, one preferred by a person, who may err      -> the reward model
    RLHF             maximise the reward minus beta KL(policy || SFT model)        -> the RLHF model
    DPO              the same pairs, without a reward model and without sampling   -> the DPO model
"""

import sys

import numpy as np

from minilm.model import Config, RewardModel, Transformer
from minilm.plain import (Parameters, advantages, dpo_loss, generate, log_probs, policy_gradient_loss, reward, reward_loss,
                          sequence_log_probs, sft_loss, train_step)
from minilm.tensor import Tensor, no_grad

VOCABULARY = "abcdefghABCDEFGH="
CONFIG = Config(vocab_size=17, width=32, layers=2, heads=4, kv_heads=2, context=7)
REPLY = np.array([0, 0, 0, 1, 1, 1])        # the mask of the 6 log-probs of "bag=gab": 1 for the letters of "gab"
BETA = 0.5


# The task.

def text(n: int, share_reversed: float, rng: np.random.Generator) -> np.ndarray:
    """n lines (n,7). The given share of the replies is reversed; half of them are in capitals."""
    letters = rng.integers(8, size=(n, 3))
    is_reversed = rng.random((n, 1)) < share_reversed
    in_capitals = rng.integers(2, size=(n, 1))
    reply = np.where(is_reversed, letters[:, ::-1], letters) + 8 * in_capitals          # (n,3)
    return np.concatenate([letters, np.full((n, 1), VOCABULARY.index("=")), reply], axis=1)


def gold_reward(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2 points for the right letters and 1 for capitals; and both apart. (n,7) -> (n) each"""
    reply = lines[:, 4:]                                                                # (n,3)
    right = ((reply < 16) & (reply % 8 == lines[:, 2::-1])).all(axis=1)
    capitals = ((reply < 16) & (reply >= 8)).all(axis=1)
    return 2.0 * right + capitals, right, capitals


def answer(policy: Parameters, questions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Questions (n,4), each with a reply sampled from the policy: (n,7)."""
    replies, _ = generate(policy, questions, CONFIG, 3, rng)
    return np.concatenate([questions, replies], axis=1)


def reply_log_probs(policy: Parameters, lines: np.ndarray) -> Tensor:
    """log pi(y|x) of the reply y to the question x in each line: (n,7) -> (n)."""
    return sequence_log_probs(log_probs(policy, lines, CONFIG), REPLY)


def compare(policy: Parameters, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n pairs of replies, chosen and rejected, (n,7) each. A person prefers a reply with probability
    sigmoid(2 (its gold reward - the other's)): a point more is preferred 88 times in 100."""
    questions = text(n, 1.0, rng)[:, :4]
    first = answer(policy, questions, rng)
    second = answer(policy, questions, rng)
    difference = gold_reward(first)[0] - gold_reward(second)[0]
    first_is_chosen = (rng.random(n) < 1 / (1 + np.exp(-2 * difference)))[:, None]
    return np.where(first_is_chosen, first, second), np.where(first_is_chosen, second, first)


# The five stages. Each trains the model it is given, and prints the mean loss of each fifth of its steps.

def train(parameters: Parameters, loss, steps: int, learning_rate: float) -> None:
    """loss() draws a new batch and returns the loss on it; the learning rate falls linearly to 0."""
    state = {}
    losses = []
    for step in range(steps):
        losses.append(train_step(loss(), parameters, state, learning_rate * (1 - step / steps)))
    print("   loss ", *(f"{np.mean(fifth):7.3f}" for fifth in np.array_split(losses, 5)))


def pretrain(model: Parameters, steps: int, rng: np.random.Generator) -> None:
    def loss():
        return sft_loss(log_probs(model, text(64, 0.5, rng), CONFIG), np.ones((64, 6)))
    train(model, loss, steps, learning_rate=1e-2)


def train_sft(model: Parameters, steps: int, rng: np.random.Generator) -> None:
    def loss():
        return sft_loss(log_probs(model, text(32, 1.0, rng), CONFIG), np.tile(REPLY, (32, 1)))
    train(model, loss, steps, learning_rate=5e-3)


def train_reward_model(model: Parameters, chosen: np.ndarray, rejected: np.ndarray, steps: int, rng) -> None:
    def loss():
        i = rng.integers(len(chosen), size=64)
        return reward_loss(reward(model, chosen[i], CONFIG), reward(model, rejected[i], CONFIG))
    train(model, loss, steps, learning_rate=3e-3)


def train_rlhf(policy: Parameters, reference: Parameters, reward_model: Parameters, steps: int, rng) -> None:
    def loss():
        questions = np.repeat(text(16, 1.0, rng)[:, :4], 4, axis=0)                     # 16 questions, 4 replies each
        lines = answer(policy, questions, rng)                                          # (64,7)
        policy_log_probs = log_probs(policy, lines, CONFIG)                             # (64,6)
        with no_grad():
            kl = sequence_log_probs(policy_log_probs, REPLY).data - reply_log_probs(reference, lines).data
            rewards = reward(reward_model, lines, CONFIG).data                          # (64)
        A = advantages(rewards.reshape(16, 4), kl.reshape(16, 4), BETA)                 # (16,4)
        return policy_gradient_loss(policy_log_probs, A.reshape(64), REPLY)
    train(policy, loss, steps, learning_rate=2e-3)


def train_dpo(policy: Parameters, reference: Parameters, chosen: np.ndarray, rejected: np.ndarray, steps: int, rng) -> None:
    with no_grad():
        reference_chosen = reply_log_probs(reference, chosen).data                      # (n)
        reference_rejected = reply_log_probs(reference, rejected).data                  # (n)

    def loss():
        i = rng.integers(len(chosen), size=64)
        return dpo_loss(reply_log_probs(policy, chosen[i]), reply_log_probs(policy, rejected[i]),
                        reference_chosen[i], reference_rejected[i], BETA)
    train(policy, loss, steps, learning_rate=3e-4)


# The whole lecture.

def report(name: str, policy: Parameters, rng, reference: Parameters | None = None,
           reward_model: Parameters | None = None) -> dict[str, float]:
    """Ask all 512 questions once. Returns the means, and prints them with their standard errors."""
    questions = np.insert(np.indices((8, 8, 8)).reshape(3, 512).T, 3, VOCABULARY.index("="), axis=1)
    lines = answer(policy, questions, rng)                                              # (512,7)
    gold, right, capitals = gold_reward(lines)
    columns = {"right": right, "capitals": capitals, "gold reward": gold}
    if reference is not None:
        with no_grad():
            columns["proxy reward"] = reward(reward_model, lines, CONFIG).data
            columns["KL"] = reply_log_probs(policy, lines).data - reply_log_probs(reference, lines).data
    print(f"   {name:6s}", *("".join(VOCABULARY[token] for token in line) for line in lines[[70, 355, 20]]))
    print("         ", ", ".join(f"{key} {x.mean():.2f}±{x.std() / 512 ** 0.5:.2f}" for key, x in columns.items()))
    return {key: float(x.mean()) for key, x in columns.items()}


def lecture(seed: int = 0, scale: float = 1.0) -> dict[str, dict[str, float]]:
    """All stages, with `scale` times as many steps. Returns the means of report by model."""
    rng = np.random.default_rng(seed)
    model = Transformer(CONFIG, rng, np.float64)
    results = {"random": report("random", model.parameters(), rng)}
    print("1. Pretraining")
    pretrain(model.parameters(), int(400 * scale), rng)
    results["base"] = report("base", model.parameters(), rng)
    print("2. Supervised finetuning")
    train_sft(model.parameters(), int(120 * scale), rng)
    reference = model.parameters()
    results["SFT"] = report("SFT", reference, rng)
    print("3. Reward model")
    chosen, rejected = compare(reference, 2000, rng)
    reward_model = RewardModel(model.copy(), rng).parameters()
    train_reward_model(reward_model, chosen, rejected, int(150 * scale), rng)
    results["SFT"] = report("SFT", reference, rng, reference, reward_model)
    print("4. RLHF")
    policy = model.copy().parameters()
    train_rlhf(policy, reference, reward_model, int(80 * scale), rng)
    results["RLHF"] = report("RLHF", policy, rng, reference, reward_model)
    print("5. DPO")
    policy = model.copy().parameters()
    train_dpo(policy, reference, chosen, rejected, int(200 * scale), rng)
    results["DPO"] = report("DPO", policy, rng, reference, reward_model)
    return results


if __name__ == "__main__":
    lecture(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
