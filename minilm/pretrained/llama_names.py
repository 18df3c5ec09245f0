"""The weights of a Llama checkpoint and those of model.Transformer: other names, matrices joined and transposed.

A checkpoint has one matrix (out,in) for each of query, key, value, gate and up. Transformer has them side by side, as
(in,out): `qkv` and `gate_up`. GGUF stores the rows of query and key for the "interleaved" pairing of rotary positions,
Hugging Face for "half" (rotary.py); the rows are put in the order of "half", so that there is one pairing here.
Tests: tests/test_pretrained.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from minilm.config import Config, matrix_widths
from minilm.model import Transformer

# Of a block: minilm's name, the names in a GGUF file, the names in a folder of Hugging Face.
BLOCK = (("attention_norm", ["attn_norm"], ["input_layernorm"]),
         ("qkv", ["attn_q", "attn_k", "attn_v"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
         ("attention_out", ["attn_output"], ["self_attn.o_proj"]),
         ("ffn_norm", ["ffn_norm"], ["post_attention_layernorm"]),
         ("gate_up", ["ffn_gate", "ffn_up"], ["mlp.gate_proj", "mlp.up_proj"]),
         ("ffn_out", ["ffn_down"], ["mlp.down_proj"]))


def gguf_names(config: Config) -> dict[str, list[str]]:
    """{minilm's name of a weight: the tensors of a GGUF file that it is made of}"""
    names = {"embedding": ["token_embd.weight"], "final_norm": ["output_norm.weight"]}
    for i in range(config.layers):
        names |= {f"blocks.{i}.{name}": [f"blk.{i}.{part}.weight" for part in parts] for name, parts, _ in BLOCK}
    return names if config.tied else names | {"unembedding": ["output.weight"]}


def hugging_face_names(config: Config) -> dict[str, list[str]]:
    """The same for the tensors in a folder of Hugging Face."""
    names = {"embedding": ["model.embed_tokens.weight"], "final_norm": ["model.norm.weight"]}
    for i in range(config.layers):
        names |= {f"blocks.{i}.{name}": [f"model.layers.{i}.{part}.weight" for part in parts]
                  for name, _, parts in BLOCK}
    return names if config.tied else names | {"unembedding": ["lm_head.weight"]}


def transformer(config: Config, names: dict[str, list[str]], found: dict[str, tuple[int, ...]],
                read: Callable[[str], np.ndarray]) -> Transformer:
    """The Transformer of a checkpoint. found: {tensor: its shape there}; read(tensor) gives it in float32.

    One matrix at a time is in memory twice. Raises ValueError, before anything is read, for tensors of other shapes
    than the Config's. A reward model's names lack the unembedding, and so does the Transformer.
    """
    shapes = Transformer.shapes(config)
    for name, parts in names.items():
        widths = matrix_widths(config, name)
        for part, width in zip(parts, widths):
            wanted = shapes[name] if _as_it_is(name) else (width, shapes[name][0])
            if found[part] != wanted:
                raise ValueError(f"{part} has shape {found[part]}, and the configuration says {wanted}")
    weights = {}
    for name, parts in names.items():
        if _as_it_is(name):
            weights[name] = read(parts[0])
            continue
        weights[name] = data = np.empty(shapes[name], np.float32)
        for part, columns in zip(parts, split(config, name, data)):
            columns[...] = read(part).T
    return Transformer.of(config, weights)


def _as_it_is(name):
    """Whether a weight has the same shape there and here."""
    return name.endswith(("norm", "embedding"))


def split(config: Config, name: str, weight: np.ndarray) -> Iterator[np.ndarray]:
    """The matrices that a weight (in,out) joins, views (in,..)."""
    start = 0
    for width in matrix_widths(config, name):
        yield weight[:, start:start + width]
        start += width


def interleaved_to_half(matrix: np.ndarray, head_width: int) -> np.ndarray:
    """The rows of a query or key matrix (out,in), from the order of "interleaved" pairs to that of "half"."""
    return matrix.reshape(-1, head_width // 2, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)
