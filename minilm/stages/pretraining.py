"""Stage 1. Pretraining: predict the next token, of a long text or of documents that are drawn for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from minilm import checks
from minilm.data import windows
from minilm.objectives.sft import sft_loss
from minilm.stages import plan
from minilm.stages.inputs import check_settings, checked_config, checked_documents
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, repeat, shards, stage


def pretrain(state: TrainState, stream: np.ndarray, steps: int, batch_size: int, length: int,
             learning_rate: plan.Rate = 3e-3, microbatches: int | None = None) -> Iterator[Mapping]:
    """Train state.model on random windows of a stream of tokens (N,), up to `steps` steps in all.

    batch_size windows of `length` + 1 tokens a step; every position counts. Yields as pretrain_on_documents does.
    Raises TypeError, ValueError and IndexError for settings out of range, and for a stream that is no integers of the
    vocabulary or shorter than a window, before the first step.
    """
    check_settings("pretrain", steps, learning_rate, microbatches, batch_size=batch_size)
    config = checked_config("pretrain", getattr(state, "model", state), method="log_probs")
    checks.integer("pretrain", "length", length, at_least=1, below=config.context + 1)
    stream = checks.token_ids("pretrain", "stream", stream, config.vocab_size)
    if stream.ndim != 1:
        raise ValueError(f"pretrain: stream has shape {stream.shape}; it must be (N,), as data.make_stream gives it")
    windows(stream, np.random.default_rng(0), 1, length + 1)        # raises if the stream is shorter than one

    def draw(rng, count):
        tokens = windows(stream, rng, count, length + 1)
        return tokens, np.ones(tokens.shape)
    return pretrain_on_documents(state, draw, steps, batch_size, learning_rate, microbatches)


@stage
def pretrain_on_documents(state: TrainState, draw: Callable, steps: int, batch_size: int,
                          learning_rate: plan.Rate = 3e-3, microbatches: int | None = None) -> Iterator[Mapping]:
    """Train state.model on documents: draw(rng, batch_size) gives tokens and mask, each (B,T).

    mask: 1 on tokens to predict. The loss is their mean over the whole step. The first token of a document has no
    context, so it never counts. draw is called by every worker, so it must take its random numbers from rng alone.
    microbatches: shards of a step, None for one per worker.
    Yields {"loss" in nats per token, "grad_norm", "learning_rate", "trained_tokens"} after each step.
    Raises TypeError, ValueError and IndexError for settings out of range, before the first step, and for a drawn batch
    as inputs.checked_documents does.
    """
    check_settings("pretrain_on_documents", steps, learning_rate, microbatches, batch_size=batch_size)
    config = checked_config("pretrain_on_documents", state.model, method="log_probs")

    def step():
        tokens, mask = checked_documents("pretrain_on_documents", draw(state.rng, batch_size), config)
        targets = mask[:, 1:]
        total = float(targets.sum())

        def loss(model, shard):
            return sft_loss(model.log_probs(tokens[shard]), targets[shard], total=total), None

        rate = plan.rate(state, learning_rate, steps, warmup=50)
        return train_step(state, loss, shards(len(tokens), microbatches or state.workers), rate, "pretraining",
                          drawn=[tokens, mask], metrics=lambda _: {"trained_tokens": total})
    return repeat(step, state, steps)
