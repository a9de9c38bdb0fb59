"""Activations on the disk: those of a running block, and those after each block, with which a later run goes on."""

from __future__ import annotations

import ctypes
import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor, UntypedStorage

from qexport.architectures.memory import return_freed_memory_beyond
from qexport.errors import ResourceError

Restore = Callable[[UntypedStorage], None]
"""Fills an offloaded storage again, which it does not keep alive."""

_GROWTH: Final = 48 << 20
"""Bytes that the process may grow by before freed memory is returned."""


def stays(storage: UntypedStorage) -> None:
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
        self._file = _nameless(folder)
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

    def reserve(self, size: int) -> bool:
        """Whether so many bytes may stay on the device for as long as this object is used. Here none may."""
        return False

    def offload(self, storage: UntypedStorage) -> Restore:
        """Empties a storage and returns the function that fills it again.

        Raises:
            OSError: the disk is full.
        """
        place = self._end
        self._end += storage.nbytes()
        return _offloaded(storage, storage.cpu(), self._file, place)


_TRAILER: Final = struct.Struct("<QQI")
"""After a batch's states in a file: the number of blocks that they have been through, their bytes, their CRC-32."""


class StateFiles:
    """The hidden states of batches between two blocks, in two files in turn. A context manager.

    While the states after a block are written, those before it remain readable: a run that is stopped can go on from
    one of the two files. Each batch has a place of its own, so several processes can each write theirs, and any other
    process can read them.

    Args:
        folder: where the files are.
        size: bytes of the largest batch's states.
        kept: whether they stay there; else they have no names.
        on_device: whether the states stay in memory too. They are written only to be kept then.
    """

    def __init__(self, folder: Path, size: int, *, kept: bool, on_device: bool) -> None:
        self._paths = [folder / f"activations-{number}" for number in range(2)]
        with ExitStack() as stack:
            self._files = [stack.enter_context(_opened(path) if kept else _nameless(folder)) for path in self._paths]
            stack.pop_all()
        self._stride, self._kept, self.on_device = size + _TRAILER.size, kept, on_device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def path(self, blocks: int) -> Path:
        """The file of the states after some blocks."""
        return self._paths[blocks % 2]

    def offload(self, blocks: int, number: int, hidden: Tensor) -> Restore:
        """Writes a batch's states in place of those two blocks before, and frees their memory. They are not durable.

        Args:
            blocks: how many blocks they have been through.
            number: of the batch.
            hidden: the states, contiguous, alone in their storage.

        Raises:
            OSError: the disk is full.
        """
        file, place, size = self._files[blocks % 2], number * self._stride, hidden.nbytes
        if self.on_device and not self._kept:
            return stays
        assert hidden.untyped_storage().nbytes() == size, "other tensors share the memory"
        host = hidden.cpu().untyped_storage()
        _write(file, memoryview(_trailer(blocks, host)), place + size)
        if not self.on_device:
            return _offloaded(hidden.untyped_storage(), host, file, place)
        _write(file, _view(host.data_ptr(), size), place)
        return stays

    def read(self, blocks: int, hidden: Mapping[int, Tensor]) -> list[Restore]:
        """Takes over the states that an earlier run, or another process, has written.

        Args:
            blocks: how many blocks they have been through.
            hidden: tensors of the right shape and dtype by the numbers of their batches. Their storages are emptied,
                or filled if the states stay on the device.

        Raises:
            ResourceError: the file does not hold them, or is damaged.
        """
        file, restores = self._files[blocks % 2], list[Restore]()
        for number, tensor in hidden.items():
            host, place, found = torch.empty_like(tensor, device="cpu"), number * self._stride, bytearray(_TRAILER.size)
            _read(file, _view(host.data_ptr(), tensor.nbytes), place)
            _read(file, memoryview(found), place + tensor.nbytes)
            if found != _trailer(blocks, host.untyped_storage()):
                raise ResourceError(
                    "the activations that an interrupted run has left are damaged",
                    where=str(self.path(blocks)),
                    mend="check the disk, then begin again with --restart",
                )
            if self.on_device:
                tensor.copy_(host)
            else:
                tensor.untyped_storage().resize_(0)
            restores.append(stays if self.on_device else _restore(file, place, tensor.nbytes))
        return restores


def _trailer(blocks: int, storage: UntypedStorage) -> bytes:
    return _TRAILER.pack(blocks, storage.nbytes(), _checksum(storage))


def _checksum(storage: UntypedStorage) -> int:
    return zlib.crc32(_view(storage.data_ptr(), storage.nbytes()))


def _offloaded(storage: UntypedStorage, host: UntypedStorage, file: io.FileIO, place: int) -> Restore:
    """Writes a storage, of which `host` is a copy or itself, into a file, and empties it."""
    size = host.nbytes()
    _write(file, _view(host.data_ptr(), size), place)
    storage.resize_(0)
    return_freed_memory_beyond(_GROWTH)
    return _restore(file, place, size)


def _restore(file: io.FileIO, place: int, size: int) -> Restore:
    def restore(storage: UntypedStorage) -> None:
        storage.resize_(size)
        if storage.device.type == "cpu":
            _read(file, _view(storage.data_ptr(), size), place)
        else:
            host = UntypedStorage(size)
            _read(file, _view(host.data_ptr(), size), place)
            storage.copy_(host)

    return restore


def _nameless(folder: Path) -> io.FileIO:
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by the caller
    assert isinstance(file, io.FileIO)
    return file


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
