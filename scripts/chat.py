"""Talk to models that assistant.py has trained: one, or several side by side.

    python scripts/chat.py runs/assistant           # base, SFT, RLHF and DPO
    python scripts/chat.py runs/assistant/rlhf-beta-0.3.safetensors
    python scripts/chat.py runs/assistant/dpo*.safetensors --temperature 0

Type a question and press Enter. ? shows the questions that the model knows.
Ctrl-D or Ctrl-C ends. In a file or a pipe, each line is a question:

    echo "What is 2 + 3?" | python scripts/chat.py

Each question starts a new dialogue: the models are trained on dialogues of one
question and one answer. All models get the same random numbers. "..." marks an
answer that reached --max-tokens. Newlines in answers are shown as \\n.
"""

from support import installed

installed.check("numpy", "minilm")

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

import numpy as np

from minilm.checks import TEMPERATURES
from minilm.data import decode_response, encode_prompt
from minilm.diverged import Diverged
from minilm.generate import generate
from minilm.model import Transformer
from minilm.model_file import load_model
from minilm.tokenizer import Tokenizer
from minilm.world import tasks
from support.command_line import Parser, whole
from support.json_files import fault
from support.options import TRIAL_BELOW
from support.run_folder import UsageError, main_guard
from support.terminal import labelled, one_line, trial_note

FOLDER = os.path.join("runs", "assistant")
STAGES = ("base", "sft", "rlhf-beta-0.3", "dpo-beta-0.3")      # the models of a folder, in this order
MAX_ANSWERS = 100
MAX_TOKENS = 100_000        # of an answer: each needs a random number


@dataclasses.dataclass
class Speaker:
    """A model that answers, with its tokenizer and the name that it has in the conversation."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    scale: float        # --scale of the run of assistant.py that trained it

    def answers(self, question: str, temperature: float, uniforms: np.ndarray) -> list[str]:
        """Sampled answers, each on one line.

        uniforms (answers, max_tokens): the random numbers. Raises ValueError if the question is too long for the model.
        """
        count, max_tokens = uniforms.shape
        prompt = encode_prompt(self.tokenizer, question)
        samples = generate(self.model, [prompt] * count, max_tokens, uniforms, self.tokenizer.eos, temperature)
        return [one_line(decode_response(self.tokenizer, tokens).strip(), finished=tokens[-1] == self.tokenizer.eos)
                for tokens in samples.responses()]


def model_files(paths: list[str]) -> list[str]:
    """The model files behind the paths: a file is itself, a folder is its models of STAGES."""
    files = []
    for path in paths:
        found = [path]
        if os.path.isdir(path):
            stages = [os.path.join(path, f"{stage}.safetensors") for stage in STAGES]
            found = [file for file in stages if os.path.exists(file)]
        if not found or not os.path.exists(path):
            missing = f"the folder {path} holds no model" if os.path.isdir(path) else f"there is no file {path}"
            raise UsageError(f"{missing}. Train the models first: python scripts/assistant.py (it writes to "
                             f"{FOLDER}). Or check the path.")
        files += found
    return files


def load_speakers(files: list[str]) -> list[Speaker]:
    """The language models among the files. Raises UsageError if there is none, CheckpointError for other files."""
    stems = [os.path.basename(file).removesuffix(".safetensors") for file in files]
    speakers = []
    for file, stem in zip(files, stems):
        model, tokenizer, metadata = load_model(file)
        if isinstance(model, Transformer) and model.config.causal:
            name = stem if stems.count(stem) == 1 else file
            run = metadata.get("run")       # the settings of assistant.py; another program may write something else
            scale = run.get("scale") if isinstance(run, dict) else None
            speakers.append(Speaker(name, model, tokenizer, 1.0 if fault(scale, float) else scale))
        elif len(files) == 1:
            raise UsageError(f"{file} gives numbers, not text (it is a {type(model).__name__}). Choose a model that "
                             "writes answers, for example base, sft, rlhf-beta-0.3 or dpo-beta-0.3.")
        else:
            print(f"left out: {file} gives numbers, not text", file=sys.stderr)
    if not speakers:
        raise UsageError(f"none of the {len(files)} files holds a model that writes answers. Choose, for example, "
                         "base, sft, rlhf-beta-0.3 or dpo-beta-0.3.")
    return speakers


def questions() -> Iterator[str]:
    """The lines that are typed, or that come from a file or pipe, without the blank ones."""
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            return
        if line and not at_terminal:
            print(f"> {one_line(line)}")
        if line:
            yield line


def converse(speakers: list[Speaker], options: argparse.Namespace) -> None:
    """Answers each question with every model, until the input ends."""
    width = max(len(speaker.name) for speaker in speakers)
    for number, question in enumerate(questions()):
        if question in ("?", "help"):
            print(tasks.guide(), end="\n\n")
            continue
        # A generator for each question: the answers do not depend on the questions before.
        uniforms = np.random.default_rng([options.seed, number]).random((options.answers, options.max_tokens))
        for speaker in speakers:
            try:
                answers = speaker.answers(question, options.temperature, uniforms)
            except (ValueError, Diverged) as error:
                answers = [f"error: {error}"]
            for i, answer in enumerate(answers):
                print(labelled(speaker.name if i == 0 else "", answer, width))
        print(flush=True)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=tasks.guide() + "\n")
    parser.add_argument("models", metavar="MODEL", nargs="*", default=[FOLDER],
                        help=f"model files, or folders of assistant.py (default: {FOLDER})")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0,
                        help="0 gives the most likely answer; 1 samples from the model (default: %(default)s)")
    parser.add_argument("--answers", metavar="N", type=whole(1, MAX_ANSWERS), default=1,
                        help="of each model (default: %(default)s)")
    parser.add_argument("--max-tokens", metavar="N", type=whole(1, MAX_TOKENS), default=40,
                        help="of an answer (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0,
                        help="of the random numbers (default: %(default)s)")
    options = parser.parse_args()
    lowest, highest = TEMPERATURES
    if options.temperature != 0 and not lowest <= options.temperature <= highest:
        raise UsageError(f"--temperature {options.temperature} must be 0 or from {lowest:g} to {highest:g}")
    return options


def main() -> None:
    options = parse()
    speakers = load_speakers(model_files(options.models))
    if hasattr(sys.stdin, "reconfigure"):       # bytes that are no text end nothing
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits the line and remembers the lines before)
        print(tasks.guide())
        if (scale := min(speaker.scale for speaker in speakers)) < TRIAL_BELOW:
            print(f"\n{trial_note(scale)}")
        print("\n? shows this list again. Ctrl-D or Ctrl-C ends.\n")
    try:
        converse(speakers, options)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main_guard(main))
