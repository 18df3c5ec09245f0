"""From a conversation to token ids and back, with a checkpoint's own tokenizer and chat template.

A template is a program of Jinja in the checkpoint, which writes messages as one text with special tokens in it:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n

Jinja's sandbox keeps it from files and from Python's objects, but not from running for ever. The template above,
ChatML, needs no Jinja.
Tests: tests/test_chat_tokenizer.py.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from minilm.pretrained.byte_level import ByteLevelTokenizer
from minilm.pretrained.tokenizers_package import PackageTokenizer

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
          " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# The same with a system prompt for conversations without one: SmolLM2's.
DEFAULT_SYSTEM = re.compile(r"\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}\{\{ '<\|im_start\|>system"
                            r"(?:\n|\\n)([^'\\]*)<\|im_end\|>(?:\n|\\n)' \}\}\{% endif %\}")
PRIVATE = range(0xe000, 0xf900)     # characters of Unicode without a meaning


class ChatTokenizer:
    """text: encodes and decodes plain text. names: {"bos_token": "<|im_start|>", ...}. ends: more ids of ends.

    template           None: ChatML if its two tokens exist; otherwise the model has no conversations
    pad, bos, eos      ids, or None
    ends               ids that end an answer: eos, <|endoftext|>, which ends a document, and those given
    vocab_size         number of ids
    Raises ValueError for a name that is no special token, and for a template that is no string.
    """

    def __init__(self, text: ByteLevelTokenizer | PackageTokenizer, template: Any, names: Mapping[str, Any],
                 ends: Collection[int] = ()):
        if "" in text.specials:
            raise ValueError("a special token has an empty name")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"the chat template is a {type(template).__name__}, and no text")
        if template is None and {"<|im_start|>", "<|im_end|>"} <= text.specials.keys():
            template = CHATML
        self.text = text
        self.template = template
        self.names = dict(names)
        for role, name in self.names.items():
            if name not in text.specials:
                raise ValueError(f"the {role} {name!r} is no special token")
        self.bos, self.eos, self.pad = (text.specials.get(self.names.get(f"{role}_token", ""))
                                        for role in ("bos", "eos", "pad"))
        known = {self.eos, text.specials.get("<|endoftext|>"), *ends}
        self.ends = tuple(sorted(i for i in known if i is not None))
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

        Raises ValueError for messages that the template refuses, or without role or content, and for a model without a
        template; ImportError for a template that needs Jinja, if it is not installed.
        """
        words = _words(messages)
        found = list(dict.fromkeys(name for part in words for name in self._special.findall(part)))
        if not found:
            return self.text.encode_with_specials(self.render(messages, answer_follows))
        # Each name is one unused character while the template runs, and becomes text again behind it.
        used = set("".join(words))
        unused = [chr(i) for i in PRIVATE if chr(i) not in used]
        mark = dict(zip(found, unused))
        name_of = {ord(character): name for name, character in mark.items()}
        hidden = [{key: self._special.sub(lambda name: mark[name[0]], message[key]) for key in ("role", "content")}
                  for message in messages]
        ids: list[int] = []
        start = 0
        rendered = self.render(hidden, answer_follows)
        for special in self._special.finditer(rendered):
            ids += self.encode(rendered[start:special.start()].translate(name_of))
            ids.append(self.text.specials[special[0]])
            start = special.end()
        return ids + self.encode(rendered[start:].translate(name_of))

    def render(self, messages: Sequence[Mapping[str, str]], answer_follows: bool = True) -> str:
        """The text of a conversation by the template. Raises as encode_chat does."""
        if self.template is None:
            raise ValueError("this model has no chat template: it continues texts, and knows no conversations")
        default = DEFAULT_SYSTEM.search(self.template)
        if DEFAULT_SYSTEM.sub("", self.template).replace("\n", "\\n") == CHATML:
            system = [{"role": "system", "content": default[1]}] if default and messages[0]["role"] != "system" else []
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in [*system, *messages]]
            return "".join(turns) + "<|im_start|>assistant\n" * answer_follows
        return _jinja(self.template, messages=list(messages), add_generation_prompt=answer_follows, tools=None,
                      documents=None, **self.names)


def _words(messages):
    """All roles and contents. Raises ValueError for what is no conversation."""
    words = []
    for i, message in enumerate(messages):
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"message {i} is {message!r}; it must be {{'role': .., 'content': ..}}, two strings")
        words += parts
    if not words:
        raise ValueError("a conversation needs at least one message")
    return words


def _jinja(template: str, **variables: Any) -> str:
    """The template's text, with the functions that transformers gives to templates."""
    try:
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("this chat template is not ChatML, and needs jinja2: pip install jinja2") from error

    class Generation(jinja2.ext.Extension):
        """{% generation %} .. {% endgeneration %} marks an answer, and changes no text."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    try:
        return environment.from_string(template).render(variables)
    except Exception as error:          # the template is a program, which may raise anything
        raise ValueError(f"the chat template fails on this conversation: {error}") from error
