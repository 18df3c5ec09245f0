"""The stages of align.py: their examples, their steps, and rewards from a model or a function."""

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from minilm import evaluate
from minilm.model import Config, RewardModel, Transformer
from minilm.optim import warmup_cosine
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.pretrained.encoding import ChatEncoding, QuestionEncoding, encoding_of
from minilm.pretrained.training_data import Examples, demonstrations, pairs, prompts
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.inputs import checked_rewards
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tokenizer import Tokenizer
from support.alignment import TOGETHER, text_of
from support.models import load_any
from support.run_folder import UsageError


def read_examples(options: argparse.Namespace, tokenizer: ChatTokenizer | Tokenizer,
                  config: Config) -> tuple[ChatEncoding | QuestionEncoding, Examples, Examples]:
    """(encoding, examples to train on, held-out examples): no prompt is in both. Prints what was cut or left out."""
    encoding = encoding_of(tokenizer, strings_are_messages=options.chat)
    longest = min(options.max_length, config.context)
    read = {"sft": lambda path: demonstrations(encoding, path, longest),
            "reward": lambda path: pairs(encoding, path, longest, cut=False),
            "dpo": lambda path: pairs(encoding, path, longest),
            "rlhf": lambda path: prompts(encoding, path, longest - options.max_new_tokens)}[options.stage]
    found = read(options.data)
    held_out = read(options.eval_data) if options.eval_data else None
    for note in found.notes + (held_out.notes if held_out else []):
        print(note)
    names = _names(found)
    if held_out:
        seen = set.union(*_names(held_out))
        rest = [i for i, known in enumerate(names) if not known & seen]
        if not rest:
            raise UsageError(f"every prompt of {options.data} is in {options.eval_data} too. Add examples to train on")
        left_out = len(names) - len(rest)
        why = f" ({left_out} are left out: {options.eval_data} has their prompts)" if left_out else ""
        print(f"{len(rest)} examples to train on{why}; {len(held_out.prompts)} are held out")
        return encoding, found.some(rest), held_out
    groups: dict[tuple, list[int]] = {}
    for i in range(len(found.prompts)):
        groups.setdefault(_tokens(found, i), []).append(i)
    count = options.held_out or min(64, max(4, len(groups) // 10))
    if len(groups) <= count:
        raise UsageError(f"{options.data} has {len(groups)} different prompts, and {count} are held out. Add examples, "
                         "or lower --held-out.")
    order = np.random.default_rng([options.seed, 0]).permutation(len(groups))
    places = list(groups.values())
    chosen, rest = (sorted(i for group in part for i in places[group]) for part in (order[:count], order[count:]))
    print(f"{len(rest)} examples to train on; {len(chosen)} are held out, of {count} other prompts")
    return encoding, found.some(rest), found.some(chosen)


def _tokens(examples: Examples, i: int) -> tuple[int, ...]:
    """The tokens of the prompt of an example; of a text without a prompt those of the text."""
    prompt, texts = examples.prompts[i], examples.responses.get("responses")
    return tuple(prompt if len(prompt) > 1 or texts is None else [*prompt, *texts[i]])


def _names(examples: Examples) -> list[set]:
    """What tells the prompt of each example: its tokens, which may be cut, and the prompt as it was given."""
    return [{_tokens(examples, i), *([json.dumps(given)] if given else [])} for i, given in enumerate(examples.given)]


class Stage:
    """The steps of one stage: which examples each has, at which rate. steps: how many."""

    def __init__(self, options: argparse.Namespace, base: Transformer, examples: Examples, ends: Sequence[int],
                 reward: Callable | None):
        self.options = options
        self.base = base
        self.examples = examples
        self.ends = ends
        self.reward = reward
        count = len(examples.prompts)
        self.steps = max(1, math.ceil(options.epochs * math.ceil(count / options.batch_size)))
        self.batches = shuffled(count, options.batch_size, self.steps, options.seed)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        o = self.options
        if step < o.warmup:
            return o.learning_rate * (step + 1) / o.warmup
        if o.schedule == "cosine":
            return warmup_cosine(step, self.steps, o.learning_rate, o.warmup, floor=0.0)
        left = (self.steps - step) / max(1, self.steps - o.warmup)
        return o.learning_rate * (1.0 if o.schedule == "constant" else left)

    def epoch(self, steps: int) -> float:
        """How often each example was seen in so many steps, on average."""
        return round(sum(map(len, self.batches[:steps])) / len(self.examples.prompts), 4)

    def tokens(self, step: int, metrics: dict) -> int:
        """Of a step with these metrics, without padding, as TRL counts them: each response with its prompt."""
        e, places = self.examples, self.batches[step]
        each = len(e.responses) or self.options.samples_per_prompt
        drawn = metrics.get("completions/mean_length", 0) * each * len(places)
        return round(drawn) + sum(each * len(e.prompts[i]) + sum(len(side[i]) for side in e.responses.values())
                                  for i in places)

    def run(self, state: TrainState) -> Iterator[dict]:
        """The stage on this state: the metrics of each step, with TRL's names."""
        o, e = self.options, self.examples
        given = {"learning_rate": self.rate, "microbatches": o.microbatches, "batches": self.batches}
        if o.stage == "sft":
            return train_sft(state, e.prompts, e.responses["responses"], self.steps, o.batch_size, **given)
        if o.stage == "reward":
            return train_reward_model(state, e.prompts, *e.responses.values(), self.steps, o.batch_size, **given)
        if o.stage == "dpo":
            print(f"reference log-probs of {len(e.prompts)} pairs", flush=True)
            references = [reference_log_probs(self.base, e.prompts, side, TOGETHER, o.workers)
                          for side in e.responses.values()]
            return train_dpo(state, e.prompts, *e.responses.values(), *references, self.steps, o.batch_size, o.beta,
                             **given)
        return train_rlhf(state, self.base, self.reward, e.prompts, self.steps, o.batch_size, o.samples_per_prompt,
                          o.max_new_tokens, self.ends, o.beta, **given)


def shuffled(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Batches of places 0 .. count - 1: every epoch in another random order, each place once an epoch."""
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        order = np.random.default_rng([seed, 3, epoch]).permutation(count).tolist()
        batches += [order[i:i + size] for i in range(0, count, size)]
        epoch += 1
    return batches[:steps]


def reward_function(options: argparse.Namespace, encoding: ChatEncoding | QuestionEncoding,
                    *examples: Examples) -> Callable | None:
    """reward(prompts, responses), lists of token lists, to N numbers; None without --reward and --judge.

    Raises UsageError for a module or function that is not there, and for a model that is no reward model.
    """
    name = options.judge or options.reward
    if name is None:
        return None
    if os.path.exists(name):
        model, _ = load_any(name)
        if not isinstance(model, RewardModel):
            raise UsageError(f"{name} is no reward model. Train one: python scripts/align.py reward")
        return lambda prompts, responses: evaluate.predicted_rewards(model, prompts, responses, TOGETHER,
                                                                      options.workers)
    function = _function(name)
    given = {tuple(prompt): words for part in examples for prompt, words in zip(part.prompts, part.given)}

    def reward(prompts, responses):
        questions = [last_words(given[tuple(prompt)]) for prompt in prompts]
        found = function(questions, [text_of(encoding, response) for response in responses])
        try:
            return checked_rewards(name, found, len(prompts))
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
    return reward


def last_words(prompt) -> str:
    """A prompt that is a string, or the last message of one that is a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _function(name):
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"{name}: there is no such file or folder. Give a reward model, or module:function")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UsageError(f"{name}: {error}. Give a function in a module of this folder: mine:shorter is shorter in "
                         "mine.py") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UsageError(f"{name} is {found!r}, and no function")
    return found
