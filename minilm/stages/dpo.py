"""Stage 3, the direct way. DPO: two answers, one preferred, train the policy. No reward model, no sampling."""

from minilm import layers
from minilm.backend import concatenate
from minilm.objectives.dpo import dpo_loss, dpo_metrics
from minilm.optim import warmup_cosine
from minilm.packing import pack, packs
from minilm.stages.train_state import train_step, shards, stage
from minilm.tensor import no_grad


def summed_log_probs(model, part):
    """log pi(response | prompt) of each dialogue of a Pack: a Tensor (B,)."""
    return layers.sequence_log_probs(model.response_log_probs(part), part.mask)


def reference_log_probs(reference, prompts, responses, batch_size=64):
    """The same under a frozen model, as an array (N,). Compute it once and keep it: the reference never moves."""
    with no_grad():
        return concatenate([summed_log_probs(reference, part).data for part
                       in packs(prompts, responses, batch_size, reference.config.context)])


@stage
def train_dpo(training, prompts, chosen, rejected, reference_chosen, reference_rejected, steps, batch_size,
                      beta=0.1, learning_rate=3e-4, loss=dpo_loss, microbatches=None):
    """Train training.model, the policy, on comparisons: token lists, chosen[i] preferred to rejected[i].

    reference_chosen, reference_rejected: their summed log-probs under the reference, arrays (N,), from
    reference_log_probs. loss: of four arrays of summed log-probs and beta, as dpo_loss (with
    functools.partial for its options). microbatches: parts of a step, None for one a worker. Yields
    {"loss", "grad_norm", "learning_rate", "rewards/accuracies", "rewards/margins", "logps/chosen", ...}.
    """
    while training.step < steps:
        drawn = training.rng.integers(len(prompts), size=batch_size)
        parts = [drawn[s] for s in shards(batch_size, microbatches or training.workers)]

        def part_loss(policy, pairs):
            log_probs = summed_log_probs(policy, pack([prompts[i] for i in pairs] * 2,
                                                      [chosen[i] for i in pairs] + [rejected[i] for i in pairs],
                                                      policy.config.context))
            chosen_and_rejected = log_probs[:len(pairs)], log_probs[len(pairs):]
            references = reference_chosen[pairs], reference_rejected[pairs]
            report = [x.data for x in chosen_and_rejected] + [*references]
            return loss(*chosen_and_rejected, *references, beta=beta) * (len(pairs) / batch_size), report

        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(10, steps // 10 + 1))
        metrics, log_probs = train_step(training, part_loss, parts, rate, "preference tuning")
        yield {**metrics, **dpo_metrics(*map(concatenate, zip(*log_probs)), beta=beta)}
