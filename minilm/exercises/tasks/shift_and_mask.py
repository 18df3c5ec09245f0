"""The shift and the mask: which log-probs belong to the response.

A row of tokens is prompt, response (with its EOS at the end), padding. The model reads token t and predicts token
t + 1, so n tokens have n - 1 predictions: column t of `targets` is the token that the logits at position t score. The
loss counts the predictions of response tokens alone, EOS included.

    tokens            (B, T), integers. A token of the response may have the same id as the padding
    prompt_lengths    (B,), number of prompt tokens of each row, at least 1
    lengths           (B,), number of prompt and response tokens together
    returns           targets (B, T-1), integers, and mask (B, T-1), 1 (or True) where the target is a response token
"""

import numpy as np

from minilm.data import make_batch
from minilm.exercises.task import Mistake, Task


def shift_and_mask(tokens, prompt_lengths, lengths) -> tuple:
    """The targets and their mask."""
    targets = tokens[:, 1:]
    place = np.arange(1, tokens.shape[1])                   # of each target in its row of tokens
    mask = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])
    return targets, mask


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"one row": (np.array([[5, 6, 7, 8, 9]]), np.array([2]), np.array([5])),
            "with padding": (np.array([[5, 6, 7, 1, 0, 0], [5, 6, 7, 8, 9, 1]]), np.array([2, 1]), np.array([4, 6])),
            "0 is a token of the response, too": (np.array([[5, 0, 0, 1, 0], [3, 0, 4, 0, 1]]), np.array([1, 2]),
                                                  np.array([4, 5])),
            "a long prompt and much padding": (np.array([[5, 6, 7, 8, 1, 0, 0, 0, 0], [5, 6, 7, 8, 9, 5, 6, 7, 1]]),
                                               np.array([3, 4]), np.array([5, 9]))}


def expected(tokens, prompt_lengths, lengths) -> tuple:
    prompts = [row[:start].tolist() for row, start in zip(tokens, prompt_lengths)]
    responses = [row[start:end].tolist() for row, start, end in zip(tokens, prompt_lengths, lengths)]
    return tokens[:, 1:], make_batch(prompts, responses, pad=0).target_mask


TASK = Task(
    solution=shift_and_mask, returns=("targets", "mask"), cases=cases, expected=expected,
    read="minilm/data.py, Batch and make_batch",
    hints=("Where in `tokens` does target t stand? Compare this place with the two lengths.",
           "targets = tokens[:, 1:]. Target t stands at place t + 1, and counts if prompt_length <= t + 1 < length."),
    mistakes=(
        Mistake("The mask is not shifted with the targets: column t is about token t + 1, not about token t.",
                "np.arange(1, tokens.shape[1])", "np.arange(tokens.shape[1] - 1)"),
        Mistake("The mask is shifted twice: column t is about token t + 1, not about token t + 2.",
                "np.arange(1, tokens.shape[1])", "np.arange(2, tokens.shape[1] + 1)"),
        Mistake("Padding counts: the upper end of the response is missing.", " & (place < lengths[:, None])", ""),
        Mistake("The prompt counts: the loss would train the model to write prompts.",
                "(place >= prompt_lengths[:, None]) & ", ""),
        Mistake("The last prompt token counts, too: the response begins at place prompt_length.",
                "place >= prompt_lengths[:, None]", "place >= prompt_lengths[:, None] - 1"),
        Mistake("The first padding token counts, too: the last response token stands at place length - 1.",
                "place < lengths[:, None]", "place <= lengths[:, None]"),
        Mistake("The prompt's length is added to `lengths`, which counts prompt and response together.",
                "place < lengths[:, None]", "place < (prompt_lengths + lengths)[:, None]"),
        Mistake("The mask is reversed: prompt and padding count, and the response does not.",
                "return targets, mask", "return targets, ~mask"),
        Mistake("The EOS is left out. The model would never learn to stop.", "place < lengths[:, None]",
                "place < lengths[:, None] - 1"),
        Mistake("The targets are the inputs: the model would learn to copy the token that it reads.", "tokens[:, 1:]",
                "tokens[:, :-1]"),
        Mistake("The first token of the response is left out. The last prompt token predicts it.",
                "place >= prompt_lengths[:, None]", "place > prompt_lengths[:, None]"),
        Mistake("Padding is recognised by its id. A response may hold this id; use the lengths.",
                "(place < lengths[:, None])", "(targets != 0)"),
        Mistake("The last column is dropped; n tokens have n - 1 targets, and no further one.",
                "return targets, mask", "return targets[:, :-1], mask[:, :-1]")))
