"""A GGUF file: metadata and quantised tensors. Each count and size in it is checked against the size of the file.

    magic, version | how many tensors, how many metadata | metadata: name, type, value ...
                   | tensors: name, shape, type, offset ... | the bytes of the tensors

ggml's docs/gguf.md defines the layout (versions 2 and 3, little-endian). A quantised row is cut into blocks of 32
numbers, each with its own scale d, and Q4_1 with its own least number m:

    Q8_0:  d q, with q from -128 to 127         Q4_0:  d (q - 8), with q from 0 to 15       Q4_1:  d q + m

Tests: tests/test_gguf_file.py, against the package `gguf`.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm.checkpoint import CheckpointError, Path, one_line
from minilm.checks import ordinary_file

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}    # of struct
STRING, ARRAY = 8, 9
LARGEST_ALIGNMENT = 1 << 20
PIECE = 1 << 16         # blocks that are decoded at a time, so that the memory for it stays small


@dataclasses.dataclass(frozen=True)
class Type:
    """How numbers are stored: `numbers` of them in a block of `size` bytes. decode: blocks (n,size) of bytes to numbers
    (n,numbers)."""
    name: str
    numbers: int
    size: int
    decode: Callable


def _float16(blocks, start):
    """The float16 at this place of every block, as a column (n,1)."""
    return blocks[:, start:start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed):
    """(n,16) bytes to (n,32) numbers of four bits: the lower halves of all bytes, then the upper halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def from_bfloat16(blocks: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32: bytes (..,2 n) to numbers (..,n)."""
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


TYPES = {0: Type("F32", 1, 4, lambda b: b.view("<f4")),
         1: Type("F16", 1, 2, lambda b: b.view("<f2")),
         2: Type("Q4_0", 32, 18, lambda b: _float16(b, 0) * (_nibbles(b[:, 2:]) - 8)),
         3: Type("Q4_1", 32, 20, lambda b: _float16(b, 0) * _nibbles(b[:, 4:]) + _float16(b, 2)),
         8: Type("Q8_0", 32, 34, lambda b: _float16(b, 0) * b[:, 2:].view(np.int8)),
         30: Type("BF16", 1, 2, from_bfloat16)}


class GGUFFile:
    """metadata: {name: number, string or list}; shapes: {name of a tensor: shape, the fastest axis last}.

    Use it in a `with` block, which closes the file at the end. Raises CheckpointError for a file that is missing,
    damaged, not GGUF, or holds tensors of other types than TYPES.
    """

    def __init__(self, path: Path):
        self.path = os.fspath(path)
        try:
            self._file = open(ordinary_file(self.path), "rb")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
        self._size = os.fstat(self._file.fileno()).st_size
        self._at = 0
        try:
            self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)    # of the names and numbers alone
            tensors, fields = self._read_start()
            self.metadata = dict(self._field() for _ in range(self._possible(fields, 13)))
            found = [self._tensor() for _ in range(self._possible(tensors, 32))]
            if (len(self.metadata), len(dict(found))) != (fields, tensors):
                raise ValueError("a name comes twice")
            self._place(dict(found))
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a GGUF file that can be read: at byte {self._at}: {one_line(error)}. "
                                  "Fetch the file again, or check the path.") from error

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._bytes.close()
        self._file.close()

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32. Raises CheckpointError if the file has become shorter."""
        shape, kind, offset = self._tensors[name]
        out = np.empty(math.prod(shape), np.float32).reshape(-1, kind.numbers)
        self._file.seek(offset)
        for start in range(0, len(out), PIECE):
            blocks = out[start:start + PIECE]
            raw = self._file.read(len(blocks) * kind.size)
            if len(raw) < len(blocks) * kind.size:
                raise CheckpointError(f"{self.path}: ends within {name}. Fetch the file again.")
            blocks[...] = kind.decode(np.frombuffer(raw, np.uint8).reshape(-1, kind.size))
        return out.reshape(shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _, _) in self._tensors.items()}

    def _read_start(self):
        if self._bytes[:4] != b"GGUF":
            raise ValueError(f"it starts with {self._bytes[:4]!r} and not with b'GGUF'")
        _, version, tensors, fields = self._unpack("<4sIQQ")
        if version not in (2, 3):
            raise ValueError(f"it has version {version} of the format; 2 and 3 are read")
        return tensors, fields

    def _field(self):
        return self._string(), self._value(*self._unpack("<I"))

    def _tensor(self):
        name = self._string()
        axes, = self._unpack("<I")
        shape = self._unpack(f"<{self._possible(axes, 8)}Q")[::-1]      # the fastest axis stands first in the file
        return name, (shape, *self._unpack("<IQ"))

    def _place(self, found):
        """self._tensors: {name: (shape, Type, offset in the file)}."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= LARGEST_ALIGNMENT:
            raise ValueError(f"an alignment of {alignment!r}")
        data = -(-self._at // alignment) * alignment
        self._tensors = {}
        for name, (shape, code, offset) in found.items():
            if code not in TYPES:
                raise ValueError(f"{name} has type {code}; those that are read are "
                                 f"{', '.join(kind.name for kind in TYPES.values())}")
            kind = TYPES[code]
            count = math.prod(shape)
            if not shape or shape[-1] % kind.numbers or data + offset + count // kind.numbers * kind.size > self._size:
                raise ValueError(f"{name} {shape} of type {kind.name} does not fit the file")
            self._tensors[name] = shape, kind, data + offset

    def _possible(self, count, least):
        """The count, if so many items of at least so many bytes can still follow."""
        if count * least > self._size - self._at:
            raise ValueError(f"a count of {count} in a file of {self._size} bytes")
        return count

    def _unpack(self, form):
        values = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self):
        length, = self._unpack("<Q")
        start = self._at
        self._at += self._possible(length, 1)
        return self._bytes[start:self._at].decode("utf-8")

    def _value(self, kind) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._unpack("<" + SCALARS[kind])[0]
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, count = self._unpack("<IQ")
        if kind in SCALARS:
            return list(self._unpack(f"<{self._possible(count, struct.calcsize(SCALARS[kind]))}{SCALARS[kind]}"))
        return [self._value(kind) for _ in range(self._possible(count, 8))]
