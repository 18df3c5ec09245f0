"""minilm/fast/malloc.py: arrays come and go as before, and a system without glibc is not an error."""
import ctypes
import subprocess
import sys

import pytest

from minilm.fast import malloc


def test_after_keep_freed_memory_arrays_come_and_go_as_before():
    """In a process of its own: the setting lasts as long as the process."""
    code = ("import numpy as np, threading; from minilm.fast.malloc import keep_freed_memory\n"
            "assert keep_freed_memory() in (True, False)\n"
            "def work(): assert all(np.full(10**6, i, 'f').sum() == i * 10**6 for i in range(10))\n"
            "threads = [threading.Thread(target=work) for _ in range(2)]\n"
            "[t.start() for t in threads]; work(); [t.join() for t in threads]; print('done')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("done\n", "")


@pytest.mark.parametrize("missing", [OSError, AttributeError, TypeError])
def test_without_glibc_keep_freed_memory_says_no(monkeypatch, missing):
    def no_library(name):
        raise missing
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert malloc.keep_freed_memory() is False
