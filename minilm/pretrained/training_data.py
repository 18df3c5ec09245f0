"""A person's own examples: lines of JSON become token ids, in the way of TRL 1.16's trainers.

    {"prompt": "Hi", "completion": "Hello"}                              a demonstration, as strings
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    {"messages": [...]} or {"text": "..."}                               every token is learned
    {"prompt": .., "chosen": .., "rejected": ..}                         a pair; strings or messages
    {"chosen": [...], "rejected": [...]}                                 the prompt is what both begin with
    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": ..}      a pair of Anthropic's HH-RLHF

Strings are text to continue; an end token follows the completion. Messages go through the chat template. The response
begins where the tokens of the prompt alone and those of the whole text part: if a merge crosses that boundary, the
prompt's last tokens are left out, as TRL does. Whatever is cut or left out is counted in `notes`.
Tests: tests/test_training_data.py, against TRL.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from minilm.checkpoint import Path, one_line
from minilm.checks import distinct, ordinary_file
from minilm.pretrained.encoding import ChatEncoding, QuestionEncoding, Turns

Encoding = ChatEncoding | QuestionEncoding
TURN = re.compile(r"\n\n(Human|Assistant):[ \n]?")      # of HH-RLHF


class DataError(ValueError):
    """The message names the file, the line, the fault, and what to do."""


@dataclasses.dataclass
class Examples:
    """Token lists: prompts (N), and the lists of N responses by name (responses; chosen and rejected; none).

    given: each prompt as it was before it was encoded (a text: ""). lines: the line of each example in the file.
    notes: what was changed or left out, in words with counts.
    """
    prompts: list[list[int]]
    responses: dict[str, list[list[int]]]
    given: list[Turns]
    lines: list[int]
    notes: list[str]

    def some(self, places: Sequence[int]) -> Examples:
        """The examples at these places."""
        return Examples([self.prompts[i] for i in places], {name: [side[i] for i in places] for name, side
                                                            in self.responses.items()},
                        [self.given[i] for i in places], [self.lines[i] for i in places], self.notes)


def read_lines(path: Path) -> list[tuple[int, dict]]:
    """(number, object) of each line that is not blank. Raises DataError."""
    try:
        with open(ordinary_file(os.fspath(path)), "rb") as file:
            raw = file.read()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Give a file with one JSON object per "
                        "line") from error
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text. Convert the file") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found.append((number, _object(path, number, line)))
    if not found:
        raise DataError(f"{path}: empty. Give a file with one JSON object per line")
    return found


def _object(path, number, line):
    try:
        found = json.loads(line, object_pairs_hook=distinct)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not one JSON object ({one_line(error)}). Write one example per "
                        "line") from error


def demonstrations(encoding: Encoding, path: Path, max_length: int) -> Examples:
    """Prompts and responses for train_sft; longer texts are cut at max_length. Raises DataError."""
    return _examples(path, ("responses",), lambda line: _demonstration(encoding, line), max_length)


def pairs(encoding: Encoding, path: Path, max_length: int, cut: bool = True) -> Examples:
    """Prompts, chosen and rejected responses for train_dpo; longer texts are cut at max_length. cut False leaves such
    pairs out, as TRL's RewardTrainer does: a cut text lacks its end, where the reward is read. Raises DataError."""
    return _examples(path, ("chosen", "rejected"), lambda line: _pair(encoding, line), max_length, cut)


def prompts(encoding: Encoding, path: Path, max_length: int) -> Examples:
    """Prompts for train_rlhf, of at most max_length tokens; the others are left out. Raises DataError."""
    def encode(line):
        given = _prompt_of(line)
        return given, encoding.alone(given), []
    return _examples(path, (), encode, max_length, cut=False)


def _examples(path, names: tuple, encode: Callable, max_length: int, cut: bool = True) -> Examples:
    found = Examples([], {name: [] for name in names}, [], [], [])
    notes: Counter[str] = Counter()
    lines = read_lines(path)
    errors = []
    for number, line in lines:
        try:
            given, alone, wholes = encode(line)
        except (TypeError, ValueError, KeyError) as error:
            errors.append((number, error))
            continue
        length = min([_common(alone, whole) for whole in wholes], default=len(alone))
        notes["have a prompt whose last tokens merge with the response; these are left out, as TRL does"] += (
            length < len(alone))
        prompt = (wholes[0] if wholes else alone)[:length]
        _add(found, notes, (number, given), prompt, [whole[length:] for whole in wholes], max_length, cut)
    if errors:
        number, error = errors[0]
        more = f" ({len(errors) - 1} more of {len(lines)} lines are bad)" if len(errors) > 1 else ""
        raise DataError(f"{path}, line {number}: {one_line(error)}{more}. Correct the file")
    if not found.prompts:
        reasons = "; ".join(f"{count} {note}" for note, count in notes.items() if count)
        raise DataError(f"{path}: no example is left of {len(lines)}: {reasons}. Raise --max-length, or check the file")
    found.notes = [f"{count} of {len(lines)} examples {note}" for note, count in notes.items() if count]
    return found


