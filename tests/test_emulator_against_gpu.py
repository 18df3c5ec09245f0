"""Every kernel on a GPU and on the emulator, from the same numbers: the same results to rounding."""
import importlib

import numpy as np
import pytest

from helpers import assert_close
from minilm.kernels import emulator

MODULES = ["attention", "decode", "log_probs", "sampling", "fused", "smear"]


def example(name, xp, dtype):
    """The results of the example of a module, as NumPy arrays."""
    module = importlib.import_module(f"minilm.kernels.{name}")
    return [a.get() for a in module.example(xp, np.random.default_rng(0), dtype=np.dtype(dtype))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", MODULES)
def test_a_gpu_and_the_emulator_agree(name, dtype, tolerance, request):
    if reason := emulator.available():
        pytest.skip(reason)
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install -e '.[gpu]'")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a GPU: {error}")
    on_gpu = example(name, cupy, dtype)
    with emulator.as_cupy() as stand_in:
        emulated = example(name, stand_in, dtype)
    for i, (a, b) in enumerate(zip(on_gpu, emulated, strict=True)):
        assert_close(a, b, tolerance, f"{name}, result {i}")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", MODULES)
def test_the_example_of_a_module_has_no_fault_and_the_same_results_fast_and_checked(name, dtype, emulated):
    with emulator.checked() as launches:
        checked = example(name, emulated, dtype)
    assert launches and all(np.isfinite(a).all() for a in checked)
    for a, b in zip(checked, example(name, emulated, dtype), strict=True):
        assert a.tobytes() == b.tobytes() and a.dtype in (dtype, np.int64, np.float64)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", MODULES)
def test_contracted_products_change_results_by_rounding_alone(name, dtype, tolerance, emulated):
    """Compilers for a GPU round a * b + c once."""
    with emulator.contracted():
        contracted = example(name, emulated, dtype)
    for i, (a, b) in enumerate(zip(contracted, example(name, emulated, dtype), strict=True)):
        assert_close(a, b, tolerance, f"{name}, result {i}")
