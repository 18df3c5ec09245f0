"""Adapters (lora.py) on disk as the package PEFT lays them out: adapter_config.json and adapter_model.safetensors.

PEFT opens what is saved here over the model that it was trained from, and the other way round.
Tests: tests/test_adapter_folder.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
from typing import Any

import numpy as np

from minilm import checkpoint
from minilm.backend import to_numpy
from minilm.checkpoint import CheckpointError, Path, one_line
from minilm.lora import TARGETS, Adapted
from minilm.model import Transformer
from minilm.pretrained.hugging_face import read_json
from minilm.pretrained.safetensors_folder import SafetensorsFolder
from minilm.tensor import Tensor

# Settings of adapter_config.json that change the mathematics, with the only values that lora.py has.
WITHOUT: dict[str, tuple] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False,), "use_dora": (False,),
    "modules_to_save": (None, []), "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (None,),
    "fan_in_fan_out": (False,), "exclude_modules": (None,),
    "trainable_token_indices": (None,), "target_parameters": (None, [])}


def save_adapters(model: Adapted, path: Path, base: str = "") -> None:
    """Writes the adapters of a model. base: the name or path of the model under them, for whoever opens the folder.

    Raises CheckpointError for a folder that cannot be written.
    """
    folder = pathlib.Path(os.fspath(path))
    os.makedirs(folder, exist_ok=True)
    tensors = {peft_name(name): np.ascontiguousarray(to_numpy(p.data).T) for name, p in model.parameters().items()}
    safetensors = checkpoint.import_safetensors()
    checkpoint.write_bytes(folder / "adapter_model.safetensors", safetensors.numpy.save(tensors, {"format": "pt"}))
    checkpoint.write_text(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": model.rank,
        "lora_alpha": model.alpha, "lora_dropout": 0.0, "target_modules": list(model.targets), "bias": "none",
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None,
        "inference_mode": True}, indent=1))


def load_adapters(base: Transformer, path: Path) -> Adapted:
    """The adapters in a folder over a model. Raises CheckpointError for damaged files, for settings that lora.py lacks,
    and for adapters of another model."""
    folder = pathlib.Path(os.fspath(path))
    config = read_json(folder / "adapter_config.json")
    for key, values in WITHOUT.items():
        if key in config and config[key] not in values:
            raise CheckpointError(f"{folder}: adapter_config.json has {key} {reprlib.repr(config[key])}, which minilm "
                                  "does not have. Choose another adapter.")
    saved = SafetensorsFolder(folder, "adapter_model")
    ranks = {shape[:1] for name, shape in saved.shapes.items() if "lora_A" in name}
    try:
        if ranks != {(config["r"],)}:           # before matrices of this rank are allocated
            raise ValueError(f"r is {reprlib.repr(config['r'])}, and the tensors have other ranks")
        targets: Any = config["target_modules"]
        model = Adapted(base, config["r"], config["lora_alpha"], np.random.default_rng(0), targets)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json cannot be used ({one_line(error)}). Matrices that can be "
                              f"adapted are {', '.join(TARGETS)}.") from error
    names = {peft_name(name): name for name in model.parameters()}
    if wrong := sorted(saved.places.keys() ^ names.keys()):
        kind = "missing" if wrong[0] in names else "unknown"
        raise CheckpointError(f"{folder}: the tensor {wrong[0]} is {kind}: adapters of another model. Check the "
                              "folder.")
    arrays = {ours: np.ascontiguousarray(saved.array(name).T, base.dtype) for name, ours in names.items()}
    try:
        return model.over({name: Tensor(array, requires_grad=True) for name, array in arrays.items()})
    except ValueError as error:
        raise CheckpointError(f"{folder}: adapters of another model ({one_line(error)}). Check the folder.") from error


def peft_name(name: str) -> str:
    """blocks.0.q_proj.lora_a in PEFT's file: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"""
    _, layer, matrix, which = name.split(".")
    part = "self_attn" if matrix[0] in "qkvo" else "mlp"
    return f"base_model.model.model.layers.{layer}.{part}.{matrix}.lora_{which[-1].upper()}.weight"
