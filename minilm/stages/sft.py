"""Stage 2. Instruction finetuning: imitate demonstrated answers, with the loss on the answer."""

from minilm.objectives.sft import sft_loss
from minilm.optim import warmup_cosine
from minilm.packing import pack
from minilm.stages.train_state import train_step, shards, stage


@stage
def train_sft(training, prompts, responses, steps, batch_size, learning_rate=1e-3, microbatches=None):
    """Finetune training.model on demonstrations, token lists as of data.encode_dialogue.

    batch_size demonstrations a step, drawn at random, in microbatches parts (None: one a worker); the loss is the mean
    over the response tokens of the whole step. Yields {"loss", "grad_norm", "learning_rate",
    "trained_tokens"} a step, the last being the response tokens.
    """
    context = training.model.config.context
    while training.step < steps:
        drawn = training.rng.integers(len(prompts), size=batch_size)
        parts = [drawn[s] for s in shards(batch_size, microbatches or training.workers)]
        total = float(sum(len(responses[i]) for i in drawn))

        def loss(model, rows):
            part = pack([prompts[i] for i in rows], [responses[i] for i in rows], context)
            return sft_loss(model.response_log_probs(part), part.mask, total=total), None

        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(20, steps // 10 + 1))
        metrics, _ = train_step(training, loss, parts, rate, "instruction tuning")
        yield {**metrics, "trained_tokens": total}
