"""The state of a model in training, and one optimiser step.

A stage is a generator function over a TrainState. Between two yields the TrainState is consistent: the caller may save
snapshot() there, and a stage started on a restored TrainState continues bit for bit (on one machine, with one number
of workers).
Tests: tests/test_stages.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.diverged import Diverged, first_bad_parameter, first_nonfinite
from minilm.fast.malloc import return_freed_memory
from minilm.fast.workers import ProcessGroup, available_cores, can_fork
from minilm.in_place import mark_changed
from minilm.optim import AdamW

TOKENS_PER_WORKER = 512


class TrainState:
    """A model in training: its optimiser, the Generator that draws its data, and the number of steps done.

    workers: processes that share each step's batch (fast/workers.py). Each computes the gradient of its own shard, and
    the gradients are added in a fixed order. Results differ with the number of workers by rounding only, and are the
    same bit for bit every time for one number. `settings` are those of AdamW.
    """

    def __init__(self, model, rng: np.random.Generator, workers: int = 1, **settings):
        self.model = model
        self.rng = rng
        self.workers = workers
        self.step = 0
        self.group = ProcessGroup(workers)
        self.optimizer = AdamW(model.parameters(), group=self.group, **settings)
        return_freed_memory()           # the parameters were copied into the optimiser's flat array
        # Rank 0 writes to the optimiser's own gradient, every other rank to one of these.
        self._gradients = [self.optimizer.flat.zeros() for _ in range(workers - 1)]

    def use_own_gradient(self) -> None:
        """In a worker process just forked: let backward write to this rank's gradient."""
        if self.group.rank:
            parameters = self.model.parameters()
            for name, view in self.optimizer.flat.views(self._gradients[self.group.rank - 1]).items():
                parameters[name].grad_buffer = view
                parameters[name].grad = None

    def all_reduce_gradients(self) -> None:
        """Add the gradients of the other ranks to the optimiser's gradient."""
        self.optimizer.flat.add_gradients(self._gradients[:self.group.active_size - 1])

    def snapshot(self) -> tuple[dict[str, np.ndarray], dict]:
        """(arrays, metadata) to save: parameters, moments, Generator, step. The arrays are views: save them at once."""
        arrays = {f"model.{name}": to_numpy(p.data) for name, p in self.model.parameters().items()}
        arrays.update({f"optimizer.{name}": to_numpy(a) for name, a in self.optimizer.state().items()})
        return arrays, {"step": self.step, "rng": self.rng.bit_generator.state}

    def restore(self, arrays: dict[str, np.ndarray], metadata: dict) -> None:
        """Continue where snapshot() was taken.

        Raises KeyError or ValueError, and changes nothing, if it is a snapshot of another model.
        """
        here = self.snapshot()[0]
        rng, step = metadata["rng"], metadata["step"]
        for name, a in here.items():
            saved = arrays[name]
            if (saved.shape, saved.dtype) != (a.shape, a.dtype):
                raise ValueError(f"the checkpoint's tensor '{name}' is {saved.dtype} {saved.shape}, the model's is "
                                 f"{a.dtype} {a.shape}; load it with the configuration it was saved with")
        if more := sorted(arrays.keys() - here.keys()):
            raise ValueError(f"the checkpoint has a tensor '{more[0]}' that this model does not have; load it with the "
                             "configuration it was saved with")
        self.rng.bit_generator.state = rng          # raises for a Generator of another kind
        self.step = step
        for name, p in self.model.parameters().items():
            p.data[...] = array_module(p.data).asarray(arrays[f"model.{name}"])
        mark_changed(self.model.parameters(), "TrainState.restore")
        self.optimizer.load_state({name: arrays[f"optimizer.{name}"] for name in ("m", "v", "steps")})


def stage(loop: Callable) -> Callable:
    """Make a stage of a generator function over a TrainState: every rank runs the loop, and rank 0 yields."""
    @functools.wraps(loop)
    def run(state, *args, **options) -> Iterator[dict]:
        with state.group as group:
            state.use_own_gradient()
            for metrics in loop(state, *args, **options):
                if group.rank == 0:
                    yield metrics
                group.all_gather(None)      # the other ranks continue when the caller asks for the next step
    return run


def train_step(state: TrainState, loss: Callable, shards: Sequence, learning_rate: float, stage: str,
               clip: float = 1.0) -> tuple[dict, tuple]:
    """One optimiser step down the sum of loss(model, shard) over the shards of a batch.

    loss returns (scalar Tensor, report). A report is of the kinds that ProcessGroup.all_gather takes. Each worker holds
    one shard in memory at a time, so more shards than workers is gradient accumulation. `stage` names the stage in
    errors. Returns {"loss", "grad_norm", "learning_rate"} and the reports, one per shard.
    Raises Diverged, before anything is updated, or when the update itself overflowed.
    """
    model = state.model
    parameters = model.parameters()
    where = f"{stage}, step {state.step + 1}"
    state.optimizer.zero_grad()

    def forward_backward(shard):
        value, report = loss(model, shard)
        if not math.isfinite(value.item()):
            bad = first_bad_parameter(parameters, "data") or first_nonfinite(lambda: loss(model, shard))
            raise Diverged(f"{where}: the loss is {value.item()}; first bad tensor: {bad}")
        value.backward()
        return value.item(), report

    losses, reports = zip(*state.group.map(forward_backward, shards, then=state.optimizer.flat.collect))
    state.all_reduce_gradients()
    norm = state.optimizer.clip(clip)
    if not math.isfinite(norm):
        bad = first_bad_parameter(parameters, "grad") or "none (the sum of squares overflowed)"
        raise Diverged(f"{where}: the gradient's norm is {norm}; first bad tensor: {bad}")
    length = state.optimizer.step(learning_rate)
    state.step += 1
    if not math.isfinite(length) and (bad := first_bad_parameter(parameters, "data")):     # a norm may overflow
        raise Diverged(f"{where}: the update went to NaN or infinity; first bad tensor: {bad}")
    return {"loss": sum(losses), "grad_norm": norm, "learning_rate": learning_rate}, reports


def workers_for(tokens: int) -> int:
    """The number of workers for steps of that many tokens here: at most one per core, each with enough work. 1 if the
    system cannot fork."""
    return max(1, min(available_cores(), tokens // TOKENS_PER_WORKER)) if can_fork() else 1


def shards(count: int, n: int) -> list[slice]:
    """Slices that split `count` items into at most n shards of nearly equal size, none of them empty."""
    return [slice(i, None, n) for i in range(min(n, count))]
