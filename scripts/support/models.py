"""Models of every kind by their path: a file of assistant.py, a GGUF file, a folder of Hugging Face, an adapter."""

import os
from pathlib import Path

from minilm.checkpoint import CheckpointError
from minilm.lora import Adapted
from minilm.model import RewardModel, Transformer
from minilm.model_file import load_model, save_model
from minilm.pretrained import load, save
from minilm.pretrained.adapter_folder import load_adapters
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.pretrained.safetensors_folder import read_json
from minilm.tokenizer import Tokenizer

ADAPTER = "adapter_config.json"


def is_real(path: str) -> bool:
    """Whether it is no file of assistant.py: a folder, or a file that begins as GGUF."""
    if not os.path.isfile(path):
        return os.path.isdir(path)
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def load_any(path: str) -> tuple[Transformer | RewardModel, ChatTokenizer | Tokenizer]:
    """(model, tokenizer). An adapter is an Adapted over its base. Raises CheckpointError."""
    if os.path.exists(os.path.join(path, ADAPTER)):
        base, tokenizer = load_any(base_of(path))
        return load_adapters(base, path), tokenizer
    if is_real(path):
        return load(path)
    model, tokenizer, _ = load_model(path)
    return model, tokenizer


def base_of(path: str) -> str:
    """The path of the model under an adapter. Raises CheckpointError if it is not here."""
    base = read_json(Path(path, ADAPTER)).get("base_model_name_or_path")
    if not isinstance(base, str) or not os.path.exists(base) or os.path.exists(os.path.join(base, ADAPTER)):
        raise CheckpointError(f"{path}: an adapter of {base!r}, which is no model here. Write the path of its model "
                              f"into {ADAPTER}.")
    return base


def save_any(model: Transformer | RewardModel, tokenizer: ChatTokenizer | Tokenizer, path: Path) -> Path:
    """Writes a folder of Hugging Face, or for a tokenizer of assistant.py the file path.safetensors; gives its path."""
    if isinstance(model, Adapted):
        model = model.merged()
    elif isinstance(model, RewardModel) and isinstance(model.transformer, Adapted):
        model = RewardModel.of(model.transformer.merged(), model.head.data)
    if isinstance(tokenizer, Tokenizer):
        path = path.with_suffix(".safetensors")
        save_model(path, model, tokenizer)
    else:
        save(model, tokenizer, path)
    return path
