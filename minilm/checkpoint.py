"""Named arrays and a dictionary on disk: saved completely or not at all, and verified when they are read.

The file is an ordinary safetensors file, which any tool can open; nothing is ever unpickled. Its header has one
string of minilm, under the key "minilm":

    {"format": "minilm checkpoint", "version": 1, "sha256": "...", "metadata": {...}}

It is one string because safetensors writes several strings in an order that changes from call to call. With one
string, equal contents give equal files, and `cmp` can compare two runs. The sha256 is needed because safetensors
checks the layout of a file but not its bytes: without it, a flipped bit would be read as a wrong weight.

Checked by tests/test_checkpoint.py.
"""
import contextlib
import errno
import hashlib
import json
import os
import secrets
from typing import Any

import numpy as np

from minilm.backend import array_module
from minilm.checks import distinct, ordinary_file
from minilm.in_place import mark_changed

KEY = "minilm"
FORMAT = "minilm checkpoint"
VERSION = 1
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64",
          "uint8", "uint16", "uint32", "uint64", "bool")
HEADER_LIMIT = 100_000_000             # bytes: the longest header that safetensors reads
TEMPORARY_SUFFIX = ".minilm-partial"   # a killed process may leave such a file: it can be deleted

Path = str | os.PathLike

_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "Free some space on that disk",
    errno.EDQUOT: "Free some of your disk quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.ENOENT: "Create its folder first",
    **dict.fromkeys([errno.EACCES, errno.EPERM, errno.EROFS], "Choose a folder you may write to")}


class CheckpointError(Exception):
    """The message names the file, the fault, and what to do."""


