"""Stage 3a. The reward model: predict which of two responses people prefer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from minilm import checks
from minilm.backend import concatenate
from minilm.data import check_dialogues
from minilm.objectives.reward import reward_loss, reward_metrics
from minilm.packing import pack
from minilm.stages import plan
from minilm.stages.inputs import check_settings, checked_config
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, repeat, shards, stage


@stage
def train_reward_model(state: TrainState, prompts: Sequence, chosen: Sequence, rejected: Sequence, steps: int,
                       batch_size: int, learning_rate: plan.Rate = 1e-3, centering: float = 0.0,
                       microbatches: int | None = None, batches: Sequence | None = None) -> Iterator[Mapping]:
    """Train state.model, a RewardModel, on comparisons: token lists, chosen[i] preferred to rejected[i].

    batch_size comparisons a step, in `microbatches` shards (None: one per worker); batches and a learning_rate that is
    a function: plan.py. centering: the weight of
    (r_chosen + r_rejected)^2, as in objectives.reward.reward_loss; 0, as in TRL, unless given.
    The body is trained too: it is the Transformer that RewardModel(transformer, rng) was made from. Give it
    transformer.copy() unless the Transformer itself is to change.
    Yields {"loss", "grad_norm", "learning_rate", "accuracy", "margin", ...} of each step's batch.
    Raises TypeError, ValueError and IndexError as train_sft does, and for another model than a RewardModel.
    """
    check_settings("train_reward_model", steps, learning_rate, microbatches, batch_size=batch_size)
    checks.number("train_reward_model", "centering", centering, at_least=0)
    config = checked_config("train_reward_model", state.model, method="packed_rewards")
    check_dialogues("train_reward_model", config.vocab_size, config.context, prompts, chosen=chosen, rejected=rejected)
    plan.check_batches("train_reward_model", steps, batches, len(prompts))

    def step():
        drawn = plan.examples(state, batches, len(prompts), batch_size)

        def loss(model, pairs):
            # Chosen and rejected in one forward, in which each prompt is computed once.
            responses = [chosen[i] for i in pairs] + [rejected[i] for i in pairs]
            rewards = model.packed_rewards(pack([prompts[i] for i in pairs] * 2, responses, config.context, last=True))
            r_chosen, r_rejected = rewards[:len(pairs)], rewards[len(pairs):]
            share = len(pairs) / len(drawn)
            return reward_loss(r_chosen, r_rejected, centering=centering) * share, (r_chosen.data, r_rejected.data)

        parts = [drawn[s] for s in shards(len(drawn), microbatches or state.workers)]
        rate = plan.rate(state, learning_rate, steps, warmup=10)
        return train_step(
            state, loss, parts, rate, "reward model",
            drawn=[drawn, *(side[i] for side in (prompts, chosen, rejected) for i in drawn.tolist())],
            metrics=lambda rewards: reward_metrics(*map(concatenate, zip(*rewards))))
    return repeat(step, state, steps)
