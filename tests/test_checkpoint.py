"""minilm/checkpoint.py: saved arrays are read back bit for bit, or an error gives the reason; a save that fails
leaves the previous file."""
import errno
import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minilm import checkpoint
from minilm.checkpoint import CheckpointError

safetensors_numpy = pytest.importorskip("safetensors.numpy")

ARRAYS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(7)}
METADATA = {"step": 7, "loss": 0.1}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A path that is written many times: one folder for all examples of a hypothesis test."""
    return tmp_path_factory.mktemp("scratch") / "state.safetensors"


@pytest.fixture
def saved(tmp_path):
    """The path of a good checkpoint, alone in its folder."""
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, ARRAYS, METADATA)
    return path


def assert_same_arrays(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        assert loaded[name].shape == array.shape, name
        assert loaded[name].dtype == array.dtype.newbyteorder("="), name
        assert loaded[name].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes(), name


# Reading back.

MEMORY_ORDERS = {
    "C": lambda a: a,
    "Fortran": np.asfortranarray,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[::-1] if a.ndim else a,
    "every second": lambda a: a[..., ::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, a.size, offset=1).reshape(a.shape),
}


@settings(deadline=None, max_examples=100)
@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from(checkpoint.DTYPES),
       order=st.sampled_from(sorted(MEMORY_ORDERS)), seed=st.integers(0, 2**32 - 1))
def test_any_shape_dtype_and_memory_order_round_trips_bitwise(scratch, shape, dtype, order, seed):
    dtype = np.dtype(dtype)
    contents = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)    # NaNs of every kind
    array = np.frombuffer(contents, np.uint8)
    array = (array % 2).astype(bool) if dtype.kind == "b" else array.view(dtype)
    array = MEMORY_ORDERS[order](array.reshape(shape))
    checkpoint.save(scratch, {"array": array}, {})
    loaded, _ = checkpoint.load(scratch)
    assert_same_arrays(loaded, {"array": array})


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.arange(12.0).reshape(3, 4)[:, ::2]],
                         ids=["transposed", "strided"])
def test_a_non_contiguous_array_keeps_its_numbers_in_their_places(scratch, array):
    checkpoint.save(scratch, {"array": array}, {})
    np.testing.assert_array_equal(checkpoint.load(scratch)[0]["array"], array)


def test_an_array_without_axes_gets_none(scratch):
    checkpoint.save(scratch, {"array": np.array(2.5), "scalar": np.float32(1.5)}, {})
    loaded, _ = checkpoint.load(scratch)
    assert loaded["array"].shape == () and loaded["array"] == 2.5
    assert loaded["scalar"].shape == () and loaded["scalar"].dtype == np.float32


def test_arrays_return_in_the_order_of_their_names(scratch):
    names = ["e", "b", "d", "a", "c"]
    checkpoint.save(scratch, {name: np.zeros(2, dtype) for name, dtype in zip(names, checkpoint.DTYPES)}, {})
    assert list(checkpoint.load(scratch)[0]) == sorted(names)


def test_loaded_arrays_can_be_written_to(saved):
    arrays, _ = checkpoint.load(saved)
    arrays["weight"] += 1
    np.testing.assert_array_equal(arrays["weight"], ARRAYS["weight"] + 1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2**200, 2**200) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8)


@settings(deadline=None)
@given(metadata=st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4))
def test_metadata_round_trips_exactly(scratch, metadata):
    checkpoint.save(scratch, {}, metadata)
    arrays, loaded = checkpoint.load(scratch)
    assert arrays == {} and loaded == metadata
    assert json.dumps(loaded) == json.dumps(metadata)    # 1, 1.0 and True apart, keys in the same order


def test_a_generator_continues_where_it_was_saved(scratch):
    generator = np.random.default_rng(5)
    generator.standard_normal(3)
    checkpoint.save(scratch, {}, {"generator": generator.bit_generator.state})
    resumed = np.random.default_rng()
    resumed.bit_generator.state = checkpoint.load(scratch)[1]["generator"]
    np.testing.assert_array_equal(resumed.standard_normal(8), generator.standard_normal(8))


def test_metadata_returns_as_json_returns_it(scratch):
    checkpoint.save(scratch, {}, {"betas": (0.9, 0.95), 1: "first", "2": "second", "loss": float("nan")})
    metadata = checkpoint.load(scratch)[1]
    assert metadata["betas"] == [0.9, 0.95] and np.isnan(metadata["loss"])
    assert (metadata["1"], metadata["2"]) == ("first", "second")


def test_equal_contents_give_equal_files(saved, tmp_path):
    for _ in range(8):    # safetensors' own order of metadata would differ within a few
        checkpoint.save(tmp_path / "again", dict(reversed(ARRAYS.items())), METADATA)
        assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_any_reader_of_safetensors_can_open_it(saved):
    assert_same_arrays(safetensors_numpy.load_file(saved), ARRAYS)


@pytest.mark.parametrize("arrays, metadata, error", [
    ({"a": np.array([object()])}, {}, TypeError),
    ({"a": np.zeros(2, complex)}, {}, TypeError),
    ({"a": np.array(["text"])}, {}, TypeError),
    ({"__metadata__": np.zeros(2)}, {}, ValueError),
    ({0: np.zeros(2)}, {}, ValueError),
    ({}, {"generator": np.zeros(2)}, TypeError),
    ({}, {"step": np.int64(3)}, TypeError),
    ({}, {"losses": [{1: 0.5, "1": 0.7}]}, ValueError),
    ({}, {"history": "x" * (checkpoint.HEADER_LIMIT // 4)}, ValueError),
], ids=["objects", "complex", "strings", "reserved name", "name not a string",
        "array in metadata", "NumPy integer in metadata", "two keys that JSON makes one",
        "metadata too long to read back"])
def test_what_the_format_cannot_hold_is_an_error_before_anything_is_written(saved, arrays, metadata, error):
    before = saved.read_bytes()
    with pytest.raises(error):
        checkpoint.save(saved, arrays, metadata)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("path", [0, 5, None])
def test_a_path_is_no_number_of_an_open_file(path):
    for use in (lambda: checkpoint.load(path), lambda: checkpoint.save(path, {}, {}),
                lambda: checkpoint.write_text(path, "text")):
        with pytest.raises(TypeError, match="os.PathLike"):
            use()


# Bad files.

class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was unpickled",))


def file_with(**fields):
    """The bytes of a checkpoint of ARRAYS and METADATA, with these fields of its header changed."""
    header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION,
              "sha256": checkpoint._digest(ARRAYS, METADATA), "metadata": METADATA, **fields}
    return safetensors_numpy.save(ARRAYS, {checkpoint.KEY: json.dumps(header)})


GOOD_FILE = file_with()
BAD_FILES = {
    "empty": (b"", "empty file"),
    "a few bytes": (b"minilm", "cut short after 6 bytes"),
    "text": (b"no checkpoint at all\n" * 9, "not a safetensors file"),
    "text with a brace": (b"minilm: {}\n" * 9, "not a safetensors file"),
    "a small number first": (b"\x08" + b"\0" * 40, "not a safetensors file"),
    "pickle": (pickle.dumps([Bomb()] * 9), "not a safetensors file"),
    "no metadata": (safetensors_numpy.save(ARRAYS), "not a checkpoint of minilm"),
    "metadata of others": (safetensors_numpy.save(ARRAYS, {"format": "pt"}), "not a checkpoint of minilm"),
    "newer": (file_with(version=checkpoint.VERSION + 1), "newer minilm .* Update minilm"),
    "version unheard of": (file_with(version=0), "header makes no sense"),
    "version not a number": (file_with(version="1"), "header makes no sense"),
    "another format": (file_with(format="something else"), "header makes no sense"),
    "header not JSON": (safetensors_numpy.save(ARRAYS, {checkpoint.KEY: "{"}), "header makes no sense"),
    "header a list": (safetensors_numpy.save(ARRAYS, {checkpoint.KEY: "[]"}), "header makes no sense"),
    "wrong checksum": (file_with(sha256=""), "do not match their checksum"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_each_kind_of_bad_file_has_its_own_error(tmp_path, content, message):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors_with_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        checkpoint.load(tmp_path)


def test_the_file_of_the_next_tests_is_valid(scratch):
    scratch.write_bytes(GOOD_FILE)
    assert_same_arrays(checkpoint.load(scratch)[0], ARRAYS)


def write_anew(path, content):
    """Deletes the old file first: ext4 syncs a file that is overwritten, which is slow."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_a_file_cut_anywhere_is_reported_as_cut_short(scratch):
    for length in range(1, len(GOOD_FILE)):
        write_anew(scratch, GOOD_FILE[:length])
        with pytest.raises(CheckpointError, match="cut short"):
            checkpoint.load(scratch)
            pytest.fail(f"not noticed: cut after {length} bytes")


