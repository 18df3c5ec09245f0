"""The loss of supervised finetuning (and of pretraining).

    L = -(1/M) sum of log_probs where mask is 1,       M = the number of ones in the mask

Every response token of the batch has the same weight, whatever row it is in. Outside the mask, log_probs may hold
anything, NaN included: select, do not multiply.

    log_probs    (B, T), log pi of each predicted token
    mask         (B, T), bool
    returns      L, one number
"""

import numpy as np

from minilm.exercises.task import Mistake, Task, forms
from minilm.objectives import sft


def sft_loss(log_probs, mask) -> float:
    """The mean negative log-prob of the tokens where mask is 1."""
    return -np.where(mask, log_probs, 0.0).sum() / mask.sum()


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    log_probs = -rng.uniform(0.1, 3, size=(3, 4))
    mask = np.array([[False, True, True, True], [False, False, False, True], [True, True, False, False]])
    return {"one row": (np.array([[-1.0, -2.0, -3.0]]), np.array([[False, True, True]])),
            "rows of unequal length": (log_probs, mask),
            "NaN outside the mask": (np.where(mask, log_probs, np.nan), mask)}


def expected(log_probs, mask) -> float:
    return sft.sft_loss(log_probs, mask).item()


TASK = Task(
    solution=sft_loss, returns=("loss",), cases=cases, expected=expected, read="minilm/objectives/sft.py",
    golden=("sft_loss_masked_nan", {}, ("loss",)),
    hints=("Make the log-probs outside the mask 0 first. 0 times NaN is NaN.",
           "np.where(mask, log_probs, 0).sum() is the sum; divide by mask.sum() and change the sign."),
    mistakes=(
        Mistake("The log-probs are multiplied by the mask, and 0 times NaN is NaN. Select with np.where.",
                "np.where(mask, log_probs, 0.0)", "(mask * log_probs)"),
        Mistake("This is a mean over all columns. Divide by the number of tokens that the mask selects.",
                "/ mask.sum()", "/ mask.size"),
        Mistake("This is the mean of the rows' means: a token of a short response has more weight than others.",
                "-np.where(mask, log_probs, 0.0).sum() / mask.sum()",
                "-(np.where(mask, log_probs, 0.0).sum(axis=1) / mask.sum(axis=1)).mean()"),
        Mistake("The sign is missing: the loss is the negative log-prob, which training makes smaller.", "-np.where",
                "np.where"),
        Mistake("The sum is not divided by the number of tokens.", " / mask.sum()", ""),
        Mistake("The sum is divided by the number of rows. Then long responses have a larger gradient.", "mask.sum()",
                "len(mask)"),
        *forms("The mask is left out: prompt and padding are scored, too.",
               "np.where(mask, log_probs, 0.0).sum() / mask.sum()", "log_probs.mean()", "log_probs.sum() / mask.sum()",
               "log_probs.sum()", "log_probs.sum() / len(mask)", "np.nanmean(log_probs)"),
        Mistake("The mask is reversed: prompt and padding are scored, and the response is not.",
                "np.where(mask, log_probs, 0.0)", "np.where(mask, 0.0, log_probs)")))
