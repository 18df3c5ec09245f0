"""Stage 1. Pretraining: predict the next token, of a long text or of documents that are drawn for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from minilm.data import windows
from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.stages.train_state import TrainState, shards, stage, train_step


def pretrain(state: TrainState, stream: np.ndarray, steps: int, batch_size: int, length: int,
             learning_rate: float = 3e-3, microbatches: int | None = None) -> Iterator[dict]:
    """Train state.model on random windows of a stream of tokens (N,), up to `steps` steps in all.

    batch_size windows of `length` + 1 tokens a step; every position counts. Yields as pretrain_on_documents does.
    """
    def draw(rng, count):
        tokens = windows(stream, rng, count, length + 1)
        return tokens, np.ones(tokens.shape)
    return pretrain_on_documents(state, draw, steps, batch_size, learning_rate, microbatches)


@stage
def pretrain_on_documents(state: TrainState, draw: Callable, steps: int, batch_size: int, learning_rate: float = 3e-3,
                          microbatches: int | None = None) -> Iterator[dict]:
    """Train state.model on documents: draw(rng, batch_size) gives tokens and mask, each (B,T).

    mask: 1 on tokens to predict. The loss is their mean over the whole step. The first token of a document has no
    context, so it never counts. microbatches: shards of a step, None for one per worker.
    Yields {"loss" in nats per token, "grad_norm", "learning_rate", "trained_tokens"} after each step.
    """
    while state.step < steps:
        tokens, mask = draw(state.rng, batch_size)
        targets = mask[:, 1:]
        total = float(targets.sum())

        def loss(model, shard):
            return sft_loss(model.log_probs(tokens[shard]), targets[shard], total=total), None

        rate = warmup_cosine(state.step, steps, learning_rate, warmup=min(50, steps // 10 + 1))
        metrics, _ = train_step(state, loss, shards(len(tokens), microbatches or state.workers), rate, "pretraining")
        yield {**metrics, "trained_tokens": total}
