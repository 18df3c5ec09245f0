"""Real models: Llama checkpoints of Hugging Face and of llama.cpp, loaded and saved.

    model, tokenizer = load("smollm2-135m-instruct.gguf")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Name a colour."}])
    tokens = generate(model, [prompt], 40, np.random.default_rng(0), tokenizer.ends).responses()[0]
    print(tokenizer.decode(tokens))

The family that is tested is SmolLM2: python scripts/get_smollm2.py fetches it.
Tests: tests/test_pretrained.py.
"""

from __future__ import annotations

import os
import pathlib

from minilm.checkpoint import CheckpointError, Path
from minilm.diverged import first_bad_parameter
from minilm.model import RewardModel, Transformer
from minilm.pretrained.chat_tokenizer import ChatTokenizer
from minilm.pretrained.gguf_checkpoint import load_gguf
from minilm.pretrained.hugging_face import load_folder, save_folder


def load(path: Path) -> tuple[Transformer | RewardModel, ChatTokenizer]:
    """(model, tokenizer) of a GGUF file, or of a folder of Hugging Face: a RewardModel if that holds a classifier with
    one number. The weights are float32.

    Raises CheckpointError, in one line that says what to do: for damaged files, for other architectures, for settings
    that Transformer does not compute, for weights that are not finite.
    """
    path = pathlib.Path(os.fspath(path))
    model, tokenizer = load_folder(path) if path.is_dir() else load_gguf(path)
    if bad := first_bad_parameter(model.parameters(), "data"):
        raise CheckpointError(f"{path}: {bad}, holds NaN or infinity. Fetch the file again.")
    return model, tokenizer


def save(model: Transformer | RewardModel, tokenizer: ChatTokenizer, path: Path) -> None:
    """Writes a folder that `load` and transformers' from_pretrained open. Existing files there are replaced.

    Raises CheckpointError for a folder that cannot be written, ValueError for a model that is no Llama.
    """
    save_folder(pathlib.Path(os.fspath(path)), model, tokenizer)
