"""minilm/pretrained/gguf_file.py: metadata and tensors of a GGUF file are read exactly; a damaged file is one error."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from gguf_writer import float32, gguf, random_blocks
from helpers import rngs
from minilm.checkpoint import CheckpointError
from minilm.pretrained.gguf_file import TYPES, GGUFFile

METADATA = {"general.architecture": "llama", "count": 7, "eps": 0.5, "yes": True, "words": ["a", "é", ""],
            "numbers": [1, 2], "nested": [["x"], ["y", "z"]], "empty": []}


def written(path, *arguments, **options):
    path.write_bytes(gguf(*arguments, **options))
    return path


def test_metadata_of_every_kind_and_the_shapes_are_read(tmp_path):
    tensors = {"a": float32(np.zeros((3, 2))), "b": float32(np.ones(4))}
    with GGUFFile(written(tmp_path / "f", METADATA, tensors)) as file:
        assert file.metadata == METADATA
        assert file.shapes == {"a": (3, 2), "b": (4,)}


@given(rngs, st.sampled_from([2, 3]))
def test_numbers_that_are_not_quantised_are_read_exactly(tmp_path_factory, rng, version):
    x = rng.normal(size=(5, 6)).astype(np.float32)
    upper = (x.view(np.uint32) >> 16).astype("<u2")
    tensors = {"F32": float32(x), "F16": (x.shape, 1, x.astype("<f2").tobytes()),
               "BF16": (x.shape, 30, upper.tobytes())}
    with GGUFFile(written(tmp_path_factory.mktemp("f") / "f", {}, tensors, version=version)) as file:
        read = {name: file.array(name) for name in tensors}
    assert all(array.dtype == np.float32 and array.shape == x.shape for array in read.values())
    assert (read["F32"] == x).all() and (read["F16"] == x.astype(np.float16)).all()
    assert (read["BF16"] == (upper.astype(np.uint32) << 16).view(np.float32)).all()


def block_by_hand(code, raw):
    """The 32 numbers of one block of bytes, one after the other."""
    d = np.frombuffer(raw[:2], "<f2")[0].astype(np.float32)
    if code == 8:
        return [d * np.float32(q) for q in np.frombuffer(raw[2:], np.int8)]
    packed = raw[4:] if code == 3 else raw[2:]
    quants = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
    if code == 2:
        return [d * np.float32(q - 8) for q in quants]
    return [d * np.float32(q) + np.frombuffer(raw[2:4], "<f2")[0].astype(np.float32) for q in quants]


@pytest.mark.parametrize("code", [2, 3, 8], ids=lambda code: TYPES[code].name)
def test_quantised_blocks_are_the_formula_number_by_number(tmp_path, rng, code):
    shape, _, raw = tensor = random_blocks(rng, (3, 64), code)
    with GGUFFile(written(tmp_path / "f", {}, {"first": float32(np.zeros(3)), "w": tensor})) as file:
        read = file.array("w")
    size = TYPES[code].size
    expected = [block_by_hand(code, raw[i:i + size]) for i in range(0, len(raw), size)]
    assert read.shape == shape and (read.reshape(-1, 32) == np.array(expected, np.float32)).all()


@pytest.mark.parity
@pytest.mark.parametrize("code", sorted(TYPES), ids=lambda code: TYPES[code].name)
def test_tensors_are_those_of_the_package_gguf(tmp_path, rng, code):
    package = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    x = rng.normal(size=(7, 96)).astype(np.float32)
    writer = package.GGUFWriter(tmp_path / "f", "llama")
    kind = package.GGMLQuantizationType(code)
    raw = x if code == 0 else x.astype(np.float16) if code == 1 else package.quants.quantize(x, kind)
    writer.add_tensor("w", raw, raw_dtype=None if code in (0, 1) else kind)
    writer.add_array("tokens", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "f") as file:
        read = file.array("w")
        assert file.metadata["tokens"] == ["a", "b"]
    assert (read == package.quants.dequantize(raw, kind).reshape(x.shape)).all()


def test_pieces_of_a_large_tensor_are_joined(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("minilm.pretrained.gguf_file.PIECE", 7)
    x = rng.normal(size=(10, 9)).astype(np.float32)
    with GGUFFile(written(tmp_path / "f", {}, {"x": float32(x)})) as file:
        assert (file.array("x") == x).all()


GOOD = {"a": float32(np.arange(6.0)), "q": ((2, 32), 3, bytes(40))}


@pytest.mark.parametrize("bad, message", [
    (gguf(METADATA, GOOD, magic=b"GGML"), "starts with b'GGML'"),
    (gguf(METADATA, GOOD, version=1), "version 1"),
    (gguf({"general.alignment": 0}, GOOD), "an alignment of 0"),
    (gguf({}, {"a": ((3,), 12, bytes(12))}), "a has type 12; those that are read are F32, F16"),
    (gguf({}, {"a": ((2, 16), 3, bytes(20))}), r"a \(2, 16\) of type Q4_1 does not fit the file"),
    (gguf({}, {"a": ((1 << 40,), 0, bytes(20))}), "does not fit the file"),
    (gguf({}, {"a": ((), 0, bytes(4))}), "does not fit the file"),
    (gguf(METADATA, GOOD)[:-30], "does not fit the file"),
    (gguf({"a": 1}, {})[:8] + b"\xff" * 40, "a count of 18446744073709551615"),
    (gguf({}, {})[:16] + b"\1" + bytes(7) + b"\1" + bytes(7) + b"a" + b"\x63" + bytes(20), "a value of type 99"),
    (gguf({"a": "x"}, {}).replace(b"x", b"\xff"), "utf-8"),
    (gguf({"a": 1, "b": 1}, {}).replace(b"b", b"a"), "a name comes twice"),
    (b"", "empty"), (b"GGUF", "requires a buffer"), (b"text", "starts with b'text'")])
def test_a_damaged_file_is_an_error_with_the_fault(tmp_path, bad, message):
    (tmp_path / "f").write_bytes(bad)
    with pytest.raises(CheckpointError, match=f"f: not a GGUF file that can be read: .*{message}"):
        GGUFFile(tmp_path / "f")


def test_a_file_that_is_missing_or_a_folder_is_an_error(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            GGUFFile(path)


@given(st.data())
def test_no_change_of_bytes_does_anything_but_raise_a_checkpoint_error_or_change_values(tmp_path_factory, data):
    raw = bytearray(gguf(METADATA, GOOD))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 255]))
    path = tmp_path_factory.mktemp("f") / "f"
    path.write_bytes(raw[:data.draw(st.integers(0, len(raw)))])
    try:
        with np.errstate(all="ignore"), GGUFFile(path) as file:
            assert all(file.array(name).shape == shape for name, shape in file.shapes.items())
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_a_file_that_becomes_shorter_after_it_was_opened_is_an_error(tmp_path):
    path = written(tmp_path / "f", {}, {"x": float32(np.zeros(5000))})
    with GGUFFile(path) as file:
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(CheckpointError, match="ends within x"):
            file.array("x")
