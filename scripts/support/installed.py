"""Imported before NumPy and minilm: one line instead of a traceback where they are not installed."""

import importlib.util
import sys


def check(*modules: str) -> None:
    """Ends the program with exit status 2 if a module cannot be found."""
    missing = [name for name in modules if not _found(name)]
    if missing:
        print(f"error: {sys.executable} has no {' and no '.join(missing)}. In the folder of the README: "
              "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[run]'", file=sys.stderr)
        sys.exit(2)


def _found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:         # the package of a module
        return False
