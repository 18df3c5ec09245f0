"""AdamW over one flat array, gradient clipping, learning-rate schedules."""

import math

import numpy as np

from minilm.backend import array_module

# Elements updated at a time: the five arrays of a block stay in the cache of one core.
BLOCK = 1 << 15


class AdamW:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.

        m <- b1 m + (1 - b1) g         v <- b2 v + (1 - b2) g^2
        p <- p - lr ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd p )

    Decay applies to matrices and not to vectors (norm weights). As PyTorch does, and the
    paper does not, it is scaled by lr.

    All parameters move into one flat array, matrices first, and all gradients into another:
    `p.data` and `p.grad` become views, and a step is a few operations on long vectors instead
    of a Python loop over hundreds of small ones. Make one optimiser per set of parameters,
    after the model is on its device; assign to p.data[...] and not to p.data afterwards.
    """

    def __init__(self, parameters, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01):
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
        self.data = xp.concatenate([p.data.reshape(-1) for p in ordered])
        self.grad, self.m, self.v = (xp.zeros_like(self.data) for _ in range(3))
        ends = np.cumsum([p.size for p in ordered])
        self._layout = {name: (slice(int(end) - p.size, int(end)), p.shape) for name, p, end in zip(names, ordered, ends)}
        data, grad = self.views(self.data), self.views(self.grad)
        for name, p in self.parameters.items():
            p.data, p.grad = data[name], grad[name]

    def views(self, flat):
        """A flat array in the layout of the parameters, as {name: view of the parameter's shape}."""
        return {name: flat[where].reshape(shape) for name, (where, shape) in self._layout.items()}

    def zero_grad(self):
        self.grad.fill(0)

    def clip(self, max_norm):
        """Scale the gradient so that its norm over all parameters is at most max_norm.

        Returns the norm before (Pascanu et al. 2013, arXiv:1211.5063). PyTorch divides by the norm
        plus 1e-6; we do not.
        """
        norm = math.sqrt(sum(float(self.grad[b] @ self.grad[b]) for b in _blocks(0, self.grad.size)))
        if norm > max_norm:
            self.grad *= max_norm / norm
        return norm

    def step(self, learning_rate=None):
        """One update from the accumulated gradients (which stay until zero_grad)."""
        lr = self.learning_rate if learning_rate is None else learning_rate
        self.steps += 1
        b1, b2 = self.betas
        xp = array_module(self.data)
        first, second = lr / (1 - b1 ** self.steps), (1 - b2 ** self.steps) ** -0.5
        for start, end, decay in ((0, self.decayed, self.weight_decay), (self.decayed, self.data.size, 0.0)):
            for block in _blocks(start, end):
                p, g, m, v = self.data[block], self.grad[block], self.m[block], self.v[block]
                m += (1 - b1) * (g - m)
                v += (1 - b2) * (g * g - v)
                p *= 1 - lr * decay
                denominator = xp.sqrt(v)
                denominator *= second
                denominator += self.eps
                p -= first * m / denominator

    def state(self):
        """Arrays to save, by name; `steps` among them. See load_state."""
        return {"m": self.m, "v": self.v, "steps": np.array(self.steps)}

    def load_state(self, arrays):
        """Go on exactly where state() was taken. The parameters are saved apart."""
        if arrays["m"].shape != self.m.shape:
            raise ValueError(f"optimiser state for {arrays['m'].size} parameters, model of {self.m.size}")
        self.m[...], self.v[...], self.steps = arrays["m"], arrays["v"], int(arrays["steps"])


def _blocks(start, end):
    return (slice(i, min(i + BLOCK, end)) for i in range(start, end, BLOCK))


def warmup_cosine(step, steps, peak, warmup, floor=0.1):
    """Learning rate at `step` of `steps` (from 0): linear warm-up to peak, then half a cosine
    down to floor * peak (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
