"""Mixed precision on a GPU: bf16 activations and products between float32 residuals and parameters; or TF32 products.

    model.to_device("gpu", compute="bfloat16")

On tensor cores a product of bf16 matrices takes a fraction of the time of a float32 one, and its operands half the
memory. bf16 has 8 bits of mantissa and the exponents of float32, so no loss need be scaled. What must have more digits
stays float32: parameters, gradients and moments, the residual stream, the sums of every product, softmax, norms, logits
and the loss (Micikevicius et al. 2018, arXiv:1710.03740; Kalamkar et al. 2019, arXiv:1905.12322).

All of a model computes so: packs, rectangles with padding or without, logits, rewards, and generation, which reads bf16
weights and a bf16 cache (kernels/mixed_decoding.py). Sampling rounds where training rounds: the ratio of a policy to
itself stays within 2e-3 of 1 for each token (tests/test_mixed_decoding.py). Of an adapted model (lora.py) the frozen
matrices are on the GPU as bf16 alone. The formulas are in kernels/mixed_layers.py.

    model.to_device("gpu", compute="tensorfloat32")

keeps a model in float32; only the factors of products with its weights are rounded, by the tensor cores, to the 10 bits
of mantissa of TF32 (JAX has the same name for it). Attention scores stay float32. CuPy's environment variable CUPY_TF32
does so for every product of a process.
Tests: tests/test_mixed_precision.py, tests/test_mixed_decoding.py, tests/test_mixed_lora.py, tests/test_tf32.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm import checks
from minilm.backend import array_module
from minilm.config import Config
from minilm.fast.packed_attention import Segment, rectangle_segments, tables_on_gpu
from minilm.rotary import rope_tables
from minilm.tensor import Tensor, no_grad, primitive

COMPUTE = ("float32", "tensorfloat32", "bfloat16")
HEAD_WIDTHS = (32, 64, 128)         # of kernels/attention_bf16.py
WIDEST = 4096                       # of kernels/fused_bf16.py


def check(config: Config, dtype: Any, device: str, compute: str) -> None:
    """Raise ValueError unless a model of this Config can compute so on the device, with what is in the way."""
    if compute not in COMPUTE:
        raise ValueError(f"to_device: compute is {compute!r}; it must be one of {', '.join(COMPUTE)}")
    if compute == "float32":
        return
    wanted = {"the device 'gpu'": device == "gpu", "a model of float32": dtype == np.float32}
    if compute == "bfloat16":
        wanted |= {f"a head_width of {HEAD_WIDTHS}": config.head_width in HEAD_WIDTHS,
                   f"a width of at most {WIDEST} that 8 divides": config.width % 8 == 0 and config.width <= WIDEST,
                   "an ffn_width that 8 divides": int(config.ffn_width or 0) % 8 == 0}
    if missing := [words for words, there in wanted.items() if not there]:
        raise ValueError(f"to_device: compute={compute!r} needs {missing[0]}")
    import cupy
    if int(cupy.cuda.Device().compute_capability) < 80:
        raise ValueError(f"to_device: compute={compute!r} needs a GPU of compute capability 8.0 or later")


@functools.cache
def _primitive(name):
    from minilm.kernels import mixed_layers
    return primitive(getattr(mixed_layers, name))


def logits(hidden: Any, unembedding: Any, compute: str) -> Any:
    """hidden unembedding^T in float32, of rounded matrices.  (..,D), (V,D) -> (..,V)"""
    return _primitive("logits")(hidden, unembedding, compute=compute)


def token_log_probs(hidden: Tensor, unembedding: Any, targets: np.ndarray, compute: str) -> Tensor:
    """layers.token_log_probs with products of rounded matrices.  (..,D), (V,D), integers (..) of the vocabulary -> (..)
    """
    targets = checks.token_ids("token_log_probs", "targets", targets, len(unembedding))
    return _primitive("token_log_probs")(hidden, unembedding, targets, compute=compute)


def with_tf32(parameters: dict) -> dict:
    """The parameters of model.block, or arrays, with a function of x that rounds to TF32 for each matrix."""
    from minilm.kernels.mixed_layers import MATRICES
    product = _primitive("tf32_product")

    def linear(x, weight):
        W, A, B = _matrices(weight)
        return product(x, W) if A is None else product(x, W) + product(product(x, A), B)
    return {name: functools.partial(linear, weight=p) if name.endswith(MATRICES) else p
            for name, p in parameters.items()}


def layers_of_segments(config: Config, parameters: dict, segments: list[Segment], positions: Any) -> Callable:
    """layer(i, x) for model.after_blocks: model.block of layer i, x (..,D) -> (..,D), N tokens in all.

    The tokens are those of the segments; positions (N,): of each in its own sequence, on the device.
    """
    plan, neighbours = tables_on_gpu(positions, segments, config.key_smear)
    return _layers_of(config, parameters, plan, neighbours, positions)


def layers_of_padded(config: Config, parameters: dict, key_mask: np.ndarray, positions: Any) -> Callable:
    """The same for sequences of T tokens: key_mask (B,T) NumPy's, 0 on padding, positions (B T,).

    The numbers of padding are those of layers.attention with this mask. Raises ValueError for a mask with gaps.
    """
    from minilm.kernels.mixed_layers import padded_plan
    from minilm.kernels.smear import Neighbours
    xp = array_module(positions)
    neighbours = Neighbours(xp, rectangle_segments(*key_mask.shape), key_mask.reshape(-1)) if config.key_smear else None
    return _layers_of(config, parameters, padded_plan(xp, key_mask, config.causal), neighbours, positions)


def _layers_of(config, parameters, plan, neighbours, positions):
    from minilm.kernels.mixed_layers import layers_of
    cos, sin = rope_tables(positions, config.head_width, config.rope_base, parameters["embedding"].dtype)
    return layers_of(_primitive("attention_branch"), _primitive("ffn_branch"), parameters, _matrices, plan=plan,
                     neighbours=neighbours, cos=cos, sin=sin, heads=config.heads, kv_heads=config.kv_heads,
                     pairing=config.rope_pairing, eps=config.norm_eps)


def _matrices(weight):
    """W, and A and B of its adapter (lora.py) or None."""
    return weight.factors() if callable(weight) else (weight, None, None)


def decoding_weights(parameters: dict, unembedding: Any) -> dict:
    """{name: weight} for kernels/mixed_decoding.py, rounded now."""
    from minilm.kernels import mixed_decoding
    with no_grad():
        return mixed_decoding.rounded_weights({name: _matrices(p) for name, p in parameters.items()}, unembedding)
