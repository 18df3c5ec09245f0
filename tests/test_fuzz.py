"""Every loader on damaged files: the documented error in one line, no hang, and no memory that the file does not hold.

The long search gives each loader 20,000 inputs in .ci/run, the short one a few hundred; EXAMPLES has an input of each
kind that was once read wrongly. The inputs are those of fuzzing.py, from real files. Files that have a checksum are
damaged behind it too (`signed`), because another program may have written them.
FUZZ_SEED=n python -m pytest -m slow tests/test_fuzz.py searches other inputs.
"""
import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource", reason="the limits of a process need a POSIX system")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

import fuzzing
import golden_files
from common import experiment, markdown, page, record
from common.words import LECTURE
from helpers import peak_memory, small_transformer
from minilm import checkpoint, data
from minilm.checkpoint import CheckpointError
from minilm.model import RewardModel
from minilm.model_file import load_model, save_model
from minilm.tokenizer import Tokenizer, split
from minilm.world import annotators, tasks
from support import tables, terminal
from support.results import read_results
from support.run_folder import RunFolder, UsageError

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
SETTINGS = {"version": 2, "text": "ab12", "scale": 0.1, "size": "small", "seed": 0, "workers": 2, "device": "cpu"}
CASES = ("dpo_loss", "sft_loss", "adamw")        # of the golden vectors
RECORD = {"rows": {"dpo": {"claim": "Some a | b.", "rule": "It ends high.", "outcome": "shown", "measured": "0.5",
                           "size": "full", "date": "2020-01-02", "machine": "2 cores", "seeds": 3, "seconds": 2.5}},
          "roundings": {"float64": {"dpo": {"outcome": "undecided", "equal": False}}}}
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
    index = json.loads((GOLDEN / golden_files.INDEX).read_text("utf-8"))
    return {"checkpoint": written(lambda path: checkpoint.save(path, arrays, metadata)),
            "transformer": written(lambda path: save_model(path, model, TOKENIZER, run={"scale": 0.1})),
            "reward model": written(lambda path: save_model(path, reward_model, TOKENIZER)),
            "results": json.loads((HERE / "corpus" / "results.json").read_text("utf-8")),
            "experiment": json.loads((HERE / "corpus" / "experiment.json").read_text("utf-8")),
            "record": RECORD, "golden index": {**index, "cases": {name: index["cases"][name] for name in CASES}},
            "text": (HERE / "README.md").read_bytes()[:800], "answers": [
                "What is 2 + 3?", "Sure! The answer is 5. I hope this helps!", "First 47 + 30 = 77 , then 77 + 5 = 82.",
                "Well, um, I think the answer is caf\u00e9 \u03c0\u2217 \U0001f600\r\n", ""]}


@functools.cache
def loaded(name):
    """(arrays, metadata) of a real file."""
    with file_of(files()[name]) as path:
        return checkpoint.load(path)


@contextlib.contextmanager
def file_of(content):
    """A path whose file has this content; each process has one path, in memory where there is a place for it."""
    path = os.path.join(SCRATCH, f"minilm-fuzz-{os.getpid()}")
    with open(path, "wb") as file:
        file.write(content)
    try:
        yield path
    finally:
        os.unlink(path)


@contextlib.contextmanager
def folder_of(name, content):
    """A folder with one file; each process has one folder."""
    folder = os.path.join(SCRATCH, f"minilm-fuzz-{os.getpid()}-folder")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


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


def a_run(rng):
    return fuzzing.damaged_json({"format": "minilm run", "settings": SETTINGS}, rng)


def some_results(rng):
    return fuzzing.damaged_json(files()["results"], rng)


def an_experiment(rng):
    return fuzzing.damaged_json(files()["experiment"], rng)


def a_record(rng):
    return fuzzing.damaged_json(files()["record"], rng)


def a_golden_index(rng):
    return fuzzing.damaged_json(files()["golden index"], rng)


def a_golden_case(rng):
    """(its entry in the index, the bytes of its file): one of the two is damaged, or the header of an array."""
    name = rng.choice(CASES)
    entry = files()["golden index"]["cases"][name]
    content = (GOLDEN / entry["file"]).read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        return {**entry, "inputs": {key: rng.choice((text, text.replace("4", "10000000000"), "float64[]"))
                                    for key, text in entry["inputs"].items()}}, content
    if kind == 1:
        return entry, fuzzing.damaged_bytes(content, rng)
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as new:
        damaged = rng.choice(old.namelist())
        for member in old.namelist():
            array = old.read(member)
            new.writestr(member, fuzzing.damaged_bytes(array, rng) if member == damaged else array)
    return entry, rewritten.getvalue()


