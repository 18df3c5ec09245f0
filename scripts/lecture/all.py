"""All claims of the lecture, each tested by its experiment in this folder, and one page with the results

    all.py                       every experiment
    all.py --quick               a trial of every experiment: it runs, and decides nothing
    all.py --rows dpo,rlhf --out runs/two
    all.py --rounding float64,coretype,workers       are the outcomes the same under other roundings?
    all.py --readme runs/claims  write the run in this folder into scripts/lecture/README.md, and its figures
    all.py --table runs/claims   print what --readme would write
    all.py --seconds runs/claims write the times of this run to scripts/lecture/seconds.json

Writes claims.json, claims.md and index.html to the folder --out, anew after every experiment, beside the
files of the experiments. With --rounding every experiment runs once more per rounding, in
OUT/rounding/NAME, and rounding.md compares the outcomes: float64 models; another matrix kernel of OpenBLAS
(OPENBLAS_CORETYPE); another number of workers, which must change nothing.
"""

import sys
from pathlib import Path

from common.suite import Suite
from common.words import LECTURE
from support.run_folder import main_guard

STAGES = {
    "Stage 1. Pretraining, and learning in context":
        ("pretrain", "in_context", "context_limit", "needs_gradient", "encoder_vs_decoder", "cot_few_shot",
         "cot_zero_shot"),
    "Stage 2. Instruction finetuning":
        ("instruct", "unseen_tasks", "multiple_choice", "demo_cost", "uniform_penalty"),
    "Stage 3. Optimising for human preference":
        ("sampling", "reward_model", "unlabelled", "few_labels", "pairwise", "rlhf", "kl_penalty",
         "rl_is_hard", "imperfect_preference", "dpo", "rlhf_vs_dpo"),
}
SUITE = Suite(Path(__file__).resolve().parent, STAGES, LECTURE, __doc__, "runs/claims")

if __name__ == "__main__":
    sys.exit(main_guard(SUITE.main))
