"""Activations on the disk: those of a running block, and those after each block, with which a later run goes on."""

from __future__ import annotations

import ctypes
import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor, UntypedStorage

from qexport.errors import ResourceError

Restore = Callable[[], None]
"""Fills the storage of an offloaded tensor again."""


def stays() -> None:
    """The `Restore` of a tensor whose storage was not emptied."""


class OffloadFile:
    """Holds the bytes of offloaded tensors, and restores them in place. A context manager.

    The tensor objects stay: their storage is emptied, and filled again before it is used. The file is as large as what
    is offloaded for one block.

    Args:
        folder: where the file is made. It has no name there, and is closed at the end of the context, even if forwards
            that an error has stopped still refer to it: a program may go on after the error.
    """

    def __init__(self, folder: Path) -> None:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        assert isinstance(file, io.FileIO)
        self._file = file
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frees the disk. What is still offloaded is lost."""
        self._file.close()

    def empty(self) -> None:
        """Makes the whole file free again; every offloaded tensor must have been restored."""
        self._end = 0

    def offload(self, storage: UntypedStorage) -> Restore:
        """Empties a storage and returns the function that fills it again.

        Raises:
            OSError: the disk is full.
        """
        place = self._end
        self._end += storage.nbytes()
        host = storage.cpu()
        _write(self._file, _view(host.data_ptr(), host.nbytes()), place)
        return _emptied(storage, self._file, place)


_TRAILER: Final = struct.Struct("<QQI")
"""After each tensor in a file: the number of blocks that it has been through, its bytes, their CRC-32."""


@dataclass(frozen=True)
class _Written:
    """A tensor whose bytes are in a file, as long as nothing has changed it in place. It is not kept in memory."""

    tensor: ReferenceType[Tensor]
    version: int
    place: int


class ActivationFiles:
    """The hidden states of all batches between two blocks, in two files in turn. A context manager.

    While the states after a block are written, those before it remain readable: a run that is stopped can go on from
    one of the two files. Each tensor has a place of its own, so that several processes can each write theirs, and any
    other process can read them. What has been written need not be written again to free its memory (`offload`).

    Args:
        folder: where the files are, and stay.
        size: bytes of the largest tensor.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._paths = [folder / f"activations-{number}" for number in range(2)]
        with ExitStack() as stack:
            self._files = [stack.enter_context(_opened(path)) for path in self._paths]
            stack.pop_all()
        self._stride = size + _TRAILER.size
        self._current = self._files[0]
        self._written: dict[int, _Written] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def write(self, blocks: int, hidden: Mapping[int, Tensor]) -> Path:
        """Writes states after some blocks, in place of those two blocks before.

        Args:
            blocks: how many blocks they have been through.
            hidden: tensors by their places, which are counted from 0.

        Returns:
            The file, which is not durable yet.

        Raises:
            OSError: the disk is full.
        """
        file, self._written = self._files[blocks % 2], {}
        for number, tensor in hidden.items():
            host, place = tensor.cpu().contiguous(), number * self._stride
            content = _view(host.data_ptr(), host.nbytes)
            _write(file, content, place)
            trailer = _TRAILER.pack(blocks, host.nbytes, zlib.crc32(content))
            _write(file, memoryview(trailer), place + host.nbytes)
            self._written[number] = _Written(ref(tensor), tensor._version, place)
        self._current = file
        return self._paths[blocks % 2]

    def read(self, blocks: int, hidden: Mapping[int, Tensor]) -> None:
        """Fills tensors with the states that an earlier run, or another process, wrote.

        Args:
            blocks: how many blocks they have been through.
            hidden: tensors of the right shape and dtype by their places.

        Raises:
            ResourceError: the file does not hold them, or is damaged.
        """
        file = self._files[blocks % 2]
        for number, tensor in hidden.items():
            host = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            content, trailer = _view(host.data_ptr(), host.nbytes), bytearray(_TRAILER.size)
            _read(file, content, number * self._stride)
            _read(file, memoryview(trailer), number * self._stride + host.nbytes)
            if _TRAILER.unpack(trailer) != (blocks, host.nbytes, zlib.crc32(content)):
                raise ResourceError(
                    "the activations that an interrupted run has left are damaged",
                    where=str(self._paths[blocks % 2]),
                    mend="check the disk, then begin again with --restart",
                )
            tensor.copy_(host)
        self._current, self._written = file, {}

    def offload(self, number: int, tensor: Tensor) -> Restore | None:
        """Empties the storage of the states at a place, if they are those that were written last.

        Returns:
            The function that fills it again; None if the states were not written, or have changed since.
        """
        found = self._written.get(number)
        if found is None or found.tensor() is not tensor or found.version != tensor._version:
            return None
        return _emptied(tensor.untyped_storage(), self._current, found.place) if _fills_its_storage(tensor) else None


def _fills_its_storage(tensor: Tensor) -> bool:
    """Whether the bytes of the tensor, row after row, are all the bytes of its storage."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _emptied(storage: UntypedStorage, file: io.FileIO, place: int) -> Restore:
    size = storage.nbytes()
    storage.resize_(0)

    def restore() -> None:
        storage.resize_(size)
        if storage.device.type == "cpu":
            _read(file, _view(storage.data_ptr(), size), place)
        else:
            host = UntypedStorage(size)
            _read(file, _view(host.data_ptr(), size), place)
            storage.copy_(host)

    return restore


def _opened(path: Path) -> io.FileIO:
    """The file with its content, or an empty new one."""
    path.touch()
    return io.FileIO(path, "r+")


def _write(file: io.FileIO, content: memoryview, place: int) -> None:
    file.seek(place)
    while content:
        content = content[file.write(content) :]


def _read(file: io.FileIO, content: memoryview, place: int) -> None:
    """Fills `content`; a file that ends before leaves the rest as it is."""
    file.seek(place)
    while content and (count := file.readinto(content)):
        content = content[count:]


def _view(address: int, size: int) -> memoryview:
    """The bytes of a CPU storage. Not through numpy: a storage that has been shared with numpy cannot be resized."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
