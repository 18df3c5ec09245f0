"""The mock of CuPy (kernels/emulator/arrays.py, cupy.py): as strict as CuPy, and with no names that CuPy lacks.

Names and arguments are compared with the real package if it is installed (`pip install cupy-cuda13x`; no GPU needed).
"""
import copy
import importlib.util
import inspect
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from minilm.backend import array_module, is_cupy, to_device, to_numpy
from minilm.kernels.bf16 import from_bf16
from minilm.kernels.emulator import arrays, cublas, stream
from minilm.kernels.emulator.cupy import FUNCTIONS, TYPES, as_cupy, cupy, ufunc

X = np.arange(6.0).reshape(2, 3)


def there(x=X):
    return cupy.asarray(x)


# Where it stands.

def test_import_finds_the_mock_inside_as_cupy_and_not_after_it(monkeypatch):
    for before in ({}, {"cupy": np}):
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        for name, module in before.items():
            monkeypatch.setitem(sys.modules, name, module)
        with as_cupy() as module:
            import cupy as imported
            assert imported is module is cupy
            with as_cupy():
                pass
            assert sys.modules["cupy"] is cupy
        assert sys.modules.get("cupy") is before.get("cupy")


def test_what_stood_in_its_place_is_there_again_even_after_an_error(monkeypatch):
    """The parts of a real package too."""
    before = {"cupy": np, "cupy.linalg": np.linalg}
    for name, module in before.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ZeroDivisionError), as_cupy():
        assert "cupy.linalg" not in sys.modules
        raise ZeroDivisionError
    assert {name: sys.modules.get(name) for name in before} == before
    as_cupy()                           # without `with` nothing changes
    assert sys.modules["cupy"] is np


def test_other_libraries_find_the_names_by_which_they_recognise_an_array():
    """As einops, array-api-compat, datasets and others do, whatever array they are given."""
    with as_cupy() as module:
        assert isinstance(there(), module.ndarray) and not isinstance(X, (module.ndarray, module.generic))
        assert importlib.util.find_spec("cupy").name == "cupy" and int(module.__version__.split(".")[0]) >= 13
        assert module.float32 is np.float32
        with pytest.raises(ImportError):
            import cupy.cuda  # noqa: F401
    assert "cupy.cuda" not in sys.modules


def test_einops_works_while_the_mock_is_in_force():
    einops = pytest.importorskip("einops", reason="einops is not installed")
    with as_cupy():
        assert einops.rearrange(X, "a b -> b a").shape == (3, 2)
        assert einops.rearrange(there(), "a b -> b a").get().tolist() == X.T.tolist()
    assert einops.rearrange(X, "a b -> b a").shape == (3, 2)


def test_minilm_recognises_its_arrays_as_cupys():
    with as_cupy():
        x = to_device(X, "gpu")
        assert is_cupy(x) and array_module(x, 2.0) is cupy
        assert type(to_numpy(x)) is np.ndarray and (to_numpy(x) == X).all()
    with pytest.raises(TypeError, match="mixed"):
        array_module(x, X)


def test_a_missing_name_raises_and_says_where_to_add_it():
    with pytest.raises(AttributeError, match=r"no cupy\.linalg.*add it to kernels/emulator/cupy\.py"):
        cupy.linalg                     # noqa: B018
    with pytest.raises(AttributeError, match=r"no cupy\.ndarray\.std.*add it to kernels/emulator/arrays\.py"):
        there().std                     # noqa: B018
    with pytest.raises(TypeError):
        there().sum(axis=0, where=there() > 1)
    with pytest.raises(TypeError):
        cupy.exp(there(), where=there() > 1)


# The border between host and device.