def test_every_flipped_bit_is_an_error(scratch):
    for bit in range(8 * len(GOOD_FILE)):
        content = bytearray(GOOD_FILE)
        content[bit // 8] ^= 1 << bit % 8
        write_anew(scratch, content)
        with pytest.raises(CheckpointError):
            checkpoint.load(scratch)
            pytest.fail(f"not noticed: bit {bit % 8} of byte {bit // 8}")


@pytest.mark.parametrize("before, after", [(b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]"),
                                           (b'"weight"', b'"height"')], ids=["dtype", "shape", "name"])
def test_a_header_changed_in_dtype_shape_or_name_is_an_error(scratch, before, after):
    assert GOOD_FILE.count(before) == 1
    scratch.write_bytes(GOOD_FILE.replace(before, after))
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        checkpoint.load(scratch)


def test_without_safetensors_the_error_names_the_remedy_and_text_can_still_be_written(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: checkpoint.load(saved), lambda: checkpoint.save(saved, {}, {})):
        with pytest.raises(CheckpointError, match=r"pip install -e '\.\[run\]'"):
            call()
    checkpoint.write_text(saved.with_name("results.json"), "{}")


# A save that fails.

def raising(error):
    def function(*_, **__):
        raise error
    return function


class HalfWritten:
    """A file that writes half of its data, then fails."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        raise self.error


def fail_at(step, error, monkeypatch):
    if step == "open":
        monkeypatch.setattr(checkpoint, "open", raising(error), raising=False)
    elif step == "write":
        monkeypatch.setattr(checkpoint, "open", lambda *args: HalfWritten(open(*args), error), raising=False)
    else:
        monkeypatch.setattr(os, step, raising(error))


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number, remedy", [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "quota"),
                                            (errno.EACCES, "Choose a folder you may write to"),
                                            (errno.EIO, "Check that disk")],
                         ids=["ENOSPC", "EDQUOT", "EACCES", "EIO"])
def test_a_failing_disk_leaves_the_previous_file_and_nothing_else(saved, monkeypatch, step, number, remedy):
    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        fail_at(step, OSError(number, os.strerror(number)), patch)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(saved, {"weight": np.zeros(100)}, {})
    for part in (str(saved), os.strerror(number), remedy, "intact"):
        assert part in str(caught.value)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_ctrl_c_leaves_the_previous_file_and_nothing_else(saved, monkeypatch, step):
    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        fail_at(step, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(saved, {"weight": np.zeros(100)}, {})
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_device_is_reported(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    with pytest.raises(CheckpointError, match="No space left on device. Free some space"):
        checkpoint.save(saved, ARRAYS, {})


def test_a_write_beyond_the_file_size_limit_leaves_the_previous_file(saved):
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))    # bytes a file may have
    try:
        with pytest.raises(CheckpointError, match="File too large. Raise the limit"):
            checkpoint.save(saved, {"weight": np.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_process_killed_before_the_renaming_leaves_the_previous_file_and_a_marked_leftover(saved):
    code = """if True:
        import os, signal, sys, numpy
        from minilm import checkpoint
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save(sys.argv[1], {"weight": numpy.zeros(3)}, {})"""
    assert subprocess.run([sys.executable, "-c", code, saved]).returncode == -signal.SIGKILL
    assert_same_arrays(checkpoint.load(saved)[0], ARRAYS)
    leftover, = set(os.listdir(saved.parent)) - {saved.name}
    assert leftover.endswith(checkpoint.TEMPORARY_SUFFIX)
    checkpoint.save(saved, {}, {"step": 8})    # and the next save is not in its way
    assert checkpoint.load(saved)[1] == {"step": 8}


def test_the_file_reaches_the_disk_before_its_name_and_the_name_before_save_returns(saved, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    checkpoint.save(saved, ARRAYS, METADATA)
    assert calls == [f"{saved.stat().st_size} bytes", "rename", "folder"]


def test_a_folder_that_cannot_be_synced_is_reported_as_saved_but_not_confirmed(saved, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: raising(OSError(errno.EIO, "I/O error"))()
                        if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor))
    with pytest.raises(CheckpointError, match="saved, but the disk does not confirm it"):
        checkpoint.save(saved, {}, {"step": 8})
    assert checkpoint.load(saved)[1] == {"step": 8}


def test_a_pipe_or_a_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match="no ordinary file"):
            checkpoint.save(tmp_path / name, ARRAYS, {})
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="Create its folder first"):
        checkpoint.save(tmp_path / "none" / "state.safetensors", ARRAYS, {})


def test_a_link_stays_a_link(saved):
    link = saved.with_name("latest")
    link.symlink_to(saved.name)
    checkpoint.save(link, {}, {"step": 8})
    assert link.is_symlink() and checkpoint.load(saved)[1] == {"step": 8}


def test_a_saved_file_is_as_readable_as_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "state.safetensors", ARRAYS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state.safetensors").stat().st_mode) == 0o640


def test_text_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    checkpoint.write_text(path, "π* = 1\n")
    assert path.read_bytes() == "π* = 1\n".encode("utf-8")
    with monkeypatch.context() as patch:
        fail_at("write", OSError(errno.ENOSPC, "No space left on device"), patch)
        with pytest.raises(CheckpointError, match="Free some space"):
            checkpoint.write_text(path, "something longer")
    assert path.read_text("utf-8") == "π* = 1\n" and os.listdir(tmp_path) == ["results.json"]


# Into a model.

def parameters():
    return {"a": SimpleNamespace(data=np.zeros((2, 3), np.float32)), "b": SimpleNamespace(data=np.zeros(()))}


def test_parameters_are_filled_in_place():
    model = parameters()
    holders = {name: parameter.data for name, parameter in model.items()}
    checkpoint.load_into(model, {"b": np.array(5.0), "a": np.ones((2, 3), np.float32)})
    assert all(model[name].data is holders[name] for name in model)
    assert (holders["a"] == 1).all() and holders["b"] == 5


GOOD = {"a": np.ones((2, 3), np.float32), "b": np.array(5.0)}


@pytest.mark.parametrize("arrays, message", [
    ({"a": GOOD["a"]}, r"1 missing \(b\)\."),
    ({**GOOD, "c": GOOD["b"]}, r"1 unexpected \(c\)\."),
    ({**GOOD, **{f"c{i}": GOOD["b"] for i in range(9)}}, r"9 unexpected \(c0, c1, c2, \.\.\.\)\."),
    ({"b": GOOD["b"], "c": GOOD["a"]}, r"1 missing \(a\); 1 unexpected \(c\)\."),
    ({**GOOD, "b": np.ones(1)}, r"b is float64 \(1,\) there, float64 \(\) here"),
    ({**GOOD, "b": np.ones((), np.float32)}, r"b is float32 \(\) there, float64 \(\) here"),
    ({**GOOD, "a": np.ones((3, 2), np.float32)}, r"a is float32 \(3, 2\) there, float32 \(2, 3\) here"),
], ids=["missing", "unexpected", "many unexpected", "renamed", "shape", "dtype", "transposed"])
def test_another_architecture_is_an_error_and_nothing_is_copied(arrays, message):
    model = parameters()
    with pytest.raises(CheckpointError, match="^m.safetensors: a checkpoint of another architecture: " + message):
        checkpoint.load_into(model, arrays, "m.safetensors")
    assert all((parameter.data == 0).all() for parameter in model.values())
