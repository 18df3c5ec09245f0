"""The whole lecture on a toy task: from random weights to an assistant in half a minute.

It uses the functions of plain.py; model.py only makes the initial weights.

    python -m minilm.plain          a number after it is the random seed: python -m minilm.plain 1

A line is a question and a reply. The reply is the question reversed, "bag=gab", or copied, "bag=bag", and it is
in small or in capital letters. Every reply has exactly 3 tokens, so there is no EOS. People want reversed letters,
and they prefer capitals: the gold reward of a reply is 2 for the right letters plus 1 for capitals. People compare by
it, with errors; the training stages never read it.

    1. pretraining     text: half of the replies are reversed, half are copied      -> base model
    2. finetuning      demonstrations: all replies are reversed, half in capitals   -> SFT model
    3. reward model    pairs of replies, compared by people, who make errors        -> proxy reward
    4. RLHF            maximise proxy reward - beta KL(policy || SFT model)         -> RLHF model
    5. DPO             the pairs of stage 3, no reward model and no sampling        -> DPO model

Printed:

    five numbers     means over each fifth of the training steps. R is proxy reward - beta KL
    bag=GAB ...      replies to three questions
    0.92±0.01        mean and standard error over all 512 questions, one fresh sample each. right and capitals are
                     shares of the replies, gold is the gold reward
    error            among new pairs with unequal gold rewards, the share in which the reward model (or a person)
                     prefers the reply with the lower gold reward
    pi*              the policy with the largest (twice the gold reward - beta KL), computed exactly

People choose with P = sigmoid(2 (difference of gold rewards)). So the proxy reward estimates twice the gold reward,
plus a constant for each question, and RLHF and DPO would both end at pi* with unlimited comparisons, unrestricted
models and complete training.
"""

import os
import sys
from collections.abc import Callable

import numpy as np

from minilm import ops, plain
from minilm.model import Config, RewardModel, Transformer
from minilm.plain import Parameters
from minilm.tensor import Tensor, no_grad

LETTERS = "abcdefghABCDEFGH="                # the capital of token i is token i + 8
EQUALS = LETTERS.index("=")
CONFIG = Config(vocab_size=len(LETTERS), width=32, layers=2, heads=4, kv_heads=2, context=7)
REPLY = np.array([0, 0, 0, 1, 1, 1])         # mask of the 6 log-probs of "bag=gab": 1 for "gab"
BETA = 0.5


def reply_mask(lines: np.ndarray) -> np.ndarray:
    """(n,7) -> (n,6)"""
    return np.tile(REPLY, (len(lines), 1))


# The task.

def text(n: int, share_reversed: float, rng: np.random.Generator) -> np.ndarray:
    """n lines of 7 tokens. The given share of the replies is reversed, the others are copied; half are in capitals."""
    letters = rng.integers(8, size=(n, 3))
    is_reversed = rng.random((n, 1)) < share_reversed
    in_capitals = rng.integers(2, size=(n, 1))
    reply = np.where(is_reversed, letters[:, ::-1], letters) + 8 * in_capitals          # (n,3)
    return np.concatenate([letters, np.full((n, 1), EQUALS), reply], axis=1)            # (n,7)


