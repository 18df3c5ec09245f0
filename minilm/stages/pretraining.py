"""Stage 1. Pretraining: predict the next token of plain text."""

from minilm.data import windows
from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.stages.training import optimise


def pretraining(training, stream, steps, batch_size, length, learning_rate=3e-3, micro_batches=1):
    """Train training.model on random windows of a stream of tokens (N,), up to `steps` steps in all.

    batch_size windows of `length` + 1 tokens a step, in micro_batches parts. Every position counts.
    Yields {"loss" in nats per token, "grad_norm", "learning_rate", "num_tokens"} a step.
    """
    while training.step < steps:
        tokens = windows(stream, training.rng, batch_size, length + 1)
        parts = [tokens[i::micro_batches] for i in range(micro_batches)]
        losses = (sft_loss(training.model.log_probs(part), part[:, 1:] >= 0, total=batch_size * length)
                  for part in parts)
        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(50, steps // 10 + 1))
        yield {**optimise(training, losses, rate, "pretraining"), "num_tokens": float(batch_size * length)}