def a_text_file(rng):
    return fuzzing.damaged_bytes(files()["text"], rng)


def a_text(rng):
    return fuzzing.damaged_bytes(rng.choice(files()["answers"]).encode(), rng).decode(
        "utf-8", rng.choice(("replace", "surrogateescape")))


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


def read_run(content):
    """As assistant.py --resume reads run.json."""
    with folder_of("run.json", content) as folder:
        assert isinstance(RunFolder.recorded(folder), dict)
        with RunFolder(folder, True, SETTINGS) as run:
            assert run.resumed


def read_results_json(content):
    with folder_of("results.json", content) as folder:
        results = read_results(Path(folder) / "results.json")
    assert tables.summary(results).encode() and tables.across_seeds([results, results]).encode()


def read_experiment(content):
    with folder_of("sampling.json", content) as folder:
        result = experiment.read(Path(folder) / "sampling.json")
    stages, done, pictures = {"Stage": ["sampling"]}, {"sampling": result}, {"sampling": (bytes(24), bytes(24))}
    assert page.html(LECTURE, stages, done, pictures, "default")
    assert markdown.readme(LECTURE, stages, record.of_run({"as run": done}), {})


def read_record(content):
    """As all.py --readme reads and writes the results.json of the lecture."""
    with folder_of("results.json", content) as folder:
        found = record.read(Path(folder) / "results.json")
    names = list(RECORD["rows"])
    assert markdown.readme(LECTURE, {"Stage": names}, record.updated(found, RECORD, names), {})


def read_golden_index(content):
    with folder_of(golden_files.INDEX, content) as folder:
        index = golden_files.read_index(folder)
    assert all(isinstance(entry["inputs"], dict) for entry in index["cases"].values())


def read_golden_case(contents):
    entry, content = contents
    with folder_of("case.npz", content) as folder:
        arrays = golden_files.read_case(folder, {**entry, "file": "case.npz"})
    assert arrays.keys() == entry["inputs"].keys() | entry["results"].keys()


def read_text_file(content):
    with file_of(content) as path:
        text = data.read_text(path)
    assert text.strip() and "\0" not in text and TOKENIZER.decode(TOKENIZER.encode(text)) == text


def speak(text):
    """Every function that takes the text of a user or of a model."""
    question = tasks.draw_questions(np.random.default_rng(0), 1)[0]
    prompt, response = data.encode_dialogue(TOKENIZER, text, text)
    assert data.decode_response(TOKENIZER, response) == text
    assert prompt == data.encode_prompt(TOKENIZER, text) and response == data.encode_response(TOKENIZER, text)
    assert np.isfinite(annotators.gold_reward(question, text)) and annotators.is_right(question, text) in (True, False)
    assert "\n" not in terminal.one_line(text) and "".join(split(text)) == text
    assert Tokenizer.train(text, 270).vocab_size <= 270


LOADERS = {"checkpoint.load": (read_checkpoint, a_checkpoint, CheckpointError),
           "load_model": (read_model, a_model_file, CheckpointError),
           "Tokenizer.from_json": (read_tokenizer, a_tokenizer, ValueError),
           "run.json": (read_run, a_run, UsageError), "results.json": (read_results_json, some_results, UsageError),
           "an experiment's results": (read_experiment, an_experiment, UsageError),
           "the lecture's record": (read_record, a_record, UsageError),
           "the golden index": (read_golden_index, a_golden_index, UsageError),
           "a golden case": (read_golden_case, a_golden_case, UsageError),
           "data.read_text": (read_text_file, a_text_file, ValueError), "text": (speak, a_text, ValueError)}


def assert_no_fault(loader, count, loaders=LOADERS):
    read, make, errors = loaders[loader]
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


