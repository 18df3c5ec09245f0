"""Align SmolLM2-135M-Instruct with two preferences, by DPO and by RLHF, with three seeds each.

    python scripts/two_preferences.py --out runs/two-preferences
    python scripts/two_preferences.py --out runs/two-preferences --print    # the page of a finished run

The preferences are rules, so that no person has to judge: short words, and few words (support/rules.py). The
model answers 240 questions four times; DPO gets the best and the worst answer by the rule. align.py trains adapters of
rank 8: DPO on these pairs, RLHF with the rule as the reward. Win rates are on questions about topics that were not
trained on. Ctrl-C saves (but not the first answers); the same command with --resume goes on.
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
from minilm.fast.workers import WorkerFailed
from minilm.pretrained.encoding import encoding_of
from support import alignment, rules, two_preferences_page
from support.command_line import MOST_WORKERS, Parser, whole, wholes
from support.models import load_any
from support.run_folder import RunFolder, StopRequest, UsageError, command_to_resume, main_guard, require

ALIGN = Path(__file__).with_name("align.py")
VERSION = 1
RULES = {"short_words": "short words", "few_words": "few words"}
METHODS = ("dpo", "rlhf")
NEW_TOKENS = 64
ANSWERS = 4             # to each question, of which DPO gets the best and the worst
COMPARED = 8, 4         # answers to each held-out question, of the untrained model and of each trained one
SHARED = ["--chat", "--lora-rank", "8", "--max-new-tokens", str(NEW_TOKENS), "--microbatches", "4"]
# Tried with seed 9 on topics that are trained on; RLHF's for short words alone.
OPTIONS = {"dpo": ["--batch-size", "8", "--epochs", "2", "--beta", "0.1"],
           "rlhf": ["--batch-size", "8", "--samples-per-prompt", "4", "--epochs", "1.2", "--beta", "0.05"]}
STEP_SIZE = {"dpo": {"short_words": "3e-4", "few_words": "1e-4"}, "rlhf": {"short_words": "1e-3", "few_words": "1e-3"}}
TOPICS = """bread|rain|the moon|a bicycle|honey|the heart|paper|volcanoes|chess|salt|trains|bees|glass|sleep|tea|maps|
bridges|the alphabet|wool|clouds|a library|coffee|the sun|music|soap|rice|a kite|ships|snow|a garden|money|dogs|
whales|a clock|cheese|the sea|a piano|trees|a camera|birds|the brain|gold|a telephone|fire|wind|a school|milk|
earthquakes|shoes|stars|a newspaper|ice|cats|a market|rivers|an oven|a mirror|spiders|an island|the wheel"""
QUESTIONS = ("what should a child know about {}?", "why do people care about {}?", "what is surprising about {}?",
             "how would you explain {} to a visitor?")
HELD_OUT = 5            # every fifth topic


def questions() -> list[tuple[str, bool]]:
    """240 questions, 4 on each of 60 topics, and whether each is held out."""
    return [(f"Answer in one short sentence: {form.format(topic.strip())}", i % HELD_OUT == 0)
            for i, topic in enumerate(TOPICS.split("|")) for form in QUESTIONS]


def write_data(model: str, folder: Path, workers: int, stop: StopRequest) -> bool:
    """PREFERENCE-train.jsonl and -eval.jsonl: for each question the best and the worst of the model's own answers, by
    each rule; False if the user stopped it.

    To train on, only answers that ended are taken, and only questions for which each rule orders two of them: all rules
    and methods have the same questions. All held-out questions stay; their pairs are only measured.
    """
    policy, tokenizer = load_any(model)
    encoding = encoding_of(tokenizer, strings_are_messages=True)
    asked = questions()
    prompts = [encoding.alone(question) for question, _ in asked]
    sampling = alignment.Sampling(0, NEW_TOKENS, workers)
    drawn = []
    for i in range(ANSWERS):
        if stop.requested:
            return False
        print(f"answers {i + 1}/{ANSWERS} of the untrained model to {len(asked)} questions", flush=True)
        drawn.append(sampling.draw(policy, prompts, encoding.ends, f"answers {i}"))
    pairs: dict[str, list] = {rule: [] for rule in RULES}
    for (question, held_out), *answers in zip(asked, *drawn):
        texts = [alignment.text_of(encoding, answer) for answer in answers if held_out or answer[-1] in encoding.ends]
        for rule, found in pairs.items():
            ranked = sorted(zip(getattr(rules, rule)([question] * len(texts), texts), texts), key=lambda one: one[0])
            found.append((ranked[0], ranked[-1]) if ranked else None)
    kept = [i for i, (_, held_out) in enumerate(asked) if all(
        found[i] and found[i][0][1] != found[i][1][1] and (held_out or found[i][0][0] < found[i][1][0])
        for found in pairs.values())]
    for rule, (part, held_out) in itertools.product(RULES, (("train", False), ("eval", True))):
        lines = [{"prompt": asked[i][0], "chosen": pairs[rule][i][1][1], "rejected": pairs[rule][i][0][1]}
                 for i in kept if asked[i][1] == held_out]
        checkpoint.write_text(folder / f"{rule}-{part}.jsonl",
                              "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    count = sum(not asked[i][1] for i in kept)
    print(f"{count} questions to train on have answers that ended and that both rules order")
    return True


def align(options, rule: str, method: str, seed: int) -> bool:
    """One run of align.py, unless it is there; False if it was stopped."""
    out = run_of(options.out, rule, method, seed)
    if (out / "results.json").exists():
        return True
    print(f"\nseed {seed}: {RULES[rule]}, {method}", flush=True)
    data = [f"--data={options.out / f'{rule}-train.jsonl'}", f"--eval-data={options.out / f'{rule}-eval.jsonl'}"]
    judge = "--reward" if method == "rlhf" else "--judge"
    # Ctrl-C reaches this process and align.py: it saves and ends, and this one waits for it.
    ended = subprocess.run([sys.executable, ALIGN, method, f"--model={options.model}", *data, f"--out={out}", judge,
                            f"support.rules:{rule}", *SHARED, *OPTIONS[method], "--learning-rate",
                            STEP_SIZE[method][rule], "--seed", str(seed), "--workers", str(options.workers),
                            "--resume"])
    if ended.returncode not in (0, 130):
        raise UsageError(f"align.py ended with exit status {ended.returncode}; its message is above")
    return ended.returncode == 0


def write_answers(model: Path | str, path: Path, eval_data: Path, count: int, seed: int, workers: int) -> None:
    """`count` answers of a model to each held-out question: {"answers": texts by question}, unless the file exists."""
    if path.exists():
        return
    print(f"{count} answers of {model} to each held-out question", flush=True)
    policy, tokenizer = load_any(model)
    encoding = encoding_of(tokenizer, strings_are_messages=True)
    asked = [json.loads(line)["prompt"] for line in eval_data.read_text("utf-8").splitlines()]
    prompts = [encoding.alone(question) for question in asked for _ in range(count)]
    drawn = alignment.Sampling(seed, NEW_TOKENS, workers).draw(policy, prompts, encoding.ends, str(path.parent.name))
    texts = [alignment.text_of(encoding, answer) for answer in drawn]
    by_question = [texts[i:i + count] for i in range(0, len(texts), count)]
    checkpoint.write_text(path, json.dumps({"answers": by_question}, ensure_ascii=False) + "\n")


def run_of(folder: Path, rule: str, method: str, seed: int) -> Path:
    """The folder of one run."""
    return folder / f"seed-{seed}" / f"{rule}-{method}"


def parser() -> Parser:
    found = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for all runs")
    found.add_argument("--resume", action="store_true", help="continue the runs in this folder")
    found.add_argument("--model", default="models/smollm2-135m-instruct.gguf", metavar="MODEL",
                       help="(default: %(default)s)")
    found.add_argument("--seeds", default=[0, 1, 2], metavar="N,...", type=wholes(0, 10**6),
                       help="with commas (default: 0,1,2)")
    found.add_argument("--workers", metavar="N", type=whole(1, MOST_WORKERS),
                       default=min(workers.available_cores(), MOST_WORKERS),
                       help="processes that share each step (default: one for each core)")
    found.add_argument("--print", action="store_true", help="train nothing; print the page of the runs in DIR")
    return found


def train(options) -> bool:
    """All runs that are not there yet; False if the user stopped them."""
    keep_freed_memory()
    fingerprint = {"version": VERSION, "model": options.model}
    with StopRequest() as stop, RunFolder(options.out, options.resume, fingerprint) as run:
        data = [run.path(f"{rule}-{part}.jsonl") for rule in RULES for part in ("train", "eval")]
        if not all(path.exists() for path in data) and not write_data(options.model, run.folder, options.workers, stop):
            return False
        eval_data = run.path(f"{next(iter(RULES))}-eval.jsonl")             # both have the same questions
        write_answers(options.model, run.path("answers.json"), eval_data, COMPARED[0], 0, options.workers)
        for seed, rule, method in itertools.product(options.seeds, RULES, METHODS):
            if stop.requested or not align(options, rule, method, seed):
                return False
            of_it = run_of(options.out, rule, method, seed)
            write_answers(of_it / "model", of_it / "answers.json", eval_data, COMPARED[1], seed + 1, options.workers)
        return True


def main() -> int:
    options = parser().parse_args()
    require("matplotlib", "safetensors", "tqdm")
    if options.print:
        RunFolder.recorded(options.out)         # an error if there is no run
    elif not train(options):
        print(f"stopped; continue with:\n    {command_to_resume()}")
        return 130
    seeds = sorted(int(path.name.removeprefix("seed-")) for path in options.out.glob("seed-*"))
    found = {(rule, method): [run_of(options.out, rule, method, seed) / "results.json" for seed in seeds]
             for rule in RULES for method in METHODS}
    print(two_preferences_page.page(found, RULES, seeds, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main, CheckpointError, WorkerFailed))
