"""The structure of the code, read from its files: imports point downwards, small files and functions, no pickle."""
import ast
import fnmatch
import functools
import graphlib
import subprocess
import sys
import tokenize
from pathlib import Path

import readme
from readme import imported, modules

ROOT = Path(__file__).resolve().parents[1]

# The whole import picture. A node imports only from lines above its own, and stands in the first line where it can.
# The diagram in tests/README.md is this table (scripts/dev/readme.py).
LEVELS = """
    backend  fast.malloc  in_place  modes  numpy_functions  ranks
    checks  fast.deferred  fast.few_rows  fast.tiled_attention  fast.workers  readback  tensor
    checkpoint  config  diverged  einsum  fast.activation_checkpointing  fast.chunked_log_probs  fast.flat_parameters  kernels  parallel  tokenizer
    data  optim  segment_sum
    ops
    activations  gradcheck  objectives  plain  rotary  world
    check  fast.packed_attention  layers
    exact  mixed_precision  packing  padded_attention
    evaluate  model
    fast.cached_decoding  lora  model_file  toy
    generate  pretrained
    exercises  stages  stream
"""  # noqa: E501 (one line is one level)
# The files of the mathematics. All but exact, which trains models too, stand without the fast path.
READER = ("plain", "tensor", "ops", "gradcheck", "objectives", "exact")
# Folders of scripts that scripts import from, and the helpers that lie beside the benchmarks.
SHARED_BY_SCRIPTS = {"support", "common", "worlds", "benchmark", "decoding", "golden_files", "golden_inputs",
                     "gpu_measuring", "gpu_process", "hf_llama", "library_process", "llama_cpp", "measuring",
                     "mutants_table", "mutants_tests", "objective_steps", "torch_llama", "trl_trainers"}
FUNCTION_LINES = 40             # without its docstring
TUPLE_ASSIGNMENTS = 0.05


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


def top(name):
    return name.partition(".")[0]


def of(*names):
    """The files of modules or packages."""
    return [path for name, path in modules().items() if top(name) in names]


def others(folder):
    return sorted((ROOT / folder).rglob("*.py"))


# Imports.

def test_every_import_points_downwards_as_in_the_picture():
    assert readme.levels_diagram().split("\n") == LEVELS.strip("\n").split("\n")


def test_imports_run_in_no_circle():
    graphlib.TopologicalSorter({name: imported(path) for name, path in modules().items()}).prepare()


def test_the_mathematics_can_be_read_without_the_fast_path():
    """plain and what it needs import no file of fast/ but the gradients that tensor stores (deferred)."""
    for path in of("plain", "tensor", "ops", "gradcheck", "objectives"):
        assert {name for name in imported(path) if top(name) == "fast"} <= {"fast.deferred"}, path


def test_kernels_are_imported_where_arrays_are_on_a_gpu_and_never_at_import_time():
    for name, path in modules().items():
        if top(name) != "kernels":
            early = imports(path, at_import_time_only=True)
            assert not [other for other in early if other.startswith("minilm.kernels")], path


def test_a_bare_clone_can_be_imported(tmp_path):
    """Without an installation, which would map minilm.kernels: copied files and python -c."""
    for path in (ROOT / "minilm").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    code = ("import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
            "import minilm.layers, minilm.generate, minilm.plain, minilm.stages.rlhf, minilm.stages.dpo\n"
            "print(minilm.__file__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "minilm" / "__init__.py")), done.stderr


def test_nobody_imports_a_package_called_kernels():
    for path in (*modules().values(), *others("scripts"), *others("tests")):
        assert "kernels" not in map(top, imports(path)), f"{path}: import minilm.kernels"


def test_the_library_imports_neither_scripts_nor_tests():
    outside = {"scripts", "tests"} | {path.stem for path in (*others("scripts"), *others("tests"))}
    for path in modules().values():
        assert not outside & set(map(top, imports(path))), path


def test_scripts_import_only_shared_helpers_never_each_other_and_no_tests():
    forbidden = {path.stem for path in others("scripts")} - SHARED_BY_SCRIPTS | {"scripts", "tests"}
    for path in others("scripts"):
        assert not forbidden & set(map(top, imports(path))), path


def test_each_speed_trick_says_where_its_gain_is_measured():
    for name, path in modules().items():
        if top(name) == "fast":
            assert "scripts/bench/tricks.py" in ast.get_docstring(tree(path)), path


# Dependencies.

def test_the_core_needs_numpy_alone():
    for path in (path for name, path in modules().items() if top(name) not in ("checkpoint", "kernels")):
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
            if (n := sum(bool(line.strip()) for line in path.read_text().splitlines())) >= 300}
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


def test_the_mathematics_stays_under_1350_lines_of_code():
    assert sum(map(lines_of_code, of(*READER))) < 1350


