"""The puzzles of the CUDA emulator as tasks. minilm.kernels.emulator.puzzles has their texts, checker and solutions."""

from pathlib import Path

from minilm.exercises.grading import NOT_BEGUN, Verdict
from minilm.exercises.task import commands

TITLES = {"cuda_sums": "Sums of rows in CUDA, in shared memory",
          "cuda_softmax": "An online softmax in CUDA, with shuffles in a warp",
          "cuda_attention": "A tile of FlashAttention in CUDA"}
HINTS = {
    "cuda_sums": ("Each thread first adds its own numbers t, t + 128, .. in a register, writes the sum to shared "
                  "memory, and all threads wait. If columns is 5, most sums are 0.",
                  "for (half = 64; half > 0; half /= 2): threads below half add the sum at t + half to their own, then "
                  "all 128 threads wait (the barrier stands outside the if)."),
    "cuda_softmax": ("Each thread keeps a pair (m, d), which starts at (-inf, 0), and joins (x, 1) for each number.",
                     "Join with the other threads for n = 16, 8, 4, 2, 1; read both m and d of the other thread before "
                     "either is changed. exp(-inf - -inf) is NaN: two empty pairs need a case of their own."),
    "cuda_attention": ("A thread without a query must still load its column of the tile and wait at both barriers: "
                       "only the reading of q and the writing of o depend on i < queries.",
                       "For each key: highest = max(m, score), shrink = exp(m - highest), p = exp(score - highest); "
                       "d = d shrink + p, o = o shrink + p v. A barrier before the tile is used and one after it.")}


def _name(task):
    return task.removeprefix("cuda_")


def text(task: str, folder: str = "DIR") -> str:
    """The text that `start` writes: the puzzle, with the commands below its words."""
    from minilm.kernels.emulator import puzzles
    words, blank, code = puzzles.task(_name(task)).partition("\n\n")
    return words + "\n//\n" + "\n".join(f"//     {line}" for line in commands(task, folder)) + blank + code


def solution(task: str) -> str:
    """Our kernel."""
    from minilm.kernels.emulator import puzzles
    return puzzles.solution(_name(task))


def check(task: str, path: Path) -> Verdict:
    """The verdict of the emulator, or that it cannot run here. Raises OSError for a file that cannot be read."""
    from minilm.kernels import emulator
    from minilm.kernels.emulator import puzzles
    from minilm.kernels.emulator.fault import explained
    if "YOUR CODE HERE" in path.read_text("utf-8"):
        return NOT_BEGUN
    if reason := emulator.available():
        return Verdict(False, f"not checked: {reason}")
    try:
        return Verdict(True, puzzles.check(_name(task), path).replace(f"{_name(task)}: ", "", 1))
    except emulator.Fault as fault:
        advice = puzzles.advice(fault)
        return Verdict(False, f"wrong: {explained(fault)}" + f"\n{advice}" * bool(advice))
    except emulator.Unsupported as error:
        return Verdict(False, f"not graded, although it may be right CUDA: {error}")
    except (puzzles.Unsolved, emulator.CompileError) as error:
        return Verdict(False, f"wrong: {error}")