CROSSINGS = {
    "np.asarray": np.asarray, "np.array of a list": lambda x: np.array([x, x]), "np.exp": np.exp, "np.sum": np.sum,
    "np.shape": np.shape, "np.concatenate": lambda x: np.concatenate([X, x]),
    "np.where": lambda x: np.where(X > 1, x, X), "array + x": lambda x: X + x, "x + array": lambda x: x + X,
    "array @ x.T": lambda x: X @ x.T, "x @ array": lambda x: x @ X.T, "x < array": lambda x: x < X,
    "array == x": lambda x: X == x, "x == None": lambda x: x.__eq__(None), "x += array": lambda x: x.__iadd__(X),
    "array += x": lambda x: X.copy().__iadd__(x), "x * 0-d array": lambda x: x * np.array(2.0),
    "x[array]": lambda x: x[np.array([0])], "x[mask]": lambda x: x[X > 1],
    "x[0] = array": lambda x: x.__setitem__(0, X[0]), "array[...] = x": lambda x: X.copy().__setitem__(..., x),
    "array[x]": lambda x: X[x.astype("int64")], "float": float, "int": int, "math.sqrt": math.sqrt,
    "list for range": lambda x: range(x.sum().astype("int64")),
    "where of an array": lambda x: cupy.where(X > 1, x, 0), "where with an array": lambda x: cupy.where(x > 1, X, x),
    "maximum": lambda x: cupy.maximum(x, X),
    "matmul to an array": lambda x: cupy.matmul(x, x.T, out=np.empty((2, 2))),
    "copyto": lambda x: cupy.copyto(x, X, where=x > 1), "copyto where": lambda x: cupy.copyto(x, 0.0, where=X > 1),
    "einsum": lambda x: cupy.einsum("ij,ij->i", x, X),
    "take": lambda x: x.take(np.array([0]), axis=0), "concatenate": lambda x: cupy.concatenate([x, X]),
    "take_along_axis": lambda x: cupy.take_along_axis(x, np.zeros((2, 1), int), -1),
    "fill": lambda x: x.fill(x.sum().get()), "asarray of a list": lambda x: cupy.asarray([x, x]),
    "real": lambda x: setattr(x, "real", X), "copy": copy.copy, "deepcopy": copy.deepcopy,
    "two masks": lambda x: x[there(X[:, 0] > 1), there(X[0] > 1)], "object": lambda x: cupy.array([None]),
    "long double": lambda x: cupy.array(X, np.longdouble)}


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_an_implicit_conversion_raises(crossing):
    x = there()
    with pytest.raises(TypeError):
        CROSSINGS[crossing](x)
    assert (x.get() == X).all()


def test_the_truth_of_many_elements_raises():
    with pytest.raises(ValueError, match="ambiguous"):
        bool(there())
    assert bool(there().sum()) and not bool(there()[0, :1])


def test_numbers_convert_in_both_directions():
    x = there(np.float32([1, 2]))
    for number in (2, 2.0, True, np.float32(2), np.int64(2)):
        for product in (x * number, number * x):
            assert (product.get() == X[0, 1:] * number).all()
    assert (np.float64(3) - x).dtype == np.float64 and (3.0 - x).dtype == np.float32 and (1j * x).dtype == np.complex64
    assert float(x.sum()) == 3.0 == x.sum().item() and int(x[1]) == 2 and type(x.sum().item()) is float


def test_asarray_and_get_copy():
    mine = X.copy()
    x = there(mine)
    mine[0, 0] = 9
    back = x.get()
    back[0, 0] = 8
    assert x[0, 0].item() == 0 and cupy.asarray(x) is x and cupy.array(x) is not x
    y = cupy.array(x)
    y[0, 0] = 7
    assert x[0, 0].item() == 0


# Where CuPy is not NumPy.

def test_an_element_is_a_view_and_a_reduction_an_array():
    x = there()
    element, row = x[1, 2], [*x][0]
    assert element.shape == () and is_cupy(element)
    x[1, 2] = 50
    x[0] = 7
    assert element.item() == 50 and (row.get() == 7).all()
    for reduced in (x.sum(), x.mean(), x.max(), x.min(), x.any(), x.all(), x.argmax(), x[0] @ x[0], x.sum() * 2):
        assert is_cupy(reduced) and reduced.shape == ()


