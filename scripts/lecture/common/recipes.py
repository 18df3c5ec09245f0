"""Models that several experiments start from, trained in the same way for each. Import it after experiment.

A function of (model, rng, ...) is for Row.trained, which stores the trained model for the other experiments.
"""

import numpy as np

from common.early_stopping import keep_best
from minilm.evaluate import predicted_rewards
from minilm.model import Config, RewardModel, Transformer
from minilm.stages.dpo import train_dpo
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.reward_model import train_reward_model
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from worlds import digit_sums, instructions, strings
from worlds.replies import MODEL, ReplyWorld

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def recognise_strings(model: Transformer, rng: np.random.Generator, steps: int) -> list[list[float]]:
    """Pretrain on string tasks, two of them at first. Returns the history of the curriculum."""
    course = strings.Curriculum()
    return course.follow(pretrain_on_documents(TrainState(model, rng), course.draw, steps, 16), model, rng)


def add_digits(model: Transformer, rng: np.random.Generator, steps: tuple[int, int], corpus: str) -> list[float]:
    """Pretrain on sums with digit_sums.CURRICULUM: steps for each part; corpus: its name in digit_sums.

    Returns the losses.
    """
    losses = []
    for count, part in zip(steps, digit_sums.CURRICULUM):
        def documents(rng, size):
            return digit_sums.documents(rng, size, part["examples"], part["length"], getattr(digit_sums, corpus))
        stage = pretrain_on_documents(TrainState(model, rng), documents, count, part["batch_size"],
                                      part["learning_rate"])
        losses += [metrics["loss"] for metrics in stage]
    return losses


def follow_single_operations(model: Transformer, rng: np.random.Generator, steps: int) -> list[float]:
    """Train on lines with one operation each, with the loss on the answer. Returns the losses."""
    training = TrainState(model, rng, weight_decay=0.01)
    stage = pretrain_on_documents(training, instructions.single_operations, steps, 64, 3e-3)
    return [metrics["loss"] for metrics in stage]


def finetune_on_replies(model: Transformer, rng: np.random.Generator, words: int, steps: int) -> None:
    """SFT on 4,000 demonstrations of replies to questions about `words` words."""
    for _ in train_sft(TrainState(model, rng), *ReplyWorld(words).demonstrations(rng, 4000), steps, 64, 3e-3):
        pass


def sft_model(world: ReplyWorld, rng: np.random.Generator, steps: int, dtype: np.dtype = np.float32) -> Transformer:
    """A Transformer finetuned on the demonstrations of a ReplyWorld: the reference of most experiments."""
    model = Transformer(Config(**MODEL), rng, dtype)
    finetune_on_replies(model, rng, len(world.prompts[0]) - 1, steps)
    return model


def finetune_by_dpo(world: ReplyWorld, policy: Transformer, reference: np.ndarray, pairs: Pairs,
                    rng: np.random.Generator, steps: int, beta: float, learning_rate: float = 3e-4) -> None:
    """Train the policy by DPO on comparisons (p, chosen, rejected); reference: log pi_ref (P,Y) of its start."""
    p, *replies = pairs
    references = [reference[p, y].astype(policy.dtype) for y in replies]
    for _ in train_dpo(TrainState(policy, rng), *world.tokens_of(*pairs), *references, steps, 64, beta, learning_rate):
        pass


def proxy_rewards(world: ReplyWorld, model: Transformer, rng: np.random.Generator, count: int, steps: int
                  ) -> np.ndarray:
    """Train a reward model on `count` comparisons of replies of the model. Returns its reward of every reply, (P,Y)."""
    reward_model = RewardModel(model.copy(), rng)
    pairs = world.tokens_of(*world.comparisons(world.log_distributions(model), world.gold, rng, count))
    for _ in train_reward_model(TrainState(reward_model, rng), *pairs, steps, 64, 1e-3, centering=0.01):
        pass
    return reward_table(world, reward_model)


def early_stopped_reward_model(world: ReplyWorld, model: Transformer, rng: np.random.Generator, pairs: Pairs,
                               steps: int) -> RewardModel:
    """Train a RewardModel on four fifths of the comparisons (p, chosen, rejected).

    It keeps the weights with the lowest loss on the other fifth.
    """
    reward_model = RewardModel(model.copy(), rng)
    fifth = len(pairs[0]) // 5
    prompts, chosen, rejected = world.tokens_of(*pairs)

    def held_out_loss():
        r = predicted_rewards(reward_model, prompts[:fifth] * 2, chosen[:fifth] + rejected[:fifth])
        return np.logaddexp(0, r[fifth:] - r[:fifth]).mean()

    rest = [part[fifth:] for part in (prompts, chosen, rejected)]
    keep_best(train_reward_model(TrainState(reward_model, rng), *rest, steps, 64, 2e-3, centering=0.01),
              reward_model, held_out_loss)
    return reward_model


def reward_table(world: ReplyWorld, reward_model: RewardModel) -> np.ndarray:
    """The reward of every reply under a RewardModel: (P,Y) in float64."""
    prompts = [prompt for prompt in world.prompts for _ in world.responses]
    rewards = predicted_rewards(reward_model, prompts, world.responses * len(world.prompts))
    return rewards.reshape(world.shape).astype(float)
