"""Low-rank adaptation: the weights of a model stay, and a product of two thin matrices is added to each.

    y = x W + (alpha / r) (x A) B,      W (in,out) frozen,  A (in,r),  B (r,out)

A starts as U(-1, 1) / sqrt(in) and B as 0, so that the adapted model starts as the model itself. Only A and B are
trained, so gradients, moments and snapshots are as small as they are. To decode, the product is added to W.
A weight that joins several matrices (qkv, gate_up) has an A and a B for each of them, as in PEFT.
Hu et al. 2021, arXiv:2106.09685. Tests: tests/test_lora.py.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np

from minilm import checks, ops
from minilm.backend import array_module
from minilm.config import matrix_widths
from minilm.model import Transformer, move_parameter
from minilm.tensor import Tensor

# The matrices of a weight of a block, by Hugging Face's names.
MATRICES = {"qkv": ("q_proj", "k_proj", "v_proj"), "attention_out": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
            "ffn_out": ("down_proj",)}
TARGETS = tuple(name for names in MATRICES.values() for name in names)


class LowRank:
    """An adapted weight of a block: a function of x (..,in) that gives x W + scale (x A) B (..,out).

    pairs: (A, B) of each matrix that W joins, or None for one that is not adapted; widths: of their outputs.
    """

    def __init__(self, weight: Tensor, pairs: list[tuple[Tensor, Tensor] | None], widths: list[int], scale: float):
        self.weight = weight
        self.pairs = pairs
        self.widths = widths
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        xp = array_module(x.data)
        updates = [((x @ pair[0]) * self.scale) @ pair[1] if pair else xp.zeros((*x.shape[:-1], width), x.dtype)
                   for pair, width in zip(self.pairs, self.widths)]
        return x @ self.weight + (updates[0] if len(updates) == 1 else ops.concatenate(updates, axis=-1))

    def merged(self) -> np.ndarray:
        """W + scale A B."""
        W = self.weight.data.copy()
        start = 0
        for pair, width in zip(self.pairs, self.widths):
            if pair:
                W[:, start:start + width] += self.scale * (pair[0].data @ pair[1].data)
            start += width
        return W


class Adapted(Transformer):
    """A Transformer with the weights of `base`, frozen and shared; parameters() are A and B of each adapted matrix.

    rank: r. alpha: the update is scaled by alpha / r. targets: the matrices that are adapted, of TARGETS.
    Raises ValueError for another name or none, and for a rank or alpha out of range.
    """

    def __init__(self, base: Transformer, rank: int, alpha: float, rng: np.random.Generator,
                 targets: Collection[str] = TARGETS):
        checks.integer("Adapted", "rank", rank, at_least=1)
        checks.number("Adapted", "alpha", alpha, above=0)
        checks.generator("Adapted", rng)
        if isinstance(targets, str) or not targets or not set(targets) <= set(TARGETS):
            raise ValueError(f"Adapted: targets is {targets!r}; it must be a list of some of {', '.join(TARGETS)}")
        self.config = base.config
        self.activation_checkpointing = base.activation_checkpointing
        self.rank = rank
        self.alpha = alpha
        self.targets = tuple(name for name in TARGETS if name in targets)
        self._frozen = {name: Tensor(p.data) for name, p in base.parameters().items()}
        self._adapt(self._fresh(rng))

    def _fresh(self, rng):
        """{name: Tensor} of new adapters."""
        adapters = {}
        for name, W in self._frozen.items():
            for matrix, width in zip(self._matrices(name), matrix_widths(self.config, name)):
                if matrix in self.targets:
                    A = rng.uniform(-1, 1, (W.shape[0], self.rank)) * W.shape[0] ** -0.5
                    where = name.rpartition(".")[0]
                    xp = array_module(W.data)
                    adapters[f"{where}.{matrix}.lora_a"] = Tensor(xp.asarray(A.astype(W.dtype)), requires_grad=True)
                    adapters[f"{where}.{matrix}.lora_b"] = Tensor(xp.zeros((self.rank, width), W.dtype),
                                                                  requires_grad=True)
        return adapters

    @staticmethod
    def _matrices(name):
        return MATRICES.get(name.rpartition(".")[2], ())

    def _adapt(self, adapters):
        self._adapters = adapters
        self._parameters = {}
        for name, W in self._frozen.items():
            where = name.rpartition(".")[0]
            pairs = [(adapters[f"{where}.{matrix}.lora_a"], adapters[f"{where}.{matrix}.lora_b"])
                     if matrix in self.targets else None for matrix in self._matrices(name)]
            self._parameters[name] = LowRank(W, pairs, matrix_widths(self.config, name), self.alpha / self.rank) \
                if any(pairs) else W

    def parameters(self) -> dict[str, Tensor]:
        """The adapters by name, in a fixed order: blocks.0.q_proj.lora_a (in,r), blocks.0.q_proj.lora_b (r,out), ..."""
        return dict(self._adapters)

    def over(self, parameters: dict[str, Tensor]) -> Adapted:
        """The same frozen weights with other adapters, a mapping like the one that parameters() returns."""
        shapes = {name: p.shape for name, p in self._adapters.items()}
        if wrong := [name for name in shapes if name not in parameters or parameters[name].shape != shapes[name]]:
            raise ValueError(f"over: the adapter '{wrong[0]}' is missing, or of another shape than {shapes[wrong[0]]}")
        other = copy.copy(self)
        other._adapt({name: parameters[name] for name in shapes})
        return other

    def merged(self) -> Transformer:
        """A Transformer with W + (alpha / r) A B; weights that are not adapted are shared."""
        return Transformer.of(self.config, {name: p.merged() if isinstance(p, LowRank) else p.data
                                            for name, p in self._parameters.items()})

    def to_device(self, device: str, compute: str = "float32") -> Adapted:
        """As Transformer.to_device. The frozen weights are then no longer shared with the base.

        Raises ValueError for compute="bfloat16": a weight with an adapter is no matrix.
        """
        if compute != "float32":
            raise ValueError(f"to_device: compute is {compute!r}; an adapted model computes in float32 alone")
        for p in (*self._frozen.values(), *self._adapters.values()):
            move_parameter(p, device)
        return self
