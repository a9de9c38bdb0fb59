"""A model in one GGUF file or in several, as llama.cpp's `llama-gguf-split` makes them of one.

The first file has all values of the header; each has its number, the count of the files and that of all tensors, and a
table of its own tensors. llama.cpp finds the others by the name of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qexport.errors import InputError
from qexport.references import gguf_part, parsed_gguf_part
from qexport.tensors.gguf_file import GgufFile, GgufTensor

SPLIT_NO: Final = "split.no"
SPLIT_COUNT: Final = "split.count"
SPLIT_TENSORS_COUNT: Final = "split.tensors.count"
_KEYS: Final = (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS_COUNT)


def open_gguf(path: Path) -> GgufFile:
    """The GGUF file at a path; if it is the first of several, the model in all of them.

    Raises:
        InputError: as for `GgufFile`; or it is one of several files and not the first, its name is not of the form
            that says where the others are, or they do not belong together.
    """
    file = GgufFile(path)
    count = file.metadata.get(SPLIT_COUNT)
    if type(count) is not int or count <= 1:
        return file
    file.close()
    return GgufParts(path, count)


class GgufParts(GgufFile):
    """The model in several files. `tensors` has those of all files, and `metadata` no key of the splitting.

    Args:
        path: the first file.
        count: of the files, as the first says.

    Raises:
        InputError: as for `open_gguf`.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._parts: list[GgufFile] = []
        super().__init__(path)
        try:
            names = _names(self, count)
            self.paths = tuple(path.with_name(name) for name in names)
            self._parts += [GgufFile(each) for each in self.paths[1:]]
            own = [self.tensors, *(part.tensors for part in self._parts)]
            self._refuse_strangers(count, sum(map(len, own)))
            self._holders: Mapping[str, int] = {name: number for number, table in enumerate(own) for name in table}
            self.tensors: Mapping[str, GgufTensor] = {name: each for table in own for name, each in table.items()}
            if len(self.tensors) < sum(map(len, own)):
                raise InputError("a tensor is in two of the files", where=str(path), mend=_MEND)
            self.metadata = {key: value for key, value in self.metadata.items() if key not in _KEYS}
        except BaseException:
            self.close()
            raise

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """See `GgufFile.read_rows`."""
        holder = self._holders[name]
        return (
            super().read_rows(name, start, stop)
            if holder == 0
            else self._parts[holder - 1].read_rows(name, start, stop)
        )

    def close(self) -> None:
        """Closes all files."""
        super().close()
        for part in self._parts:
            part.close()

    def _refuse_strangers(self, count: int, tensors: int) -> None:
        for number, part in enumerate((self, *self._parts)):
            found = tuple(part.metadata.get(key) for key in _KEYS)
            if found != (number, count, tensors):
                raise InputError(
                    f"{SPLIT_NO}, {SPLIT_COUNT} and {SPLIT_TENSORS_COUNT} are {_words(found)}, where "
                    f"{_words((number, count, tensors))} is meant",
                    where=str(part.path),
                    mend=_MEND,
                )


_MEND: Final = "fetch all files of the model again"


def _words(values: tuple[object, ...]) -> str:
    """Values in words."""
    return ", ".join(map(str, values))


def _names(first: GgufFile, count: int) -> list[str]:
    """The names of all files."""
    number, found = first.metadata.get(SPLIT_NO), parsed_gguf_part(first.path.name)
    if number != 0 or (found is not None and found[1] != 1):
        mend = f"name the first: {gguf_part(found[0], 1, count)}" if found else "name the first of them"
        raise InputError(f"this is not the first of the model's {count} files", where=str(first.path), mend=mend)
    if found is None or found[2] != count:
        raise InputError(
            f"the model has {count} files, and this name does not say where the others are",
            where=str(first.path),
            mend=f"give them the names {gguf_part('NAME', 1, count)} and so on",
        )
    return [gguf_part(found[0], each, count) for each in range(1, count + 1)]
