"""results.json of a finished run of assistant.py, checked when it is read: figures.py shows any file that passes."""

import reprlib
from pathlib import Path

from support.json_files import fault, read_shaped
from support.run_folder import UsageError
from support.tables import COLUMNS, NAMES

ADVICE = "Give folders of finished runs of scripts/assistant.py. Is it a run of an older version? Run it again."
ROW = {"stage": str, **{name: float for column in COLUMNS for name in (column, f"{column}_se")}}
POLICIES = [{**ROW, "beta": float}]
RLHF_STEPS = [{"step": int, "reward": float, "kl_sequence": float, "gold_reward": float, "gold_reward_se": float}]
LOSSES = [{"step": int, "loss": float}]
ACCURACIES = [{"step": int, "accuracy": float}]
SHAPE = {
    "rows": [ROW], "frontier": {"rlhf": POLICIES, "dpo": POLICIES},
    "examples": ([{"question": str, "answer": str}], []), "main_beta": float,
    "history": {"base": LOSSES, "sft": LOSSES, "reward_model": ACCURACIES},
    "turning_point": {"step": int, "turned_down": bool,
                      **dict.fromkeys(("kl_sequence", "gold_reward", "last_gold_reward"), float)},
    **dict.fromkeys(("held_out_questions", "distinct_questions", "seed", "workers", "parameters"), int),
    **dict.fromkeys(("reward_model_accuracy", "reward_model_accuracy_se", "base_completion_accuracy",
                     "base_completion_accuracy_se", "scale"), float), "seconds": {str: float}, "trial": bool}


def shape_of_history(model: str) -> list:
    """The shape of the metrics of one model's training, as json_files.fault takes it."""
    return RLHF_STEPS if model.startswith("rlhf") else ACCURACIES if model == "reward_model" else LOSSES


def read_results(path: Path) -> dict:
    """The content of results.json. Raises UsageError, with the first fault, if it cannot be shown."""
    results = read_shaped(path, SHAPE, ADVICE)
    if found := _fault(results):
        raise UsageError(f"{path}: damaged, or of another version: {found}. {ADVICE}")
    return results


def _fault(results):
    """What does not fit together among values that each have their type, or None."""
    stages = [row["stage"] for row in results["rows"]]
    if sorted(stages) != sorted(NAMES):
        return f"its rows are of the stages {reprlib.repr(stages)}, not {', '.join(NAMES)}"
    beta = results["main_beta"]
    unpenalised = f"rlhf-beta-{min(row['beta'] for row in results['frontier']['rlhf'])}"
    for value, shape, place in (
            (results["rows"][stages.index("best_of_n")], {"n": int}, "the row best_of_n"),
            (results["history"], {f"rlhf-beta-{beta}": RLHF_STEPS, unpenalised: RLHF_STEPS,
                                  f"dpo-beta-{beta}": LOSSES}, "history")):
        if found := fault(value, shape, place):
            return found
    steps = results["history"][unpenalised]
    if not 0 <= results["turning_point"]["step"] - steps[0]["step"] < len(steps):
        return f"the turning point is step {results['turning_point']['step']}, outside the {len(steps)} steps"
    for example in results["examples"]:
        for stage in NAMES:
            answer = example.get(stage, ["", True])
            if not isinstance(answer, list) or len(answer) != 2 or fault(answer[0], str) or fault(answer[1], bool):
                return f"the answer of {stage} to an example is {reprlib.repr(answer)}"
    return None
