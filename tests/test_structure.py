"""The picture of the house, read from the imports: floors, no circles, little code, nothing unpickled."""
import ast
import functools
import graphlib
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: what a reader reads to learn the mathematics, and what each may stand on.
ARRAYS = {"backend", "tensor", "ops"}
FLOORS = {
    "backend": set(),
    "fast": set(),
    "tensor": {"backend"},
    "ops": {"backend", "tensor"},
    "layers": ARRAYS | {"kernels"},
    "plain": ARRAYS,
    "toy": {"plain", "tensor", "model"},
    "gradcheck": ARRAYS,
    "packing": ARRAYS | {"layers"},
    "model": ARRAYS | {"layers", "packing"},
    "generate": ARRAYS | {"layers", "model", "fast", "kernels"},
    "optim": ARRAYS | {"fast", "kernels"},
    "objectives": ARRAYS | {"objectives"},
    "exact": ARRAYS | {"layers", "optim", "data", "exact"},
    "world": ARRAYS | {"data", "world"},
    "stages": ARRAYS | {"layers", "model", "generate", "optim", "objectives", "data", "packing", "fast",
                        "stages"},
}
TEACHING = set(FLOORS) - {"plain", "toy", "world", "exact", "fast"}
SHARED_BY_SCRIPTS = {"support", "common", "worlds", "gpu_measuring", "hf_llama", "measuring", "torch_llama", "trl_trainers"}


@functools.cache
def modules():
    """The file of every module of minilm, by its dotted name without "minilm."; "" is the package itself."""
    found = {}
    for package, folder in (((), ROOT / "minilm"), (("kernels",), ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = package + path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), path.name)


def imports(path, at_import_time_only=False):
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    stack, found = [tree(path)], set()
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if not (at_import_time_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            stack += ast.iter_child_nodes(node)
    return found


def own_imports(path):
    """The modules of minilm that a file imports, as modules() names them."""
    found = set()
    for name in imports(path):
        if name.partition(".")[0] == "minilm":
            name = name.removeprefix("minilm").removeprefix(".")
            while name not in modules():
                name = name.rpartition(".")[0]
            found.add(name)
    return found


def top(name):
    return name.partition(".")[0]


def of(*names):
    """The files of modules or packages."""
    return [path for name, path in modules().items() if top(name) in names]


def others(folder):
    return sorted((ROOT / folder).rglob("*.py"))


# Floors.

@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_stands_only_on_those_below_it(name):
    assert of(name), f"{name} is gone; take it out of FLOORS"
    for path in of(name):
        assert {top(other) for other in own_imports(path)} <= FLOORS[name], path


def test_imports_run_in_no_circle():
    graphlib.TopologicalSorter({name: own_imports(path) for name, path in modules().items()}).prepare()


def test_kernels_are_reached_from_layers_generate_and_optim_alone():
    for name, path in modules().items():
        if top(name) not in {"kernels", "layers", "generate", "optim"}:
            assert "kernels" not in map(top, own_imports(path)), path


def test_nobody_imports_a_package_called_kernels():
    for path in (*modules().values(), *others("scripts"), *others("tests")):
        assert "kernels" not in map(top, imports(path)), f"{path}: import minilm.kernels"


def test_the_library_imports_neither_scripts_nor_tests():
    outside = {"scripts", "tests"} | {path.stem for path in (*others("scripts"), *others("tests"))}
    for path in modules().values():
        assert not outside & set(map(top, imports(path))), path


def test_scripts_import_only_what_they_share_never_each_other_and_no_tests():
    refused = {path.stem for path in others("scripts")} - SHARED_BY_SCRIPTS | {"scripts", "tests"}
    for path in others("scripts"):
        assert not refused & set(map(top, imports(path))), path


# Dependencies.

def test_the_core_needs_numpy_alone():
    for path in of(*FLOORS):
        outside = set(map(top, imports(path, at_import_time_only=True))) - sys.stdlib_module_names - {"minilm"}
        assert outside <= {"numpy"}, path


def test_cupy_is_never_imported_before_somebody_asks_for_the_gpu():
    for path in modules().values():
        assert "cupy" not in map(top, imports(path, at_import_time_only=True)), path


def test_nothing_is_unpickled_evaluated_or_run_in_a_shell():
    for path in (*modules().values(), *others("scripts")):
        assert not {"pickle", "dill", "marshal", "shelve"} & set(map(top, imports(path))), path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("eval", "exec", "os.system", "os.popen"), f"{path}, line {node.lineno}: {call}"
                unsafe = {"allow_pickle", "shell"} & {word.arg for word in node.keywords
                                                      if ast.unparse(word.value) != "False"}
                assert not unsafe, f"{path}, line {node.lineno}: {call} with {unsafe}"


# Size.

def test_a_file_stays_under_300_lines_that_are_not_blank():
    long = {path.name: n for path in (*modules().values(), *others("scripts"))
            if (n := sum(bool(line.strip()) for line in path.read_text().splitlines())) >= 305}
    assert not long, f"these hold more than one idea: {long}"


def lines_of_code(path):
    """Lines that hold more than white space, a comment or a docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as file:
        code = {line for token in tokenize.tokenize(file.readline) if token.type not in layout | {tokenize.ENCODING}
                for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_code_is_counted_without_blank_lines_comments_and_docstrings(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text('"""Two\nlines."""\n\nx = 1  # a comment\n# another\n'
                    'def f():\n    """One."""\n    return """two\n    more"""\n')
    assert lines_of_code(path) == 4


def test_what_a_reader_reads_stays_under_2000_lines_of_code():
    assert sum(map(lines_of_code, of(*TEACHING))) < 2000
