"""The models that talk in chat.py: those of assistant.py, and real ones (minilm.pretrained)."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minilm.data import decode_response, encode_prompt
from minilm.generate import generate
from minilm.model import RewardModel, Transformer
from minilm.model_file import load_model
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.stream import Text
from minilm.tokenizer import Tokenizer
from support.json_files import fault
from support.models import ADAPTER, is_real, load_any
from support.run_folder import UsageError
from support.terminal import CUT_OFF, EMPTY, one_line, printable

FOLDER = os.path.join("runs", "assistant")
STAGES = ("base", "sft", "rlhf-beta-0.3", "dpo-beta-0.3")      # the models of a folder, in this order


class Speaker:
    """A model of assistant.py: it answers one question, and knows nothing of the questions before.

    name: in the conversation; scale: --scale of the run of assistant.py that trained it.
    """

    temperature, top_p, max_tokens = 1.0, None, 40          # where chat.py has no other settings

    def __init__(self, name: str, model: Transformer, tokenizer: Tokenizer, scale: float = 1.0):
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.scale = scale
        self.messages: list[dict[str, str]] = []            # the conversation

    def answers(self, question: str, uniforms: np.ndarray, temperature: float, top_k: int | None,
                top_p: float | None) -> Iterator[Iterator[str]]:
        """Sampled answers, each in pieces as they come. The first one joins the conversation.

        uniforms (answers,max_tokens): the random numbers. Raises ValueError if the question is too long for the model.
        """
        count, max_tokens = uniforms.shape
        prompt = encode_prompt(self.tokenizer, question)
        samples = generate(self.model, [prompt] * count, max_tokens, uniforms, self.tokenizer.eos, temperature, top_k,
                           top_p)
        self.messages = [{"role": "user", "content": question}]
        for i, tokens in enumerate(samples.responses()):
            text = decode_response(self.tokenizer, tokens).strip()
            if i == 0:
                self.messages.append({"role": "assistant", "content": text})
            yield iter([one_line(text, finished=tokens[-1] == self.tokenizer.eos)])

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []


class RealSpeaker(Speaker):
    """A model of minilm.pretrained, which reads the whole conversation.

    The settings are those of SmolLM2's own description. The keys and values of the conversation stay in memory.
    """

    temperature, top_p, max_tokens = 0.2, 0.9, 512

    def __init__(self, name: str, model: Transformer, tokenizer: ChatTokenizer, system: str | None = None):
        super().__init__(name, model, tokenizer)    # type: ignore[arg-type]
        self.system = [{"role": "system", "content": system}] if system else []
        self.text = Text(model)
        self.drawn = 0                                  # tokens of the last answer
        try:
            tokenizer.encode_chat([*self.system, {"role": "user", "content": "Hi"}])
        except (ImportError, ValueError) as error:
            raise UsageError(f"{name} holds no conversation: {error}. Choose a model that was finetuned for "
                             "chat.") from error

    def answers(self, question, uniforms, temperature, top_k, top_p):
        before = [*self.messages, {"role": "user", "content": question}]
        prompt = self.tokenizer.encode_chat([*self.system, *before])
        free = self.model.config.context - len(prompt)
        if free < 1:
            raise ValueError(f"the conversation has {len(prompt)} tokens, and the context is "
                             f"{self.model.config.context}; /reset begins a new one")
        for i, row in enumerate(uniforms[:, :free]):
            yield self._answer(before if i == 0 else None, prompt, row, temperature, top_k, top_p)

    def _answer(self, before, prompt, uniforms, temperature, top_k, top_p):
        tokens, shown = [], ""
        ends = self.tokenizer.ends
        try:
            for token in self.text.respond(prompt, len(uniforms), uniforms[None], ends, temperature, top_k, top_p):
                tokens.append(token)
                self.drawn = len(tokens)
                text = printable(self.tokenizer.decode(tokens), "\n\t")
                if not text.endswith("\ufffd"):         # the bytes of a character may come one by one
                    yield text[len(shown):]
                    shown = text
            text = printable(self.tokenizer.decode(tokens), "\n\t")
            yield text[len(shown):] + ("" if tokens[-1] in ends else CUT_OFF) + EMPTY * (not text)
        finally:                                        # also of an answer that was stopped
            if before is not None and tokens:
                self.messages = [*before, {"role": "assistant", "content": self.tokenizer.decode(tokens)}]


def model_files(paths: list[str]) -> list[str]:
    """The models behind the paths: of a folder without a config.json, its models of STAGES, or its GGUF files."""
    files = []
    for path in paths:
        found = [path]
        if os.path.isdir(path) and not {"config.json", ADAPTER} & set(os.listdir(path)):
            stages = [os.path.join(path, f"{stage}.safetensors") for stage in STAGES]
            found = [file for file in stages if os.path.exists(file)] or sorted(map(str, Path(path).glob("*.gguf")))
        if not found or not os.path.exists(path):
            missing = f"the folder {path} holds no model" if os.path.isdir(path) else f"there is no file {path}"
            raise UsageError(f"{missing}. Train the models first: python scripts/assistant.py (it writes to "
                             f"{FOLDER}). Or fetch one: python scripts/get_smollm2.py. Or check the path.")
        files += found
    return files


def stem_of(path: Path) -> str:
    """A short name of a model. align.py writes DIR/model and DIR/adapter: their name is that of DIR."""
    if path.name in ("model", "adapter", "model.safetensors"):
        path = path.parent
    return path.name.removesuffix(".safetensors").removesuffix(".gguf")


def load_speakers(files: list[str], system: str | None = None) -> list[Speaker]:
    """The language models among the files. Raises UsageError if there is none, CheckpointError for other files."""
    stems = [stem_of(Path(file).resolve()) for file in files]
    speakers: list[Speaker] = []
    for file, stem in zip(files, stems):
        name = stem if stems.count(stem) == 1 else file
        if is_real(file):
            model, tokenizer = load_any(file)
            if isinstance(model, RewardModel):
                raise UsageError(f"{file} gives numbers, not text. Choose a model that writes answers.")
            speakers.append(RealSpeaker(name, model, tokenizer, system=system))
            continue
        model, tokenizer, metadata = load_model(file)
        if isinstance(model, Transformer) and model.config.causal:
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
