"""Where a graph's weights are: in files beside it, under names and offsets that cannot be trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qexport.errors import InputError
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.strict_files import contained_path

_KEYS: Final = ("location", "offset", "length")
_MAX_DIGITS: Final = 18
_MEND: Final = "fetch or export the model again; its graph and its data do not belong together"


@dataclass(frozen=True)
class ExternalData:
    """The bytes of one tensor in a file beside the graph.

    Attributes:
        path: the file.
        offset: of the first byte in the file.
        length: in bytes.
        where: the initializer, for an error.
    """

    path: Path
    offset: int
    length: int
    where: str

    def read_into(self, buffer: memoryview) -> None:
        """Fills a buffer of `length` bytes.

        Raises:
            InputError: the file cannot be read, or has become shorter.
        """
        done = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                while done < len(buffer):
                    count = os.preadv(file.fileno(), [buffer[done:]], self.offset + done)
                    if count == 0:
                        raise InputError("the file ends inside this tensor", where=self.where, mend=_MEND)
                    done += count
        except OSError as error:
            raise InputError(f"{self.path.name} cannot be read: {error.strerror}", where=self.where) from error


class DataFiles:
    """The files beside a graph.

    Args:
        folder: the graph's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._headers: dict[str, Mapping[str, tuple[TensorSpec, int]]] = {}

    def place(self, entries: Sequence[tuple[str, str]], name: str, spec: TensorSpec, where: str) -> ExternalData:
        """The place that an initializer's `external_data` names, checked against the file.

        Args:
            entries: keys and values, as the graph has them.
            name: the initializer's.
            spec: its shape and dtype.
            where: the initializer, for an error.

        Raises:
            InputError: a key is missing, unknown or repeated; the file is missing, not in the folder itself, or a link
                out of it; the file ends before the tensor does; the length does not fit the shape; or the file is a
                safetensors file that has another tensor at this place.
        """
        values = dict(entries)
        if len(entries) != len(_KEYS) or values.keys() != set(_KEYS):
            raise InputError(f"external data must have {', '.join(_KEYS)}, once each", where=where, mend=_MEND)
        path = self._path(values["location"], where)
        data = ExternalData(path, _count(values["offset"], where), _count(values["length"], where), where)
        if data.length != spec.nbytes:
            raise InputError(
                f"{spec.dtype} {list(spec.shape)} takes {spec.nbytes} bytes, not {data.length}", where=where, mend=_MEND
            )
        end, size = data.offset + data.length, path.stat().st_size
        if end > size:
            raise InputError(
                f"the data ends at byte {end} of {path.name}, but the file ends at byte {size}", where=where, mend=_MEND
            )
        if path.suffix == ".safetensors":
            self._refuse_another_tensor(data, name, spec)
        return data

    def _path(self, location: str, where: str) -> Path:
        """The path of a file in the folder itself: ONNX Runtime treats some paths below it specially."""
        if "/" in location:
            raise InputError(f"the data file {location!r} is not beside the graph", where=where, mend=_MEND)
        path = contained_path(self._folder, location)
        if not path.is_file():
            raise InputError(f"there is no file {location!r} beside the graph", where=where, mend=_MEND)
        return path

    def _refuse_another_tensor(self, data: ExternalData, name: str, spec: TensorSpec) -> None:
        """Shapes and dtypes must be equal, but codes of bitsandbytes are [n, 1] in safetensors and [n] in the graph."""
        shapes = (spec.shape, (*spec.shape, 1)) if len(spec.shape) == 1 else (spec.shape,)
        allowed = [(TensorSpec(shape, spec.dtype), data.offset) for shape in shapes]
        if self._header(data.path).get(name) not in allowed:
            raise InputError(
                f"{data.path.name}: not the safetensors file that the graph was made for",
                where=data.where,
                mend=_MEND,
            )

    def _header(self, path: Path) -> Mapping[str, tuple[TensorSpec, int]]:
        if path.name not in self._headers:
            with SafetensorsFile(path) as file:
                offsets = file.offsets()
                self._headers[path.name] = {name: (spec, offsets[name]) for name, spec in file.specs().items()}
        return self._headers[path.name]


def _count(text: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise InputError(f"{text!r} is not a number of bytes", where=where, mend=_MEND)
    return int(text)
