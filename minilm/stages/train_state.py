"""What every stage shares: the state that is saved, and one optimiser step.

A stage is a generator function over a TrainState. Between two yields the TrainState is consistent:
whoever drives the stage may save it there, and a stage started on a restored TrainState goes on
as if it had never stopped, bit for bit on one machine with one number of workers.
"""

import functools
import math

from minilm.backend import array_module, to_numpy
from minilm.fast.malloc import return_freed_memory
from minilm.optim import AdamW, materialise_gradients
from minilm.fast.workers import ProcessGroup, available_cores
from minilm.tensor import first_nonfinite

TOKENS_A_WORKER = 512


class Diverged(ArithmeticError):
    """A loss, a gradient or an update became NaN or infinite."""


class TrainState:
    """A model in training: its optimiser, the Generator that draws its data, the steps done.

    workers: each step's batch is split into that many parts, each worked on by a process of its
    own (fast/workers.py) with a tape and a gradient of its own; the gradients are added in a fixed order.
    Results depend on the number of workers by rounding only, and are the same bit for bit every time
    for a given number. It pays where BLAS itself is held to one thread. `settings` are those of AdamW.
    """

    def __init__(self, model, rng, workers=1, **settings):
        self.model, self.rng, self.workers, self.step = model, rng, workers, 0
        self.team = ProcessGroup(workers)
        self.optimizer = AdamW(model.parameters(), team=self.team, **settings)
        return_freed_memory()           # where the parameters were before, which is as much again as they are
        # Worker 0 has the optimiser's own gradient, each other one of these.
        self._gradients = [self.team.zeros(self.optimizer.grad.size, self.optimizer.grad.dtype) for _ in range(workers - 1)]

    def use_own_gradient(self):
        """For a worker just forked: let backward write into this worker's gradient."""
        if self.team.rank:
            for name, view in self.optimizer.views(self._gradients[self.team.rank - 1]).items():
                p = self.model.parameters()[name]
                p.grad_buffer, p.grad = view, None

    def gather_gradients(self):
        """Add what the other workers found to the optimiser's gradient."""
        self.optimizer.add_gradients(self._gradients[:self.team.active_size - 1])

    def snapshot(self):
        """(arrays, metadata) to save: parameters, moments, Generator, step. The arrays are views: save them at once."""
        arrays = {f"model.{name}": to_numpy(p.data) for name, p in self.model.parameters().items()}
        arrays.update({f"optimizer.{name}": to_numpy(a) for name, a in self.optimizer.state().items()})
        return arrays, {"step": self.step, "rng": self.rng.bit_generator.state}

    def restore(self, arrays, metadata):
        """Go on where snapshot() was taken.

        Raises KeyError or ValueError, and changes nothing, if it is of another model.
        """
        here, rng, step = self.snapshot()[0], metadata["rng"], metadata["step"]
        for name, a in here.items():
            there = arrays[name]
            if (there.shape, there.dtype) != (a.shape, a.dtype):
                raise ValueError(f"{name} is {there.dtype} {there.shape} there, {a.dtype} {a.shape} here")
        if more := sorted(arrays.keys() - here.keys()):
            raise ValueError(f"{more[0]} is there, and not here")
        self.rng.bit_generator.state = rng          # which refuses that of another kind of Generator
        self.step = step
        for name, p in self.model.parameters().items():
            p.data[...] = array_module(p.data).asarray(arrays[f"model.{name}"])
        self.optimizer.load_state({name: arrays[f"optimizer.{name}"] for name in ("m", "v", "steps")})


def stage(loop):
    """Makes a stage of a generator function over a TrainState: all its workers run it, and worker 0 yields."""
    @functools.wraps(loop)
    def run(training, *args, **options):
        with training.team as team:
            training.use_own_gradient()
            for metrics in loop(training, *args, **options):
                if team.rank == 0:
                    yield metrics
                team.all_gather(None)         # the others go on when worker 0 is asked to
    return run


def train_step(training, loss, parts, learning_rate, stage, clip=1.0):
    """One step down the sum of loss(model, part) over the parts of a batch.

    loss returns (scalar Tensor, report), computed with the model it is given; each worker holds one
    part in memory at a time, so more parts than workers is gradient accumulation. A report is what
    parallel.Team can exchange. `stage` names the stage in errors. Returns {"loss", "grad_norm", "learning_rate"} and the list of the parts' reports.
    Raises Diverged, before anything is updated or when the update itself overflowed.
    """
    model = training.model
    training.optimizer.zero_grad()

    def forward_backward(part):
        value, report = loss(model, part)
        if not math.isfinite(value.item()):
            raise Diverged(f"{stage}, step {training.step + 1}: the loss is {value.item()}; first bad tensor: "
                           f"{_first_bad_parameter(training, 'data') or first_nonfinite(lambda: loss(model, part))}")
        value.backward()
        return value.item(), report

    losses, reports = zip(*training.team.map(forward_backward, parts, then=lambda: materialise_gradients(model.parameters())))
    training.gather_gradients()
    norm = training.optimizer.clip(clip)
    if not math.isfinite(norm):
        raise Diverged(f"{stage}, step {training.step + 1}: the gradient's norm is {norm}; first bad tensor: "
                       f"{_first_bad_parameter(training, 'grad') or 'none (the sum of squares overflowed)'}")
    length = training.optimizer.step(learning_rate)
    training.step += 1
    if not math.isfinite(length) and (bad := _first_bad_parameter(training, "data")):     # a norm may overflow
        raise Diverged(f"{stage}, step {training.step}: the update went to NaN or infinity; first bad tensor: {bad}")
    return {"loss": sum(losses), "grad_norm": norm, "learning_rate": learning_rate}, reports


def workers_for(tokens):
    """How many workers pay for steps of so many tokens on this machine: a core for each, and work enough for each."""
    return max(1, min(available_cores(), tokens // TOKENS_A_WORKER))


def shards(count, parts):
    """Slices that deal `count` items out to at most `parts` parts of nearly equal size, none empty."""
    return [slice(i, None, parts) for i in range(min(parts, count))]


def _first_bad_parameter(training, field):
    for name, p in training.model.parameters().items():
        array = getattr(p, field)
        if not array_module(array).isfinite(array).all():
            return f"the {'gradient of ' if field == 'grad' else ''}parameter {name}, shape {p.shape}"
    return None
