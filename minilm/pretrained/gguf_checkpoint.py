"""A Llama checkpoint in one GGUF file, as llama.cpp's tools write it: sizes and tokenizer are in its metadata.

Tests: tests/test_pretrained.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minilm.checkpoint import CheckpointError, one_line
from minilm.model import Config, Transformer
from minilm.pretrained.byte_level import ByteLevelTokenizer
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.pretrained.gguf_file import GGUFFile
from minilm.pretrained.llama_names import gguf_names, interleaved_to_half, transformer

SPECIAL, ADDED = 3, 4   # token types of GGUF: a token that stands for no text; text that is found before the merges
# The metadata of a Llama that are read here, and others with the only values for which Transformer computes the same.
READ = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
        "rope.freq_base", "rope.dimension_count", "vocab_size"}
WITHOUT = {"rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,),
           "rope.scaling.finetuned": (False,), "attention.causal": (True,), "expert_count": (0,),
           "expert_used_count": (0,)}


def load_gguf(path: Path) -> tuple[Transformer, ChatTokenizer]:
    """(model, tokenizer) of a GGUF file. Raises CheckpointError."""
    with GGUFFile(path) as file:
        try:
            config = _config(file)
            tokenizer = _tokenizer(file.metadata)
            if tokenizer.vocab_size > config.vocab_size:
                raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}")
            if config.layers > len(file.shapes):
                raise ValueError(f"it says {config.layers} layers, and has {len(file.shapes)} tensors")
            names = gguf_names(config)
            wanted = {part for parts in names.values() for part in parts}
            if wrong := wanted ^ file.shapes.keys():
                raise ValueError(f"the tensor {min(wrong)} is {'missing' if min(wrong) in wanted else 'unknown'}")

            def read(name):
                query_or_key = name.split(".")[-2] in ("attn_q", "attn_k")
                return interleaved_to_half(file.array(name), config.head_width) if query_or_key else file.array(name)
            return transformer(config, names, file.shapes, read), tokenizer
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            fault = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
            raise CheckpointError(f"{path}: no model that minilm can build: {fault}. Choose another model, or fetch "
                                  "the file again.") from error


def _config(file: GGUFFile) -> Config:
    m = file.metadata
    if m["general.architecture"] != "llama":
        raise ValueError(f"its architecture is {m['general.architecture']!r}, and minilm reads 'llama'")
    for name, value in m.items():
        key = name.removeprefix("llama.")
        if key != name and key not in READ and value not in WITHOUT.get(key, ()):
            raise ValueError(f"it has {name} {value!r}, which minilm does not have")
    heads, width = m["llama.attention.head_count"], m["llama.embedding_length"]
    config = Config(vocab_size=file.shapes["token_embd.weight"][0], width=width, layers=m["llama.block_count"],
                    heads=heads, kv_heads=m.get("llama.attention.head_count_kv", heads),
                    head_width=m.get("llama.attention.key_length"), ffn_width=m["llama.feed_forward_length"],
                    context=m["llama.context_length"], tied="output.weight" not in file.shapes,
                    rope_base=m.get("llama.rope.freq_base", 10000.0),
                    # Stored as float32: 1e-5 is there 9.999999747378752e-06.
                    norm_eps=float(str(np.float32(m["llama.attention.layer_norm_rms_epsilon"]))))
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if m.get(name, config.head_width) != config.head_width:
            raise ValueError(f"its {name} is {m[name]} and a head has {config.head_width} numbers; they must be equal")
    return config


def _tokenizer(m: dict) -> ChatTokenizer:
    kind = m["tokenizer.ggml.model"], m.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"its tokenizer is {kind[0]!r}, {kind[1]!r}, and minilm reads 'gpt2', 'smollm'; Hugging "
                         "Face's folder of this model can be loaded")
    tokens = m["tokenizer.ggml.tokens"]
    types = m["tokenizer.ggml.token_type"]
    if ADDED in types:
        raise ValueError(f"its tokenizer has added tokens such as {tokens[types.index(ADDED)]!r}, which minilm does "
                         "not have")
    specials = [token for token, kind in zip(tokens, types) if kind == SPECIAL]
    text = ByteLevelTokenizer(tokens, [merge.split(" ") for merge in m["tokenizer.ggml.merges"]], specials)
    ids = {role: m.get(f"tokenizer.ggml.{name}_token_id")
           for role, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))}
    names = {role: tokens[i] for role, i in ids.items() if i is not None}
    ends = [m[f"tokenizer.ggml.{name}_token_id"] for name in ("eot", "eom") if f"tokenizer.ggml.{name}_token_id" in m]
    if any(not 0 <= end < len(tokens) for end in ends):
        raise ValueError(f"its end tokens {ends} are no tokens")
    return ChatTokenizer(text, m.get("tokenizer.chat_template"), names, ends)
