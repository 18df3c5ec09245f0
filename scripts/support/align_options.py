"""The command line of align.py."""

import argparse

from minilm.fast.workers import available_cores
from minilm.lora import TARGETS
from support.command_line import MOST_WORKERS, Parser, names, number, whole
from support.models import is_real
from support.run_folder import UsageError

STAGES = ("sft", "reward", "dpo", "rlhf")
# By stage: of adapters, of all weights, and of all weights of a model of assistant.py.
LEARNING_RATES = {"sft": (2e-4, 2e-5, 1e-3), "reward": (2e-4, 1e-5, 1e-3), "dpo": (1e-4, 1e-5, 1e-3),
                  "rlhf": (1e-4, 1e-5, 5e-4)}


def parse(description: str) -> argparse.Namespace:
    """The options, with the defaults of the stage. Raises UsageError."""
    options = parser_of(description).parse_args()
    small = not is_real(options.model)
    if options.lora_rank is None:
        options.lora_rank = 0 if small else 8
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.stage][(options.lora_rank == 0) * (1 + small)]
    if (options.reward is None) == (options.stage == "rlhf"):
        raise UsageError("rlhf needs --reward" if options.stage == "rlhf" else
                         f"--reward is for rlhf; {options.stage} learns from the examples alone. To measure win rates: "
                         "--judge")
    return options


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = Parser(description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES, help="what to train")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the model to start from")
    parser.add_argument("--data", required=True, metavar="FILE", help="the examples, one JSON object per line")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for all files that are written")
    parser.add_argument("--resume", action="store_true", help="continue the run in this folder")
    parser.add_argument("--chat", action="store_true", help="strings are messages of user and assistant")
    parser.add_argument("--reward", metavar="R", help="of rlhf: a reward model, or module:function")
    parser.add_argument("--judge", metavar="R", help="measures win rates, like --reward (default: the reward of rlhf)")
    parser.add_argument("--epochs", metavar="N", type=number(0.01, 1000), default=1.0,
                        help="how often each example is seen (default: %(default)g)")
    parser.add_argument("--batch-size", metavar="N", type=whole(1, 4096), default=8,
                        help="examples of a step (default: %(default)s)")
    parser.add_argument("--microbatches", metavar="N", type=whole(1, 4096),
                        help="parts of a step, one after the other: less memory (default: one for each worker)")
    parser.add_argument("--learning-rate", metavar="X", type=number(0, 1),
                        help="at the start (default: of adapters 2e-4 for sft and reward, 1e-4 for dpo and rlhf; of "
                             "all weights a tenth or less; of a model of assistant.py 1e-3)")
    parser.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear",
                        help="of the learning rate, down to 0 (default: %(default)s)")
    parser.add_argument("--warmup", metavar="N", type=whole(0), default=0,
                        help="steps in which the learning rate rises (default: %(default)s)")
    parser.add_argument("--weight-decay", metavar="X", type=number(0, 10), default=0.0, help="(default: %(default)g)")
    parser.add_argument("--beta", metavar="X", type=number(0, 100), default=0.1,
                        help="of DPO, and of RLHF's KL penalty (default: %(default)g)")
    parser.add_argument("--max-length", metavar="N", type=whole(2), default=1024,
                        help="tokens of an example; longer ones are cut or left out (default: %(default)s)")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--held-out", metavar="N", type=whole(1),
                          help="prompts to measure on (default: a tenth, 4 to 64)")
    held_out.add_argument("--eval-data", metavar="FILE",
                          help="examples to measure on, in place of a part of --data")
    parser.add_argument("--max-new-tokens", metavar="N", type=whole(1), default=64,
                        help="of a sampled answer (default: %(default)s)")
    parser.add_argument("--samples-per-prompt", metavar="N", type=whole(2, 256), default=4,
                        help="of a step of rlhf; --batch-size counts prompts (default: %(default)s)")
    parser.add_argument("--lora-rank", metavar="R", type=whole(0, 4096),
                        help="of the adapters; 0 trains all weights (default: 8; 0 for a model of assistant.py)")
    parser.add_argument("--lora-alpha", metavar="X", type=number(1e-6, 1e6), default=16.0,
                        help="the adapters' update is scaled by alpha / R (default: %(default)g)")
    parser.add_argument("--lora-targets", metavar="NAMES", type=names("matrix", TARGETS), default=list(TARGETS),
                        help=f"which matrices, of {','.join(TARGETS)} (default: all)")
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="(default: %(default)s)")
    parser.add_argument("--workers", metavar="N", type=whole(1, MOST_WORKERS),
                        default=min(available_cores(), MOST_WORKERS),
                        help="processes that share each step, each with gradients of its own (default: one for each "
                             "core)")
    return parser
