"""The loaders of real models and of a person's examples on damaged files, as test_fuzz.py has it for the others."""
import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource", reason="the limits of a process need a POSIX system")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")

import fuzzing
from minilm.checkpoint import CheckpointError
from minilm.lora import Adapted
from minilm.model import RewardModel
from minilm.pretrained import load, save
from minilm.pretrained.adapter_folder import load_adapters, save_adapters
from minilm.pretrained.encoding import encoding_of
from minilm.pretrained.training_data import DataError, demonstrations, pairs, prompts
from test_fuzz import LONG, SCRATCH, SHORT, assert_no_fault
from test_pretrained import CHAT, SHAPES, as_gguf, model_of

MODEL = model_of({**SHAPES["as SmolLM2"], "layers": 1})
MESSAGES = [{"role": "user", "content": "Hi 12 <|im_end|>"}]
LINES = [{"prompt": "Hi", "completion": "Hello", "chosen": "Hello", "rejected": "Go"},
         {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "a"}],
          "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]},
         {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}], "text": "abc",
          "chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}]
WRONG = (0, 1, 7, 2 ** 31, 2 ** 32 - 1, 0.5, 1e30, True, "", "x", [], [0], ["a", "b"], [[1]])


@functools.cache
def folders():
    """The files that save and save_adapters write: {folder: {name: bytes}}."""
    with tempfile.TemporaryDirectory() as folder:
        save(MODEL, CHAT, Path(folder) / "model")
        save_adapters(Adapted(MODEL, 2, 4.0, np.random.default_rng(0)), Path(folder) / "adapter")
        return {kind: {path.name: path.read_bytes() for path in (Path(folder) / kind).iterdir()}
                for kind in ("model", "adapter")}


@contextlib.contextmanager
def folder_with(files):
    """A folder with these files; each process has one folder."""
    folder = Path(SCRATCH, f"minilm-fuzz-{os.getpid()}-model")
    folder.mkdir(exist_ok=True)
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder
    finally:
        shutil.rmtree(folder)


def a_gguf(rng):
    if rng.random() < 0.5:
        return fuzzing.damaged_bytes(as_gguf(MODEL), rng)

    def change(metadata, tensors):
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.8:
                name = rng.choice(list(metadata))
                if rng.random() < 0.2:
                    del metadata[name]
                else:
                    metadata[name] = rng.choice(WRONG)
            else:
                name = rng.choice(list(tensors))
                shape, code, raw = tensors[name]
                tensors[name] = rng.choice(((shape[:-1], code, raw), (shape, rng.choice((1, 2, 3, 8, 30)), raw),
                                            (shape[::-1], code, raw), ((*shape, 1), code, raw)))
    return as_gguf(MODEL, change)


def a_folder(rng, kind="model"):
    files = dict(folders()[kind])
    name = rng.choice(list(files))
    if rng.random() < 0.05:
        del files[name]
    elif name.endswith(".json") and rng.random() < 0.8:
        files[name] = fuzzing.damaged_json(json.loads(files[name]), rng)
    else:
        files[name] = fuzzing.damaged_bytes(files[name], rng)
    return files


def some_adapters(rng):
    return a_folder(rng, "adapter")


def some_lines(rng):
    lines = [json.dumps(line).encode() for line in LINES]
    place = rng.randrange(len(lines))
    lines[place] = fuzzing.damaged_json(LINES[place], rng).replace(b"\n", b" ")
    return b"\n".join(lines) if rng.random() < 0.8 else fuzzing.damaged_bytes(b"\n".join(lines), rng)


def use(model, tokenizer):
    tokens = np.array([[1, 2, 3]])[:, :getattr(model, "transformer", model).config.context]
    value = model.rewards(tokens, tokens > 0) if isinstance(model, RewardModel) else model(tokens)
    assert value.shape[0] == 1
    try:
        ids = tokenizer.encode_chat(MESSAGES)
        assert max(ids, default=0) < tokenizer.vocab_size and isinstance(tokenizer.decode(ids), str)
    except (ImportError, ValueError) as error:
        assert any(word in str(error) for word in ("template", "token", "surrogate")), error


def read_gguf(content):
    path = os.path.join(SCRATCH, f"minilm-fuzz-{os.getpid()}.gguf")
    try:
        Path(path).write_bytes(content)
        use(*load(path))
    finally:
        os.unlink(path)


def read_folder(files):
    with folder_with(files) as folder:
        use(*load(folder))


def read_adapters(files):
    with folder_with(files) as folder:
        model = load_adapters(MODEL, folder)
        assert model(np.array([[1, 2]])).shape[0] == 1


def read_lines_of(content):
    path = os.path.join(SCRATCH, f"minilm-fuzz-{os.getpid()}.jsonl")
    try:
        Path(path).write_bytes(content)
        errors = []
        for read in (demonstrations, pairs, prompts):
            try:
                found = read(encoding_of(CHAT), path, 60)
                assert len(found.prompts) == len(found.lines) == len(found.given) > 0
            except DataError as error:
                errors.append(error)
        if errors:
            raise errors[0]
    finally:
        os.unlink(path)


LOADERS = {"a GGUF file": (read_gguf, a_gguf, CheckpointError), "a folder": (read_folder, a_folder, CheckpointError),
           "adapters": (read_adapters, some_adapters, CheckpointError),
           "lines of JSON": (read_lines_of, some_lines, DataError)}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_file_is_refused_in_one_line_or_read(loader):
    assert_no_fault(loader, SHORT, LOADERS)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_twenty_thousand_damaged_files_are_refused_in_one_line_or_read(loader):
    assert_no_fault(loader, LONG, LOADERS)
