"""Supervised finetuning (SFT): raise the probability of a demonstrated response.

Symbols, and how to read the code (@primitive, vjp, xp): objectives/__init__.py.

s_1, ..., s_n is a prompt x, then the demonstrated response y with its EOS, then padding. The mask m_t is 1 on
the tokens of y, and 0 on prompt and padding. Here t counts from the start of the prompt. log pi(s_t) is
short for log pi(s_t | s_1, ..., s_{t-1}); where m_t = 1, s_t is a token of y, and this is log pi(y_t) of the
other files.

    L = -(1/M) sum_t m_t log pi(s_t),       M = sum_t m_t

Both sums run over t and over all B sequences. Gradient:

    dL / d log pi(s_t) = -m_t / M
    dL / d logits_t    = (m_t / M) ( softmax(logits_t) - onehot(s_t) )

logits_t are the V logits that score s_t, one for each token v of the vocabulary; onehot(v) is the vector with 1
at entry v and 0 elsewhere. The first line is the derivative of a sum. The second follows by the chain rule:
with z = logits_t, log pi(v) is z_v - log sum_u exp(z_u), where u runs over the vocabulary, and its gradient in
z is onehot(v) - softmax(z). If the logits themselves were the parameters, a step of gradient descent would move
logits_t by a multiple of onehot(s_t) - softmax(logits_t): the logit of s_t would rise, and every other logit
would fall in proportion to the probability of its token. A step in theta moves logits_t differently, because
the logits of all positions depend on the same theta.
`sft_loss` computes the first line, `minilm.layers.token_log_probs` the second.

Shift: the logits that score s_t are computed at position t - 1. `model.log_probs(tokens)` therefore belongs
to tokens[:, 1:], and its mask is mask[:, 1:]. Both are (B,T); T = n - 1 is the number of their columns.

Accumulation: M counts the tokens of all microbatches between two steps of the optimiser. Then every response
token has the same weight, however the tokens are split into sequences and microbatches. Pass M as `total`. If
each microbatch is divided by its own M, the tokens of short microbatches have a larger weight.

Pretraining is the same loss with m_t = 1 on all real tokens.
Tests: tests/test_sft.py.
"""

import numpy as np

from minilm import checks
from minilm.backend import array_module, to_numpy
from minilm.tensor import Tensor, primitive


@primitive
def sft_loss(log_probs: Tensor, mask: np.ndarray, total: float | None = None):
    """Mean negative log-prob, in nats, of the tokens that the mask selects: a scalar.

    log_probs  (B,T), log pi(s_t) of each predicted token; may be NaN outside the mask
    mask       (B,T), 0 or 1: m_t of the same tokens, no labels such as -100 and no weights
    total      M, the sum of the masks of the whole accumulation window; None: the sum of this mask
    Raises ValueError for shapes other than these, another mask, and if M is not above 0 (with a total, a microbatch
    may be empty).
    """
    xp = array_module(log_probs)
    selected = xp.asarray(checks.mask("sft_loss", mask, log_probs.shape, hint="log_probs has that shape: "
                                      "model.log_probs(tokens) scores tokens[:, 1:], so pass mask[:, 1:] with it"))
    token_count = float(selected.sum() if total is None else checks.number("sft_loss", "total", total, above=0))
    if not token_count:
        raise ValueError(f"the mask {selected.shape} selects no token. Check for a response that is empty or cut off; "
                         "for one microbatch of several, pass total")
    loss = -xp.where(selected, log_probs, 0).sum() / token_count
    def vjp(dloss):
        return -dloss * selected.astype(log_probs.dtype) / token_count
    return loss, vjp


def sft_metrics(log_probs: np.ndarray, mask: np.ndarray, predictions: np.ndarray | None = None,
                targets: np.ndarray | None = None, entropies: np.ndarray | None = None) -> dict[str, float]:
    """Means over the selected tokens, under TRL's names. All arrays are (B,T); all metrics are 0 if none is selected.

    loss                 negative log-prob, in nats per token
    trained_tokens       the number of selected tokens (TRL's num_tokens counts prompts too)
    mean_token_accuracy  fraction of predictions equal to targets, if both are given
    entropy              of the next-token distributions, in nats per token, if given
    Raises ValueError for shapes other than these, another mask, and predictions without targets.
    """
    checks.same_shape("sft_metrics", log_probs=log_probs, mask=mask, predictions=predictions, targets=targets,
                      entropies=entropies)
    if (predictions is None) != (targets is None):
        raise ValueError("sft_metrics: predictions and targets are compared; pass both, or neither")
    selected = checks.mask("sft_metrics", to_numpy(mask))
    def mean(values):
        values = to_numpy(values)
        return float(values[selected].sum() / max(1, selected.sum()))

    metrics = {"loss": -mean(log_probs), "trained_tokens": float(selected.sum())}
    if predictions is not None:
        metrics["mean_token_accuracy"] = mean(to_numpy(predictions) == to_numpy(targets))
    if entropies is not None:
        metrics["entropy"] = mean(entropies)
    return metrics
