"""A Llama checkpoint as Hugging Face's libraries lay it out: a folder of

    config.json   tokenizer.json   tokenizer_config.json   (generation_config.json, chat_template.jinja)
    model.safetensors, or model.safetensors.index.json and the files that it names

A setting that changes the mathematics and that Transformer lacks is an error with its name.
Tests: tests/test_pretrained.py, against the package `transformers`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from minilm import checkpoint
from minilm.backend import to_numpy
from minilm.checkpoint import CheckpointError, one_line
from minilm.model import Config, RewardModel, Transformer
from minilm.pretrained.byte_level import ByteLevelTokenizer
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.pretrained.llama_names import hugging_face_names, split, transformer
from minilm.pretrained.safetensors_folder import SafetensorsFolder, read_json, text_of
from minilm.pretrained.tokenizers_package import PackageTokenizer

HEAD = "score.weight"           # (1,D), of a reward model
INDEX, TEMPLATE = "model.safetensors.index.json", "chat_template.jinja"
# Settings of config.json that Transformer lacks, with the only values for which it computes the same.
WITHOUT = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "rope_scaling": (None,),
           "sliding_window": (None,), "use_sliding_window": (False,), "partial_rotary_factor": (1, 1.0),
           "rope_interleaved": (False,), "quantization_config": (None,), "embedding_multiplier": (1, 1.0),
           "logits_scaling": (1, 1.0), "residual_multiplier": (1, 1.0), "num_local_experts": (None, 0),
           "rope_type": (None, "default")}
DAMAGE = (AttributeError, ImportError, LookupError, TypeError, ValueError, OverflowError, RecursionError)


def load_folder(path: Path) -> tuple[Transformer | RewardModel, ChatTokenizer]:
    """(model, tokenizer) of a folder: a RewardModel if it holds a LlamaForSequenceClassification with one number.

    Raises CheckpointError.
    """
    try:
        settings = read_json(path / "config.json")
        config = read_config(settings)
        tensors = SafetensorsFolder(path)
        reward = settings.get("architectures") == ["LlamaForSequenceClassification"]
        if config.layers > len(tensors.places):
            raise ValueError(f"config.json says {config.layers} layers, and there are {len(tensors.places)} tensors")
        names = hugging_face_names(config)
        if reward:
            names.pop("unembedding", None)
        parts = {part for parts in names.values() for part in parts}
        _check_names(config, tensors, parts | {HEAD} if reward else parts)
        tokenizer = read_tokenizer(path, settings)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model's vocabulary is "
                             f"{config.vocab_size}")
        body = transformer(config, names, tensors.shapes, tensors.array)
        return RewardModel.of(body, tensors.array(HEAD).T) if reward else body, tokenizer
    except DAMAGE as error:
        raise CheckpointError(f"{path}: no Llama checkpoint that minilm can load: {_fault(error)}. Choose another "
                              "model, or fetch the files again.") from error


def _fault(error):
    return f"{error} is missing" if isinstance(error, KeyError) else one_line(error)


def _check_names(config, tensors, known):
    """Raises ValueError unless the folder has these tensors, and no others that would change the result."""
    extra = {name for name in tensors.places if not name.endswith("rotary_emb.inv_freq")} - known
    if config.tied and "lm_head.weight" in extra:
        if not np.array_equal(tensors.array("lm_head.weight"), tensors.array("model.embed_tokens.weight")):
            raise ValueError("config.json says that lm_head.weight is the embedding (tie_word_embeddings), and it is "
                             "another matrix")
        extra.remove("lm_head.weight")
    if wrong := extra or known - tensors.places.keys():
        raise ValueError(f"the tensor {min(wrong)} is {'unknown' if extra else 'missing'}")


def read_config(settings: dict[str, Any]) -> Config:
    """The Config of a config.json. Raises ValueError, TypeError or KeyError for what Transformer cannot compute."""
    c = settings
    if c.get("model_type") != "llama":
        raise ValueError(f"its model_type is {c.get('model_type')!r}, and minilm loads 'llama'")
    rope = c.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {rope!r}")
    given = {**c, **{key: value for key, value in rope.items() if key != "rope_theta"},
             "rope_type": rope.get("rope_type", rope.get("type"))}
    for key, values in WITHOUT.items():
        if key in given and given[key] not in values:
            raise ValueError(f"it has {key} {given[key]!r}, which minilm does not have")
    return Config(vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
                  heads=c["num_attention_heads"], kv_heads=c.get("num_key_value_heads"),
                  head_width=c.get("head_dim"), ffn_width=c["intermediate_size"],
                  context=c.get("max_position_embeddings", 2048), tied=c.get("tie_word_embeddings", False),
                  rope_base=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
                  norm_eps=c.get("rms_norm_eps", 1e-6))


def read_tokenizer(path: Path, settings: dict[str, Any]) -> ChatTokenizer:
    """The tokenizer of a folder: byte_level.py if it is of SmolLM2's kind, otherwise the package tokenizers.

    Raises CheckpointError, ImportError and what a damaged file makes of the rest.
    """
    own = read_json(path / "tokenizer_config.json")
    saved = read_json(path / "tokenizer.json")
    template = own.get("chat_template")
    if isinstance(template, list):          # of several templates by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if (path / TEMPLATE).exists():
        template = text_of(path / TEMPLATE)
    names = {role: value["content"] if isinstance(value, dict) else value
             for role in ("bos_token", "eos_token", "pad_token", "unk_token") if (value := own.get(role)) is not None}
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}
    ends = []
    for given in (settings.get("eos_token_id"), generation.get("eos_token_id")):
        ends += given if isinstance(given, list) else [] if given is None else [given]
    text = ByteLevelTokenizer.from_json(saved) or PackageTokenizer(json.dumps(saved), names.values())
    if bad := [end for end in ends if type(end) is not int or not 0 <= end < text.vocab_size]:
        raise ValueError(f"eos_token_id {bad[0]!r} is no token")
    return ChatTokenizer(text, template, names, ends)


def save_folder(path: Path, model: Transformer | RewardModel, tokenizer: ChatTokenizer) -> None:
    """Writes the folder; config.json, without which nobody can load it, comes last. Raises CheckpointError, and
    ValueError for a model that is no Llama."""
    body = model.transformer if isinstance(model, RewardModel) else model
    for name, only in (("causal", True), ("key_smear", False), ("rope_pairing", "half")):
        if getattr(body.config, name) != only:
            raise ValueError(f"save: no Llama has {name} {getattr(body.config, name)!r}; use model_file.save_model")
    safetensors = checkpoint.import_safetensors()
    try:
        os.makedirs(path, exist_ok=True)
        for stale in (INDEX, TEMPLATE):         # of another model that was there before
            (path / stale).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: no folder that can be written: {error.strerror}. Choose another "
                              "path.") from error
    checkpoint.write_bytes(path / "model.safetensors", safetensors.numpy.save(_tensors(model, body), {"format": "pt"}))
    checkpoint.write_text(path / "tokenizer.json", tokenizer.text.to_json())
    own = {**tokenizer.names, "chat_template": tokenizer.template, "tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoint.write_text(path / "tokenizer_config.json", json.dumps(own, indent=1))
    checkpoint.write_text(path / "generation_config.json", json.dumps({"eos_token_id": list(tokenizer.ends)}, indent=1))
    checkpoint.write_text(path / "config.json", json.dumps(_settings(model, body, tokenizer), indent=1))


def _tensors(model, body):
    """{name there: array}"""
    tensors = {}
    for name, parts in hugging_face_names(body.config).items():
        weight = to_numpy(body.parameters()[name].data)
        if name.endswith(("norm", "embedding")):
            tensors[parts[0]] = weight
        else:
            matrices = split(body.config, name, weight)
            tensors |= {part: np.ascontiguousarray(matrix.T) for part, matrix in zip(parts, matrices)}
    if isinstance(model, RewardModel):
        tensors.pop("lm_head.weight", None)
        tensors[HEAD] = np.ascontiguousarray(to_numpy(model.head.data).T)
    return tensors


def _settings(model, body, tokenizer):
    """The contents of config.json."""
    c = body.config
    reward = isinstance(model, RewardModel)
    return {"architectures": ["LlamaForSequenceClassification" if reward else "LlamaForCausalLM"],
            **({"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}} if reward else {}),
            "model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_width,
            "intermediate_size": c.ffn_width, "max_position_embeddings": c.context, "tie_word_embeddings": c.tied,
            "rope_theta": c.rope_base, "rms_norm_eps": c.norm_eps, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "torch_dtype": str(body.dtype), "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
