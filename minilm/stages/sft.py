"""Stage 2. Supervised finetuning (SFT): imitate demonstrated responses to instructions; only they have a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.packing import pack
from minilm.stages.train_state import TrainState, shards, stage, train_step


@stage
def train_sft(state: TrainState, prompts: Sequence, responses: Sequence, steps: int, batch_size: int,
              learning_rate: float = 1e-3, microbatches: int | None = None) -> Iterator[dict]:
    """Finetune state.model on demonstrations, token lists as data.encode_dialogue gives them.

    batch_size demonstrations a step, drawn at random, in `microbatches` shards (None: one per worker). The loss is the
    mean over the response tokens of the whole step.
    Yields {"loss", "grad_norm", "learning_rate", "trained_tokens": response tokens} after each step.
    """
    context = state.model.config.context
    while state.step < steps:
        drawn = state.rng.integers(len(prompts), size=batch_size)
        total = float(sum(len(responses[i]) for i in drawn))

        def loss(model, rows):
            batch = pack([prompts[i] for i in rows], [responses[i] for i in rows], context)
            return sft_loss(model.response_log_probs(batch), batch.mask, total=total), None

        batches = [drawn[s] for s in shards(batch_size, microbatches or state.workers)]
        rate = warmup_cosine(state.step, steps, learning_rate, warmup=min(20, steps // 10 + 1))
        metrics, _ = train_step(state, loss, batches, rate, "SFT")
        yield {**metrics, "trained_tokens": total}
