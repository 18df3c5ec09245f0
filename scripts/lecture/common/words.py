"""What a page and a table say of a folder of experiments, and the words for the lecture."""

import dataclasses

from common import korean
from common.glossary import IN_THE_TABLE


@dataclasses.dataclass(frozen=True)
class InKorean:
    """Of a page in Korean: its title, its introduction, what a claim is called, {number of a stage: title}."""
    title: str = ""
    introduction: str = ""
    claim: str = ""
    stages: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Words:
    """title, introduction   of the page (page.py)
    claim    what the sentence is called that an experiment tests, as the head of a column
    header, reading, running    texts of README.md, around its table (markdown.py)
    terms    the words of the table, {term: what it means}
    korean   of the page; without it the page has one language
    titles   whether the table has the titles of the experiments, which are questions
    """
    title: str
    introduction: str
    claim: str
    header: str
    reading: str
    running: str
    terms: dict[str, str] = dataclasses.field(default_factory=dict)
    korean: InKorean = InKorean()
    titles: bool = False


HEADER = """# The lecture, claim by claim

minilm follows the lecture "Prompting, Instruction Finetuning, and RLHF" of Stanford CS224N (2023; 2024 with
DPO). Each of its {claims} claims is one experiment in this folder. In Korean, as a walkthrough:
[강의를 따라 읽는 minilm](README.ko.md). Words of the table:

"""
READING = """
## How to read it

The lecture's claim is a sentence about large models. The rule is the sentence that was tested here, on
models with 7,000 to 181,000 parameters in small invented worlds. The outcome is about the rule. "Not
shown" means that the rule fails in this experiment; the lecture's claim can still be true.

- **shown**: the 95% confidence interval over the seeds lies within the required range, for every comparison
  of the rule. In rl_is_hard, three of five comparisons must hold, each with its 99% interval.
- **not shown**: the interval of some comparison lies outside the required range. This interval is
  wider than a 95% interval: for a rule of n comparisons its level is 1 - 0.05/n.
- **undecided**: neither, or the model did not learn the task that the rule is about.
- **Decided by**: the comparison that determines the outcome: its mean over the seeds, [its interval], and the
  range that the rule requires. The level of the interval is 95% unless another one is given. If a rule has
  several comparisons, the one that is nearest to failing, or fails most clearly, decides: the distance of its
  mean from the nearest limit of the range, divided by half the width of the interval, is the smallest
  (outside the range the distance is negative). In rl_is_hard the third largest decides.

If the effects of the seeds are independent and normal, a false "shown" has a probability of at most 2.5%
(one side of a 95% interval) per experiment, and a false "not shown" of at most 5% (all comparisons of the
rule together). So one wrong outcome in {claims} would be no surprise. The statistics are in
[intervals.py](common/intervals.py). An experiment's docstring has the claim, the test, the rule with its
margins, the limits, and the paper.
"""
RUNNING = """
## How to run it

    python scripts/lecture/all.py                      # all experiments, and one page: runs/claims/index.html
    python scripts/lecture/all.py --quick              # a trial: every experiment runs, none decides anything
    python scripts/lecture/dpo.py --out runs/dpo       # one experiment: dpo.png, dpo.json, a table
    python scripts/lecture/all.py --readme runs/claims # this file and its figures, from a run

`all.py --rounding float64,coretype,workers` repeats every experiment with other rounding errors and
compares the outcomes: with models in float64; with another matrix kernel of OpenBLAS (OPENBLAS_CORETYPE);
and with another number of worker processes, which must change nothing. "Every number" is without times and
memory. How to write an experiment:
[experiment.py](common/experiment.py).
"""
INTRODUCTION = ("From language model to assistant: each claim of the lecture is an experiment in minilm, with small "
                "models in small invented worlds, where the best possible result is known. A claim is a sentence about "
                "large models; beside it stands the rule that was tested here, and the outcome is about the rule.")
LECTURE = Words("The lecture, claim by claim", INTRODUCTION, "the lecture's claim", HEADER, READING, RUNNING,
                IN_THE_TABLE, InKorean(korean.TITLE, korean.INTRODUCTION, korean.CLAIM,
                                       dict(enumerate(korean.STAGES, 1))))
