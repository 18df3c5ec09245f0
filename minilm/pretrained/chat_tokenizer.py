"""From a conversation to token ids and back, with a checkpoint's own tokenizer and chat template.

A template is a program of Jinja in the checkpoint, which writes messages as one text with special tokens in it:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n

It comes from the file of somebody else, so it runs in Jinja's sandbox. The template above, ChatML, needs no Jinja.
Tests: tests/test_chat_tokenizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilm.pretrained.byte_level import ByteLevelTokenizer
from minilm.pretrained.tokenizers_package import PackageTokenizer

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
          " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# The same with a system prompt for conversations without one: SmolLM2's.
DEFAULT_SYSTEM = re.compile(r"\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}\{\{ '<\|im_start\|>system"
                            r"(?:\n|\\n)([^'\\]*)<\|im_end\|>(?:\n|\\n)' \}\}\{% endif %\}")


class ChatTokenizer:
    """text: encodes and decodes plain text. names: {"bos_token": "<|im_start|>", ...}.

    pad, bos, eos      ids, or None
    ends               ids that end an answer: eos, and <|endoftext|>, which ends a document
    vocab_size         number of ids
    Raises ValueError for a name that is no special token.
    """

    def __init__(self, text: ByteLevelTokenizer | PackageTokenizer, template: str, names: Mapping[str, str]):
        self.text = text
        self.template = template
        self.names = dict(names)
        for role, name in self.names.items():
            if name not in text.specials:
                raise ValueError(f"the {role} {name!r} is no special token")
        self.bos, self.eos, self.pad = (text.specials.get(self.names.get(f"{role}_token", ""))
                                        for role in ("bos", "eos", "pad"))
        ends = {self.eos, text.specials.get("<|endoftext|>")}
        self.ends = tuple(sorted(i for i in ends if i is not None))
        self.vocab_size = text.vocab_size
        self._special = re.compile("|".join(map(re.escape, sorted(text.specials, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, in which the name of a special token is text."""
        return self.text.encode(text)

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of ids. Special tokens are left out, or written as their names if specials is True."""
        return self.text.decode(ids, specials)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], answer_follows: bool = True) -> list[int]:
        """The ids of a conversation, [{"role": "user", "content": "Hi"}, ...], with the start of the next answer or
        without. The name of a special token in a message is text.

        Raises ValueError for messages that the template refuses, or without role or content; ImportError for a
        template that needs Jinja, if it is not installed.
        """
        mark = _unused_character(messages)

        def marked(text):       # "<|im_end|>" becomes "<" + mark + "|im_end|>", which is no special token
            return self._special.sub(lambda found: found[0][0] + mark + found[0][1:], text)

        rendered = self.render([{"role": marked(message["role"]), "content": marked(message["content"])}
                                for message in messages], answer_follows)
        return self._encode_rendered(rendered, mark)

    def _encode_rendered(self, rendered, mark):
        ids: list[int] = []
        start = 0
        for found in self._special.finditer(rendered):
            ids += self.encode(rendered[start:found.start()].replace(mark, ""))
            ids.append(self.text.specials[found[0]])
            start = found.end()
        return ids + self.encode(rendered[start:].replace(mark, ""))

    def render(self, messages: Sequence[Mapping[str, str]], answer_follows: bool = True) -> str:
        """The text of a conversation by the template. Raises as encode_chat does."""
        default = DEFAULT_SYSTEM.search(self.template)
        if DEFAULT_SYSTEM.sub("", self.template).replace("\n", "\\n") == CHATML:
            system = [{"role": "system", "content": default[1]}] if default and messages[0]["role"] != "system" else []
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in [*system, *messages]]
            return "".join(turns) + "<|im_start|>assistant\n" * answer_follows
        return _jinja(self.template, messages=list(messages), add_generation_prompt=answer_follows, **self.names)


def _unused_character(messages):
    """A character that is in none of the messages. Raises ValueError for what is no conversation."""
    texts = []
    for i, message in enumerate(messages):
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"message {i} is {message!r}; it must be {{'role': .., 'content': ..}}, two strings")
        texts += parts
    if not texts:
        raise ValueError("a conversation needs at least one message")
    used = set("".join(texts))
    return next(character for character in map(chr, range(0xe000, 0xf900)) if character not in used)


def _jinja(template: str, **variables: Any) -> str:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("this chat template is not ChatML, and needs jinja2: pip install jinja2") from error

    def refuse(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])     # as in transformers
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(variables)
    except Exception as error:          # the template is a program, which may raise anything
        raise ValueError(f"the chat template fails on this conversation: {error}") from error
