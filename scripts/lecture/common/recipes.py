"""Models that several experiments begin with, trained the same way in each; import after experiment.

The functions of (model, rng, ...) are for Row.trained, which keeps what they train for the other rows.
"""

import numpy as np

from common.early_stopping import keep_best
from minilm.evaluate import predicted_rewards
from minilm.model import Config, RewardModel, Transformer
from minilm.stages.sft import train_sft
from minilm.stages.dpo import train_dpo
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.reward_model import train_reward_model
from minilm.stages.train_state import TrainState
from worlds import digit_sums, instructions, strings
from worlds.replies import MODEL, ReplyWorld


def recognise_strings(model, rng, steps):
    """String tasks, two of them at first. Returns the curriculum's history."""
    course = strings.Curriculum()
    return course.follow(pretrain_on_documents(TrainState(model, rng), course.draw, steps, 16), model, rng)


def add_digits(model, rng, steps, corpus):
    """Sums by digit_sums.CURRICULUM, so many steps of each part of it; corpus: its name there. Returns the losses."""
    losses = []
    for count, stage in zip(steps, digit_sums.CURRICULUM):
        def documents(rng, size):
            return digit_sums.documents(rng, size, stage["examples"], stage["length"], getattr(digit_sums, corpus))
        training = TrainState(model, rng)
        steps_done = pretrain_on_documents(training, documents, count, stage["batch_size"], stage["learning_rate"])
        losses += [metrics["loss"] for metrics in steps_done]
    return losses


def follow_single_operations(model, rng, steps):
    """Lines about one operation each, with the loss on the answer. Returns the losses."""
    training = TrainState(model, rng, weight_decay=0.01)
    lessons = pretrain_on_documents(training, instructions.single_operations, steps, 64, 3e-3)
    return [metrics["loss"] for metrics in lessons]


def reply(model, rng, asked, steps):
    """Finetune on 4,000 demonstrations of replies to questions about `asked` words."""
    for _ in train_sft(TrainState(model, rng), *ReplyWorld(asked).demonstrations(rng, 4000), steps, 64, 3e-3):
        pass


def instructed(world, rng, steps):
    """A Transformer that answers the questions of a ReplyWorld as its demonstrators do: the reference of most rows."""
    model = Transformer(Config(**MODEL), rng)
    reply(model, rng, len(world.prompts[0]) - 1, steps)
    return model


def prefer(world, policy, reference, pairs, rng, steps, beta, rate=3e-4):
    """Train the policy by DPO on comparisons (p, chosen, rejected); reference: the log-probs (P,N) of its start."""
    p, *replies = pairs
    references = [reference[p, y].astype(np.float32) for y in replies]
    for _ in train_dpo(TrainState(policy, rng), *world.tokens_of(*pairs), *references, steps, 64, beta, rate):
        pass


def learned_rewards(world, model, rng, count, steps):
    """What a reward model, fitted to so many comparisons of the model's own replies, gives every reply: (P,N)."""
    reward_model = RewardModel(model.copy(), rng)
    compared = world.tokens_of(*world.comparisons(world.laws(model), world.gold, rng, count))
    for _ in train_reward_model(TrainState(reward_model, rng), *compared, steps, 64, 1e-3):
        pass
    return rewards_of(world, reward_model)


def stopped_reward_model(world, model, rng, pairs, steps):
    """A RewardModel from comparisons (p, chosen, rejected): the weights that predict a held-out fifth of them best."""
    reward_model, fifth = RewardModel(model.copy(), rng), len(pairs[0]) // 5
    prompts, chosen, rejected = world.tokens_of(*pairs)

    def held_out_loss():
        r = predicted_rewards(reward_model, prompts[:fifth] * 2, chosen[:fifth] + rejected[:fifth])
        return np.logaddexp(0, r[fifth:] - r[:fifth]).mean()

    rest = [part[fifth:] for part in (prompts, chosen, rejected)]
    keep_best(train_reward_model(TrainState(reward_model, rng), *rest, steps, 64, 2e-3), reward_model, held_out_loss)
    return reward_model


def rewards_of(world, reward_model):
    """What a RewardModel gives every reply, an array (P,N) in float64."""
    prompts = [prompt for prompt in world.prompts for _ in world.responses]
    rewards = predicted_rewards(reward_model, prompts, world.responses * len(world.prompts))
    return rewards.reshape(world.shape).astype(float)
