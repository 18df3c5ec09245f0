"""minilm.fast.malloc: arrays keep their values, and a system without glibc gives False instead of an error."""
import ctypes
import subprocess
import sys

import pytest

from minilm.fast import malloc


def test_arrays_have_their_values_after_keep_freed_memory():
    """In a separate process, because the setting holds for the whole process."""
    code = ("import numpy as np, threading; from minilm.fast.malloc import keep_freed_memory\n"
            "assert keep_freed_memory() in (True, False)\n"
            "def work(): assert all(np.full(10**6, i, 'f').sum() == i * 10**6 for i in range(10))\n"
            "threads = [threading.Thread(target=work) for _ in range(2)]\n"
            "[t.start() for t in threads]; work(); [t.join() for t in threads]; print('done')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("done\n", "")


@pytest.mark.parametrize("missing", [OSError, AttributeError, TypeError])
def test_without_glibc_keep_freed_memory_returns_false(monkeypatch, missing):
    def no_library(name):
        raise missing
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert malloc.keep_freed_memory() is False
