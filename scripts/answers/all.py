"""Answers to the questions that users of DPO, GRPO and RLHF ask, each tested by its experiment in this folder

    all.py                       every answer, and one page: runs/answers/index.html
    all.py --quick               a trial of every experiment: it runs, and decides nothing
    all.py --rows chosen_falls,token_mean --out runs/two
    all.py --readme runs/answers write the run in this folder into scripts/answers/README.md, and its figures
    all.py --table runs/answers  print what --readme would write
    all.py --seconds runs/answers  write the times of this run to scripts/answers/seconds.json

Writes claims.json, claims.md and index.html to the folder --out, anew after every experiment, beside the
files of the experiments. The experiments are made as those of the lecture (scripts/lecture).
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "lecture"))       # for common
from common.suite import Suite
from common.words import Words
from support.run_folder import main_guard

STAGES = {
    "DPO": ("chosen_falls", "sum_or_mean", "wrong_labels"),
    "KL divergence": ("kl_in_the_loss",),
    "Policy gradients": ("loss_and_progress", "token_mean", "off_policy_ratio"),
    "Verifiable rewards": ("verifiable_reward",),
}
HEADER = """# Questions people ask

Users of DPO, GRPO and RLHF ask these {claims} questions again and again. Each answer is one experiment in
this folder: in a world where all responses can be listed, so that expectations are sums, or with a small
model and several seeds. The outcome is about the rule that was tested.

"""
READING = """
## How to read it

- **shown**: the 95% confidence interval over the seeds lies within the required range, for every comparison
  of the rule.
- **not shown**: the interval of some comparison lies outside the required range.
- **undecided**: neither.
- **Decided by**: the comparison that is nearest to failing, with its mean and its interval.

The statistics are those of [the lecture's claims](../lecture/README.md#how-to-read-it). Five rules were
undecided in a first run, and more seeds were run for them: there a false "shown" has a probability of at most
5 %, not 2.5 %. An experiment's docstring has the answer, the test, the rule with its margins, the limits (with
the first run), and the papers.
"""
RUNNING = """
## How to run it

    python scripts/answers/all.py                       # all of them, and one page: runs/answers/index.html
    python scripts/answers/chosen_falls.py --out runs/chosen   # one: chosen_falls.png, chosen_falls.json, a table
    python scripts/answers/all.py --readme runs/answers # this file and its figures, from a run
"""
INTRODUCTION = (
    "Users of DPO, GRPO and RLHF ask these questions again and again. Each answer is an experiment in minilm, in a "
    "world where all responses can be listed, so that expectations are sums, or with a small model and several seeds. "
    "Beside the answer stands the rule that was tested, and the outcome is about the rule.")
WORDS = Words("Questions people ask", INTRODUCTION, "the answer", HEADER, READING, RUNNING, titles=True)
SUITE = Suite(Path(__file__).resolve().parent, STAGES, WORDS, __doc__, "runs/answers")

if __name__ == "__main__":
    sys.exit(main_guard(SUITE.main))
