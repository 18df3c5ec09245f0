"""Stage 3a. The reward model: predict which of two answers people prefer."""

from minilm.backend import concatenate
from minilm.objectives.reward import reward_loss, reward_metrics
from minilm.optim import warmup_cosine
from minilm.packing import pack
from minilm.stages.train_state import train_step, shards, stage


@stage
def train_reward_model(training, prompts, chosen, rejected, steps, batch_size, learning_rate=1e-3, centering=0.01,
                     microbatches=None):
    """Train training.model, a RewardModel, on comparisons: token lists, chosen[i] preferred to rejected[i].

    batch_size comparisons a step, in microbatches parts (None: one a worker).
    Yields {"loss", "grad_norm", "learning_rate", "accuracy", "margin", ...} of the step's batch.
    """
    context = training.model.transformer.config.context
    while training.step < steps:
        drawn = training.rng.integers(len(prompts), size=batch_size)
        parts = [drawn[s] for s in shards(batch_size, microbatches or training.workers)]

        def loss(model, pairs):
            # Chosen and rejected in one forward, which sees each prompt once.
            rewards = model.packed_rewards(pack([prompts[i] for i in pairs] * 2,
                                                [chosen[i] for i in pairs] + [rejected[i] for i in pairs],
                                                context, last=True))
            r_chosen, r_rejected = rewards[:len(pairs)], rewards[len(pairs):]
            share = len(pairs) / batch_size
            return reward_loss(r_chosen, r_rejected, centering=centering) * share, (r_chosen.data, r_rejected.data)

        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(10, steps // 10 + 1))
        metrics, rewards = train_step(training, loss, parts, rate, "reward modelling")
        yield {**metrics, **reward_metrics(*map(concatenate, zip(*rewards)))}
