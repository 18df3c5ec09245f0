"""Stage 1 for encoders: some tokens are hidden, and predicted from all that is left on both sides.

    L = - sum_t h_t log p(x_t | x, each hidden token replaced by <mask>) / sum_t h_t,    h_t = 1 if x_t is hidden

Devlin et al. 2018, arXiv:1810.04805 (BERT, masked language modelling). There 15% of all tokens are chosen, and of
these 10% stay as they are and 10% become random tokens, because finetuning never shows the mask. Here finetuning asks
at the mask, so each chosen token becomes one.
Tests: tests/test_masked_pretraining.py.
"""

import numpy as np

from minilm.layers import token_log_probs
from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.stages.train_state import train_step, shards, stage


def masked_log_probs(model, tokens, hidden, mask_token):
    """log p of every token (B,T), where those that are hidden (B,T) are not seen: only theirs mean anything."""
    seen = np.where(hidden, mask_token, tokens)
    return token_log_probs(model.hidden(seen), model.unembedding, tokens)


@stage
def masked_pretraining(training, draw, steps, batch_size, mask_token, share=0.15, learning_rate=3e-3,
                       microbatches=None):
    """Train training.model, which must be bidirectional, to fill in what is hidden.

    draw(rng, batch_size) gives tokens and mask, each (B,T); of the tokens where mask is 1, each is hidden with
    probability `share`. share 1 with the labels of examples as the mask is finetuning. Yields {"loss" in nats per
    hidden token, "grad_norm", "learning_rate", "trained_tokens"} a step. Raises ValueError for a causal model, or a
    step that hides nothing.
    """
    if training.model.config.causal:
        raise ValueError("a causal model sees one side alone; masked pretraining is for Config(causal=False)")
    while training.step < steps:
        tokens, mask = draw(training.rng, batch_size)
        hidden = mask.astype(bool) & (training.rng.random(tokens.shape) < share)
        total = float(hidden.sum())
        if not total:
            raise ValueError("no token was hidden in this step: raise share or batch_size")

        def loss(model, part):
            log_probs = masked_log_probs(model, tokens[part], hidden[part], mask_token)
            return sft_loss(log_probs, hidden[part], total=total), None

        parts = shards(len(tokens), microbatches or training.workers)
        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(50, steps // 10 + 1))
        metrics, _ = train_step(training, loss, parts, rate, "masked pretraining")
        yield {**metrics, "trained_tokens": total}
