"""A GGUF file of any maker as the folder of an artifact, for the time that it is verified."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from qexport.artifact.names import GGUF_NAME
from qexport.errors import InputError
from qexport.loading.gguf_checkpoint import files_in_header
from qexport.reading.folders import artifact_place
from qexport.tensors.gguf_file import GgufFile

_PREFIX: Final = "qexport-gguf-"


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """The path of a folder; for a GGUF file a temporary one, with a hard link to it, and with config.json and the
    tokenizer's files as transformers would make them from its header.

    Raises:
        InputError: it is neither a folder with a config.json nor a GGUF file, the header is malformed, or no folder
            beside the file or for temporary files can be made on the same disk.
        CompatibilityError: the architecture or the tokenizer is not supported.
    """
    if artifact_place(path).is_dir():
        yield path
        return
    with closing(GgufFile(path)) as file:
        files = files_in_header(file)
    with _linked(path.resolve()) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder


@contextmanager
def _linked(path: Path) -> Iterator[Path]:
    for place in (None, path.parent):
        try:
            folder = TemporaryDirectory(prefix=_PREFIX, dir=place)
        except OSError:
            continue
        with folder as name:
            try:
                os.link(path, Path(name) / GGUF_NAME)
            except OSError:
                continue
            yield Path(name)
            return
    raise InputError(
        "the file cannot be linked into a temporary folder, on the same disk or beside it",
        where=str(path),
        mend=f"set TMPDIR to a folder on its disk, or put it into one as {GGUF_NAME}, beside the model's config.json",
    )
