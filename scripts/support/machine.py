"""The machine and the versions that a number was measured with, in one line."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path


def machine(*packages: str) -> str:
    """Cores, processor, Python, NumPy, and those of the packages that are installed."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", *packages) if installed(name)]
    return f"{os.cpu_count()} cores, {processor()}, Python {platform.python_version()}, {', '.join(versions)}"


def processor() -> str:
    """The name of the processor, as well as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
