"""The files of a folder of Hugging Face: safetensors, of which there may be several with an index, and JSON.

Tests: tests/test_pretrained.py.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path

import numpy as np

from minilm import checkpoint
from minilm.checkpoint import CheckpointError, one_line
from minilm.checks import distinct, ordinary_file
from minilm.pretrained.gguf_file import from_bfloat16

NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}    # of safetensors; BF16 has no NumPy dtype


class SafetensorsFolder:
    """The tensors of a folder's safetensors files. places: {name: (file, dtype, shape, first byte, size in bytes)}.

    The layout is checked by the package safetensors; the numbers are read here, because its reader for NumPy refuses
    bfloat16. Raises CheckpointError.
    """

    def __init__(self, path: Path, name: str = "model"):
        self.places: dict[str, tuple] = {}
        index = path / f"{name}.safetensors.index.json"
        names = {f"{name}.safetensors"}
        if index.exists() and not (path / f"{name}.safetensors").exists():
            names = set(read_json(index)["weight_map"].values())
        for file in sorted(map(str, names)):
            if Path(file).name != file:
                raise CheckpointError(f"{index}: names the file {reprlib.repr(file)}, outside the folder. Fetch the "
                                      "files again.")
            for tensor, place in _layout(path / file).items():
                if tensor in self.places:
                    raise CheckpointError(f"{path / file}: holds {one_line(tensor)}, as another file does. Fetch "
                                          "them again.")
                self.places[tensor] = place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place[2] for name, place in self.places.items()}

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        file, dtype, shape, start, size = self.places[name]
        with open(file, "rb") as opened:
            opened.seek(start)
            raw = np.fromfile(opened, np.uint8, size)
        if len(raw) < size:
            raise CheckpointError(f"{file}: ends within {name}. Fetch it again.")
        numbers = from_bfloat16(raw) if dtype == "BF16" else raw.view(NUMBERS[dtype])
        return numbers.astype(np.float32, copy=False).reshape(shape)


def _layout(file):
    """{name of a tensor: its place} of one safetensors file."""
    safetensors = checkpoint.import_safetensors()
    try:
        with safetensors.safe_open(ordinary_file(os.fspath(file)), framework="np"):     # checks sizes and places
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({one_line(error)}). Check the path, or fetch it "
                              "again.") from error
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] not in (*NUMBERS, "BF16"):
            raise CheckpointError(f"{file}: {name} is {entry['dtype']}; weights are {', '.join(NUMBERS)} or BF16. "
                                  "Choose a file with such weights.")
        places[name] = (file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return places


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        found = json.loads(text_of(path), object_pairs_hook=distinct)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
        return found
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON that can be read ({one_line(error)}). Fetch it again.") from error


def text_of(path: Path) -> str:
    """The text of a UTF-8 file. Raises CheckpointError; ValueError if it is no UTF-8."""
    try:
        with open(ordinary_file(os.fspath(path)), "rb") as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check the path, or fetch it "
                              "again.") from error
