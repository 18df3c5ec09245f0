"""How prompt and response become tokens: with a checkpoint's chat template, or as the small assistant was trained.

Both classes have the same methods, for a prompt that is a string or a list of messages ({"role": .., "content": ..}):
alone(prompt); whole(prompt, response), with the end token; text(text), a text without a prompt.
Tests: tests/test_training_data.py.
"""

from __future__ import annotations

from typing import Any

from minilm.data import encode_dialogue, encode_prompt
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.tokenizer import Tokenizer

Turns = str | list[dict[str, str]]


class ChatEncoding:
    """Messages go through the chat template; strings are texts to continue, as in TRL.

    strings_are_messages: a string is one message, of the user or the assistant.
    """

    def __init__(self, tokenizer: ChatTokenizer, strings_are_messages: bool = False):
        self.tokenizer = tokenizer
        self.ends = tokenizer.ends
        self.strings_are_messages = strings_are_messages

    def alone(self, prompt: Turns) -> list[int]:
        """The tokens of a prompt, after which a response can be sampled."""
        prompt = self._turns("user", prompt)
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)

    def whole(self, prompt: Turns, response: Any) -> list[int]:
        """The tokens of prompt and response. Raises ValueError for strings if there is no end token."""
        prompt, response = self._turns("user", prompt), self._turns("assistant", response)
        if isinstance(prompt, str):
            return self.text(prompt + response)
        return self.tokenizer.encode_chat([*prompt, *response], answer_follows=False)

    def text(self, text: Turns) -> list[int]:
        """The tokens of a text and its end, or of a conversation."""
        if not isinstance(text, str):
            return self.tokenizer.encode_chat(text, answer_follows=False)
        if self.tokenizer.eos is None:
            raise ValueError("the model's tokenizer has no end token for a text; give messages")
        text = text.removesuffix(self.tokenizer.names["eos_token"])
        return [*self.tokenizer.encode(text), self.tokenizer.eos]

    def _turns(self, role, words):
        return [{"role": role, "content": words}] if self.strings_are_messages and isinstance(words, str) else words


class QuestionEncoding:
    """For the models of assistant.py: a string, or one message, is a question, and a response is its answer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ends = (tokenizer.eos,)

    def alone(self, prompt: Turns) -> list[int]:
        """The tokens of a question. Raises ValueError for a longer conversation."""
        return encode_prompt(self.tokenizer, _only(prompt, "user"))

    def whole(self, prompt: Turns, response: Any) -> list[int]:
        """The tokens of a question and its answer. Raises ValueError for a longer conversation."""
        question, answer = encode_dialogue(self.tokenizer, _only(prompt, "user"), _only(response, "assistant"))
        return question + answer

    def text(self, text: Turns) -> list[int]:
        """Raises ValueError for a text: these models learn from questions. A conversation is question and answer."""
        if isinstance(text, str) or len(text) != 2:
            raise ValueError("a model of assistant.py learns from one question and its answer: prompt and completion")
        return self.whole(text[:1], text[1:])


def encoding_of(tokenizer: ChatTokenizer | Tokenizer,
                strings_are_messages: bool = False) -> ChatEncoding | QuestionEncoding:
    """The one that fits the tokenizer."""
    if isinstance(tokenizer, Tokenizer):
        return QuestionEncoding(tokenizer)
    return ChatEncoding(tokenizer, strings_are_messages)


def _only(turns, role):
    """The words of a string, or of the only message, which has this role."""
    if isinstance(turns, str):
        return turns
    if [turn["role"] for turn in turns] != [role]:
        raise ValueError("a model of assistant.py knows one question and one answer; this is a conversation of "
                         f"{', '.join(turn['role'] for turn in turns)}")
    return turns[0]["content"]
