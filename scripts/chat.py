"""Talk to models: those that assistant.py has trained, and real ones.
One, or several side by side.

    python scripts/chat.py runs/assistant           # base, SFT, RLHF and DPO
    python scripts/chat.py runs/assistant/rlhf-beta-0.3.safetensors
    python scripts/chat.py models/smollm2-135m-instruct.gguf
    python scripts/chat.py MODEL MODEL --system "Be brief." --temperature 0

A real model is a GGUF file or a folder of Hugging Face; it reads the whole
conversation. python scripts/get_smollm2.py fetches one. A model of assistant.py
is trained on one question and one answer, so each question starts anew; ? shows
the questions that it knows.

Type a question and press Enter. Ctrl-C stops an answer. Ctrl-D, or Ctrl-C
where you type, ends. In a file or a pipe, each line is a question:

    echo "What is 2 + 3?" | python scripts/chat.py

    /retry          the last question again, with other random numbers
    /reset          begin a new conversation
    /save FILE      write the conversation, a line of JSON for each model

All models get the same random numbers. "..." marks an answer that reached
--max-tokens.
"""

from support import installed

installed.check("numpy", "minilm")

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator

import numpy as np

from minilm import checkpoint
from minilm.checks import TEMPERATURES
from minilm.diverged import Diverged
from minilm.world import tasks
from support.command_line import Parser, number, whole
from support.options import TRIAL_BELOW
from support.run_folder import UsageError, main_guard
from support.speakers import FOLDER, RealSpeaker, Speaker, load_speakers, model_files
from support.terminal import Column, labelled, one_line, trial_note

COMMANDS = "/retry answers again, /reset begins anew, /save FILE writes the conversation"
MAX_ANSWERS = 100
MAX_TOKENS = 100_000        # of an answer: each needs a random number


def lines() -> Iterator[str]:
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


