"""Hypothesis chooses shapes, masks, paddings and seeds; a failure prints what replays it.

Scripts and helpers.py are plain files: their folders go to the end of the path once, here.
"""
import os
import signal
import sys
from pathlib import Path

# Before NumPy is imported: in products as small as these a second BLAS thread costs more than it brings
# (ten times as long, on a machine with something else to do).
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent / "scripts"
sys.path += map(str, (HERE, SCRIPTS, *(SCRIPTS / folder for folder in ("bench", "dev", "lecture"))))

# These read the sources of a checkout. Beside an installed package, tests/ and scripts/ are there without the sources.
READ_A_CHECKOUT = [f"test_{name}.py" for name in ("english", "mutants", "packaging", "readme", "structure")]
collect_ignore = [] if (HERE.parent / "minilm").is_dir() else READ_A_CHECKOUT

# Ctrl-C is heard here and in what tests start, even where a shell's `&` started pytest with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Few examples of many kinds: the whole suite stays far below five minutes on two cores. Others in every run, on a
# CI too, where hypothesis would draw the same ones until some line of the sources changes.
settings.register_profile("minilm", deadline=None, max_examples=12, print_blob=True, derandomize=False)
settings.load_profile("minilm")


def pytest_report_header():
    import minilm
    left_out = f"; left out, because there is no checkout here: {', '.join(collect_ignore)}" if collect_ignore else ""
    return f"minilm: {Path(minilm.__file__).parent}{left_out}"


@pytest.fixture
def emulated():
    """The stand-in for CuPy, on which the kernels run on any machine with g++."""
    from minilm.kernels import emulator
    if reason := emulator.available():
        pytest.skip(reason)
    with emulator.as_cupy() as cupy:
        yield cupy


@pytest.fixture(params=["emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """CuPy, with which arrays on a device are made: its stand-in, and the real one."""
    return request.getfixturevalue("emulated" if request.param == "emulated" else "real_cupy")


@pytest.fixture
def real_cupy():
    """The real CuPy, on a GPU."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install -e '.[gpu]'")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a GPU: {error}")
    return cupy


@pytest.fixture
def rng():
    """For what does not depend on the numbers; where it might, hypothesis chooses the seed (helpers.rngs)."""
    return np.random.default_rng(0)
