"""Stage 2. Supervised finetuning (SFT): imitate demonstrated responses to instructions; only they have a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from minilm.data import check_dialogues
from minilm.objectives.sft import sft_loss
from minilm.packing import pack
from minilm.stages import plan
from minilm.stages.inputs import check_settings, checked_config
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, repeat, shards, stage


@stage
def train_sft(state: TrainState, prompts: Sequence, responses: Sequence, steps: int, batch_size: int,
              learning_rate: plan.Rate = 1e-3, microbatches: int | None = None,
              batches: Sequence | None = None) -> Iterator[Mapping]:
    """Finetune state.model on demonstrations, token lists as data.encode_dialogue gives them.

    batch_size demonstrations a step, drawn at random, in `microbatches` shards (None: one per worker); batches and a
    learning_rate that is a function: plan.py. The loss is the mean over the response tokens of the whole step.
    Yields {"loss", "grad_norm", "learning_rate", "trained_tokens": response tokens} after each step.
    Raises TypeError, ValueError and IndexError for settings out of range and for a bad demonstration anywhere in the
    data set (data.check_dialogues), before the first step.
    """
    check_settings("train_sft", steps, learning_rate, microbatches, batch_size=batch_size)
    config = checked_config("train_sft", state.model)
    check_dialogues("train_sft", config.vocab_size, config.context, prompts, responses=responses)
    plan.check_batches("train_sft", steps, batches, len(prompts))

    def step():
        drawn = plan.examples(state, batches, len(prompts), batch_size)
        total = float(sum(len(responses[i]) for i in drawn))

        def loss(model, rows):
            batch = pack([prompts[i] for i in rows], [responses[i] for i in rows], config.context)
            return sft_loss(model.response_log_probs(batch), batch.mask, total=total), None

        parts = [drawn[s] for s in shards(len(drawn), microbatches or state.workers)]
        rate = plan.rate(state, learning_rate, steps, warmup=20)
        return train_step(state, loss, parts, rate, "SFT", metrics=lambda _: {"trained_tokens": total},
                          drawn=[drawn, *(side[i] for side in (prompts, responses) for i in drawn.tolist())])
    return repeat(step, state, steps)
