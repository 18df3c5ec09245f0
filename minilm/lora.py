"""Low-rank adaptation: the weights of a model stay, and a product of two thin matrices is added to each.

    y = x W + (alpha / r) (x A) B,      W (in,out) frozen,  A (in,r),  B (r,out)

A starts as U(-1, 1) / sqrt(in) and B as 0, so that the adapted model starts as the model itself. Only A and B are
trained, so gradients, moments and snapshots are as small as they are. To decode, the product is added to W (but not in
bf16: kernels/mixed_decoding.py).
A weight that joins several matrices (qkv, gate_up) has an A and a B for each of them, as in PEFT.
Hu et al. 2021, arXiv:2106.09685. Tests: tests/test_lora.py.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection
from typing import Any

import numpy as np

from minilm import checks, mixed_precision, ops
from minilm.backend import array_module, is_cupy, to_device
from minilm.config import matrix_widths
from minilm.model import Transformer, move_parameter
from minilm.tensor import Tensor, primitive

# The matrices of a weight of a block, by Hugging Face's names.
MATRICES = {"qkv": ("q_proj", "k_proj", "v_proj"), "attention_out": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
            "ffn_out": ("down_proj",)}
TARGETS = tuple(name for names in MATRICES.values() for name in names)


class LowRank:
    """An adapted weight of a block: a function of x (..,in) that gives x W + scale (x A) B (..,out).

    pairs: (A, B) of each matrix that W joins, or None for one that is not adapted; widths: of their outputs.
    """

    def __init__(self, weight: Any, pairs: list[tuple[Tensor, Tensor] | None], widths: list[int], scale: float):
        self.weight = weight
        self.scale = scale
        self.widths = widths
        self.pairs = pairs
        self.starts = list(itertools.accumulate(widths[:-1], initial=0))       # columns

    def __call__(self, x: Tensor) -> Tensor:
        W, A, B = self.factors()
        return x @ W + (x @ A) @ B

    def factors(self) -> tuple[Any, Tensor, Tensor]:
        """W, A (in,R) and B (R,out) of this function x W + (x A) B: the pairs side by side, R the sum of their r."""
        there = [(pair, start) for pair, start in zip(self.pairs, self.starts) if pair]
        A = ops.concatenate([A for (A, _), _ in there], axis=1)
        B = block_rows(*(B for (_, B), _ in there), starts=[start for _, start in there], width=sum(self.widths),
                       scale=self.scale)
        return self.weight, A, B

    def added_to(self, W: np.ndarray) -> np.ndarray:
        """W + scale A B, of W (in,out) on the device of A and B."""
        W = W.copy()
        for pair, start, width in zip(self.pairs, self.starts, self.widths):
            if pair:
                W[:, start:start + width] += self.scale * (pair[0].data @ pair[1].data)
        return W


@primitive
def block_rows(*blocks, starts: list[int], width: int, scale: float):
    """The rows of blocks (r,n), times scale, one below the other: those of block i from column starts[i] on, 0 beside
    them.  -> (sum of r, width).    dblock = scale * its part of dy"""
    xp = array_module(*blocks)
    y = xp.zeros((sum(map(len, blocks)), width), blocks[0].dtype)
    row = 0
    parts = []
    for block, start in zip(blocks, starts):
        parts.append((slice(row, row + len(block)), slice(start, start + block.shape[1])))
        y[parts[-1]] = scale * block
        row += len(block)
    def vjp(dy):
        return tuple(scale * dy[part] for part in parts)
    return y, vjp


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
        self._rounded: dict = {}
        self._adapt(self._fresh(rng))
        if base.compute != "float32":
            self.to_device("gpu", base.compute)

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
            weight = self._rounded.get(name, W)
            self._parameters[name] = LowRank(weight, pairs, matrix_widths(self.config, name), self.alpha / self.rank) \
                if any(pairs) else weight

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

    @property
    def unembedding(self) -> Any:
        """As Transformer.unembedding; in mixed precision a mixed_layers.Rounded."""
        return self._rounded.get("unembedding") or super().unembedding

    def merged(self) -> Transformer:
        """A Transformer with W + (alpha / r) A B of float32 weights, on the same device, which computes as this one;
        weights that are not adapted are shared."""
        device = self._device()
        weights = {name: to_device(W.data, device) for name, W in self._frozen.items()}
        weights |= {name: p.added_to(weights[name]) for name, p in self._parameters.items() if isinstance(p, LowRank)}
        return Transformer.of(self.config, weights).to_device(device, self.compute)

    def decoding_weights(self) -> dict[str, Any]:
        """As Transformer.decoding_weights: of the merged weights; in bf16 (mixed_decoding.py) not merged."""
        return super().decoding_weights() if self.compute == "bfloat16" else self.merged().decoding_weights()

    def to_device(self, device: str, compute: str = "float32") -> Adapted:
        """As Transformer.to_device. The frozen weights are then no longer shared with the base.

        compute="bfloat16" keeps one bf16 copy of each frozen matrix on the GPU, and its float32 numbers on the CPU, for
        merged() and for the way back. The adapters are float32, and their products are of bf16 matrices too.
        """
        mixed_precision.check(self.config, self.dtype, device, compute)
        for p in self._adapters.values():
            move_parameter(p, device)
        self.compute = compute
        self._rounded = {}
        if compute == "bfloat16":
            from minilm.kernels.mixed_layers import frozen
            self._rounded = frozen({name: p.data for name, p in self._frozen.items()}, self.config.tied)
        for name, p in self._frozen.items():
            move_parameter(p, "cpu" if name in self._rounded else device)
        self._adapt(self._adapters)
        return self

    def _device(self):
        return "gpu" if is_cupy(next(iter(self._adapters.values())).data) else "cpu"
