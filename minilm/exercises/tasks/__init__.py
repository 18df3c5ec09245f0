"""The tasks, one file each, by topic. A file is read from the top: specification, solution, grading.

To add one: copy dpo_gradient.py and put its name into ORDER. The function has the name of the file. The specification
names every argument. Choose inputs on which no two mistakes give the same numbers:
`python -m pytest tests/test_exercises.py -k NAME` says whether each is noticed, and gets its own hint. A mistake that
people write in several ways, with different numbers, is task.forms. One that they make in two places at once (both
factors left out) is a mistake of its own: otherwise they are told of two.
"""

import importlib

from minilm.exercises.task import Task

ORDER = ("exp_vjp", "softmax", "log_sigmoid", "unbroadcast", "matmul_vjp", "softmax_vjp", "token_log_probs",
         "shift_and_mask", "sft_loss", "sft_gradient", "rms_norm_backward", "swiglu_backward", "attention",
         "attention_backward", "rope", "chunked_log_probs", "categorical", "decode_step", "adamw", "reward_loss",
         "reward_gradient", "k3", "leave_one_out", "policy_gradient_loss", "policy_gradient", "dpo_loss",
         "dpo_gradient", "best_of_n")


def load(name: str) -> Task:
    """A task by its name. Raises LookupError for another one."""
    if name not in ORDER:
        raise LookupError(f"no task {name!r}; there are {', '.join(ORDER)}")
    return importlib.import_module(f"minilm.exercises.tasks.{name}").TASK