def test_unwritten_memory_is_marked():
    for made in (cupy.empty((2, 3)), cupy.empty(3, "float32"), cupy.empty_like(there()), cupy.empty(2, "complex64")):
        assert np.isnan(made.get()).all()
    assert np.isnan(from_bf16(cupy.empty(2, "uint16").get())).all()
    assert (cupy.empty(2, "int32").get() > 2 ** 30).all() and cupy.empty(2, bool).get().all()
    assert np.isnan(cupy.empty(()).get()) and cupy.empty((0, 3)).shape == (0, 3)


def test_two_values_for_one_place_raise():
    x, twice = cupy.zeros(3), cupy.asarray([1, 1])
    with pytest.raises(ValueError, match="undefined"):
        x[twice] = cupy.asarray([1.0, 2.0])
    with pytest.raises(ValueError, match="undefined"):
        cupy.put_along_axis(x, twice, cupy.asarray([1.0, 2.0]), axis=0)
    x[twice] = 5.0
    assert x.get().tolist() == [0, 5, 0]
    with pytest.raises(IndexError):
        x[cupy.asarray([3])]


def test_sorting_is_stable_and_another_kind_raises():
    ties = np.random.default_rng(0).integers(3, size=100)
    assert (cupy.argsort(there(ties)).get() == np.argsort(ties, kind="stable")).all()
    with pytest.raises(ValueError, match="stable"):
        cupy.argsort(there(ties), kind="quicksort")


def test_arithmetic_in_place_writes_into_the_same_memory():
    x = there()
    row, element = x[1], x[0, 0]
    row *= 2
    element += 5
    row[1:] -= 1
    x.real = x + 1
    assert (x.get() == [[6, 2, 3], [7, 8, 10]]).all()
    z = cupy.zeros(2, complex)
    z.real, z.imag = cupy.ones(2), 2.0
    assert (z.get() == 1 + 2j).all() and (z.conj().view("float64").get() == [1, -2, 1, -2]).all()
    with pytest.raises(ValueError, match="read-only"):
        cupy.broadcast_to(x[0], (2, 3)).fill(1)


COMPUTED = {
    "arange": lambda m, x: m.arange(3, 9, 2), "arange of one": lambda m, x: m.arange(4, dtype="float32"),
    "tri": lambda m, x: m.tri(3, 4, -1, bool), "zeros": lambda m, x: m.zeros((2, 1), np.float32),
    "ones": lambda m, x: m.ones(3), "zeros_like": lambda m, x: m.zeros_like(x),
    "ones_like": lambda m, x: m.ones_like(x), "T": lambda m, x: x.T,
    "ascontiguousarray": lambda m, x: m.ascontiguousarray(x.T), "logaddexp": lambda m, x: m.logaddexp(-x, 0),
    "minimum": lambda m, x: m.minimum(x, 2.5), "clip": lambda m, x: m.clip(x, 1, 3),
    "clip by name": lambda m, x: x.clip(max=2), "where": lambda m, x: m.where(x > 2, x, -m.inf),
    "isfinite": lambda m, x: m.isfinite(x / 0), "abs": lambda m, x: m.abs(-x),
    "matmul": lambda m, x: m.matmul(x, x.T), "einsum": lambda m, x: m.einsum("...v,...v->...", x, x),
    "concatenate": lambda m, x: m.concatenate((x, x), axis=1), "expand_dims": lambda m, x: m.expand_dims(x, -1),
    "broadcast_to": lambda m, x: m.broadcast_to(x, (4, 2, 3)),
    "partition": lambda m, x: m.partition(-x, -2, axis=-1)[:, -2],
    "take_along_axis": lambda m, x: m.take_along_axis(x, m.argsort(-x, axis=-1), axis=-1),
    "squeeze": lambda m, x: x[:1].squeeze(0),
    "cumsum": lambda m, x: x.cumsum(axis=-1, dtype="float64"), "sum": lambda m, x: x.sum(axis=(0, 1), keepdims=True),
    "max": lambda m, x: x.max(axis=-1), "argmax": lambda m, x: x.argmax(axis=1), "mean": lambda m, x: x.mean(axis=0),
    "any": lambda m, x: (x > 4).any(axis=1), "all": lambda m, x: (x > 2).all(axis=1),
    "power": lambda m, x: 2 ** x + x ** -1.0, "invert": lambda m, x: ~(x > 2) & (x > 0) | (x == 5),
    "take": lambda m, x: x.take(m.arange(2), axis=1), "transpose": lambda m, x: x[None].transpose((2, 0, 1)),
    "reversed": lambda m, x: x[:, ::-1].reshape(3, -1), "none": lambda m, x: x.transpose(None),
    "mask": lambda m, x: x[x > 2], "rows": lambda m, x: x[:, [0, 2, 2]],
    "pairs": lambda m, x: x[m.arange(2), m.asarray([2, 0])], "swapaxes": lambda m, x: x.swapaxes(0, 1).copy(),
    "astype": lambda m, x: x.astype(np.float32), "tanh": lambda m, x: m.tanh(x) + m.sin(x) * m.cos(x)}


