"""A pytest fixture for tests of CUDA kernels on machines without a GPU. In conftest.py:

    pytest_plugins = ["minilm.kernels.emulator.pytest_plugin"]

and in a test:

    def test_my_kernel(emulated_cupy):
        x = emulated_cupy.asarray(np.arange(300, dtype=np.float32))
        emulated_cupy.RawModule(code=CODE).get_function("mine")((3,), (128,), (x, np.int32(300)))
        assert x.get()[0] == ...

Every launch in the test runs under all checkers, and a mistake of the kernel raises minilm.kernels.emulator.Fault. For
a faster, unchecked run: `with emulator.fast():` around it.
"""

import pytest

from minilm.kernels import emulator


@pytest.fixture
def emulated_cupy():
    """The mock of CuPy, which `import cupy` finds during the test. It is skipped where the emulator cannot run."""
    if reason := emulator.available():
        pytest.skip(reason)
    with emulator.as_cupy() as cupy, emulator.checked():
        yield cupy
