"""All parameters in one flat array, and all gradients in another: an optimiser step is a few long vector operations.

`p.data` becomes a view into the flat data, and backward writes `p.grad` into a view of the flat gradient
(`p.grad_buffer`). A loop over hundreds of small arrays would spend its time in Python. The update takes BLOCK numbers
at a time, which stay in the cache of one core. The results equal those of plain.adamw, parameter by parameter.
Measured gain: scripts/bench/tricks.py. Tests: tests/test_optim.py.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np

from minilm.backend import array_module, is_cupy
from minilm.fast.workers import ProcessGroup
from minilm.tensor import Tensor

BLOCK = 1 << 15


class FlatParameters:
    """data and grad (N,) of parameters by name, matrices first; n_decay: how many of the N belong to matrices.

    Make it after the parameters are on their device. It owns them afterwards: write with p.assign(x) instead of
    p.data = x, and make no second one for the same Tensors. A method that meets a parameter with another array raises
    RuntimeError with its name.
    group: worker processes; each updates a slice of its own of the flat arrays.
    Raises TypeError for parameters of several dtypes, ValueError for parameters that share memory.
    """

    def __init__(self, parameters: dict[str, Tensor], group: ProcessGroup):
        self.group = group
        self.parameters = dict(parameters)
        dtypes = {p.dtype for p in self.parameters.values()}
        if len(dtypes) != 1:
            raise TypeError(f"AdamW: all parameters must have one dtype; got {sorted(map(str, dtypes))}")
        for (a, p), (b, q) in itertools.combinations(self.parameters.items(), 2):
            if overlap(p.data, q.data):
                raise ValueError(f"AdamW: parameters '{a}' and '{b}' share memory, and each would get an array of its "
                                 "own; give tied weights one name, or copy one of them")
        names = sorted(self.parameters, key=lambda name: self.parameters[name].ndim < 2)    # stable: matrices first
        ordered = [self.parameters[name] for name in names]
        self.n_decay = sum(p.size for p in ordered if p.ndim >= 2)
        self._edges = [0, *np.cumsum([p.size for p in ordered]).tolist()]
        self._layout = {name: (slice(start, end), p.shape)
                        for name, p, start, end in zip(names, ordered, self._edges, self._edges[1:])}
        self.size = self._edges[-1]
        self._xp = array_module(*(p.data for p in ordered))
        self._dtype = ordered[0].dtype
        self.data = self.zeros()
        self._owned = []                    # (name, parameter, its view of data) in the order of the flat arrays
        for name, view in self.views(self.data).items():
            p = self.parameters[name]
            view[...] = p.data
            p.data = view
            self._owned.append((name, p, view))
        # Of each rank: which parameters have a gradient. Of rank 0: which require one.
        self._has_gradient = group.zeros(group.size * len(names), np.int64).reshape(group.size, -1)
        self._requires_grad = group.zeros(len(names), np.int64)
        self._collected: list[tuple[bool, bool]] | None = None
        self._trained: np.ndarray | None = None
        self._new_gradient()

    def __reduce__(self):
        """Copies and pickles would have parameters and flat arrays in different memory, so that nothing trains."""
        raise TypeError("an optimiser cannot be copied or pickled; make another one for model.copy()")

    def _new_gradient(self):
        self.grad = self.zeros()
        views = self.views(self.grad)
        for name, p, _ in self._owned:
            p.grad_buffer = views.pop(name)
        self._references = self._count_references()

    def _count_references(self):
        return [sys.getrefcount(self.grad), *[sys.getrefcount(p.grad_buffer) for _, p, _ in self._owned]]

    def zeros(self):
        """Another flat array (N,), in memory that all workers share."""
        return self.group.zeros(self.size, self._dtype, self._xp)

    def as_flat(self, array: np.ndarray):
        """An array (N,) on the device of the parameters."""
        return self._xp.asarray(array)

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """A flat array in the layout of the parameters: {name: view of the parameter's shape}."""
        return {name: flat[where].reshape(shape) for name, (where, shape) in self._layout.items()}

    def runs(self, labels: np.ndarray) -> list[tuple[slice, int]]:
        """[(slice of the flat arrays, place of its first parameter)] of neighbours with one label; labels: one for
        each parameter, and 0 is left out."""
        edges = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
        return [(slice(self._edges[i], self._edges[j]), i) for i, j in zip(edges, edges[1:]) if labels[i]]

    def blocks(self, run: slice | None = None) -> list[slice]:
        """The slices of a run (None: everything) that this worker updates; on a GPU, one slice."""
        run = run or slice(0, self.size)
        first, last = (self.size * rank // self.group.active_size for rank in (self.group.rank, self.group.rank + 1))
        start = max(first, run.start)
        stop = min(last, run.stop)
        block = self.size if is_cupy(self.data) else BLOCK
        return [slice(i, min(i + block, stop)) for i in range(start, stop, block)]

    def check_owned(self) -> None:
        """Raises RuntimeError if a parameter has another array than the view of it here, with its name."""
        for owned in self._owned:
            self._check_owned(*owned)

    def zero_grad(self) -> None:
        """Drop the gradients. The next backward writes over them, unless somebody has kept one, or a view of one: then
        it writes to new memory (with several workers the memory is shared and stays: copy a gradient to keep it)."""
        for name, p, view in self._owned:
            self._check_owned(name, p, view)
            p.grad = None
        if self.group.size == 1 and self._count_references() != self._references:
            self._new_gradient()

    def add_gradients(self, others: list[np.ndarray]) -> None:
        """Add gradients that other workers computed: flat arrays in the layout of views()."""
        for b in self.blocks():
            for other in others:
                self.grad[b] += other[b]

    def collect(self) -> None:
        """Every gradient in its place in the flat gradient, zeros where a parameter got none; and note which got one.

        Several workers call it when each has its gradients, and meet (ProcessGroup.all_gather) before they go on.
        """
        found = []
        for name, p, view in self._owned:
            self._check_owned(name, p, view)
            found.append((p.grad is not None, p.requires_grad))
            if p.grad is None:
                p.grad_buffer[...] = 0
            elif p.grad is not p.grad_buffer:
                p.grad_buffer[...] = p.grad
                p.grad = p.grad_buffer
        if found != self._collected:
            self._collected, self._trained = found, None
            self._has_gradient[self.group.rank], requires_grad = zip(*found)
            if self.group.rank == 0:
                self._requires_grad[:] = requires_grad

    def trained(self) -> np.ndarray:
        """0 or 1 for each parameter: the parameters that a step updates, in the order of the flat arrays.

        They have a gradient, in any worker, and require one. One worker collects the gradients here; several have done
        it before they were added. It is the array of the last call if nothing was frozen or thawed since.
        """
        if self.group.active_size == 1:
            self.collect()
        if self._trained is None or self.group.active_size > 1:
            trained = self._has_gradient[:self.group.active_size].max(axis=0) * self._requires_grad
            if self._trained is None or (trained != self._trained).any():
                self._trained = trained
        return self._trained

    def selected(self, trained: np.ndarray) -> dict[str, Tensor]:
        """The parameters by name where trained() is 1."""
        return {name: p for (name, p, _), selected in zip(self._owned, trained.tolist()) if selected}

    def _check_owned(self, name, p, view):
        if p.data is not view or p.grad_buffer is None:
            raise RuntimeError(f"parameter '{name}' has left this optimiser's flat array: another AdamW or TrainState "
                               "was made for it, or p.data was assigned, or the model was moved. Use one optimiser for "
                               "a model, p.assign(x) instead of p.data = x, and make the optimiser after to_device")


def shares_parameters(a: Any, b: Any) -> str | None:
    """The name of the first parameter of model a whose memory a parameter of model b uses too; None if there is none.

    A Transformer shares its parameters with itself, with a model made by over(), and with a RewardModel whose body it
    is. It shares none with its copy().
    """
    pairs = ((name, p.data, q.data) for name, p in a.parameters().items() for q in b.parameters().values())
    return next((name for name, x, y in pairs if overlap(x, y)), None)


def overlap(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two arrays have an element in common. Arrays on two devices have none."""
    if is_cupy(x) != is_cupy(y):
        return False
    xp = array_module(x)
    return bool(xp.may_share_memory(x, y) and xp.shares_memory(x, y))      # the first is fast: most pairs end there