def test_minilm_without_its_world_and_plain_stays_under_4700_lines_of_code():
    """Ranks, real models (with adapters) and check are capabilities of their own, with a limit each; so are functions
    that no model of ours needs. The exercises are texts for learners (test_an_exercise_fits_one_screen)."""
    capabilities = {("ranks", "parallel"): 450, ("lora", "pretrained", "stream"): 1200, ("check",): 200,
                    ("activations", "einsum"): 80}
    for names, most in capabilities.items():
        assert sum(map(lines_of_code, of(*names))) < most, names
    apart = ("world", "plain", "toy", "kernels", "exercises", *(name for names in capabilities for name in names))
    assert sum(lines_of_code(path) for name, path in modules().items() if top(name) not in apart) < 4700


def test_plain_stays_under_210_lines_of_code():
    assert sum(map(lines_of_code, of("plain"))) < 210


def test_an_exercise_fits_one_screen_and_the_grader_stays_under_850_lines_of_code():
    """A task is a text with its grading, so their number has no limit, but the length of each has one. It includes the
    mistakes of its sibling tasks. Questions have about 20 lines each. The grader runs all of them, and does not grow
    with them. Its limit includes the messages for a learner: what the numbers have in common, which task was
    meant, the lines to try a case."""
    files = {name: path for name, path in modules().items() if top(name) == "exercises"}
    tasks = {name: lines_of_code(path) for name, path in files.items() if name.startswith("exercises.tasks.")}
    assert max(tasks.values()) <= 70, tasks
    questions = {name: lines_of_code(path) for name, path in files.items() if name.startswith("exercises.questions.")}
    assert sum(questions.values()) < 450, questions
    assert sum(lines_of_code(path) for name, path in files.items() if name not in {*tasks, *questions}) < 850


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def test_a_function_has_at_most_40_lines_without_its_docstring():
    def length(function):
        doc = ast.get_docstring(function, clean=False)
        return function.end_lineno - function.lineno + 1 - (len(doc.splitlines()) if doc else 0)
    long = {f"{path.relative_to(ROOT)}, {f.name}": length(f) for path in modules().values() for f in functions(path)
            if length(f) > FUNCTION_LINES and "kernels" not in path.parts}
    assert not long, f"these do more than one thing: {long}"


def test_few_assignments_pack_several_values_into_one_line():
    """`a, b = f(x), g(y)` saves a line and costs a reading."""
    assignments = [node for name, path in modules().items() if top(name) != "kernels" for node in ast.walk(tree(path))
                   if isinstance(node, ast.Assign)]
    packed = [node for node in assignments
              if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)]
    assert len(packed) <= TUPLE_ASSIGNMENTS * len(assignments), f"{len(packed)} of {len(assignments)}"


def test_public_functions_of_the_library_have_annotations():
    """A primitive's arguments may be Tensors or arrays, its result is a Tensor: primitive says so."""
    def is_primitive(f):
        return any(isinstance(d, ast.Name) and d.id == "primitive" for d in f.decorator_list)

    missing = [f"{path.relative_to(ROOT)}, {f.name}" for name, path in modules().items() if top(name) != "kernels"
               for f in tree(path).body if isinstance(f, ast.FunctionDef)
               and not f.name.startswith("_") and not is_primitive(f) and f.returns is None]
    assert not missing, missing


# Array code: an argument without an annotation is an array of either device, and the docstring has its shape. The
# arguments of tensor and ops are those of NumPy; plain and toy have a table of symbols; workers passes on any object.
# The specification of an exercise has the shapes.
ARRAY_CODE = ("plain.*", "toy.*", "ops.*", "tensor.*", "layers.*", "rotary.*", "objectives.*", "kernels.*",
              "fast.workers.*", "fast.cached_decoding.*", "fast.chunked_log_probs.*", "fast.deferred.*",
              "fast.packed_attention.*", "fast.tiled_attention.*", "padded_attention.*", "exercises.tasks.*")
# Models are below exact and evaluate in the picture of imports, so these take any object with their methods.
MODELS = {"model", "policy", "reference", "reward_model"}


def test_arguments_of_public_functions_and_methods_have_annotations_outside_array_code():
    missing = []
    for name, path in modules().items():
        owners = [tree(path), *(node for node in tree(path).body if isinstance(node, ast.ClassDef))]
        for f in (f for owner in owners for f in owner.body if isinstance(f, ast.FunctionDef)):
            exempt = any(fnmatch.fnmatch(f"{name}.{f.name}", pattern) for pattern in ARRAY_CODE)
            primitive = any(ast.unparse(decorator) == "primitive" for decorator in f.decorator_list)
            if not exempt and not primitive and (f.name == "__init__" or not f.name.startswith("_")):
                missing += [f"{name}.{f.name}: {x.arg}" for x in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)
                            if x.annotation is None and x.arg not in {"self", "cls"} | MODELS]
    assert not missing, missing
