"""Stage 3, the direct way. DPO: train the policy on pairs of responses. No reward model, no sampling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from minilm import checks, layers
from minilm.backend import concatenate
from minilm.data import check_dialogues
from minilm.fast.workers import parallel_map
from minilm.model import Transformer
from minilm.objectives.dpo import dpo_loss, dpo_metrics
from minilm.packing import Pack, pack, packs
from minilm.stages import plan
from minilm.stages.inputs import check_settings, checked_config
from minilm.stages.reference import ReferenceLogProbs, checked_log_probs
from minilm.stages.step import checked_loss, train_step
from minilm.stages.train_state import TrainState, repeat, shards, stage
from minilm.tensor import Tensor, no_grad

# What a loss may have as parameters: log-probs and lengths of the responses, arrays (B,), and beta.
LOG_PROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
LENGTHS = ("chosen_lengths", "rejected_lengths")


def summed_log_probs(model: Transformer, batch: Pack) -> Tensor:
    """log pi(y|x), summed over the tokens of y, for each dialogue of a Pack: (B,)."""
    return layers.sequence_log_probs(model.response_log_probs(batch), batch.mask)


def reference_log_probs(reference: Transformer, prompts: Sequence, responses: Sequence, batch_size: int = 64,
                        workers: int = 1) -> ReferenceLogProbs:
    """The same for a frozen model, as an array (N,). Compute it once, because the reference never changes.

    The array keeps the digests of the dialogues and of the model, which train_dpo compares (stages/reference.py).
    workers: processes that share the batches. Raises as train_sft does.
    """
    checks.integer("reference_log_probs", "batch_size", batch_size, at_least=1)
    checks.integer("reference_log_probs", "workers", workers, at_least=1)
    config = checked_config("reference_log_probs", reference, "reference")
    check_dialogues("reference_log_probs", config.vocab_size, config.context, prompts, responses=responses)
    with no_grad():
        values = concatenate(parallel_map(lambda batch: summed_log_probs(reference, batch).data,
                                          list(packs(prompts, responses, batch_size, config.context)), workers))
    return ReferenceLogProbs.of(values, reference, prompts, responses)


@stage
def train_dpo(state: TrainState, prompts: Sequence, chosen: Sequence, rejected: Sequence,
              reference_chosen: np.ndarray, reference_rejected: np.ndarray, steps: int, batch_size: int,
              beta: float = 0.1, learning_rate: plan.Rate = 3e-4, loss: Callable = dpo_loss,
              microbatches: int | None = None, batches: Sequence | None = None) -> Iterator[Mapping]:
    """Train state.model, the policy, on comparisons: token lists, chosen[i] preferred to rejected[i].

    reference_chosen, reference_rejected  summed log-probs under the reference, arrays (N,), from reference_log_probs.
                  Of arrays that were made in another way, only the number and the values are checked
    loss          any function of policy_chosen, policy_rejected, reference_chosen, reference_rejected (summed
                  log-probs (B,)), chosen_lengths, rejected_lengths (in tokens, (B,)) and beta, or of some of these.
                  It is called with the parameters that it names (with **options: log-probs and beta);
                  functools.partial sets its other options. The metrics are scaled by beta in any case.
                  Every worker calls it, so its value may depend on its arguments alone
    microbatches  shards of a step, None for one per worker
    batches, and a learning_rate that is a function: plan.py
    Yields {"loss", "grad_norm", "learning_rate", "rewards/accuracies", "rewards/margins", "logps/chosen", ...}.
    Raises TypeError, ValueError and IndexError before the first step: as train_sft does; for reference log-probs that
    are not finite, above 0, or of other dialogues; for a loss with a parameter of another name and no default, or with
    a known one already set. Later, for a loss that gives no scalar Tensor.
    """
    check_settings("train_dpo", steps, learning_rate, microbatches, batch_size=batch_size)
    checks.number("train_dpo", "beta", beta, above=0)
    names = loss_parameters(loss)
    config = checked_config("train_dpo", state.model)
    check_dialogues("train_dpo", config.vocab_size, config.context, prompts, chosen=chosen, rejected=rejected)
    reference_chosen, reference_rejected = checked_log_probs(
        "train_dpo", prompts, chosen=(chosen, reference_chosen), rejected=(rejected, reference_rejected))
    plan.check_batches("train_dpo", steps, batches, len(prompts))

    def step():
        drawn = plan.examples(state, batches, len(prompts), batch_size)

        def pair_loss(policy, pairs):
            responses = [chosen[i] for i in pairs] + [rejected[i] for i in pairs]
            log_probs = summed_log_probs(policy, pack([prompts[i] for i in pairs] * 2, responses, config.context))
            sides = [log_probs[:len(pairs)], log_probs[len(pairs):], reference_chosen[pairs], reference_rejected[pairs]]
            lengths = np.array([len(response) for response in responses], log_probs.dtype).reshape(2, -1)
            given = {**dict(zip(LOG_PROBS, sides)), **dict(zip(LENGTHS, lengths)), "beta": beta}
            report = [sides[0].data.copy(), sides[1].data.copy(), reference_chosen[pairs], reference_rejected[pairs]]
            value = checked_loss("train_dpo", loss(**{name: given[name] for name in names}))
            return value * (len(pairs) / len(drawn)), report

        parts = [drawn[s] for s in shards(len(drawn), microbatches or state.workers)]
        rate = plan.rate(state, learning_rate, steps, warmup=10)
        return train_step(
            state, pair_loss, parts, rate, "DPO",
            drawn=[drawn, reference_chosen[drawn], reference_rejected[drawn],
                   *(side[i] for side in (prompts, chosen, rejected) for i in drawn.tolist())],
            metrics=lambda log_probs: dpo_metrics(*map(concatenate, zip(*log_probs)), beta=beta))
    return repeat(step, state, steps)


def loss_parameters(loss: Callable) -> list[str]:
    """The names among LOG_PROBS, LENGTHS and beta that a loss takes. Raises ValueError as train_dpo does."""
    known = (*LOG_PROBS, *LENGTHS, "beta")
    fixed = [name for name in getattr(loss, "keywords", {}) if name in known]
    if fixed:
        raise ValueError(f"train_dpo sets '{fixed[0]}' of its loss: pass it to train_dpo instead of functools.partial")
    parameters = inspect.signature(loss).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return [*LOG_PROBS, "beta"]
    unknown = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
               and (p.name not in known or p.kind is p.POSITIONAL_ONLY)]
    if unknown or not any(p.name in LOG_PROBS[:2] for p in parameters):
        wrong = (f"its parameter '{unknown[0]}' is none of them, or positional-only" if unknown
                 else "it takes no log-probs of the policy")
        raise ValueError(f"train_dpo calls a loss with the parameters that it names, out of {', '.join(known)}; "
                         f"{wrong}. Rename it, or set it with functools.partial")
    return [p.name for p in parameters if p.name in known]
