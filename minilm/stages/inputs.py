"""Checks of a stage's arguments: settings, models, data sets; and of the results of a user's functions.

A data set is checked once, whole, when the stage is called (data.check_dialogues).
Tests: tests/test_inputs.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import sys
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from minilm import checks
from minilm.backend import to_numpy
from minilm.fast.flat_parameters import shares_parameters
from minilm.model import Config, RewardModel
from minilm.stages import plan


def check_settings(function: str, steps: int, learning_rate: plan.Rate, microbatches: int | None,
                   **counts: int) -> None:
    """Raises ValueError or TypeError for a setting that all stages have, and for counts below 1, by name."""
    checks.integer(function, "steps", steps, at_least=0)
    if not callable(learning_rate):
        checks.number(function, "learning_rate", learning_rate, at_least=0)
    for name, count in {**({} if microbatches is None else {"microbatches": microbatches}), **counts}.items():
        checks.integer(function, name, count, at_least=1)


def checked_config(function: str, model: Any, role: str = "the model", method: str = "response_log_probs") -> Config:
    """The Config of a model. Raises TypeError for a model without the method, ValueError for a bidirectional one."""
    if isinstance(model, type) or not hasattr(model, method):
        kind = "RewardModel" if method == "packed_rewards" else "Transformer"
        raise TypeError(f"{function}: {role} is {checks.shown(model)}; it must be a {kind}")
    config = getattr(model, "transformer", model).config
    if not config.causal:
        raise ValueError(f"{function}: {role} is bidirectional; it must be causal (Config(causal=True))")
    return config


def check_reference_and_reward(function: str, policy: Any, reference: Any, reward: Any) -> None:
    """Raises TypeError unless the reference is a Transformer and reward a function. Raises ValueError if the reference
    has another vocabulary, a shorter context, or parameters in the same memory as the policy (the KL divergence would
    be 0 for ever), and if reward uses a reward model with the policy's body (it would change with the policy)."""
    there = checked_config(function, reference, "reference")
    here = policy.config
    if there.vocab_size != here.vocab_size or there.context < here.context:
        raise ValueError(f"{function}: reference has vocab_size {there.vocab_size} and context {there.context}, the "
                         f"model {here.vocab_size} and {here.context}; the reference must fit the same tokens")
    if not callable(reward):
        raise TypeError(f"{function}: reward is {checks.shown(reward)}; it must be a function of prompts and responses")
    for role, other in (("reference", reference), *(("the reward model", m) for m in _reward_models(reward))):
        if name := shares_parameters(policy, other):
            raise ValueError(f"{function}: {role} has the parameter {name} in the same memory as the model, so it "
                             "would change with every step; make it from a copy, model.copy()")


def _reward_models(value, depth=6):
    """The reward models that a function holds in its variables, defaults or arguments, an object in its attributes, a
    short list, tuple or dict in its items, and what they hold there in the same way. Objects of other libraries are
    asked for nothing: their `head`, `args` or `parameters` may be anything."""
    if isinstance(value, RewardModel):
        return [value]
    if depth == 0 or inspect.isclass(value) or inspect.ismodule(value):
        return []
    held = [*getattr(value, "__dict__", {}).values(), getattr(value, "__self__", None)]
    if isinstance(value, functools.partial):
        held += [value.func, value.args, value.keywords]
    if inspect.isfunction(value):
        held += [value.__defaults__, value.__kwdefaults__]
        with contextlib.suppress(ValueError):           # a variable of the closure may have no value yet
            held += inspect.getclosurevars(value)[:2]
    if isinstance(value, (list, tuple, dict)) and len(value) <= 64:
        held += value.values() if isinstance(value, dict) else value
    return [model for part in held for model in _reward_models(part, depth - 1)]


# The results of a user's functions.

def checked_documents(function: str, drawn: Any, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The result of draw(rng, batch_size), as tokens and mask (bool), (B,T) each.

    Raises TypeError, ValueError and IndexError for anything else, for tokens outside the vocabulary, T - 1 above the
    context, and a mask that selects nothing.
    """
    if not isinstance(drawn, (tuple, list, np.ndarray)) or len(drawn) != 2:
        raise TypeError(f"{function}: draw gave {checks.shown(drawn)}; it must give a pair, tokens and mask")
    tokens = checks.token_ids(function, "draw's tokens", drawn[0], config.vocab_size)
    if tokens.ndim != 2 or len(tokens) == 0 or not 2 <= tokens.shape[1] <= config.context + 1:
        raise ValueError(f"{function}: draw's tokens have shape {tokens.shape}; it must be (B,T), with B at least 1 "
                         f"and T from 2 to context + 1 = {config.context + 1}")
    mask = checks.mask(function, drawn[1], tokens.shape, "draw's mask")
    if not mask[:, 1:].any():
        raise ValueError(f"{function}: draw's mask selects no token to predict; the first of a row is never predicted")
    return tokens, mask


def checked_rewards(function: str, given: Any, count: int) -> np.ndarray:
    """The result of reward(prompts, responses), as an array (count,) in float64.

    Raises TypeError and ValueError that name the count, or the first sample without a finite number.
    """
    if isinstance(given, (str, bytes, Mapping, Set)) or not hasattr(given, "__len__") or getattr(
            given, "shape", None) == ():
        raise TypeError(f"{function}: reward gave {checks.shown(given)}; it must give a list of {count} numbers")
    values = list(to_numpy(given)) if hasattr(given, "shape") else list(given)
    if len(values) != count:
        raise ValueError(f"{function}: reward gave {len(values)} of {count} numbers; each response needs one")
    for i, value in enumerate(values):
        values[i] = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(values[i], numbers.Real):
            raise TypeError(f"{function}: the reward of sample {i} is {checks.shown(value)}; it must be a number")
        if not abs(values[i]) <= sys.float_info.max:
            raise ValueError(f"{function}: the reward of sample {i} is {values[i]}; it must be a finite number")
    return np.array(values, np.float64)
