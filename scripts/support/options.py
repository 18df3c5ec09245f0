"""The command line of assistant.py."""

import argparse
import os
from collections.abc import Iterable

import numpy as np

from minilm.backend import to_device
from minilm.parallel import launched
from minilm.stages.train_state import workers_for
from minilm.world import tasks
from support.command_line import MOST_WORKERS, Parser
from support.run_folder import UsageError

MAX_SCALE = 50          # a longer history does not fit into the header of a checkpoint
# A smaller --scale is a trial run: pretraining is too short. Accuracy of the SFT model by scale (seeds 0, 0, 0, 3):
# 0.03 at 0.1, 0.09 at 0.3, 0.15 at 0.4, 0.63 at 1.
TRIAL_BELOW = 0.5


def parse(description: str, sizes: Iterable[str], tokens_of_a_step: int) -> argparse.Namespace:
    """The options. Raises UsageError, which names the option and its limits."""
    options = parser_of(description, sizes).parse_args()
    if not 0 < options.scale <= MAX_SCALE:
        raise UsageError(f"--scale {options.scale} must be above 0 and at most {MAX_SCALE}; 0.1 is a tenth of the "
                         "steps")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must not be negative")
    if options.workers is None:
        options.workers = workers_for(tokens_of_a_step) if options.device == "cpu" else 1
    if not 1 <= options.workers <= MOST_WORKERS:
        raise UsageError(f"--workers {options.workers} must be from 1 to {MOST_WORKERS}; this machine has "
                         f"{os.cpu_count()} cores")
    if options.device == "gpu":
        check_gpu(options.workers)
    return options


def parser_of(description: str, sizes: Iterable[str]) -> argparse.ArgumentParser:
    parser = Parser(description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=tasks.guide() + "\n")
    parser.add_argument("--out", metavar="DIR", default="runs/assistant",
                        help="folder for all files that are written (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in this folder; start a new run if there is none")
    parser.add_argument("--scale", metavar="X", type=float, default=1.0,
                        help="multiplies every stage's number of steps (default: %(default)s); below "
                             f"{TRIAL_BELOW} the models do not learn the tasks: a trial run")
    parser.add_argument("--size", choices=sizes, default="small", help="of the model (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--workers", "--threads", metavar="N", type=int,
                        help="processes that share the work (default: as many as make it faster on this machine); "
                             "under mpiexec, its processes")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu",
                        help="of the models; gpu needs CuPy: pip install -e '.[gpu]' (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE",
                        help="a UTF-8 text file for the real English in the corpus (default: Python's help topics)")
    return parser


def check_gpu(workers: int) -> None:
    """Raises UsageError if the models cannot be on a GPU."""
    if workers > 1:
        raise UsageError(f"--workers {workers} are processes on the CPU; --device gpu uses 1")
    if launched()[1] > 1:
        return              # NcclRanks looks: each process takes a GPU of its own first
    try:
        to_device(np.zeros(1), "gpu")
    except (ImportError, RuntimeError) as error:            # CuPy is missing, or CUDA finds no device
        raise UsageError(f"--device gpu: {error}") from error
