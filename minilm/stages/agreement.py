"""Do all workers of a stage still compute the same thing? They compare after each step.

Every rank runs the loop of a stage on its own copy of the program's state; only the parameters and AdamW's moments are
in shared memory. Between two steps the caller's code runs in rank 0 alone, and so does the reward function. If that
code draws from the state's Generator, changes a setting or adds data, the other ranks do not see it. Without this
check they would train on other batches, and nothing would tell.

Where every rank runs the caller's code (minilm/parallel), the comparison finds code that depends on the rank. It is
made before the first step too, because the ranks may have been given different weights.

Each rank lists its `facts`: the step, the state of the Generator, the batch, AdamW's settings, the Config, the stage's
settings, the lengths of its other arguments, and a sample of the parameters that are in memory of its own. One number,
the digest of the facts, travels in the message that the ranks exchange after a step anyway. If two digests differ, the
facts are exchanged too, and WorkersDisagree names those that differ.

Parameters in shared memory are no facts: all ranks see them, and rank 0 may write to them while another rank reads.
Which of them are frozen is no fact either: requires_grad of rank 0 is used. The state that a user's loss or reward
function keeps for itself is not compared until it changes a fact.
Tests: tests/test_agreement.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.fast.workers import in_shared_memory
from minilm.model import RewardModel, Transformer
from minilm.ranks import WorkersDisagree

SAMPLED = 4096          # numbers of a model that are compared, about as many of each parameter

ALONE = ("The loop that runs the stage, and a reward function, run in worker 0 alone, and their changes do not reach "
         "the others. Use a Generator of your own there, end the stage before a change and start it again after it, or "
         "train with workers=1")
EVERYONE = ("Every rank runs the loop and the reward function: change the same in all of them, and get what depends on "
            "chance, a clock, a signal or the disk from rank 0, by ranks.once()")


class Agreement:
    """The comparison for one run of a stage: state, and the other arguments of the stage by name."""

    def __init__(self, stage: str, state: Any, arguments: dict[str, Any]):
        self.stage = stage
        self.state = state
        self.settings = {name: a for name, a in arguments.items()
                         if a is None or isinstance(a, (bool, int, float, str, np.generic))}
        self.sized = {name: a for name, a in arguments.items() if isinstance(a, Sized) and not isinstance(a, str)}
        self.models = {"the model": state.model,
                       **{name: a for name, a in arguments.items() if model_parameters(a) and a is not state.model}}

    def facts(self) -> dict[str, Any]:
        """All that must be equal in every rank, by name; see the top of this file."""
        state, optimizer = self.state, self.state.optimizer
        body = getattr(state.model, "transformer", state.model)
        return {"the step": state.step,
                "the number of workers": state.workers,
                "whether AdamW's m and v are in shared memory": all(map(in_shared_memory, (optimizer.m, optimizer.v))),
                "the Generator's state (its digest)": zlib.crc32(repr(_plain(state.rng.bit_generator.state)).encode()),
                "the batch that was drawn (its digest)": state.drawn,
                **{f"AdamW's {name}": getattr(optimizer, name)
                   for name in ("steps", "learning_rate", "betas", "eps", "weight_decay")},
                "AdamW's updates of each parameter (their digest)": zlib.crc32(optimizer.updates),
                "the model's Config": repr(getattr(body, "config", None)),
                **{f"the setting {name}": a for name, a in self.settings.items()},
                **{f"the length of {name}": len(a) for name, a in self.sized.items()},
                "which parameters are frozen": [name for name, p in state.model.parameters().items()
                                                if state.group.everyone and not p.requires_grad],
                **{f"the parameters of {name} (their digest)": _parameters_digest(model, state.group)
                   for name, model in self.models.items()}}

    def check(self) -> None:
        """Wait for all ranks. Raises WorkersDisagree, in every rank, if one of them differs from rank 0."""
        if self.state.group.active_size == 1:
            return
        facts = self.facts()
        digests = self.state.group.all_gather(zlib.crc32(repr(facts).encode()))
        if len(set(digests)) == 1:
            return
        first, *others = self.state.group.all_gather(facts)
        for rank, theirs in enumerate(others, 1):
            names = dict.fromkeys([*first, *theirs])
            if wrong := [f"{name}: {theirs.get(name, 'absent')} there, {first.get(name, 'absent')} in worker 0"
                         for name in names if theirs.get(name, "absent") != first.get(name, "absent")]:
                advice = EVERYONE if self.state.group.everyone else ALONE
                raise WorkersDisagree(f"{self.stage}, after step {theirs['the step']}: worker {rank} differs from "
                                      f"worker 0 in {'; '.join(wrong)}. {advice}")


def model_parameters(argument: Any) -> dict:
    """The parameters of a model by name; {} for any other object, whose `parameters` may be something else."""
    return argument.parameters() if isinstance(argument, (Transformer, RewardModel)) else {}


def digest(drawn: Sequence) -> int:
    """A number that tells two batches apart: arrays and token lists, in their order."""
    return hash(tuple([zlib.crc32(x.tobytes()) if isinstance(x, np.ndarray) else tuple(x) for x in drawn]))


def _parameters_digest(model, group):
    """Of parameters that each rank has for itself. Those in one memory are the same for all, or will be."""
    private = [p.data.reshape(-1) for p in model.parameters().values()
               if group.everyone or not in_shared_memory(p.data)]
    samples = [x[::len(private) * x.size // SAMPLED + 1] for x in private]
    return digest([to_numpy(array_module(*samples).concatenate(samples))] if samples else [])


def _plain(state):
    """The state of a bit generator, its arrays as bytes: the repr of an array is slow."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state
