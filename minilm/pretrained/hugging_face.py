"""A Llama checkpoint as Hugging Face's libraries lay it out: a folder of

    config.json   tokenizer.json   tokenizer_config.json   (chat_template.jinja)
    model.safetensors, or model.safetensors.index.json and the files that it names

A setting that changes the mathematics and that Transformer lacks is an error with its name.
Tests: tests/test_pretrained.py, against the package `transformers`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from minilm import checkpoint
from minilm.backend import to_numpy
from minilm.checkpoint import CheckpointError, one_line
from minilm.model import Config, Transformer
from minilm.pretrained.byte_level import ByteLevelTokenizer
from minilm.pretrained.chat_tokenizer import CHATML, ChatTokenizer
from minilm.pretrained.llama_names import hugging_face_names, split, transformer
from minilm.pretrained.safetensors_folder import SafetensorsFolder, read_json, text_of
from minilm.pretrained.tokenizers_package import PackageTokenizer

# Settings of config.json that Transformer lacks, with the only values for which it computes the same.
WITHOUT = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "rope_scaling": (None,),
           "sliding_window": (None,), "use_sliding_window": (False,), "partial_rotary_factor": (1, 1.0),
           "rope_interleaved": (False,), "quantization_config": (None,), "embedding_multiplier": (1, 1.0),
           "logits_scaling": (1, 1.0), "residual_multiplier": (1, 1.0), "num_local_experts": (None, 0)}


def load_folder(path: Path) -> tuple[Transformer, ChatTokenizer]:
    """(model, tokenizer) of a folder. Raises CheckpointError."""
    config = read_config(path)
    tensors = SafetensorsFolder(path)
    names = hugging_face_names(config)
    known = {part for parts in names.values() for part in parts}
    extra = {name for name in tensors.places if not name.endswith("rotary_emb.inv_freq")} - known
    if config.tied and "lm_head.weight" in extra:
        if not np.array_equal(tensors.array("lm_head.weight"), tensors.array("model.embed_tokens.weight")):
            raise CheckpointError(f"{path}: config.json says that lm_head.weight is the embedding, and it is another "
                                  "matrix. Set tie_word_embeddings to false if it is to be used.")
        extra.remove("lm_head.weight")
    if extra or known - tensors.places.keys():
        name = min(extra or known - tensors.places.keys())
        raise CheckpointError(f"{path}: the tensor {name} is {'unknown' if extra else 'missing'}: no Llama checkpoint "
                              "with the sizes of its config.json. Check the folder.")
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
                              f"{config.vocab_size}. Use the tokenizer of this model.")
    try:
        return transformer(config, names, tensors.array), tokenizer
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(error)}; no Llama checkpoint with the sizes of its config.json. "
                              "Check the folder.") from error


def read_config(path: Path) -> Config:
    """The Config of config.json. Raises CheckpointError for what is no Llama that Transformer can compute."""
    c = read_json(path / "config.json")
    rope = c.get("rope_parameters") or {}
    if c.get("model_type") != "llama":
        raise CheckpointError(f"{path}: config.json has model_type {c.get('model_type')!r}; minilm reads 'llama'. "
                              "Choose another model.")
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    settings = {**{key: c[key] for key in WITHOUT if key in c}, "rope_type": kind}
    for key, value in settings.items():
        if value not in {**WITHOUT, "rope_type": ("default",)}[key]:
            raise CheckpointError(f"{path}: config.json has {key} {value!r}, which minilm does not have. Choose "
                                  "another model.")
    try:
        return Config(vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
                      heads=c["num_attention_heads"], kv_heads=c.get("num_key_value_heads"),
                      head_width=c.get("head_dim"), ffn_width=c["intermediate_size"],
                      context=c.get("max_position_embeddings", 2048), tied=c.get("tie_word_embeddings", False),
                      rope_base=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
                      norm_eps=c.get("rms_norm_eps", 1e-6))
    except (KeyError, TypeError, ValueError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(f"{path}: config.json: {fault}. Fetch the file again.") from error


def read_tokenizer(path: Path) -> ChatTokenizer:
    """The tokenizer of a folder: byte_level.py if it is of SmolLM2's kind, otherwise the package tokenizers."""
    own = read_json(path / "tokenizer_config.json")
    saved = read_json(path / "tokenizer.json")
    template = own.get("chat_template")
    if (path / "chat_template.jinja").exists():
        template = text_of(path / "chat_template.jinja")
    names = {role: value if isinstance(value, str) else value.get("content")
             for role in ("bos_token", "eos_token", "pad_token") if (value := own.get(role))}
    try:
        text = ByteLevelTokenizer.from_json(saved) or PackageTokenizer(json.dumps(saved))
        return ChatTokenizer(text, template if isinstance(template, str) else CHATML, names)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a tokenizer that cannot be read ({one_line(error)}). Fetch it "
                              "again.") from error


def save_folder(path: Path, model: Transformer, tokenizer: ChatTokenizer) -> None:
    """Writes the folder; config.json, without which nobody can load it, comes last. Raises CheckpointError."""
    c = model.config
    for name, only in (("causal", True), ("key_smear", False), ("rope_pairing", "half")):
        if getattr(c, name) != only:
            raise ValueError(f"save: no Llama has {name} {getattr(c, name)!r}; use model_file.save_model")
    os.makedirs(path, exist_ok=True)
    tensors = {}
    for name, parts in hugging_face_names(c).items():
        weight = to_numpy(model.parameters()[name].data)
        if name.endswith(("norm", "embedding")):
            tensors[parts[0]] = weight
        else:
            tensors |= {part: np.ascontiguousarray(matrix.T) for part, matrix in zip(parts, split(c, name, weight))}
    safetensors = checkpoint.import_safetensors()
    checkpoint.write_bytes(path / "model.safetensors", safetensors.numpy.save(tensors, {"format": "pt"}))
    checkpoint.write_text(path / "tokenizer.json", tokenizer.text.to_json())
    own = {**tokenizer.names, "chat_template": tokenizer.template, "tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoint.write_text(path / "tokenizer_config.json", json.dumps(own, indent=1))
    checkpoint.write_text(path / "config.json", json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_width, "intermediate_size": c.ffn_width,
        "max_position_embeddings": c.context, "tie_word_embeddings": c.tied, "rope_theta": c.rope_base,
        "rms_norm_eps": c.norm_eps, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(model.dtype), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad}, indent=1))
