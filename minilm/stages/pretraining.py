"""Stage 1. Pretraining: predict the next token of plain text."""

import numpy as np

from minilm.data import windows
from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.stages.training import optimise, split, stage


@stage
def pretraining(training, stream, steps, batch_size, length, learning_rate=3e-3, micro_batches=None):
    """Train training.model on random windows of a stream of tokens (N,), up to `steps` steps in all.

    batch_size windows of `length` + 1 tokens a step, in micro_batches parts (None: one a worker).
    Every position counts.
    Yields {"loss" in nats per token, "grad_norm", "learning_rate", "trained_tokens"} a step.
    """
    while training.step < steps:
        tokens = windows(stream, training.rng, batch_size, length + 1)
        parts = [tokens[part] for part in split(batch_size, micro_batches or training.workers)]

        def loss(model, part):
            return sft_loss(model.log_probs(part), np.ones(part[:, 1:].shape), total=batch_size * length), None

        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(50, steps // 10 + 1))
        metrics, _ = optimise(training, loss, parts, rate, "pretraining")
        yield {**metrics, "trained_tokens": float(batch_size * length)}
