"""Writes GGUF files for tests, from the specification and not from the reader."""
import struct

import numpy as np

CODES = {bool: 7, int: 4, float: 6, str: 8, list: 9}        # of metadata; integers are uint32
BLOCK_BYTES = {2: 18, 3: 20, 8: 34}


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(x):
    """The type and the bytes of a metadata value."""
    code = CODES[type(x)]
    if code == 9:
        items = [value(item) for item in x]
        return code, struct.pack("<IQ", items[0][0] if items else 4, len(items)) + b"".join(raw for _, raw in items)
    return code, string(x) if code == 8 else struct.pack({7: "<?", 4: "<I", 6: "<f"}[code], x)


def gguf(metadata, tensors, version=3, magic=b"GGUF", alignment=32):
    """The bytes of a file. tensors: {name: (shape, type, bytes)}, the fastest axis of a shape last."""
    head = struct.pack("<4sIQQ", magic, version, len(tensors), len(metadata))
    for name, x in metadata.items():
        code, raw = value(x)
        head += string(name) + struct.pack("<I", code) + raw
    data = b""
    for name, (shape, code, raw) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def float32(array):
    """A tensor of type F32."""
    return np.shape(array), 0, np.asarray(array, "<f4").tobytes()


def random_blocks(rng, shape, code):
    """A tensor of a quantised type with random bytes, but finite scales."""
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // 32, BLOCK_BYTES[code]), np.uint8)
    for start in (0, 2)[:1 + (code == 3)]:
        blocks[:, start:start + 2] = rng.normal(size=(len(blocks), 1)).astype("<f2").view(np.uint8)
    return shape, code, blocks.tobytes()
