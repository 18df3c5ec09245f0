"""minilm.backend, on a machine without a GPU: a class whose module is named cupy stands in for CuPy's arrays."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minilm import backend


class FakeArray:
    def __init__(self, data):
        self.data = np.asarray(data)

    def get(self):
        return self.data.copy()


FakeArray.__module__ = "cupy._core.core"


@pytest.fixture
def cupy(monkeypatch):
    fake = SimpleNamespace(asarray=FakeArray)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


@pytest.mark.parametrize("arrays", [(), (1.0,), (np.ones(2),), (np.ones(2), 3, np.float64(1))])
def test_arrays_and_numbers_on_the_cpu_belong_to_numpy(arrays):
    assert backend.array_module(*arrays) is np


def test_an_array_on_the_gpu_belongs_to_cupy_also_beside_numbers(cupy):
    assert backend.array_module(FakeArray(1)) is cupy
    assert backend.array_module(2.0, FakeArray(1), np.float32(3), None) is cupy


def test_mixed_devices_raise_and_name_the_remedy(cupy):
    with pytest.raises(TypeError, match="mixed; move them to one device with minilm.backend.to_device"):
        backend.array_module(FakeArray(1), 1.0, np.ones(1))


def test_a_package_whose_name_only_starts_with_cupy_is_not_cupy():
    other = type("Array", (), {"__module__": "cupyx_lookalike.core"})
    assert not backend.is_cupy(other()) and backend.is_cupy(FakeArray(1))


def test_to_device_and_to_numpy_move_arrays_and_copy_none_that_is_there_already(cupy):
    x = np.arange(3.0)
    assert backend.to_device(x, "cpu") is x and backend.to_numpy(x) is x
    moved = backend.to_device(x, "gpu")
    assert backend.is_cupy(moved)
    for back in (backend.to_numpy(moved), backend.to_device(moved, "cpu")):
        assert type(back) is np.ndarray and (back == x).all()


def test_without_cupy_the_gpu_raises_with_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="pip install .cupy-cuda13x"):
        backend.to_device(np.ones(1), "gpu")


@pytest.mark.parametrize("device", ["cuda", "GPU", "", None])
def test_another_device_raises(device):
    with pytest.raises(ValueError, match="must be 'cpu' or 'gpu'"):
        backend.to_device(np.ones(1), device)
