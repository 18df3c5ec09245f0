"""Align SmolLM2-135M-Instruct with two preferences, by DPO and by RLHF, with three seeds each.

    python scripts/two_preferences.py --out runs/two-preferences         # about 75 minutes on two cores
    python scripts/two_preferences.py --out runs/two-preferences --print # the page of a finished run

The preferences are rules (support/rules.py), so that an answer can be judged without people: short words, and
short sentences. The model answers 240 questions twice; for DPO each rule orders the two answers. Then align.py trains
adapters of rank 8: DPO on these pairs, RLHF with the rule as the reward. Win rates are on 40 questions that were held
out, against a second answer of the untrained model. Ctrl-C saves; the same command goes on.
scripts/two_preferences.md is this script's page.
"""

from support import installed

installed.check("numpy", "minilm")

from support import one_blas_thread  # noqa: I001, F401

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from minilm import checkpoint
from minilm.checkpoint import CheckpointError
from minilm.fast import workers
from minilm.fast.malloc import keep_freed_memory
from minilm.pretrained.encoding import encoding_of
from support import alignment, rules, two_preferences_page
from support.command_line import MOST_WORKERS, Parser, whole, wholes
from support.machine import machine
from support.models import load_any
from support.run_folder import UsageError, main_guard, require

ALIGN = Path(__file__).with_name("align.py")
RULES = {"short_words": "short words", "short_sentences": "short sentences"}
METHODS = ("dpo", "rlhf")
HELD_OUT = 40
NEW_TOKENS = 48
SHOWN = 3                # questions, with their answers, on the page
SHARED = ["--lora-rank", "8", "--held-out", str(HELD_OUT), "--max-new-tokens", str(NEW_TOKENS), "--microbatches", "4"]
OPTIONS = {"dpo": ["--batch-size", "8", "--learning-rate", "6e-4", "--epochs", "1"],
           "rlhf": ["--batch-size", "4", "--samples-per-prompt", "4", "--learning-rate", "5e-4", "--epochs", "0.4",
                    "--beta", "0.05"]}
TOPICS = """bread|rain|the moon|a bicycle|honey|the heart|paper|volcanoes|chess|salt|trains|bees|glass|sleep|tea|maps|
bridges|the alphabet|wool|clouds|a library|coffee|the sun|music|soap|rice|a kite|ships|snow|a garden|money|dogs|
whales|a clock|cheese|the sea|a piano|trees|a camera|birds|the brain|gold|a telephone|fire|wind|a school|milk|
earthquakes|shoes|stars|a newspaper|ice|cats|a market|rivers|an oven|a mirror|spiders|an island|the wheel"""
QUESTIONS = ("What should a child know about {}?", "Why do people care about {}?",
             "Tell me something surprising about {}.", "How would you explain {} to a visitor?")


def questions() -> list[str]:
    """240 questions: 4 on each of 60 topics."""
    return [form.format(topic.strip()) for topic, form in itertools.product(TOPICS.split("|"), QUESTIONS)]


def write_pairs(model: str, folder: Path, workers: int) -> None:
    """prompts.jsonl, and RULE.jsonl for each rule: pairs of the model's own answers, in the order of the rule."""
    policy, tokenizer = load_any(model)
    encoding = encoding_of(tokenizer, strings_are_messages=True)
    asked = questions()
    prompts = [encoding.alone(question) for question in asked]
    sampling = alignment.Sampling(0, NEW_TOKENS, workers)
    drawn = []
    for name in ("first answers", "second answers"):
        print(f"{name} to {len(asked)} questions", flush=True)
        drawn.append([alignment.text_of(encoding, answer)
                      for answer in sampling.draw(policy, prompts, encoding.ends, name)])
    for rule in RULES:
        rewards = [getattr(rules, rule)(asked, answers) for answers in drawn]
        lines = [{"prompt": question, "chosen": max(pair)[1], "rejected": min(pair)[1]}
                 for question, *pair in zip(asked, *(list(zip(r, a)) for r, a in zip(rewards, drawn)))
                 if pair[0][0] != pair[1][0]]
        write_lines(folder / f"{rule}.jsonl", lines)
    write_lines(folder / "prompts.jsonl", [{"prompt": question} for question in asked])         # last: all is there


def write_lines(path: Path, lines: list[dict]) -> None:
    checkpoint.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def align(options, rule: str, method: str, seed: int) -> bool:
    """One run of align.py, unless it is there; False if it was stopped."""
    data = options.out / ("prompts.jsonl" if method == "rlhf" else f"{rule}.jsonl")
    judged = ["--reward" if method == "rlhf" else "--judge", f"support.rules:{rule}"]
    out = options.out / f"seed-{seed}" / f"{rule}-{method}"
    if (out / "results.json").exists():
        return True
    print(f"\nseed {seed}: {RULES[rule]}, {method}", flush=True)
    ended = subprocess.run([sys.executable, ALIGN, method, "--model", options.model, "--data", data, "--out", out,
                            "--chat", *judged, *SHARED, *OPTIONS[method], "--seed", str(seed), "--workers",
                            str(options.workers), "--resume"])
    if ended.returncode not in (0, 130):
        raise UsageError(f"align.py ended with exit status {ended.returncode}; its message is above")
    return ended.returncode == 0


def page(options) -> str:
    """The generated part of two_preferences.md."""
    found = two_preferences_page.read_runs(options.out, RULES, METHODS, options.seeds)
    two_preferences_page.figure(found, RULES, options.out / "two_preferences.png")
    runs = [run for some in found.values() for run in some]
    minutes = sum(run["seconds"] for run in runs) / 60
    return "\n".join([
        f"{machine()}; {len(options.seeds)} seeds, {HELD_OUT} held-out questions each.\n",
        two_preferences_page.table(found, RULES),
        f"\n{len(runs)} runs: {minutes:.0f} minutes, without the answers for the pairs and the measurement after "
        f"training.\n\n## Answers\n\nSeed {options.seeds[0]}, the first held-out questions, at temperature 1; before "
        "and after have the same random numbers.\n",
        two_preferences_page.answers(found, RULES, SHOWN)])


def parser() -> Parser:
    found = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for all runs")
    found.add_argument("--model", default="models/smollm2-135m-instruct.gguf", metavar="MODEL",
                       help="(default: %(default)s)")
    found.add_argument("--seeds", default="0,1,2", metavar="N,...", type=wholes(0, 10**6),
                       help="with commas (default: %(default)s)")
    found.add_argument("--workers", metavar="N", type=whole(1, MOST_WORKERS), default=workers.available_cores(),
                       help="processes that share each step (default: one for each core)")
    found.add_argument("--print", action="store_true", help="train nothing; print the page of the runs in DIR")
    return found


def main() -> int:
    options = parser().parse_args()
    require("matplotlib", "safetensors", "tqdm")
    if not options.print:
        keep_freed_memory()
        options.out.mkdir(parents=True, exist_ok=True)
        if not (options.out / "prompts.jsonl").exists():
            write_pairs(options.model, options.out, options.workers)
        for seed, rule, method in itertools.product(options.seeds, RULES, METHODS):
            if not align(options, rule, method, seed):
                return 130
    print(page(options))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main, CheckpointError))
