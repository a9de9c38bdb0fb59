"""Where the activations of paused forwards wait: in a file without a name, instead of in memory."""

from __future__ import annotations

import ctypes
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Parking:
    """Takes the bytes of tensors whose owners wait, and gives them back in place. A context manager.

    The tensors stay where they are, as objects: their storage is emptied, and filled again before anybody looks. The
    file is as large as what is parked for one block.

    Args:
        folder: where the file is made. It has no name there, and ends with the context: forwards that an
            error has left waiting hold on to it, and a program may go on after the error.
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
        """Frees the disk. What is still parked is lost."""
        self._file.close()

    def empty(self) -> None:
        """Makes the whole file free again; everything that was parked must have been given back."""
        self._end = 0

    def park(self, tensor: Tensor) -> Callable[[], None]:
        """Empties the tensor's storage and returns the function that fills it again.

        Raises:
            OSError: the disk is full.
        """
        storage = tensor.untyped_storage()
        place, size = self._end, storage.nbytes()
        self._end += size
        self._write(storage.cpu(), place)
        storage.resize_(0)

        def give_back() -> None:
            storage.resize_(size)
            if storage.device.type == "cpu":
                self._read(storage, place)
            else:
                storage.copy_(self._read(torch.UntypedStorage(size), place))

        return give_back

    def _write(self, storage: torch.UntypedStorage, place: int) -> None:
        self._file.seek(place)
        content = _view(storage)
        while content:
            content = content[self._file.write(content) :]

    def _read(self, storage: torch.UntypedStorage, place: int) -> torch.UntypedStorage:
        self._file.seek(place)
        content = _view(storage)
        while content:
            content = content[self._file.readinto(content) :]
        return storage


def _view(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a CPU storage. Not through numpy: a storage that numpy has seen cannot be resized any more."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