class Conversation:
    """Questions, and the answers of every speaker."""

    def __init__(self, speakers: list[Speaker], options: argparse.Namespace):
        self.speakers = speakers
        self.options = options
        self.width = max(len(speaker.name) for speaker in speakers)
        self.question = ""
        self.asked = -1             # how many questions before this one
        self.attempt = 0            # at this question
        self.before: list[list] = []

    def read(self, line: str) -> None:
        """Answer a question, or follow a command."""
        command, _, rest = line.partition(" ")
        if line in ("?", "help"):
            small = any(not isinstance(speaker, RealSpeaker) for speaker in self.speakers)
            print(*[tasks.guide()] * small, COMMANDS, sep="\n\n", end="\n\n")
        elif line == "/reset":
            for speaker in self.speakers:
                speaker.reset()
            self.question = ""
            print("a new conversation\n")
        elif command == "/save":
            self.save(rest.strip())
        elif line == "/retry" and self.question:
            self.attempt += 1
            for speaker, messages in zip(self.speakers, self.before):
                speaker.messages = list(messages)
            self.ask()
        elif re.fullmatch(r"/\w*", line):
            print(f"{COMMANDS}\n")
        else:
            self.question, self.attempt = line, 0
            self.asked += 1
            self.ask()

    def ask(self) -> None:
        """Print every speaker's answers to the question."""
        o = self.options
        self.before = [list(speaker.messages) for speaker in self.speakers]
        # A Generator for each question: the answers do not depend on the random numbers of the questions before.
        seed = [o.seed, self.asked] + [self.attempt] * (self.attempt > 0)
        for speaker in self.speakers:
            uniforms = np.random.default_rng(seed).random((o.answers, o.max_tokens or speaker.max_tokens))
            temperature = speaker.temperature if o.temperature is None else o.temperature
            top_p = speaker.top_p if o.top_p is None else o.top_p
            try:
                show = self.stream if isinstance(speaker, RealSpeaker) else self.wrap
                show(speaker, speaker.answers(self.question, uniforms, temperature, o.top_k, top_p))
            except (ValueError, Diverged) as error:
                print(labelled(speaker.name, f"error: {error}", self.width))
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print(f"{' ' * (self.width + 6)}(stopped)")
        print(flush=True)

    def wrap(self, speaker: Speaker, answers: Iterator[Iterator[str]]) -> None:
        """Print answers of one line each."""
        for i, answer in enumerate(answers):
            print(labelled("" if i else speaker.name, "".join(answer), self.width))

    def stream(self, speaker: RealSpeaker, answers: Iterator[Iterator[str]]) -> None:
        """Print answers of several lines, each piece when it comes; the speed goes to stderr."""
        for i, answer in enumerate(answers):
            column = Column(f"    {'' if i else speaker.name:<{self.width}}  ")
            times = []
            try:
                for piece in answer:
                    times.append(time.monotonic())
                    column.write(piece)
            finally:
                column.end()                # of a stopped answer, the word that was begun
            drawn = speaker.drawn
            if sys.stderr.isatty() and drawn > 1 and times[-1] > times[0]:
                speed = (drawn - 1) / (times[-1] - times[0])        # the first one includes the prompt's time
                print(f"{column.margin}({drawn} tokens, {speed:.1f} a second)", file=sys.stderr)

    def save(self, file: str) -> None:
        """Write the conversation of each speaker."""
        path = os.path.expanduser(file)
        if not file or "\0" in file or os.path.exists(path):
            return print("name a file that does not exist yet: /save FILE\n")
        text = "".join(json.dumps({"model": speaker.name, "messages": speaker.messages}, ensure_ascii=False) + "\n"
                       for speaker in self.speakers)
        try:
            checkpoint.write_text(path, text)
            print(f"saved to {file}\n")
        except checkpoint.CheckpointError as error:
            print(f"error: {error}\n")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=tasks.guide() + "\n")
    parser.add_argument("models", metavar="MODEL", nargs="*", default=[FOLDER],
                        help=f"models, or folders of assistant.py (default: {FOLDER})")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt of real models")
    parser.add_argument("--temperature", metavar="T", type=float,
                        help="0 gives the most likely answer; 1 samples from the model (default: "
                             f"{Speaker.temperature:g}; real models {RealSpeaker.temperature:g})")
    parser.add_argument("--top-p", metavar="P", type=number(1e-9, 1),
                        help="draw from the most likely tokens, which together have probability P (default: 1; real "
                             f"models {RealSpeaker.top_p:g})")
    parser.add_argument("--top-k", metavar="K", type=whole(1), help="draw from the K most likely tokens")
    parser.add_argument("--answers", metavar="N", type=whole(1, MAX_ANSWERS), default=1,
                        help="of each model (default: %(default)s); a conversation goes on from the first")
    parser.add_argument("--max-tokens", metavar="N", type=whole(1, MAX_TOKENS),
                        help=f"of an answer (default: {Speaker.max_tokens}; real models {RealSpeaker.max_tokens})")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0,
                        help="of the random numbers (default: %(default)s)")
    options = parser.parse_args()
    lowest, highest = TEMPERATURES
    if options.temperature not in (None, 0) and not lowest <= options.temperature <= highest:
        raise UsageError(f"--temperature {options.temperature} must be 0 or from {lowest:g} to {highest:g}")
    return options


def greet(speakers: list[Speaker]) -> None:
    """What a person at a terminal reads first."""
    small = [speaker for speaker in speakers if not isinstance(speaker, RealSpeaker)]
    if small:
        print(tasks.guide())
        if (scale := min(speaker.scale for speaker in small)) < TRIAL_BELOW:
            print(f"\n{trial_note(scale)}")
        print("\n? shows this list again.", end=" ")
    print("Ctrl-C stops an answer. Ctrl-D ends. /retry, /reset, /save FILE.\n")


def main() -> None:
    options = parse()
    speakers = load_speakers(model_files(options.models), options.system)
    if hasattr(sys.stdin, "reconfigure"):       # bytes that are no text end nothing
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits the line and remembers the lines before)
        greet(speakers)
    conversation = Conversation(speakers, options)
    try:
        for line in lines():
            conversation.read(line)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main_guard(main))
