"""AdamW, gradient clipping, a learning-rate schedule. plain.adamw is the same update, parameter by parameter.

Tests: tests/test_optim.py, tests/test_plain.py.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from minilm import checks
from minilm.backend import array_module, is_cupy
from minilm.fast.flat_parameters import FlatParameters
from minilm.fast.workers import ProcessGroup
from minilm.in_place import mark_changed
from minilm.ranks import Ranks
from minilm.tensor import Tensor


class AdamW:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.

        m <- b1 m + (1 - b1) g         v <- b2 v + (1 - b2) g^2
        p <- p - lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd p )

    Decay applies to matrices, and vectors (norm weights) have none. As in PyTorch it is scaled by lr; the paper scales
    it by the schedule's multiplier alone.

    Freezing: a parameter without a gradient (p.grad is None) is skipped whole, as torch.optim.AdamW skips it. No decay
    and no momentum move it, its m and v stay, and t above counts its own updates alone. p.requires_grad = False stops
    its gradient from the next zero_grad on, and its updates at once, also if an earlier gradient is still there (where
    PyTorch would use that one). A gradient of zeros is a gradient. clip leaves out the same parameters.

    The parameters move into one flat array, which owns them (fast/flat_parameters.py): make one optimiser for a model,
    after the model is on its device, and afterwards write p.assign(x) instead of p.data = x. Otherwise the next
    zero_grad, clip, step or state raises RuntimeError with the name of the parameter.
    group: workers or ranks that share the update. Raises TypeError for parameters of several dtypes and for what is no
    dict of leaves, ValueError for parameters that share memory, and for a setting out of range: here, and in step if it
    was changed since.
    """

    def __init__(self, parameters: dict[str, Tensor], learning_rate: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.01,
                 group: Ranks | None = None):
        leaves = list(getattr(parameters, "values", list)())
        if not leaves or not all(isinstance(p, Tensor) and p.node is None for p in leaves):
            raise TypeError(f"AdamW: parameters is {checks.shown(parameters)}; it must be a dict of leaves by name")
        self.group = group or ProcessGroup(1)
        self.parameters = dict(parameters)
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self._check_settings(learning_rate)
        self.flat = FlatParameters(parameters, self.group)
        self.data = self.flat.data
        self.updates = np.zeros(len(parameters), np.int64)      # of each parameter, in the order of the flat arrays
        self._trained: Any = None       # of the last step, see _runs
        self.trained_parameters: dict[str, Tensor] = {}         # that the last clip and step found a gradient for
        self.m = self.flat.own_zeros()
        self.v = self.flat.own_zeros()
        self._refused: Any = None                               # 0 or NaN, see step_if_finite
        self.accept()

    @property
    def grad(self) -> np.ndarray:
        """The flat gradient (N,)."""
        return self.flat.grad

    @property
    def steps(self) -> int:
        """The number of updates of the parameter that has had the most."""
        return int(self.updates.max(initial=0))

    def _check_settings(self, learning_rate):
        checks.number("AdamW", "learning_rate", learning_rate, at_least=0)
        if np.shape(self.betas) != (2,):
            raise TypeError(f"AdamW: betas is {checks.shown(self.betas)}; it must be a pair of numbers")
        for i in (0, 1):
            checks.number("AdamW", f"betas[{i}]", self.betas[i], at_least=0, below=1)
        checks.number("AdamW", "eps", self.eps, above=0)
        checks.number("AdamW", "weight_decay", self.weight_decay, at_least=0)

    def zero_grad(self) -> None:
        """Drop the gradients: the next backward writes over them. One that somebody has kept stays as it is."""
        self.flat.zero_grad()

    def clip(self, max_norm: float) -> Any:
        """Scale the gradient so that its norm over all parameters is at most max_norm.

        Returns the norm before scaling (Pascanu et al. 2013, arXiv:1211.5063): a float; on one GPU an array without
        axes. PyTorch divides by the norm plus 1e-6; here it is the norm alone. max_norm is above 0; infinity measures
        the norm and scales nothing.
        """
        if max_norm != math.inf:
            checks.number("clip", "max_norm", max_norm, above=0)
        blocks = [block for run, _ in self._runs() for block in self.flat.blocks(run)]
        grad = self.grad
        if is_cupy(grad):
            from minilm.kernels import fused
            norm = self._norm([fused.squared_norm(grad[b]) for b in blocks])
            if is_cupy(norm):
                for b in blocks if max_norm < math.inf else ():
                    fused.clip(grad[b], norm, max_norm)
                return norm
        else:
            norm = self._norm([float(grad[b] @ grad[b]) for b in blocks])
        if norm > max_norm:
            for b in blocks:
                grad[b] *= max_norm / norm
        return norm

    def _norm(self, squares):
        """The root of the sum of these numbers of all ranks. One GPU keeps it, so that the host need not wait."""
        total = functools.reduce(operator.add, squares) if squares else 0.0
        if is_cupy(total) and self.group.size == 1:
            return array_module(total).sqrt(total)
        return math.sqrt(sum(self.group.all_gather(float(total))))

    def step_if_finite(self, learning_rate: float, numbers: Iterable) -> Any:
        """step() on one GPU. The kernel changes nothing unless these arrays without axes are finite, and those of all
        calls since accept(). `updates` counts the step in any case."""
        for number in numbers:
            self._refused = self._refused + 0 * number          # 0 or NaN
        return self.step(learning_rate)

    def accept(self) -> None:
        """Forget the numbers of step_if_finite that were not finite. The caller may have set `updates` back."""
        self._trained = None
        self._refused = array_module(self.data).zeros((), self.data.dtype)

    def step(self, learning_rate: float | None = None) -> Any:
        """One update from the accumulated gradients (which stay until zero_grad).

        Returns the norm of the updated parameters after it, which is finite only if each of them is: as clip does.
        """
        lr = self.learning_rate if learning_rate is None else learning_rate
        self._check_settings(lr)
        runs = self._runs()
        self.updates += self._trained
        parts = [(block, int(self.updates[i])) for run, i in runs for block in self.flat.blocks(run)]
        update = self._update_on_gpu if is_cupy(self.data) else self._update
        squares = [update(block, lr, t) for block, t in parts]
        self.group.share(self.data)
        mark_changed(self.trained_parameters, "AdamW.step")
        return self._norm(squares)

    def _runs(self):
        """[(slice, place of its first parameter)] of neighbours that this step trains and that have had equally many
        updates. A step adds 1 to each, so the slices stay as they are until a parameter is frozen or thawed."""
        trained = self.flat.trained()
        if trained is not self._trained:
            self._trained = trained
            self._runs_of_trained = self.flat.runs((self.updates + 1) * trained)
            self.trained_parameters = self.flat.selected(trained)
        return self._runs_of_trained

    def _views(self, block):
        first = self.flat.own.start
        own = slice(block.start - first, block.stop - first)
        return self.data[block], self.grad[block], self.m[own], self.v[own]

    def _update_on_gpu(self, block, lr, t):
        from minilm.kernels import fused
        decayed = min(max(0, self.flat.n_decay - block.start), block.stop - block.start)
        p, g, m, v = self._views(block)
        return fused.adamw_step(p, g, m, v, decayed, lr, self.betas, self.eps, self.weight_decay, t,
                                self._refused)

    def _update(self, block, lr, t):
        """The formula above, the t-th update, on one block of the flat arrays, in place. Returns the squared norm of p.

        With bias_correction2_sqrt = sqrt(1 - b2^t), the step is step_size m / (sqrt(v) + eps bias_correction2_sqrt).
        """
        b1, b2 = self.betas
        bias_correction2_sqrt = math.sqrt(1 - b2 ** t)
        step_size = lr * bias_correction2_sqrt / (1 - b1 ** t)
        p, g, m, v = self._views(block)
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
        """Arrays to save: moments m and v, and the number of updates of each parameter, `steps`. See load_state.

        Every rank of the group calls it: each has the moments of its own stretch alone.
        """
        self.flat.check_owned()
        return {"m": self.flat.whole(self.m), "v": self.flat.whole(self.v), "steps": self.updates}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue where state() was called. The parameters are saved apart, and requires_grad is not saved: freeze the
        same parameters again. One number as `steps` counts for all of them. Raises ValueError for another size and for
        numbers that no state has, TypeError for steps that are no integers."""
        steps = checks.indices("AdamW.load_state", "steps", arrays["steps"], 2 ** 63)
        for name, least in (("m", None), ("v", 0)):
            if checks.finite("AdamW.load_state", name, arrays[name], at_least=least).shape != self.data.shape:
                raise ValueError(f"optimiser state for {arrays[name].size} parameters, model of {self.data.size}")
        if steps.shape not in ((), self.updates.shape):
            raise ValueError(f"optimiser state of {steps.size} tensors, model of {self.updates.size}")
        for kept, name in ((self.m, "m"), (self.v, "v")):
            kept[...] = self.flat.as_flat(arrays[name])[self.flat.own]
        self.updates[...] = steps
        self.accept()


def warmup_cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Learning rate at `step` of `steps` (from 0): linear warm-up to peak, then half a cosine down to floor * peak.

    It starts at peak / warmup, not at 0. Steps warmup - 1 (the end of the warm-up) and warmup (the start of the cosine)
    both have the peak. floor * peak is the rate of step `steps`, one after the last.
    Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts. Raises ValueError for a setting out of range.
    """
    checks.integer("warmup_cosine", "step", step, at_least=0)
    checks.integer("warmup_cosine", "steps", steps, at_least=1)
    checks.number("warmup_cosine", "peak", peak, at_least=0)
    checks.integer("warmup_cosine", "warmup", warmup, at_least=0)
    checks.number("warmup_cosine", "floor", floor, at_least=0, at_most=1)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
