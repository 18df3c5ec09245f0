"""What every stage shares: the state that is saved, and one optimiser step.

A stage is a generator function over a Training. Between two yields the Training is consistent:
whoever drives the stage may save it there, and a stage started on a restored Training goes on
as if it had never stopped, bit for bit on one machine with one number of threads.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor, wait

from minilm.backend import array_module, to_numpy
from minilm.optim import AdamW, complete, forget
from minilm.tensor import Tensor, first_nonfinite

TOKENS_A_THREAD = 512


class Diverged(ArithmeticError):
    """A loss, a gradient or an update became NaN or infinite."""


class Training:
    """A model in training: its optimiser, the Generator that draws its data, the steps done.

    threads: each step's batch is split into that many parts, each worked on by a thread of its
    own with a tape and a gradient of its own (NumPy lets go of the interpreter lock inside large
    operations); the gradients are added in a fixed order. Results depend on the number of threads
    by rounding only, and are the same bit for bit every time for a given number. It pays where
    BLAS itself is held to one thread. `settings` are those of AdamW.
    """

    def __init__(self, model, rng, threads=1, **settings):
        self.model, self.rng, self.threads, self.step = model, rng, threads, 0
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.optimizer = AdamW(model.parameters(), pool=self._pool, threads=threads, **settings)
        # The first thread works on the model itself, the others on twins: the same arrays of
        # parameters, gradients apart.
        self._models, self._gradients = [model], []
        for _ in range(threads - 1):
            gradient = array_module(self.optimizer.grad).zeros_like(self.optimizer.grad)
            twins = {name: Tensor(p.data, requires_grad=True) for name, p in model.parameters().items()}
            for name, view in self.optimizer.views(gradient).items():
                twins[name].grad_buffer = view
            self._models.append(model.over(twins))
            self._gradients.append(gradient)

    def each(self, work, parts):
        """work(model, part) for every part, part i by thread i mod threads: a list of the results."""
        if self._pool is None:
            return [work(self.model, part) for part in parts]

        def run(worker):
            return [work(self._models[worker], part) for part in parts[worker::self.threads]]
        futures = [self._pool.submit(run, worker) for worker in range(self.threads)]
        wait(futures)                       # all of them, also when one has failed
        by_worker = [future.result() for future in futures]
        return [by_worker[i % self.threads][i // self.threads] for i in range(len(parts))]

    def zero_grad(self):
        for model in self._models:
            forget(model.parameters())

    def gather_gradients(self):
        """Add what the other threads found to the optimiser's gradient."""
        if self._gradients:
            for twin in self._models[1:]:
                complete(twin.parameters())
            self.optimizer.add_gradients(self._gradients)

    def state(self):
        """(arrays, metadata) to save: parameters, moments, Generator, step. The arrays are views: save them at once."""
        arrays = {f"model.{name}": to_numpy(p.data) for name, p in self.model.parameters().items()}
        arrays.update({f"optimizer.{name}": to_numpy(a) for name, a in self.optimizer.state().items()})
        return arrays, {"step": self.step, "rng": self.rng.bit_generator.state}

    def restore(self, arrays, metadata):
        """Go on where state() was taken.

        Raises KeyError or ValueError, and changes nothing, if it is of another model.
        """
        parameters = {f"model.{name}": p for name, p in self.model.parameters().items()}
        for name, p in parameters.items():
            if (arrays[name].shape, arrays[name].dtype) != (p.shape, p.dtype):
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape} there, {p.dtype} {p.shape} here")
        for name, p in parameters.items():
            p.data[...] = arrays[name]
        self.optimizer.load_state({name: arrays[f"optimizer.{name}"] for name in ("m", "v", "steps")})
        self.rng.bit_generator.state = metadata["rng"]
        self.step = metadata["step"]


def optimise(training, loss, parts, learning_rate, stage, clip=1.0):
    """One step down the sum of loss(model, part) over the parts of a batch.

    loss returns (scalar Tensor, report), computed with the model it is given; each thread holds one
    part in memory at a time, so more parts than threads is gradient accumulation. `stage` names the
    stage in errors. Returns {"loss", "grad_norm", "learning_rate"} and the list of the parts' reports.
    Raises Diverged, before anything is updated or when the update itself overflowed.
    """
    training.zero_grad()

    def forward_backward(model, part):
        value, report = loss(model, part)
        if not math.isfinite(value.item()):
            raise Diverged(f"{stage}, step {training.step + 1}: the loss is {value.item()}; first bad tensor: "
                           f"{_first_bad_parameter(training, 'data') or first_nonfinite(lambda: loss(model, part))}")
        value.backward()
        return value.item(), report

    losses, reports = zip(*training.each(forward_backward, parts))
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


def threads_for(tokens):
    """How many threads pay for steps of so many tokens on this machine: a core for each, and work enough for each.

    With fewer than TOKENS_A_THREAD tokens, handing over the interpreter lock takes the time that another core saves
    (the smallest size of scripts/bench_train.py, 1024 tokens, is where two threads are hardly faster than one).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, tokens // TOKENS_A_THREAD))


def split(count, parts):
    """Slices that deal `count` items out to at most `parts` parts of nearly equal size, none empty."""
    return [slice(i, None, parts) for i in range(min(parts, count))]


def _first_bad_parameter(training, field):
    for name, p in training.model.parameters().items():
        array = getattr(p, field)
        if not array_module(array).isfinite(array).all():
            return f"the {'gradient of ' if field == 'grad' else ''}parameter {name}, shape {p.shape}"
    return None
