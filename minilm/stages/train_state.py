"""The state of a model in training, and what makes a function over it a stage.

A stage is a generator function over a TrainState. Between two yields the TrainState is consistent: the caller may save
snapshot() there, and a stage started on a restored TrainState continues: bit for bit on one machine with the same
number of workers or ranks, to rounding with another.
Tests: tests/test_stages.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minilm import checks
from minilm.backend import array_module, to_numpy
from minilm.fast.malloc import return_freed_memory
from minilm.fast.workers import ProcessGroup, available_cores, can_fork
from minilm.in_place import mark_changed
from minilm.optim import AdamW
from minilm.ranks import Ranks
from minilm.stages.agreement import Agreement, model_parameters

TOKENS_PER_WORKER = 512


class TrainState:
    """A model in training: its optimiser, the Generator that draws its data, and the number of steps done.

    workers: processes that share each step's batch (fast/workers.py). Each computes the gradient of its own shard, and
    the gradients are added in a fixed order. Results differ with the number of workers by rounding only, and are the
    same bit for bit every time for one number. `settings` are those of AdamW.
    On one GPU the numbers of a step are read after the next step has been started (step.py). snapshot(), the end of a
    stage, and the metrics when they are read wait for them.
    The caller's code between two steps runs in rank 0 alone. It may read everything, save a snapshot, and write to the
    parameters. If it changes another part of the state, the next step raises WorkersDisagree (agreement.py).
    group: the ranks of parallel.world(), in place of workers. Every rank then runs the caller's code and may change
    everything, if all change the same; snapshot() and restore() are calls of all ranks. After a step p.grad is the sum
    over the ranks in this rank's stretch alone.
    Raises TypeError for a model whose parameters() is not a dict, for a seed in place of a Generator, for a
    learning_rate, which each stage has of its own, and for another group; ValueError for workers below 1.
    """

    def __init__(self, model, rng: np.random.Generator, workers: int = 1, group: Ranks | None = None, **settings):
        if isinstance(model, type) or not hasattr(model, "parameters") or not isinstance(model.parameters(), dict):
            raise TypeError(f"TrainState: model is {checks.shown(model)}; it must be a Transformer or a RewardModel")
        if "learning_rate" in settings:
            raise TypeError("TrainState: learning_rate has no effect here; give it to the stage, each has its own")
        self.model = model
        self.rng = checks.generator("TrainState", rng)
        if group is not None and (not isinstance(group, Ranks) or workers != 1):
            raise TypeError(f"TrainState: group is {checks.shown(group)} and workers is {checks.shown(workers)}; give "
                            "the ranks of parallel.world() as group, or the number of workers")
        self.group = group or ProcessGroup(checks.integer("TrainState", "workers", workers, at_least=1))
        self.workers = self.group.size
        self.step = 0
        self.drawn = 0                  # the digest of the step's batch, to compare between workers
        self.pending: Any = None        # the last step, while a GPU may be computing it (step.py)
        self.optimizer = AdamW(model.parameters(), group=self.group, **settings)
        return_freed_memory()           # the parameters were copied into the optimiser's flat array
        # Rank 0 writes to the optimiser's own gradient, every other rank to one of these.
        self._gradients = [self.optimizer.flat.zeros() for _ in range(0 if self.group.everyone else self.workers - 1)]

    def use_own_gradient(self) -> None:
        """In a worker process just forked: let backward write to this rank's gradient."""
        if self.group.rank and not self.group.everyone:
            parameters = self.model.parameters()
            for name, view in self.optimizer.flat.views(self._gradients[self.group.rank - 1]).items():
                parameters[name].grad_buffer = view
                parameters[name].grad = None

    def check_owned(self) -> None:
        """Raises RuntimeError if the optimiser has other parameters than the model: the model would not be trained."""
        there = self.model.parameters()
        wrong = [name for name, p in self.optimizer.parameters.items() if there.get(name) is not p]
        if wrong or (self.group.size > 1 and self.optimizer.group is not self.group):
            raise RuntimeError("TrainState: the optimiser has another "
                               f"{f'parameter {wrong[0]!r}' if wrong else 'group'} than this state; make another state")

    def add_gradients(self, found: Sequence[np.ndarray]) -> None:
        """Add up the gradients of all ranks; found: the results of FlatParameters.collect by rank."""
        self.optimizer.flat.add_gradients(found, self._gradients[:self.group.active_size - 1])

    def settle(self) -> None:
        """Wait for the numbers of the last step. Raises Diverged if one of them is not finite."""
        if self.pending is not None:
            self.pending.settle()

    def snapshot(self) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays, metadata) to save: parameters, moments, Generator, step. The arrays are views: save them at once.

        Raises Diverged as settle does."""
        self.settle()
        return self._arrays(), {"step": self.step, "rng": self.rng.bit_generator.state}

    def _arrays(self):
        arrays = {f"model.{name}": to_numpy(p.data) for name, p in self.model.parameters().items()}
        arrays.update({f"optimizer.{name}": to_numpy(a) for name, a in self.optimizer.state().items()})
        return arrays

    def restore(self, arrays: dict[str, np.ndarray], metadata: dict) -> None:
        """Continue where snapshot() was taken.

        Raises KeyError or ValueError, and changes nothing, if it is a snapshot of another model, or has NaN in it.
        """
        here = self._arrays()
        rng = metadata["rng"]
        step = checks.integer("TrainState.restore", "step", metadata["step"], at_least=0)
        for name, a in here.items():
            saved = arrays[name]
            if (saved.shape, saved.dtype) != (a.shape, a.dtype):
                raise ValueError(f"the checkpoint's tensor '{name}' is {saved.dtype} {saved.shape}, the model's is "
                                 f"{a.dtype} {a.shape}; load it with the configuration it was saved with")
            checks.finite("TrainState.restore", f"the checkpoint's tensor '{name}'", saved,
                          at_least=0 if name in ("optimizer.v", "optimizer.steps") else None)
        if more := sorted(arrays.keys() - here.keys()):
            raise ValueError(f"the checkpoint has a tensor '{more[0]}' that this model does not have; load it with the "
                             "configuration it was saved with")
        self.rng.bit_generator.state = rng          # raises for a Generator of another kind
        self.step = step
        if self.pending is not None:
            self.pending.forget()
        for name, p in self.model.parameters().items():
            p.data[...] = array_module(p.data).asarray(arrays[f"model.{name}"])
        mark_changed(self.model.parameters(), "TrainState.restore")
        self.optimizer.load_state({name: arrays[f"optimizer.{name}"] for name in ("m", "v", "steps")})


def stage(loop: Callable) -> Callable:
    """Make a stage of a function over a TrainState that returns an iterator of metrics.

    loop(state, ...) is a generator function, or a function that checks its arguments and returns a generator: such
    checks are made when the stage is called, before any worker exists. Every rank runs the generator, and rank 0
    yields. After each step the ranks compare their states.
    Raises TypeError for another object than a TrainState, ValueError for parameters with NaN or infinity, and
    WorkersDisagree as agreement.py says.
    """
    signature = inspect.signature(loop)

    @functools.wraps(loop)
    def call(state, *args, **options) -> Iterator[Mapping]:
        name = loop.__name__
        if not isinstance(state, TrainState):
            raise TypeError(f"{name}: state is {checks.shown(state)}; it must be a TrainState(model, rng)")
        checks.generator(name, state.rng)
        steps = loop(state, *args, **options)
        bound = signature.bind(state, *args, **options)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        for role, model in {"the model": state.model, **arguments}.items():
            for p_name, p in model_parameters(model).items():
                checks.finite(name, f"the parameter {p_name} of {role}", p.data)
        return _in_all_ranks(state, steps, Agreement(name, state, arguments))
    return call


def _in_all_ranks(state, steps, agreement):
    group = state.group
    with contextlib.nullcontext() if group.everyone else group:     # the ranks exist already, or for this stage
        state.use_own_gradient()
        if group.everyone:
            agreement.check()           # the same weights, before they are given to each other
        for metrics in steps:
            if group.rank == 0 or group.everyone:
                yield metrics
            agreement.check()           # the other ranks continue when the caller asks for the next step
        state.settle()


def repeat(step: Callable[[], Mapping], state: TrainState, steps: int) -> Iterator[Mapping]:
    """The metrics of step(), again and again until the state has done `steps` steps in all.

    Raises ValueError if it has done more: such a stage would train nothing. Each stage has a TrainState of its own.
    """
    if state.step > steps:
        raise ValueError(f"the state has done {state.step} steps, and this stage ends after {steps} in all: raise it")

    def remaining():
        while state.step < steps:
            yield step()
    return remaining()


def workers_for(tokens: int) -> int:
    """The number of workers for steps of that many tokens here: at most one per core, each with enough work. 1 if the
    system cannot fork."""
    return max(1, min(available_cores(), tokens // TOKENS_PER_WORKER)) if can_fork() else 1


def shards(count: int, n: int) -> list[slice]:
    """Slices that split `count` items into at most n shards of nearly equal size, none of them empty."""
    checks.integer("shards", "n", n, at_least=1)
    return [slice(i, None, n) for i in range(min(n, count))]
