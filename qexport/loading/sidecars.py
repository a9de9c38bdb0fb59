"""The small files that travel with a model, byte for byte: tokenizer, chat template, generation config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qexport.errors import InputError
from qexport.tensors.contained_path import contained_path
from qexport.text.tokenizer_files import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    OLD_TEMPLATE,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG,
)

SIDECAR_NAMES: Final = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    CHAT_TEMPLATE,
    OLD_TEMPLATE,
    GENERATION_CONFIG,
)


def read_sidecars(folder: Path, *, trusted_root: Path | None = None) -> Mapping[str, bytes]:
    """The content of each such file that the folder has, by its name inside the folder.

    Raises:
        InputError: a file cannot be read, or a symbolic link leads out of `trusted_root` (the folder where None).
    """
    templates = contained_path(folder, TEMPLATES_FOLDER, root=trusted_root)
    extra = sorted(f"{TEMPLATES_FOLDER}/{path.name}" for path in templates.glob("*.jinja"))
    files: dict[str, bytes] = {}
    for name in (*SIDECAR_NAMES, *extra):
        path = contained_path(folder, name, root=trusted_root)
        if path.is_file():
            try:
                files[name] = path.read_bytes()
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return files
