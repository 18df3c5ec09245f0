"""Supervised finetuning: cross-entropy on the tokens of the demonstrated response.

    L = - sum_t m_t log pi(y_t | y_<t) / M,       M = sum_t m_t over the accumulation window

    dL / d log pi_t = - m_t / M,        dL / d logits_t = m_t (softmax(logits_t) - onehot(y_t)) / M

(the second by layers.token_log_probs, which this loss is put on top of).

Every response token weighs the same, however it is split into sequences and micro-batches:
with gradient accumulation M is the sum of the masks of all micro-batches and is passed as
`total`. Normalising each micro-batch by its own M (as several libraries did) makes tokens
of short micro-batches count more. The mask is 1 on response tokens and their EOS, 0 on
prompt and padding. Pretraining is the same loss with a mask of ones on all real tokens.
Tests: tests/test_sft.py.
"""

from minilm.backend import array_module, to_numpy
from minilm.tensor import primitive


@primitive
def sft_loss(log_probs, mask, total=None):
    """Mean negative log-prob of the tokens that the mask selects: a scalar.

    log_probs (B,T); mask (B,T), 0 or 1; total: the mask's sum over the whole accumulation
    window, by default this mask's. A log-prob outside the mask may be NaN.
    Raises ValueError if nothing is selected (unless a total is given: a micro-batch may be empty).
    """
    xp = array_module(log_probs)
    selected = xp.asarray(mask).astype(bool)
    if selected.shape != log_probs.shape:
        raise ValueError("log_probs and mask must have the same shape (B,T)")
    total = float(selected.sum() if total is None else total)
    if total <= 0:
        raise ValueError("the response mask selects no token: there is nothing to learn from "
                         "(an empty response, or a response cut off with its prompt?)")
    def vjp(dloss):
        return -dloss * selected.astype(log_probs.dtype) / total
    return -xp.where(selected, log_probs, 0).sum() / total, vjp


def sft_metrics(log_probs, mask, predictions=None, targets=None, entropies=None):
    """Floats under TRL's names, over selected tokens only: `loss`, `mean_token_accuracy` (if
    predictions and targets (B,T) are given), `entropy` (if given, per token in nats); and how many
    they are, `trained_tokens` (TRL's num_tokens counts prompts too). All are 0 if nothing is selected."""
    selected = to_numpy(mask).astype(bool)
    def mean(values):
        values = to_numpy(values)
        return float(values[selected].sum() / max(1, selected.sum()))

    metrics = {"loss": -mean(log_probs), "trained_tokens": float(selected.sum())}
    if predictions is not None:
        metrics["mean_token_accuracy"] = mean(to_numpy(predictions) == to_numpy(targets))
    if entropies is not None:
        metrics["entropy"] = mean(entropies)
    return metrics
