"""Stage 1. Pretraining: predict the next token, of a long text or of documents that are made up on the way."""

import numpy as np

from minilm.data import windows
from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.stages.train_state import train_step, shards, stage


def pretrain(training, stream, steps, batch_size, length, learning_rate=3e-3, microbatches=None):
    """Train training.model on random windows of a stream of tokens (N,), up to `steps` steps in all.

    batch_size windows of `length` + 1 tokens a step; every position counts. Yields as pretrain_on_documents does.
    """
    def draw(rng, count):
        tokens = windows(stream, rng, count, length + 1)
        return tokens, np.ones(tokens.shape)
    return pretrain_on_documents(training, draw, steps, batch_size, learning_rate, microbatches)


@stage
def pretrain_on_documents(training, draw, steps, batch_size, learning_rate=3e-3, microbatches=None):
    """Train training.model on documents: draw(rng, batch_size) gives tokens and mask, each (B,T).

    mask: 1 on the tokens that are to be predicted. The loss is their mean over the whole step; the first token of a
    document is predicted by nothing and never counts. microbatches: parts of a step, None for one a worker.
    Yields {"loss" in nats per token, "grad_norm", "learning_rate", "trained_tokens"} a step.
    """
    while training.step < steps:
        tokens, mask = draw(training.rng, batch_size)
        targets = mask[:, 1:]
        total = float(targets.sum())

        def loss(model, part):
            return sft_loss(model.log_probs(tokens[part]), targets[part], total=total), None

        parts = shards(len(tokens), microbatches or training.workers)
        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(50, steps // 10 + 1))
        metrics, _ = train_step(training, loss, parts, rate, "pretraining")
        yield {**metrics, "trained_tokens": total}
