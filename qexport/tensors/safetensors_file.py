"""One safetensors file, read tensor by tensor.

Reading is positional and never maps the file: mapped pages would count as resident memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from qexport.errors import InputError
from qexport.tensors.safetensors_header import MEND, open_file, read_header
from qexport.tensors.source import TensorSpec

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
"""torch's types by the dtype names of the format."""

_CHUNK_BYTES: Final = 1 << 22


class SafetensorsFile:
    """An open safetensors file whose header is valid. A `WeightSource`, and a context manager.

    Reading is safe from several threads.

    Attributes:
        path: the file.
        metadata: the header's `__metadata__`.

    Raises:
        InputError: the file cannot be opened, its header is malformed (see `read_header`), or torch has no type for the
            values of a tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            header = read_header(self._file, path)
            self.metadata = header.metadata
            self._offsets = {name: entry.offset for name, entry in header.entries.items()}
            unreadable = next((name for name, each in header.entries.items() if each.dtype not in DTYPES), None)
            if unreadable is not None:
                raise InputError(
                    f"values of the dtype {header.entries[unreadable].dtype} cannot be read",
                    where=f"{path}: {unreadable}",
                    mend="qexport inspect describes such files",
                )
            self._specs = {name: TensorSpec(each.shape, DTYPES[each.dtype]) for name, each in header.entries.items()}
        except BaseException:
            self._file.close()
            raise

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's name, shape and dtype, in the order of the bytes."""
        return self._specs

    def offsets(self) -> Mapping[str, int]:
        """Where each tensor's bytes begin, counted from the start of the file."""
        return self._offsets

    def read(self, name: str) -> torch.Tensor:
        """The tensor in newly allocated memory. Its values are not checked.

        Raises:
            InputError: there is no tensor with this name, or the file has become shorter.
        """
        spec = self._spec(name)
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if tensor.numel():
            self._read_into(tensor.reshape(-1).view(torch.uint8), self._offsets[name], name)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most 4 MiB; a piece is valid until the next one is requested.

        Raises:
            InputError: there is no tensor with this name, or the file has become shorter.
        """
        count = self._spec(name).nbytes
        buffer = torch.empty(min(_CHUNK_BYTES, count), dtype=torch.uint8)
        for start in range(0, count, _CHUNK_BYTES):
            piece = buffer[: count - start]
            self._read_into(piece, self._offsets[name] + start, name)
            yield piece.numpy().data

    def close(self) -> None:
        """Closes the file. Nothing can be read afterwards."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self._specs[name]
        except KeyError:
            raise InputError("there is no tensor with this name", where=f"{self.path}: {name}") from None

    def _read_into(self, buffer: torch.Tensor, offset: int, name: str) -> None:
        """Fills a uint8 [n] tensor from `offset`; the kernel may return less than requested at a time."""
        view, done = buffer.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise InputError("the file ends inside this tensor", where=f"{self.path}: {name}", mend=MEND)
            done += count
