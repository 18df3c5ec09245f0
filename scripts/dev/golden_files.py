"""Golden vectors as they are read: the index, and the arrays of a case, which must be those that the index lists.

NumPy alone reads these files too (tests/golden/README.md). `read_case` differs in two points: it allocates no array
before the file is known to hold it, and every fault is a UsageError.
Checked by tests/test_golden.py and tests/test_fuzz.py.
"""
import io
import math
import os
import re
import struct
import zipfile
import zlib

import numpy as np

from minilm.checkpoint import one_line
from support.json_files import read_shaped
from support.run_folder import UsageError

FORMAT = {"format": "minilm golden vectors", "version": 1}
INDEX = "index.json"
ADVICE = "Write the golden set again: python scripts/dev/golden.py"
ARRAYS = ({str: str}, {})       # {name: "float64[2, 3]"}
SHAPE = {"format": str, "version": int, "seed": int, "size": str, "cases": {str: {
    "file": str, "function": str, "inputs": ARRAYS, "results": ARRAYS}}}
FAULTS = (OSError, ValueError, LookupError, AttributeError, EOFError, OverflowError, RuntimeError, zipfile.BadZipFile,
          zlib.error, struct.error)     # of zipfile and what it calls


def read_index(folder: str | os.PathLike) -> dict:
    """The index of a golden set. Raises UsageError, which names the file, if it is none."""
    path = os.path.join(folder, INDEX)
    index = read_shaped(path, SHAPE, ADVICE)
    if not FORMAT.items() <= index.items():
        raise UsageError(f"{path}: not of {FORMAT['format']}, version {FORMAT['version']}. {ADVICE}")
    for name, entry in index["cases"].items():
        if entry["file"] != os.path.basename(entry["file"]):
            raise UsageError(f"{path}: the file of case {one_line(name)} is no name of a file in this folder. {ADVICE}")
    return index


def read_case(folder: str | os.PathLike, entry: dict) -> dict[str, np.ndarray]:
    """{name: array} of a case; `entry` is its part of the index. Raises UsageError for a file with other arrays."""
    path = os.path.join(folder, entry["file"])
    listed = {**entry["inputs"], **entry["results"]}
    try:
        with zipfile.ZipFile(path) as file:
            if sorted(file.namelist()) != sorted(f"{name}.npy" for name in listed):
                raise ValueError(f"it holds {len(file.namelist())} arrays, and the index lists {len(listed)}")
            return {name: _read_array(file, name, described) for name, described in listed.items()}
    except FAULTS as error:
        raise UsageError(f"{path}: damaged, or not as its index describes it: {one_line(error) or 'cut short'}. "
                         f"{ADVICE}") from error


def _read_array(file, name, described):
    """The array of this name, which the index describes as dtype and shape: float64[2, 3]."""
    dtype, shape = re.fullmatch(r"(bool|float64|int64)\[([\d, ]*)\]", described).groups()
    dtype, shape = np.dtype(dtype), tuple(int(n) for n in shape.split(", ") if n)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    with file.open(f"{name}.npy") as data:
        if data.read(len(header.getvalue())) != header.getvalue():
            raise ValueError(f"the header of {name} is not that of {described}")
        # read() takes memory as the data arrive, and checks them against the archive's CRC at their end.
        content = data.read(math.prod(shape) * dtype.itemsize + 1)
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has not the bytes of {described}")
    return np.frombuffer(bytearray(content), dtype).reshape(shape)
