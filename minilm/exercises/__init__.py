"""Exercises: write the mathematics of minilm yourself, one function at a time, with a grader.

    python -m minilm.exercises list              the tasks, by topic
    python -m minilm.exercises start all DIR     writes a file for each: specification, shapes, a hole
    python -m minilm.exercises check DIR         grades the files in it
    python -m minilm.exercises predict           questions: predict a number, then run

    tasks/       one file per task: specification, solution, inputs, mistakes that people make
    task.py      what a task consists of, and the file that `start` writes
    grading.py   compares a function with the right numbers, and recognises the mistakes
    process.py   runs somebody's file in a process of its own, with a time limit
    reference.py the right numbers, and those of the mistakes, computed before the file runs
    golden.py    golden vectors as further inputs
    cuda.py      the puzzles of the CUDA emulator as the last tasks
    predict.py   the questions to predict; questions/ has them

A mistake is known by its number: each task in NumPy lists wrong variants of its solution (task.Mistake). The grader
runs them on the same inputs, and a function that gives the numbers of a variant gets the hint of this mistake. The
grader checks numbers, it does not protect against a file that imports the solution or changes the grader.
Tests: tests/test_exercises.py, tests/test_exercises_command.py, tests/test_predictions.py.
"""


def inputs(task: str, case: str | None = None) -> tuple:
    """The arguments that the grader gives in a case, to try your function on. None: the first case.

    Raises LookupError for the name of another task or case.
    """
    from minilm.exercises import reference, task as parts, tasks
    cases = reference.Reference(tasks.load(task)).arguments
    if case is not None and case not in cases:
        raise LookupError(f"{task} has no case {case!r}; there are {', '.join(map(repr, cases))}")
    return parts.copies(cases[next(iter(cases)) if case is None else case])