@pytest.mark.parametrize("name", COMPUTED)
def test_its_functions_equal_numpys(name):
    with np.errstate(divide="ignore", invalid="ignore"):
        actual, expected = COMPUTED[name](cupy, there()), np.asarray(COMPUTED[name](np, X))
    assert is_cupy(actual) and actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_allclose(actual.get(), expected, rtol=1e-15)


# The real package.

PROBE = """
import inspect, json, cupy
def described(thing):
    try:
        return str(inspect.signature(thing))
    except (TypeError, ValueError):
        return next(iter((getattr(thing, "__doc__", None) or "").strip().splitlines()), "")
found = {}
owners = [(cupy, ""), (cupy.ndarray, "ndarray."), (cupy.RawModule, "RawModule."), (cupy.cuda.Event, "cuda.Event."),
          (cupy.cuda.Device, "cuda.Device."), (cupy.cuda.device, "cuda.device.")]
try:                                # it loads the library of that name
    owners.append((cupy.cuda.cublas, "cuda.cublas."))
except ImportError:
    pass
for owner, prefix in owners:
    found.update({prefix + name: described(getattr(owner, name)) for name in dir(owner)})
found["cuda.alloc_pinned_memory"] = described(cupy.cuda.alloc_pinned_memory)
found["__index__"] = hasattr(cupy.ndarray, "__index__")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def real():
    """{name: signature} of the real CuPy, from another process."""
    return found_by(PROBE)


def found_by(probe):
    """The JSON that a program prints about the real CuPy. Skips without CuPy; it needs no GPU."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed (pip install cupy-cuda13x; its names can be listed without a GPU)")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BY_PLACE, EITHER_WAY, ANY_NUMBER, BY_NAME, ANY_NAME = inspect._ParameterKind


def parameters(text):
    """(name, kind) of each argument of "f(self, int a, b=1, /, out=None, *, tuple c=(), **rest) -> type"."""
    inside = text[text.index("("):].replace("\\", "")
    inside = inside[1:inside.rindex(")")]
    words = re.sub(r"\([^()]*\)", "", inside).split(",")
    names, kind = [], EITHER_WAY
    for word in map(str.strip, words):
        if word == "/":
            names = [(name, BY_PLACE) for name, _ in names]
        elif word == "*":
            kind = BY_NAME
        elif word.startswith("**"):
            names.append((word[2:], ANY_NAME))
        elif word.startswith("*"):
            names.append((word[1:], ANY_NUMBER))
            kind = BY_NAME
        elif word:
            names.append((word.split("=")[0].split(":")[0].split()[-1], kind))
    return [(name, kind) for name, kind in names if name != "self"]