def file_with_header(tensors, content=b""):
    """A safetensors file with any header, and minilm's metadata."""
    own = json.dumps({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "sha256": "", "metadata": {}})
    text = json.dumps({"__metadata__": {checkpoint.KEY: own}, **tensors}).encode()
    return len(text).to_bytes(8, "little") + text + content


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
    "a dtype of half a byte": ("checkpoint.load", lambda: file_with_header({"a": {
        "dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2)), "cut short or damaged"),
    "an array of 2^62 times 0 numbers": ("checkpoint.load", lambda: file_with_header({"a": {
        "dtype": "F32", "shape": [0, 2 ** 62], "data_offsets": [0, 0]}}), "damaged"),
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


def with_entry(name, path, value):
    """The bytes of a real file of JSON with another value at the place `path`."""
    tree = json.loads(json.dumps(files()[name]))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(tree).encode()


def zipped(**members):
    """A case of the golden vectors as a file whose arrays are these bytes, and its entry in an index."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def header_of(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


RUN = {"format": "minilm run", "settings": SETTINGS}
FOUND |= {
    "merges that come twice": ("Tokenizer.from_json", lambda: TOKENIZER.to_json()[:-1] + ', "merges": []}',
                               "has the key 'merges' twice"),
    "a seed that comes twice": ("run.json", lambda: json.dumps(RUN).replace(
        '"seed": 0', '"seed": 1, "seed": 0').encode(), "not a file of minilm"),
    "rows that come twice": ("results.json", lambda: json.dumps(files()["results"]).encode()[:-1] + b', "rows": []}',
                             "has the key 'rows' twice"),
    "settings of a run as a list": ("run.json", lambda: json.dumps({**RUN, "settings": [["seed", 0]]}).encode(),
                                    "not a file of minilm"),
    "a run nested 100,000 deep": ("run.json", lambda: b"[" * 100_000, "not a file of minilm"),
    "a setting of a run with a newline": ("run.json", lambda: json.dumps(
        {**RUN, "settings": {**SETTINGS, "seed\n": 0}}).encode(), "other settings"),
    "results in UTF-16": ("results.json", lambda: json.dumps(files()["results"]).encode("utf-16"), "no UTF-8 text"),
    "a reward that is NaN": ("results.json", lambda: with_entry("results", ["rows", 0, "gold_reward"], float("nan")),
                             r"'rows\[0\].gold_reward' is nan"),
    "a KL of 10^400": ("results.json", lambda: with_entry("results", ["rows", 1, "kl_sequence"], 10 ** 400),
                       r"'rows\[1\].kl_sequence' is 1000"),
    "a stage that does not exist": ("results.json", lambda: with_entry("results", ["rows", 0, "stage"], "grpo"),
                                    r"its rows are of the stages \['grpo', 'sft'"),
    "no step of pretraining": ("results.json", lambda: with_entry("results", ["history", "base"], []),
                               "'history.base' is"),
    "a turning point after the last step": ("results.json", lambda: with_entry(
        "results", ["turning_point", "step"], 99), "the turning point is step 99"),
    "an answer of three parts": ("results.json", lambda: with_entry("results", ["examples", 0, "sft"], ["a", True, 1]),
                                 "the answer of sft"),
    "a question that is no text": ("results.json", lambda: with_entry("results", ["examples", 0, "question"], "\ud800"),
                                   r"question' is '\\ud800'"),
    "an unknown outcome": ("an experiment's results", lambda: with_entry("experiment", ["outcome"], "proved"),
                           "the outcome is 'proved'"),
    "an interval with one end": ("an experiment's results", lambda: with_entry(
        "experiment", ["comparisons", 0, "interval"], [0.0]), "an interval has two ends"),
    "a comparison without a margin": ("an experiment's results", lambda: with_entry(
        "experiment", ["comparisons", 0, "asked"], "above"), "a comparison asked 'above'"),
    "a rule of which none must hold": ("an experiment's results", lambda: with_entry("experiment", ["at_least"], 0),
                                       "at_least is 0"),
    "lines of different lengths": ("an experiment's results", lambda: with_entry("experiment", ["table", 0], ["n"]),
                                   "different lengths"),
    "a file outside the folder": ("the golden index", lambda: with_entry(
        "golden index", ["cases", "sft_loss", "file"], "../../secret.npz"), "no name of a file in this folder"),
    "an array of 10^10 numbers": ("a golden case", lambda: (
        {"inputs": {"x": "float64[10000000000]"}, "results": {}}, zipped(x=header_of((10 ** 10,)))), "not the bytes"),
    "an array of objects": ("a golden case", lambda: (
        {"inputs": {"x": "object[2]"}, "results": {}}, zipped(x=header_of((2,)))), "damaged, or not as its index"),
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
