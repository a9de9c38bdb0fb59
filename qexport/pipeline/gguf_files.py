"""A GGUF file of any maker as the folder of an artifact, for the time that it is verified."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from qexport.artifact.names import gguf_names
from qexport.errors import InputError
from qexport.loading.gguf_checkpoint import files_in_header
from qexport.reading.folders import artifact_place
from qexport.tensors.gguf_parts import open_gguf

_PREFIX: Final = "qexport-gguf-"


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """The path of a folder; for a GGUF file, of several the first, a temporary one with hard links to them, and with
    config.json and the tokenizer's files as transformers would make them from the header.

    Raises:
        InputError: it is neither a folder with a config.json nor a GGUF file, the header is malformed, or no folder
            beside the file or for temporary files can be made on the same disk.
        CompatibilityError: the architecture or the tokenizer is not supported.
    """
    if artifact_place(path).is_dir():
        yield path
        return
    with closing(open_gguf(path)) as file:
        files = files_in_header(file)
    with _linked([each.resolve() for each in file.paths]) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder


@contextmanager
def _linked(paths: Sequence[Path]) -> Iterator[Path]:
    names = gguf_names(len(paths))
    for place in (None, paths[0].parent):
        try:
            folder = TemporaryDirectory(prefix=_PREFIX, dir=place)
        except OSError:
            continue
        with folder as name:
            try:
                for path, own in zip(paths, names, strict=True):
                    os.link(path, Path(name) / own)
            except OSError:
                continue
            yield Path(name)
            return
    raise InputError(
        "the file cannot be linked into a temporary folder, on the same disk or beside it",
        where=str(paths[0]),
        mend=f"set TMPDIR to a folder on its disk, or put it into one as {names[0]}, beside the model's config.json",
    )
