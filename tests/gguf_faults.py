"""Faults in the GGUF file of a copy of a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qexport.artifact.names import GGUF_NAME
from qexport.tensors.gguf_file import GgufFile

Rows = NDArray[np.uint8]
Change = Callable[[Path], None]

Q4_0_BYTES: Final = 18


def copied(folder: Path, copy: Path, change: Change) -> Path:
    """A copy of a folder with a change of its file."""
    shutil.copytree(folder, copy)
    change(copy / GGUF_NAME)
    return copy


def rows_of(path: Path, name: str, change: Callable[[Rows], Rows]) -> None:
    """Changes the stored bytes of a tensor, uint8 [rows, row_bytes]."""
    with closing(GgufFile(path)) as file:
        tensor = file.tensors[name]
        changed = np.ascontiguousarray(change(file.read_rows(name, 0, tensor.rows)))
    with path.open("r+b") as handle:
        handle.seek(tensor.offset)
        handle.write(changed.tobytes())


def value_of(path: Path, key: str, old: bytes, new: bytes) -> None:
    """Changes the first occurrence of some bytes behind a key of the header."""
    content = path.read_bytes()
    place = content.index(old, content.index(key.encode()) + len(key))
    path.write_bytes(content[:place] + new + content[place + len(old) :])


def rolled(rows: Rows) -> Rows:
    """Each block of a row of Q4_0 gets the scale of the one before it."""
    found = rows.reshape(len(rows), -1, Q4_0_BYTES).copy()
    found[:, :, :2] = np.roll(found[:, :, :2], 1, axis=1)
    return found


def smaller(rows: Rows) -> Rows:
    """The scales of Q4_0 times 0.9."""
    found = rows.reshape(len(rows), -1, Q4_0_BYTES).copy()
    scales = np.ascontiguousarray(found[:, :, :2]).view(np.float16) * np.float16(0.9)
    found[:, :, :2] = scales.view(np.uint8)
    return found


def swapped(experts: int) -> Callable[[Rows], Rows]:
    """The rows of a mixture's first two experts, each in the place of the other."""
    return lambda rows: rows.reshape(experts, -1, rows.shape[1])[[1, 0, *range(2, experts)]]


def first_row_larger(rows: Rows) -> Rows:
    """The first of some rows in float32 times 1.1."""
    found = rows.view(np.float32).copy()
    found[0] *= np.float32(1.1)
    return found.view(np.uint8)


def half_rotated(heads: int) -> Callable[[Rows], Rows]:
    """The rows of keys in the order of transformers, as if nobody had ordered them for llama.cpp."""
    return lambda rows: rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)
