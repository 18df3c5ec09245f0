"""AdamW, gradient clipping, a learning-rate schedule. plain.adamw is the same update, parameter by parameter.

Tests: tests/test_optim.py, tests/test_plain.py.
"""

from __future__ import annotations

import math

import numpy as np

from minilm.backend import is_cupy
from minilm.fast.flat_parameters import FlatParameters, zero_grad_of
from minilm.fast.workers import ProcessGroup
from minilm.tensor import Tensor


class AdamW:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.

        m <- b1 m + (1 - b1) g         v <- b2 v + (1 - b2) g^2
        p <- p - lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd p )

    Decay applies to matrices, and vectors (norm weights) have none. As in PyTorch it is scaled by lr; the paper scales
    it by the schedule's multiplier alone.

    The parameters move into one flat array (fast/flat_parameters.py). Make one optimiser per set of parameters, after
    the model is on its device, and afterwards assign to p.data[...] instead of p.data.
    group: worker processes that share the update. Raises TypeError for parameters of several dtypes.
    """

    def __init__(self, parameters: dict[str, Tensor], learning_rate: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.01,
                 group: ProcessGroup | None = None):
        self.group = group or ProcessGroup(1)
        self.parameters = dict(parameters)
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = 0
        self.flat = FlatParameters(parameters, self.group)
        self.data = self.flat.data
        self.grad = self.flat.grad
        self.m = self.flat.zeros()
        self.v = self.flat.zeros()

    def zero_grad(self) -> None:
        """Drop the gradients: the next backward writes over them."""
        zero_grad_of(self.parameters)

    def clip(self, max_norm: float) -> float:
        """Scale the gradient so that its norm over all parameters is at most max_norm.

        Returns the norm before scaling (Pascanu et al. 2013, arXiv:1211.5063). PyTorch divides by the norm plus 1e-6;
        here it is the norm alone.
        """
        self.flat.materialise()
        grad = self.grad
        if is_cupy(grad):
            from minilm.kernels import fused
            squares = fused.squared_norm(grad).item()
        else:
            squares = sum(float(grad[b] @ grad[b]) for b in self.flat.blocks())
        norm = math.sqrt(sum(self.group.all_gather(squares)))
        if norm > max_norm:
            for b in self.flat.blocks():
                grad[b] *= max_norm / norm
        return norm

    def step(self, learning_rate: float | None = None) -> float:
        """One update from the accumulated gradients (which stay until zero_grad).

        Returns the norm of the parameters after it: finite only if every parameter is.
        """
        self.flat.materialise()
        lr = self.learning_rate if learning_rate is None else learning_rate
        self.steps += 1
        if is_cupy(self.data):
            from minilm.kernels import fused
            return math.sqrt(fused.adamw_step(self.data, self.grad, self.m, self.v, self.flat.n_decay, lr, self.betas,
                                              self.eps, self.weight_decay, self.steps).item())
        squares = sum([self._update(block, lr) for block in self.flat.blocks()], 0.0)
        return math.sqrt(sum(self.group.all_gather(squares)))

    def _update(self, block, lr):
        """The formula above on one block of the flat arrays, in place. Returns the sum of squares of p.

        With bias_correction2_sqrt = sqrt(1 - b2^t), the step is step_size m / (sqrt(v) + eps bias_correction2_sqrt).
        """
        b1, b2 = self.betas
        bias_correction2_sqrt = math.sqrt(1 - b2 ** self.steps)
        step_size = lr * bias_correction2_sqrt / (1 - b1 ** self.steps)
        p, g, m, v = self.data[block], self.grad[block], self.m[block], self.v[block]
        change = g - m
        change *= 1 - b1
        m += change
        np.multiply(g, g, out=change)
        change -= v
        change *= 1 - b2
        v += change
        p[:max(0, self.flat.n_decay - block.start)] *= 1 - lr * self.weight_decay
        np.sqrt(v, out=change)
        change += self.eps * bias_correction2_sqrt
        np.divide(m, change, out=change)
        change *= step_size
        p -= change
        return float(p @ p)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays to save, by name; `steps` among them. See load_state."""
        return {"m": self.m, "v": self.v, "steps": np.array(self.steps)}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue where state() was called. The parameters are saved apart. Raises ValueError for another size."""
        for name in ("m", "v"):
            if arrays[name].shape != self.m.shape:
                raise ValueError(f"optimiser state for {arrays[name].size} parameters, model of {self.m.size}")
        self.m[...] = self.flat.as_flat(arrays["m"])
        self.v[...] = self.flat.as_flat(arrays["v"])
        self.steps = int(arrays["steps"])


def warmup_cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Learning rate at `step` of `steps` (from 0): linear warm-up to peak, then half a cosine down to floor * peak.

    Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