def misfit(ours, theirs):
    """Why a call of our function may be no call of theirs; None if every call is."""
    named = {name for name, kind in theirs if kind in (EITHER_WAY, BY_NAME)}
    places = [name for name, kind in theirs if kind in (BY_PLACE, EITHER_WAY)]
    if any(kind == ANY_NUMBER for _, kind in theirs):
        places += [name for name, kind in ours if kind == BY_PLACE]
    elif any(kind == ANY_NUMBER for _, kind in ours):
        return "no number of arguments"
    for i, (name, kind) in enumerate(ours):
        if kind in (BY_PLACE, EITHER_WAY) and i >= len(places):
            return f"{name} has no place"
        if kind == EITHER_WAY and places[i] != name:
            return f"{name} is called {places[i]}"
        if kind in (EITHER_WAY, BY_NAME) and name not in named:
            return f"no {name} by name"
    return None


def signature(function):
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_the_comparison_of_signatures_finds_each_difference():
    theirs = parameters("A.sum(self, Py_ssize_t axis=None, tuple dtype=(), /, out=None, \\*, keepdims=False) -> A")
    assert [name for name, _ in theirs] == ["axis", "dtype", "out", "keepdims"]
    assert misfit(signature(lambda a, b, /, out=None, *, keepdims: 0), theirs) is None
    for ours, why in ((lambda a, b, /, c: 0, "c is called out"), (lambda a, b, /, out, d: 0, "d has no place"),
                      (lambda axis: 0, "no axis by name"), (lambda *, where: 0, "no where by name"),
                      (lambda *a: 0, "no number of arguments")):
        assert misfit(signature(ours), theirs) == why


def test_cupy_has_every_function_with_these_arguments(real):
    for name, function in FUNCTIONS.items():
        assert name in real, f"CuPy has no {name}"
        if isinstance(function, ufunc):
            theirs = parameters(real[name])
            assert [kind for _, kind in theirs].count(BY_PLACE) == function.function.nin, name
            assert "out" in dict(theirs), name
        elif inspect.isfunction(function):
            assert (why := misfit(signature(function), parameters(real[name]))) is None, f"{name}: {why}"
    assert TYPES.keys() <= real.keys()
    assert parameters(real["RawModule.get_function"]) == [("name", EITHER_WAY)]
    assert misfit([("code", BY_NAME), ("options", BY_NAME)], parameters(real["RawModule"])) is None


def test_cupys_array_has_every_method_with_these_arguments(real):
    own = {"__minilm_buffer__", "__getattr__", "__init__", "__slots__", "__reduce_ex__"}
    for name, method in vars(arrays.ndarray).items():
        if name in own or name.startswith("_") and not name.startswith("__"):
            continue
        assert f"ndarray.{name}" in real, f"CuPy's array has no {name}"
        if inspect.isfunction(method) and not name.startswith("__"):
            assert (why := misfit(signature(method), parameters(real[f"ndarray.{name}"]))) is None, f"{name}: {why}"
    assert real["__index__"] is False is hasattr(arrays.ndarray, "__index__")


def test_cupys_cuda_has_every_name_with_these_arguments(real):
    """Those of cublas where its library is installed."""
    assert misfit(signature(stream.alloc_pinned_memory), parameters(real["cuda.alloc_pinned_memory"])) is None
    for owner, prefix in ((stream.Event, "cuda.Event."), (stream.Device, "cuda.Device."),
                          (cublas.device, "cuda.device."), (cublas.cublas, "cuda.cublas.")):
        for name, thing in vars(owner).items():
            if not name.startswith("_") and any(known.startswith(prefix) for known in real):
                assert prefix + name in real, f"CuPy has no {prefix}{name}"
                if inspect.isfunction(thing) and "(" in real[prefix + name]:
                    why = misfit(signature(thing), parameters(real[prefix + name]))
                    assert why is None, f"{prefix}{name}: {why}"