def gold_reward(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2 points for the right letters, 1 for capitals; no training step reads it. (n,7) -> points, right, capitals"""
    reply = lines[:, 4:]                                                                # (n,3)
    right = np.all((reply < EQUALS) & (reply % 8 == lines[:, 2::-1]), axis=1)           # (n)
    capitals = np.all((reply < EQUALS) & (reply >= 8), axis=1)                          # (n)
    return 2.0 * right + capitals, right, capitals


def answer(policy: Parameters, questions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sample a reply to each question: (n,4) -> lines (n,7)."""
    replies, _ = plain.generate(policy, questions, CONFIG, 3, rng)
    return np.concatenate([questions, replies], axis=1)


def reply_log_probs(policy: Parameters, lines: np.ndarray) -> Tensor:
    """log pi(y|x) of the reply y to the question x: (n,7) -> (n)."""
    return plain.sequence_log_probs(plain.log_probs(policy, lines, CONFIG), reply_mask(lines))


def compare(policy: Parameters, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sample two replies to each of n questions; a person prefers one. Returns the lines chosen and rejected (n,7).

    P(first is chosen) = sigmoid(2 (gold reward of the first - of the second)): 0.88 for a difference of 1 point.
    """
    questions = text(n, 1.0, rng)[:, :4]                                                # (n,4): "bag=", no reply
    first = answer(policy, questions, rng)
    second = answer(policy, questions, rng)
    difference = gold_reward(first)[0] - gold_reward(second)[0]                         # (n)
    first_is_chosen = (rng.random(n) < 1 / (1 + np.exp(-2 * difference)))[:, None]      # (n,1)
    return np.where(first_is_chosen, first, second), np.where(first_is_chosen, second, first)


# The five stages.

def train(title: str, parameters: Parameters, batch: Callable, steps: int, learning_rate: float) -> None:
    """batch() draws a batch and returns {"loss": Tensor}, with numbers to print if something else is to be printed.

    The learning rate falls linearly to 0.
    """
    print(title)
    state: dict = {}
    history = []
    for step in range(steps):
        numbers = batch()
        loss = plain.train_step(numbers.pop("loss"), parameters, state, learning_rate * (1 - step / steps))
        history.append(numbers or {"loss": loss})
    for name in history[0]:
        fifths = np.array_split([numbers[name] for numbers in history], 5)
        print(f"  {name:12s}", *(f"{fifth.mean():6.2f}" for fifth in fifths))


def pretrain(model: Parameters, steps: int, rng: np.random.Generator) -> None:
    def batch():
        lines = text(64, 0.5, rng)                                                      # (64,7)
        return {"loss": plain.sft_loss(plain.log_probs(model, lines, CONFIG), np.ones((64, 6)))}
    train("1. Pretraining", model, batch, steps, learning_rate=1e-2)


def train_sft(model: Parameters, steps: int, rng: np.random.Generator) -> None:
    def batch():
        lines = text(32, 1.0, rng)                                                      # (32,7)
        return {"loss": plain.sft_loss(plain.log_probs(model, lines, CONFIG), reply_mask(lines))}
    train("2. Supervised finetuning", model, batch, steps, learning_rate=5e-3)


def train_reward_model(model: Parameters, chosen: np.ndarray, rejected: np.ndarray, steps: int, rng) -> None:
    def batch():
        i = rng.integers(len(chosen), size=64)
        chosen_rewards = plain.reward(model, chosen[i], CONFIG)                         # (64)
        rejected_rewards = plain.reward(model, rejected[i], CONFIG)                     # (64)
        return {"loss": plain.reward_loss(chosen_rewards, rejected_rewards)}
    train("3. Reward model", model, batch, steps, learning_rate=3e-3)


def train_rlhf(policy: Parameters, reference: Parameters, reward_model: Parameters, steps: int, rng) -> None:
    """The value of the loss does not measure progress. R = proxy reward - beta KL does: its mean estimates J."""
    def batch():
        questions = np.repeat(text(16, 1.0, rng)[:, :4], 4, axis=0)                     # (64,4): each question 4 times
        lines = answer(policy, questions, rng)                                          # (64,7)
        policy_log_probs = plain.log_probs(policy, lines, CONFIG)                       # (64,6)
        with no_grad():
            log_pi = plain.sequence_log_probs(policy_log_probs, reply_mask(lines)).data     # (64)
            kl = log_pi - reply_log_probs(reference, lines).data                        # (64)
            rewards = plain.reward(reward_model, lines, CONFIG).data                    # (64)
        A = plain.advantages(rewards.reshape(16, 4), kl.reshape(16, 4), BETA)           # (16,4)
        loss = plain.policy_gradient_loss(policy_log_probs, A.reshape(64), reply_mask(lines))
        R = rewards - BETA * kl                                                         # (64)
        return {"loss": loss, "proxy reward": rewards.mean(), "KL": kl.mean(), "R": R.mean()}
    train("4. RLHF", policy, batch, steps, learning_rate=2e-3)


def train_dpo(policy: Parameters, reference: Parameters, chosen: np.ndarray, rejected: np.ndarray,
              steps: int, rng) -> None:
    with no_grad():
        reference_chosen = reply_log_probs(reference, chosen).data                      # (n)
        reference_rejected = reply_log_probs(reference, rejected).data                  # (n)

    def batch():
        i = rng.integers(len(chosen), size=64)
        policy_chosen = reply_log_probs(policy, chosen[i])                              # (64)
        policy_rejected = reply_log_probs(policy, rejected[i])                          # (64)
        loss = plain.dpo_loss(policy_chosen, policy_rejected, reference_chosen[i], reference_rejected[i], BETA)
        return {"loss": loss}
    train("5. DPO", policy, batch, steps, learning_rate=3e-4)


# The lecture.

def all_questions() -> np.ndarray:
    """(512,4)"""
    letters = np.indices((8, 8, 8)).reshape(3, 512).T                                   # (512,3)
    return np.insert(letters, 3, EQUALS, axis=1)


def report(name: str, policy: Parameters, rng: np.random.Generator, reference: Parameters | None = None) -> dict:
    """Sample a reply to each of the 512 questions. Prints three of them, and means with standard errors."""
    lines = answer(policy, all_questions(), rng)                                        # (512,7)
    points, right, capitals = gold_reward(lines)
    columns = {"right": right, "capitals": capitals, "gold": points}
    if reference is not None:
        with no_grad():
            columns["KL"] = reply_log_probs(policy, lines).data - reply_log_probs(reference, lines).data
    shown = lines[[0o106, 0o543, 0o024]]            # bag, fed, ace. Base 8, because the letters a to h are 0 to 7
    print(f"  {name:12s}", *("".join(LETTERS[token] for token in line) for line in shown))
    print(" " * 14, "  ".join(f"{key} {x.mean():.2f}±{x.std() / 512 ** 0.5:.2f}" for key, x in columns.items()))
    return {key: float(x.mean()) for key, x in columns.items()}


def errors(reward_model: Parameters, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Among pairs with unequal gold rewards: the share in which the reward model, or a person, prefers the worse."""
    gold = gold_reward(chosen)[0] - gold_reward(rejected)[0]
    with no_grad():
        proxy = plain.reward(reward_model, chosen, CONFIG).data - plain.reward(reward_model, rejected, CONFIG).data
    unequal = gold != 0
    return {"error": float((gold * proxy < 0)[unequal].mean()), "error of people": float((gold < 0)[unequal].mean())}


def optimum(reference: Parameters, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pi* = pi_ref exp(2 gold / beta) / Z: its expected gold reward and its KL, exactly. Questions (n,4) -> (n), (n)

    pi*/pi_ref depends on the gold reward alone, so the probabilities of the four gold rewards under pi_ref are enough.
    They follow from the probabilities of right letters (8 replies), of capitals (8^3 replies) and of both (1 reply).
    """
    n = len(questions)
    in_capitals = np.indices((2, 2, 2)).reshape(3, 8).T                                 # (8,3): 1 for a capital
    right_replies = questions[:, None, 2::-1] + 8 * in_capitals                         # (n,8,3)
    lines = np.concatenate([np.repeat(questions, 8, axis=0), right_replies.reshape(-1, 3)], axis=1)     # (8n,7)
    two_capitals = 8 + np.indices((8, 8)).reshape(2, 64).T                              # (64,2): how a reply can start
    starts = np.concatenate([np.repeat(questions, 64, axis=0), np.tile(two_capitals, (n, 1))], axis=1)  # (64n,6)
    with no_grad():
        p_replies = np.exp(reply_log_probs(reference, lines).data).reshape(n, 8)        # (n,8)
        p_next = ops.softmax(plain.transformer(reference, starts, CONFIG)).data         # (64n,6,V)
    row = np.arange(64 * n)
    p_first = p_next[row, 3, starts[:, 4]]                                              # (64n)
    p_second = p_next[row, 4, starts[:, 5]]                                             # (64n)
    p_third = p_next[:, 5, 8:16].sum(axis=-1)                                           # (64n): of any capital
    p_capitals = (p_first * p_second * p_third).reshape(n, 64).sum(axis=1)              # (n)
    p_right = p_replies.sum(axis=1)                                                     # (n)
    p_both = p_replies[:, 7]                                                            # (n)
    # Columns: gold reward 0, 1 (capitals only), 2 (right only), 3 (both).
    p_neither = 1 - p_right - p_capitals + p_both                                       # (n)
    pi_ref = np.stack([p_neither, p_capitals - p_both, p_right - p_both, p_both], axis=1)       # (n,4)
    gold = np.arange(4)
    tilted = pi_ref * np.exp(2 * gold / BETA)
    pi_star = tilted / tilted.sum(axis=1, keepdims=True)                                # (n,4)
    return pi_star @ gold, (pi_star * np.log(pi_star / pi_ref)).sum(axis=1)


def lecture(seed: int = 0, scale: float = 1.0) -> dict[str, dict[str, float]]:
    """All stages, with `scale` times as many steps. Returns the means of report, by model."""
    print("  Five numbers: means over each fifth of the training steps. ±: standard error.\n"
          "  right, capitals: shares of the replies. gold: gold reward. pi*: best policy.\n"
          f"  R: proxy reward - {BETA} KL. error: share of new pairs ordered wrongly.\n"
          "  More: python -m minilm.plain --help")
    rng = np.random.default_rng(seed)
    model = Transformer(CONFIG, rng, np.float64)
    results = {"random": report("random", model.parameters(), rng)}
    pretrain(model.parameters(), int(400 * scale), rng)
    results["base"] = report("base", model.parameters(), rng)
    train_sft(model.parameters(), int(50 * scale), rng)
    results["SFT"] = report("SFT", model.parameters(), rng)
    reference = model.parameters()

    chosen, rejected = compare(reference, 2000, rng)
    reward_model = RewardModel(model.copy(), rng).parameters()
    train_reward_model(reward_model, chosen, rejected, int(120 * scale), rng)
    error = results["reward model"] = errors(reward_model, *compare(reference, 500, rng))
    print(f"  error        {error['error']:6.2f}   (people: {error['error of people']:.2f})")

    policy = model.copy().parameters()
    train_rlhf(policy, reference, reward_model, int(80 * scale), rng)
    results["RLHF"] = report("RLHF", policy, rng, reference)

    policy = model.copy().parameters()
    train_dpo(policy, reference, chosen, rejected, int(160 * scale), rng)
    results["DPO"] = report("DPO", policy, rng, reference)

    parts = [optimum(reference, part) for part in np.split(all_questions(), 8)]         # in 8 parts, to save memory
    gold, kl = np.concatenate(parts, axis=1)                                            # (512), (512)
    results["pi*"] = {"gold": float(gold.mean()), "KL": float(kl.mean())}
    print(f"  {'pi*':12s} gold {gold.mean():.2f}  KL {kl.mean():.2f}")

    print("Change from the SFT model")
    for name in ("RLHF", "DPO"):
        change = {key: results[name][key] - results["SFT"][key] for key in ("right", "capitals", "gold")}
        print(f"  {name:12s}", "  ".join(f"{key} {difference:+.2f}" for key, difference in change.items()))
    return results


def main(words: list[str]) -> None:
    if words in (["--help"], ["-h"]):
        print(__doc__.strip())
    elif len(words) > 1 or not all(word.isdecimal() for word in words):
        print(f"error: {' '.join(words)}: expected one seed, a whole number", file=sys.stderr)
        sys.exit(2)
    else:
        lecture(*map(int, words))
    print(end="", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:                         # the program that reads the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # otherwise Python writes again at exit, and complains
        sys.exit(141)
