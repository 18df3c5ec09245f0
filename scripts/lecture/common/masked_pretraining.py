"""Stage 1 for encoders: some tokens are hidden and predicted from the tokens on both sides.

    L = - sum_t h_t log p(x_t | x, each hidden token replaced by <mask>) / sum_t h_t,    h_t = 1 if x_t is hidden

Devlin et al. 2018, arXiv:1810.04805 (BERT, masked language modelling). They choose 15% of the tokens; of these, 10%
stay unchanged and 10% become random tokens, because their finetuning never shows the mask. Here finetuning predicts at
the mask, so every chosen token is replaced by the mask.
Tests: tests/test_masked_pretraining.py.
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm import checks
from minilm.layers import token_log_probs
from minilm.model import Transformer
from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, shards, stage
from minilm.tensor import Tensor


def masked_log_probs(model: Transformer, tokens: np.ndarray, hidden: np.ndarray, mask_token: int) -> Tensor:
    """log p of every token (B,T), with the hidden tokens (B,T) replaced. Meaningful at hidden positions only."""
    visible = np.where(hidden, mask_token, tokens)
    return token_log_probs(model.hidden(visible), model.unembedding, tokens)


@stage
def masked_pretraining(training: TrainState, draw: Callable, steps: int, batch_size: int, mask_token: int,
                       share: float = 0.15, learning_rate: float = 3e-3, microbatches: int | None = None
                       ) -> Iterator[dict]:
    """Train training.model, which must be bidirectional, to predict hidden tokens.

    draw(rng, batch_size) returns tokens and mask, (B,T) each. Each token with mask 1 is hidden with probability
    `share`. share = 1 with a mask on the labels is finetuning. Yields {"loss" in nats per hidden token, "grad_norm",
    "learning_rate", "trained_tokens"} per step. Raises ValueError for a causal model, and if a step hides no token.
    """
    if training.model.config.causal:
        raise ValueError("masked pretraining needs a bidirectional model, this one is causal; use Config(causal=False)")
    checks.number("masked_pretraining", "share", share, at_least=0, at_most=1)
    checks.integer("masked_pretraining", "batch_size", batch_size, at_least=1)
    checks.number("masked_pretraining", "learning_rate", learning_rate, at_least=0)
    while training.step < steps:
        tokens, mask = draw(training.rng, batch_size)
        hidden = checks.mask("masked_pretraining", mask, tokens.shape) & (training.rng.random(tokens.shape) < share)
        total = float(hidden.sum())
        if not total:
            raise ValueError(f"no token was hidden in this step (share {share}, batch_size {batch_size}): "
                             "raise share or batch_size")

        def loss(model, part):
            log_probs = masked_log_probs(model, tokens[part], hidden[part], mask_token)
            return sft_loss(log_probs, hidden[part], total=total), None

        parts = shards(len(tokens), microbatches or training.workers)
        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(50, steps // 10 + 1))
        yield train_step(training, loss, parts, rate, "masked pretraining", drawn=[tokens, hidden],
                         metrics=lambda _, total=total: {"trained_tokens": total})