def save(path: Path, arrays: dict, metadata: dict) -> None:
    """Writes arrays {name: array of any shape, dtype in DTYPES} and metadata (anything that json can write).

    Afterwards the complete new file is at `path`, and on the disk, or the previous file is unchanged. load returns
    metadata as JSON does: integers of any size and floats exactly, tuples as lists, keys as strings. While saving,
    up to two copies of the arrays are in memory.

    Raises CheckpointError if the file cannot be written. Raises TypeError or ValueError, before anything is
    written, for arrays or metadata that the format cannot hold (two keys that are one as strings: 1 and "1").
    """
    safetensors = import_safetensors()
    arrays = {name: _as_stored(name, array) for name, array in arrays.items()}
    try:
        metadata = json.loads(json.dumps(metadata), object_pairs_hook=distinct)
    except ValueError as error:
        raise ValueError(f"metadata: {error}: JSON makes strings of all keys") from None
    header = json.dumps({"format": FORMAT, "version": VERSION,
                         "sha256": _digest(arrays, metadata), "metadata": metadata})
    if len(header) > HEADER_LIMIT // 4:     # it is escaped once more, and the names of the arrays follow
        raise ValueError(f"metadata of {len(header):,} bytes: keep long lists among the arrays")
    write_bytes(path, safetensors.numpy.save(arrays, {KEY: header}))


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a file of `save`: (arrays, metadata). The arrays are writable, and in the order of their names.

    Raises CheckpointError, with a different message for each fault: no such file, unreadable, empty, cut short or
    damaged, not safetensors, not a checkpoint of minilm, of a newer version, contents that fail the checksum.
    """
    safetensors = import_safetensors()
    path = os.fspath(path)          # raises TypeError for an integer, which would name an open file
    try:
        _check_first_bytes(path)
        with safetensors.safe_open(path, framework="np") as file:
            metadata, sha256 = _parse_header(path, (file.metadata() or {}).get(KEY))
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file. Check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}. "
                              "Check that it is a file, and that you may read it.") from error
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError) as error:
        # Of NumPy, for a dtype that it lacks or a shape that no array has; and UnicodeError.
        raise _damaged(path, f"cut short or damaged ({one_line(error)})") from error
    if _digest(arrays, metadata) != sha256:
        raise _damaged(path, "damaged: its contents do not match their checksum")
    return arrays, metadata


def load_into(parameters: dict, arrays: dict[str, np.ndarray], path: Path = "") -> None:
    """Copies each array into the parameter of its name, in place: p.data[...] = array.

    parameters {name: object with .data}, arrays {name: array}. Raises CheckpointError, which names `path`, if
    names, shapes or dtypes differ; then no parameter has changed.
    """
    missing = [name for name in parameters if name not in arrays]
    unexpected = [name for name in arrays if name not in parameters]
    differences = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                   for kind, names in [("missing", missing), ("unexpected", unexpected)] if names]
    for name in parameters if not differences else ():
        own = parameters[name].data
        saved = arrays[name]
        if (own.shape, own.dtype) != (saved.shape, saved.dtype):
            differences = [f"{name} is {saved.dtype} {saved.shape} there, {own.dtype} {own.shape} here"]
            break
    if differences:
        raise CheckpointError(f"{path or 'these arrays'}: a checkpoint of another architecture: "
                              f"{'; '.join(differences)}. "
                              "Build the model with the settings it was saved with.")
    for name, parameter in parameters.items():
        parameter.data[...] = array_module(parameter.data).asarray(arrays[name])
    mark_changed(parameters, "load_into")


def write_text(path: Path, text: str) -> None:
    """Writes text (UTF-8) completely or not at all, as `save` does. Raises CheckpointError."""
    write_bytes(path, text.encode("utf-8"))


def one_line(error: Exception | str) -> str:
    """The message of an error, which may quote a damaged file, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def import_safetensors() -> Any:
    """The package. Raises CheckpointError if it is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError("checkpoints need safetensors, which is not installed: "
                              "pip install -e '.[run]'") from error
    return safetensors


def _as_stored(name, array):
    """The array, C-contiguous and little-endian.

    safetensors.numpy.save reads any memory order as C order, and silently puts the numbers in the wrong places.
    """
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"{name!r} cannot name an array")
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise TypeError(f"array {name!r} is {array.dtype}; a checkpoint holds {', '.join(DTYPES)}")
    # Not ascontiguousarray, because it gives a 0-d array an axis.
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _digest(arrays, metadata):
    """The sha256 of the metadata and of the name, dtype, shape and bytes of every array."""
    sha256 = hashlib.sha256(json.dumps(metadata).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha256.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        sha256.update(array.reshape(-1).view(np.uint8))
    return sha256.hexdigest()


def _damaged(path, fault):
    return CheckpointError(f"{path}: {fault}. Restore it from a copy, or delete it and go on without it.")


def _check_first_bytes(path):
    """A safetensors file starts with the length of the header (8 bytes, little-endian) and the header's '{'."""
    with open(ordinary_file(path), "rb") as file:
        head = file.read(9)
    if not head:
        raise _damaged(path, "an empty file")
    if len(head) < 9:
        raise _damaged(path, f"cut short after {len(head)} bytes")
    if head[8:] != b"{" or int.from_bytes(head[:8], "little") > HEADER_LIMIT:
        raise CheckpointError(f"{path}: not a safetensors file. Check the path.")


def _parse_header(path, header):
    """(metadata, sha256) from the string of minilm in the header. header is None if there is no such string."""
    if header is None:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of minilm. Check the path.")
    try:
        fields = json.loads(header, object_pairs_hook=distinct)
        if fields["version"] > VERSION:
            raise CheckpointError(f"{path}: written by a newer minilm (version {fields['version']} of the "
                                  f"format; this one reads {VERSION}). Update minilm.")
        if (fields["format"], fields["version"]) != (FORMAT, VERSION) or not isinstance(fields["metadata"], dict):
            raise ValueError("no version of this format")
        return fields["metadata"], fields["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "damaged: its header makes no sense") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes, a picture for example, completely or not at all: to a temporary file beside path, which is synced
    to the disk and then renamed to path. Raises CheckpointError."""
    path = os.path.realpath(path)    # a link stays a link, and its target is replaced
    folder, name = os.path.split(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path}: not saved: this is no ordinary file. Choose another path.")
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:   # Ctrl-C too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{path}: not saved: {error.strerror}. "
                              f"{_REMEDIES.get(error.errno, 'Check that disk and folder')}; "
                              "the previous content of this file is intact.") from error
    _sync_folder(folder, path)


def _sync_folder(folder, path):
    """Brings the renaming to the disk too, so that it survives a power cut."""
    if not hasattr(os, "O_DIRECTORY"):   # Windows cannot open a folder
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: saved, but the disk does not confirm it: {error.strerror}. "
                              "Check that disk.") from error
