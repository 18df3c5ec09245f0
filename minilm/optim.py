"""AdamW over one flat array, gradient clipping, learning-rate schedules."""

import math

import numpy as np

from minilm.backend import array_module, is_cupy
from minilm.kernels import fused
from minilm.fast.workers import ProcessGroup

# Elements updated at a time: the five arrays of a block stay in the cache of one core.
BLOCK = 1 << 15


class AdamW:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.

        m <- b1 m + (1 - b1) g         v <- b2 v + (1 - b2) g^2
        p <- p - lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd p )

    Decay applies to matrices and not to vectors (norm weights). As PyTorch does, and the
    paper does not, it is scaled by lr.

    All parameters move into one flat array, matrices first, and all gradients into another:
    `p.data` becomes a view, backward writes `p.grad` into one (`p.grad_buffer`), and a step is a few
    operations on long vectors instead of a Python loop over hundreds of small ones. Make one optimiser
    per set of parameters, after the model is on its device; assign to p.data[...] and not to p.data
    afterwards.

    team: the workers that share what is done to the flat arrays, each on a stretch of its own.
    """

    def __init__(self, parameters, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, team=None):
        self.team = team or ProcessGroup(1)
        self.parameters = dict(parameters)
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.steps = 0
        dtypes = {p.dtype for p in self.parameters.values()}
        if len(dtypes) != 1:
            raise TypeError(f"AdamW: parameters of one dtype, please; got {sorted(map(str, dtypes))}")
        names = sorted(self.parameters, key=lambda name: self.parameters[name].ndim < 2)    # stable: matrices first
        ordered = [self.parameters[name] for name in names]
        xp = array_module(*(p.data for p in ordered))
        self.decayed = sum(p.size for p in ordered if p.ndim >= 2)
        ends = np.cumsum([p.size for p in ordered])
        self.data, self.grad, self.m, self.v = (self.team.zeros(int(ends[-1]), ordered[0].dtype, xp) for _ in range(4))
        self._layout = {name: (slice(int(end) - p.size, int(end)), p.shape) for name, p, end in zip(names, ordered, ends)}
        data, grad = self.views(self.data), self.views(self.grad)
        for name, p in self.parameters.items():
            data[name][...] = p.data
            p.data, p.grad_buffer, p.grad = data[name], grad[name], None

    def views(self, flat):
        """A flat array in the layout of the parameters, as {name: view of the parameter's shape}."""
        return {name: flat[where].reshape(shape) for name, (where, shape) in self._layout.items()}

    def zero_grad(self):
        """Forget the gradients: the next backward writes over them."""
        zero_grad_of(self.parameters)

    def add_gradients(self, others):
        """Add gradients found elsewhere: flat arrays in the layout of views()."""
        self._complete()
        for b in self._blocks():
            for other in others:
                self.grad[b] += other[b]

    def _complete(self):
        if self.team.active_size == 1:          # or each worker has, before the gradients were added up
            materialise_gradients(self.parameters)

    def _blocks(self):
        """Slices of this worker's stretch of the flat arrays; on a GPU, all of it."""
        start, stop = (self.data.size * rank // self.team.active_size for rank in (self.team.rank, self.team.rank + 1))
        block = self.data.size if is_cupy(self.data) else BLOCK
        return [slice(i, min(i + block, stop)) for i in range(start, stop, block)]

    def clip(self, max_norm):
        """Scale the gradient so that its norm over all parameters is at most max_norm.

        Returns the norm before (Pascanu et al. 2013, arXiv:1211.5063). PyTorch divides by the norm
        plus 1e-6; we do not.
        """
        self._complete()
        if is_cupy(self.grad):
            squares = fused.squared_norm(self.grad).item()
        else:
            squares = sum(float(self.grad[b] @ self.grad[b]) for b in self._blocks())
        norm = math.sqrt(sum(self.team.all_gather(squares)))
        if norm > max_norm:
            for b in self._blocks():
                self.grad[b] *= max_norm / norm
        return norm

    def step(self, learning_rate=None):
        """One update from the accumulated gradients (which stay until zero_grad).

        Returns the norm of the parameters after it: finite only if each of them is.
        """
        self._complete()
        lr = self.learning_rate if learning_rate is None else learning_rate
        self.steps += 1
        if is_cupy(self.data):
            return math.sqrt(fused.adamw_step(self.data, self.grad, self.m, self.v, self.decayed, lr, self.betas, self.eps,
                                              self.weight_decay, self.steps).item())
        b1, b2 = self.betas
        # lr m' / (sqrt(v') + eps) with the corrected moments, as rate m / (sqrt(v) + eps_t).
        second = math.sqrt(1 - b2 ** self.steps)
        rate, eps = lr * second / (1 - b1 ** self.steps), self.eps * second
        squares = 0.0
        for block in self._blocks():
            p, g, m, v = self.data[block], self.grad[block], self.m[block], self.v[block]
            change = g - m
            change *= 1 - b1
            m += change
            np.multiply(g, g, out=change)
            change -= v
            change *= 1 - b2
            v += change
            p[:max(0, self.decayed - block.start)] *= 1 - lr * self.weight_decay
            np.sqrt(v, out=change)
            change += eps
            np.divide(m, change, out=change)
            change *= rate
            p -= change
            squares += float(p @ p)
        return math.sqrt(sum(self.team.all_gather(squares)))

    def state(self):
        """Arrays to save, by name; `steps` among them. See load_state."""
        return {"m": self.m, "v": self.v, "steps": np.array(self.steps)}

    def load_state(self, arrays):
        """Go on exactly where state() was taken. The parameters are saved apart."""
        for name in ("m", "v"):
            if arrays[name].shape != self.m.shape:
                raise ValueError(f"optimiser state for {arrays[name].size} parameters, model of {self.m.size}")
        xp = array_module(self.m)
        self.m[...], self.v[...], self.steps = xp.asarray(arrays["m"]), xp.asarray(arrays["v"]), int(arrays["steps"])


def zero_grad_of(parameters):
    """No gradient any more, for parameters by name."""
    for p in parameters.values():
        p.grad = None


def materialise_gradients(parameters):
    """The gradients of parameters by name all in their buffers: zeros where there was none."""
    for p in parameters.values():
        if p.grad_buffer is None:
            raise RuntimeError("a parameter has left the optimiser's flat array: make the optimiser after to_device")
        if p.grad is not p.grad_buffer:
            p.grad_buffer[...] = 0 if p.grad is None else p.grad
            p.grad = p.grad_buffer


def warmup_cosine(step, steps, peak, warmup, floor=0.1):
    """Learning rate at `step` of `steps` (from 0): linear warm-up to peak, then half a cosine
    down to floor * peak (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
