"""What every stage shares: the state that is saved, and one optimiser step.

A stage is a generator function over a Training. Between two yields the Training is consistent:
whoever drives the stage may save it there, and a stage started on a restored Training goes on
as if it had never stopped, bit for bit on one machine with one number of threads.
"""

import dataclasses
import math

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.optim import AdamW
from minilm.tensor import first_nonfinite


class Diverged(ArithmeticError):
    """A loss or a gradient became NaN or infinite; nothing was updated with it."""


@dataclasses.dataclass
class Training:
    """A model in training: its optimiser, the Generator that draws its data, the steps done."""

    model: object
    optimizer: AdamW
    rng: np.random.Generator
    step: int = 0

    @classmethod
    def start(cls, model, rng, **settings):
        """Training from step 0; `settings` are those of AdamW."""
        return cls(model, AdamW(model.parameters(), **settings), rng)

    def state(self):
        """(arrays, metadata) to save: parameters, moments, Generator, step."""
        arrays = {f"model.{name}": to_numpy(p.data) for name, p in self.model.parameters().items()}
        arrays.update({f"optimizer.{name}": to_numpy(a) for name, a in self.optimizer.state().items()})
        return arrays, {"step": self.step, "rng": self.rng.bit_generator.state}

    def restore(self, arrays, metadata):
        """Go on where state() was taken. Raises KeyError or ValueError if it is of another model."""
        for name, p in self.model.parameters().items():
            p.data[...] = arrays[f"model.{name}"]
        self.optimizer.load_state({name: arrays[f"optimizer.{name}"] for name in ("m", "v", "steps")})
        self.rng.bit_generator.state = metadata["rng"]
        self.step = metadata["step"]


def optimise(training, losses, learning_rate, stage, clip=1.0):
    """One step down the sum of `losses`, an iterable of scalar Tensors.

    The iterable is consumed one at a time, each backward before the next forward: given a
    generator, only one micro-batch is held in memory. `stage` names the stage in errors.
    Returns {"loss", "grad_norm", "learning_rate"}. Raises Diverged before anything is updated.
    """
    optimizer = training.optimizer
    optimizer.zero_grad()
    total = 0.0
    for loss in losses:
        if not math.isfinite(loss.item()):
            raise Diverged(f"{stage}, step {training.step + 1}: the loss is {loss.item()}; first bad tensor: "
                           f"{_first_bad_parameter(training, 'data') or first_nonfinite(loss)}")
        total += loss.item()
        loss.backward()
    norm = optimizer.clip(clip)
    if not math.isfinite(norm):
        raise Diverged(f"{stage}, step {training.step + 1}: the gradient's norm is {norm}; first bad tensor: "
                       f"{_first_bad_parameter(training, 'grad') or 'none (the sum of squares overflowed)'}")
    optimizer.step(learning_rate)
    training.step += 1
    return {"loss": total, "grad_norm": norm, "learning_rate": learning_rate}


def _first_bad_parameter(training, field):
    for name, p in training.model.parameters().items():
        array = getattr(p, field)
        if not array_module(array).isfinite(array).all():
            return f"the {'gradient of ' if field == 'grad' else ''}parameter {name}, shape {p.shape}"
    return None
