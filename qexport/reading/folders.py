"""Which folders can be a finished artifact. Without torch, for quick errors."""

from __future__ import annotations

from pathlib import Path

from qexport.errors import InputError


def model_folder(path: Path) -> Path:
    """The path, checked to be a folder with a config.json.

    Raises:
        InputError: it does not exist, or is no such folder; the error names the layouts below it, if there are any.
    """
    if not path.exists():
        mend = "name the folder of an artifact, or a GGUF file"
        raise InputError("there is no such file or folder", where=str(path), mend=mend)
    if not (path / "config.json").is_file():
        layouts = sorted(str(found.parent) for found in path.glob("*/config.json"))
        mend = f"load one of its layouts: {', '.join(layouts)}" if layouts else "name the folder of an artifact"
        raise InputError("the folder holds no config.json", where=str(path), mend=mend)
    return path


def artifact_place(path: Path) -> Path:
    """The path, checked to be a folder with a config.json, or a GGUF file.

    Raises:
        InputError: it is neither.
    """
    return path if path.suffix == ".gguf" and path.is_file() else model_folder(path)
