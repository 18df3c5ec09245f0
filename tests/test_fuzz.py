"""Every loader on damaged files: the documented error in one line, no hang, and no memory that the file does not hold.

The long search gives each loader 20,000 inputs in .ci/run, the short one a few hundred; EXAMPLES has an input of each
kind that was once read wrongly. The inputs are those of fuzzing.py, from real files. Files that have a checksum are
damaged behind it too (`signed`), because another program may have written them.
FUZZ_SEED=n python -m pytest -m slow tests/test_fuzz.py searches other inputs.
"""
import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

import fuzzing
from helpers import peak_memory, small_transformer
from minilm import checkpoint
from minilm.checkpoint import CheckpointError
from minilm.model import RewardModel
from minilm.model_file import load_model, save_model
from minilm.tokenizer import Tokenizer

pytest.importorskip("fcntl", reason="the limits of a process need a POSIX system")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

LONG, SHORT = 20_000, 300
SEED = int(os.environ.get("FUZZ_SEED", 0))
TOKENIZER = Tokenizer.train("a cat and a cat, the cats sat", 275)


# Real files, as bytes.

def written(write):
    """The bytes that write(path) wrote."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


@functools.cache
def files():
    """{name: bytes} of real files."""
    rng = np.random.default_rng(0)
    model = small_transformer(rng, np.float32, vocab_size=TOKENIZER.vocab_size, key_smear=True)
    reward_model = RewardModel(model.copy(), rng)
    arrays = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(7), "none": np.zeros((0, 2))}
    metadata = {"step": 7, "loss": 0.1, "rng": rng.bit_generator.state, "history": [{"step": 1, "loss": 2.5}]}
    return {"checkpoint": written(lambda path: checkpoint.save(path, arrays, metadata)),
            "transformer": written(lambda path: save_model(path, model, TOKENIZER, run={"scale": 0.1})),
            "reward model": written(lambda path: save_model(path, reward_model, TOKENIZER))}


@functools.cache
def loaded(name):
    """(arrays, metadata) of a real file."""
    with file_of(files()[name]) as path:
        return checkpoint.load(path)


@contextlib.contextmanager
def file_of(content):
    """A path whose file has this content; each process has one path, in memory where there is a place for it."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    path = os.path.join(folder, f"minilm-fuzz-{os.getpid()}")
    with open(path, "wb") as file:
        file.write(content)
    try:
        yield path
    finally:
        os.unlink(path)


def signed(arrays, metadata):
    """The bytes of a checkpoint with the right checksum, as checkpoint.save writes them."""
    header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION,
              "sha256": checkpoint._digest(arrays, metadata), "metadata": metadata}
    return safetensors_numpy.save(arrays, {checkpoint.KEY: json.dumps(header)})


# Damage that knows the format.

def damaged_header(content, rng):
    """A safetensors file with a damaged tree, or damaged text, in one of its two headers; the length is right."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if rng.random() < 0.5:
        own = json.loads(header["__metadata__"][checkpoint.KEY])
        changed = fuzzing.damaged_json(own, rng).decode("utf-8", "replace")
        header["__metadata__"][checkpoint.KEY] = changed
        text = json.dumps(header).encode()
    else:
        text = fuzzing.damaged_json(header, rng)
    return len(text).to_bytes(8, "little") + text + content[end:]


def damaged_arrays(arrays, rng):
    """The arrays with one removed, renamed, or of another shape, dtype, or number."""
    arrays = dict(arrays)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    kind = rng.randrange(6)
    if kind == 1:
        arrays[name + "x"] = array
    elif kind == 2:
        arrays[name] = array[..., :-1].copy() if array.ndim else array.reshape(1)
    elif kind == 3:
        arrays[name] = array.astype(rng.choice(checkpoint.DTYPES))
    elif kind == 4:
        arrays[name] = array.T.copy()
    elif kind == 5 and array.size and array.dtype.kind == "f":
        arrays[name] = array.copy()
        arrays[name].flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, 1e30))
    return arrays


def a_checkpoint(rng, name="checkpoint"):
    kind = rng.randrange(4)
    if kind == 0:
        return fuzzing.damaged_bytes(files()[name], rng)
    if kind == 1:
        return damaged_header(files()[name], rng)
    arrays, metadata = loaded(name)
    if kind == 2:
        return signed(damaged_arrays(arrays, rng), metadata)
    return signed(arrays, fuzzing.damaged_tree(metadata, rng))


def a_model_file(rng):
    name = rng.choice(("transformer", "reward model"))
    if rng.random() < 0.4:
        return a_checkpoint(rng, name)
    arrays, metadata = loaded(name)
    metadata = dict(metadata)
    part = rng.choice(("config", "config", "tokenizer"))
    if part == "config":
        metadata["config"] = fuzzing.damaged_tree(metadata["config"], rng)
    else:
        metadata["tokenizer"] = a_tokenizer(rng)
    return signed(arrays, metadata)


def a_tokenizer(rng):
    saved = json.loads(TOKENIZER.to_json())
    if rng.random() < 0.02:     # each token twice as long as the one before
        saved["merges"] = [[max(97, i), max(97, i)] for i in range(255, 255 + rng.randrange(1, 80))]
    return fuzzing.damaged_json(saved, rng).decode("utf-8", rng.choice(("replace", "surrogateescape")))


# Loaders: what they return can be used.

def read_checkpoint(content):
    with file_of(content) as path:
        arrays, metadata = checkpoint.load(path)
    assert isinstance(metadata, dict) and all(isinstance(a, np.ndarray) for a in arrays.values())


def read_model(content):
    with file_of(content) as path:
        model, tokenizer, metadata = load_model(path)
    tokens = np.array([tokenizer.encode("a cat")[:1]])
    value = model.rewards(tokens, tokens >= 0) if isinstance(model, RewardModel) else model(tokens)
    assert value.shape[0] == 1 and isinstance(metadata, dict)
    assert all(np.isfinite(p.data).all() for p in model.parameters().values())


def read_tokenizer(text):
    tokenizer = Tokenizer.from_json(text)
    ids = tokenizer.encode("a cat <eos>")
    assert tokenizer.decode(ids) == "a cat <eos>" and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(range(tokenizer.vocab_size), specials=True)
    assert Tokenizer.from_json(tokenizer.to_json()).tokens == tokenizer.tokens


LOADERS = {"checkpoint.load": (read_checkpoint, a_checkpoint, CheckpointError),
           "load_model": (read_model, a_model_file, CheckpointError),
           "Tokenizer.from_json": (read_tokenizer, a_tokenizer, ValueError)}


def assert_no_fault(loader, count):
    read, make, errors = LOADERS[loader]
    faults, counts = fuzzing.search(read, make, errors, count, SEED)
    print(f"{loader}: {counts}")
    assert not faults, "\n".join(f"input {i} of seed {SEED}: {content}\n{fault}" for i, content, fault in faults[:3])
    assert sum(counts.values()) == count


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_file_is_refused_in_one_line_or_read(loader):
    assert_no_fault(loader, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_twenty_thousand_damaged_files_are_refused_in_one_line_or_read(loader):
    assert_no_fault(loader, LONG)


# Found by the search.

def tokenizer_with(**changes):
    return json.dumps({**json.loads(TOKENIZER.to_json()), **changes})


def checkpoint_with(**fields):
    """A checkpoint with these fields of minilm's header changed; the checksum is that of the contents."""
    arrays, metadata = loaded("checkpoint")
    metadata = fields.get("metadata", metadata)
    header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION,
              "sha256": checkpoint._digest(arrays, metadata), "metadata": metadata, **fields}
    return safetensors_numpy.save(arrays, {checkpoint.KEY: json.dumps(header)})