def _add(found, notes, source, prompt, responses, max_length, cut):
    """Append one example, cut to the length, or note why it is left out."""
    longest = len(prompt) + max(map(len, responses), default=0)
    if longest > max_length:
        if not cut or len(prompt) >= max_length:
            notes[f"are left out: longer than {max_length} tokens"] += 1
            return
        notes[f"are cut at {max_length} tokens"] += 1
        responses = [response[:max_length - len(prompt)] for response in responses]
    if not prompt or not all(responses):
        notes["are left out: nothing is left of the prompt or of a response"] += 1
        return
    found.prompts.append(prompt)
    found.lines.append(source[0])
    found.given.append(source[1])
    for side, response in zip(found.responses.values(), responses):
        side.append(response)


def _demonstration(encoding, line):
    """(the prompt, its tokens alone, [tokens of prompt and response])"""
    if "completion" in line:
        prompt, completion = _same_kind(line, "prompt", "completion")
        return prompt, encoding.alone(prompt), [encoding.whole(prompt, completion)]
    if "messages" in line:
        whole = encoding.text(_messages(line, "messages"))
    elif "text" in line:
        whole = encoding.text(_string(line, "text"))
    else:
        raise ValueError(f"a demonstration has prompt and completion, messages, or text; this line has {_keys(line)}")
    return "", whole[:1], [whole]           # every token is learned but the first, which nothing predicts


def _pair(encoding, line):
    if not {"chosen", "rejected"} <= line.keys():
        raise ValueError(f"a pair has chosen and rejected, and mostly a prompt; this line has {_keys(line)}")
    if "prompt" in line:
        prompt, chosen, rejected = _same_kind(line, "prompt", "chosen", "rejected")
    else:
        prompt, chosen, rejected = _without_common_start(*_same_kind(line, "chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return prompt, encoding.alone(prompt), [encoding.whole(prompt, response) for response in (chosen, rejected)]


def _prompt_of(line):
    """The prompt of a line of any kind."""
    if "prompt" in line:
        return _same_kind(line, "prompt")[0]
    if {"chosen", "rejected"} <= line.keys():
        return _without_common_start(*_same_kind(line, "chosen", "rejected"))[0]
    if "messages" in line:
        messages = _messages(line, "messages")
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    raise ValueError(f"a prompt is in prompt, in chosen and rejected, or in messages; this line has {_keys(line)}")


def _without_common_start(chosen, rejected):
    """(prompt, chosen, rejected): the prompt is what both begin with: messages, or characters as TRL cuts them."""
    length = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)     # no response is empty
    if isinstance(chosen, str) and length > 0 and chosen[length - 1] == " ":
        length -= 1                     # a blank belongs to the next word
    if length < 1:
        raise ValueError("chosen and rejected begin differently, so the line has no prompt")
    return chosen[:length], chosen[length:], rejected[length:]


def _common(a, b):
    """How many items two sequences have in common from the start on."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _same_kind(line, *keys):
    """The values of the keys: all strings, or all lists of messages. A transcript of HH-RLHF becomes messages."""
    if all(isinstance(line.get(key), str) for key in keys):
        texts = [line[key] for key in keys]
        if all(TURN.match(text) for text in texts):
            return [_transcript(text) for text in texts]
        return texts
    if missing := [key for key in keys if key not in line]:
        raise ValueError(f"{missing[0]} is missing; this line has {_keys(line)}")
    return [_messages(line, key) for key in keys]


def _messages(line, key):
    value: Any = line[key]
    if isinstance(value, str) or not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {_short(value)}; it must be a list of messages, as the other parts are, or all of "
                         "them strings")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{key}[{i}] is {_short(message)}; a message has role and content, two strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _string(line, key):
    if not isinstance(line[key], str):
        raise ValueError(f"{key} is {_short(line[key])}; it must be a string")
    return line[key]


def _transcript(text):
    """Messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    roles = {"Human": "user", "Assistant": "assistant"}
    pieces = TURN.split(text)[1:]
    return [{"role": roles[who], "content": words.strip()} for who, words in zip(pieces[::2], pieces[1::2])]


def _keys(line):
    return ", ".join(map(_short, line)) or "nothing"


def _short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
