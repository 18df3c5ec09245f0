"""The wheel and the source archive: complete, and enough without the checkout.

.ci/run installs the wheel in an environment of its own, and runs tests there; .ci/versions does so with other versions
of Python and with the oldest dependencies.
"""
import ast
import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minilm
from readme import modules

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys, setuptools.build_meta as b; dist = sys.argv[1]; b.build_sdist(dist); b.build_wheel(dist)"


@pytest.fixture(scope="module")
def committed():
    """The paths of the files of the checkout that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("what belongs to a checkout is known to git alone")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def dist(committed, tmp_path_factory):
    """A folder with the wheel and the source archive, built from a copy of the committed files."""
    pytest.importorskip("setuptools", minversion="70.1", reason="needs setuptools: pip install -e '.[test]'")
    copy = tmp_path_factory.mktemp("checkout")
    for name in committed:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist, committed):
    package = {name if name.startswith("minilm/") else f"minilm/{name.removeprefix('tests/')}" for name in committed
               if name.startswith(("minilm/", "kernels/", "tests/golden/")) and not name.endswith(".md")}
    wheel, = dist.glob("*.whl")
    assert wheel.name == f"minilm-{minilm.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package
    assert {Path(name).suffix for name in package} == {".py", ".cu", ".cuh", ".h", ".cpp", ".gdb", ".npz", ".json"}


def test_the_source_archive_is_a_whole_checkout(dist, committed):
    archive, = dist.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    files = {name for name in names if name and not any(other.startswith(f"{name}/") for other in names)}
    made = {"PKG-INFO"} | {name for name in files if name.startswith("minilm.egg-info/")}
    assert files - made == committed


def test_the_wheel_alone_runs_the_stages_code_and_a_kernel_in_an_empty_folder(dist, tmp_path):
    site = tmp_path / "site"
    empty = tmp_path / "empty"
    empty.mkdir()
    wheel, = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    names = [name for name in modules() if not name.endswith("__main__")]
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [{str(site)!r}] + [path for path in sys.path if path != {str(ROOT)!r}]
import {', '.join(f'minilm.{name}'.rstrip('.') for name in names)}
assert all(module.__file__.startswith({str(site)!r}) for name, module in sys.modules.items()
           if name.partition(".")[0] == "minilm")
from minilm.kernels import emulator, launch
assert "__global__" in launch.source("attention")
from minilm import check
assert check.main(["--list"]) == 0 and str(check.folder()).startswith({str(site)!r})
if not emulator.available():
    from minilm.kernels.emulator import __main__
    __main__.main(["log_probs", "--N", "3", "--V", "40"])
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


def test_the_packages_of_setup_cfg_are_the_folders_with_python_files_and_the_golden_vectors():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", "utf-8")
    folders = {path.parent for path in modules().values()}
    packages = {".".join(("minilm", *folder.relative_to(ROOT).parts)).replace("minilm.minilm", "minilm")
                for folder in folders}
    assert set(settings["options"]["packages"].split()) == packages | {"minilm.golden"}


def test_no_file_is_read_or_written_in_the_encoding_of_the_machine():
    """Windows reads text as cp1252 unless it is told. open(.., "rb") and os.open need no encoding."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                given = " ".join(map(ast.unparse, [*node.args, *node.keywords]))
                if name in ("read_text", "write_text") and ast.unparse(node.func) != "checkpoint.write_text":
                    assert "'utf-8'" in given, f"{path}, line {node.lineno}"
                if name == "open":
                    assert "b'" in given or "'utf-8'" in given or "os.O_" in given, f"{path}, line {node.lineno}"