def model_with(change=lambda arrays: None, tokenizer=None, **config):
    arrays, metadata = loaded("transformer")
    arrays = {name: a.copy() for name, a in arrays.items()}
    change(arrays)
    metadata = {**metadata, "config": {**metadata["config"], **config}}
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer.to_json()
    return signed(arrays, metadata)


def of_dtype(name):
    content = files()["checkpoint"]
    end = 8 + int.from_bytes(content[:8], "little")
    text = content[8:end].replace(b'"F32"', json.dumps(name).encode())
    return len(text).to_bytes(8, "little") + text + content[end:]


def nested_header(depth=100_000):
    return safetensors_numpy.save({}, {checkpoint.KEY: "[" * depth + "]" * depth})


FOUND = {
    "tokens of 2^60 bytes": ("Tokenizer.from_json", lambda: tokenizer_with(
        merges=[[max(97, i)] * 2 for i in range(255, 315)]), "bytes in all; a tokenizer holds at most"),
    "a name of 100,000 characters": ("Tokenizer.from_json", lambda: tokenizer_with(format="x" * 10 ** 5), "format"),
    "special names of 100,000 characters": ("Tokenizer.from_json", lambda: tokenizer_with(specials=["x" * 10 ** 5]),
                                            "lack"),
    "metadata is a list": ("checkpoint.load", lambda: checkpoint_with(metadata=[1]), "header makes no sense"),
    "a header nested 100,000 deep": ("checkpoint.load", nested_header, "header makes no sense"),
    "a dtype of many lines": ("checkpoint.load", lambda: of_dtype("F32\n" * 999), "cut short or damaged"),
    "a dtype that NumPy lacks": ("checkpoint.load", lambda: of_dtype("F8_E4M3"), "damaged"),
    "a setting with a newline": ("load_model", lambda: model_with(**{"tied\n": True}), "unexpected keyword"),
    "a width that is no integer": ("load_model", lambda: model_with(width=4.0), "width is 4.0"),
    "a base that is no number": ("load_model", lambda: model_with(rope_base="10000"), "rope_base is '10000'"),
    "a base beyond the floats": ("load_model", lambda: model_with(rope_base=10 ** 400), "rope_base is 1000"),
    "a base that is NaN": ("load_model", lambda: model_with(rope_base=float("nan")), "rope_base is nan"),
    "a flag that is no flag": ("load_model", lambda: model_with(causal=None), "causal is None"),
    "10^10 layers": ("load_model", lambda: model_with(layers=10 ** 10), r"missing \(blocks.1.qkv\)"),
    "weights of 10^20 numbers": ("load_model", lambda: model_with(ffn_width=10 ** 20), "gate_up is"),
    "another tokenizer": ("load_model", lambda: model_with(tokenizer=Tokenizer()), "tokenizer has 259 tokens"),
    "integers as weights": ("load_model", lambda: model_with(lambda arrays: arrays.update(
        final_norm=np.ones(4, np.int64))), "final_norm is int64"),
    "a weight that is NaN": ("load_model", lambda: model_with(lambda arrays: arrays["embedding"].put(5, np.nan)),
                             r"embedding, entry \(1, 1\), is nan"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_file_that_was_once_read_wrongly_is_refused_with_its_fault(name):
    loader, make, message = FOUND[name]
    read, _, errors = LOADERS[loader]
    content = make()

    def refused():
        with pytest.raises(errors, match=message) as caught:
            read(content)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= fuzzing.LONGEST_MESSAGE
    assert peak_memory(refused) < 16 * 2 ** 20
