"""What is slow to make and the same in every session of tests: made once, and kept on disk for all that come later.

A hit hides no change: entries lie in a folder named by a digest of every file of `qexport/`, of the modules that tests
share, of the versions of what both call, and of the kind of CPU.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".cache" / "tests"
PACKAGES = (
    "bitsandbytes", "gguf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "safetensors", "tokenizers",
    "torch", "transformers",
)  # fmt: skip
DAY = 24 * 3600


def sources(root: Path) -> list[Path]:
    """Every file that an entry may depend on."""
    package = [path for path in (root / "qexport").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    shared = [path for path in (root / "tests").glob("*.py") if not path.name.startswith("test_")]
    return sorted(package + shared)


def digest(root: Path = ROOT) -> str:
    """Another one for other sources, versions or kinds of CPU."""
    found = hashlib.sha256()
    for path in sources(root):
        found.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    machine = [sys.version, platform.machine(), torch.backends.cpu.get_cpu_capability()]
    found.update("\n".join(versions + machine).encode())
    return found.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # the environment of tests/tasks has no ONNX
        return "not installed"


@cache
def start() -> str:
    """The digest of what this process is about to import; entries that nobody has used for a day are removed."""
    own = digest()
    (FOLDER / own).mkdir(parents=True, exist_ok=True)
    os.utime(FOLDER / own)
    for folder in FOLDER.iterdir():
        if folder.name != own and folder.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(folder, ignore_errors=True)
    return own


def kept(key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, which is called only where no process has called it for these sources."""
    own = start()
    path = FOLDER / own / hashlib.sha256(key.encode()).hexdigest()
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path.read_bytes()
        content = make()
        if digest() == own:  # somebody may edit a file while the tests run
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        return content
