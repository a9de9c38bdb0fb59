"""Where tensors that are not needed for a while are on CUDA: on the device while there is room, then in main memory,
then on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, UntypedStorage

from qexport.architectures.machine_memory import available_memory
from qexport.architectures.memory import budget
from qexport.architectures.structure import LinearSpec
from qexport.quantizing.activations import OffloadFile, Restore, stays

_SHARE_OF_HOST: Final = 0.5
"""Of the free main memory, that offloaded tensors may take. A recipe with `max_memory` has none to spare."""


@dataclass(frozen=True)
class Room:
    """Bytes for the offloaded tensors of one block.

    Attributes:
        device: on the device itself.
        host: in pinned main memory.
    """

    device: int
    host: int


def offload_on(device: torch.device, folder: Path, linears: Sequence[LinearSpec]) -> OffloadFile:
    """What holds the offloaded tensors of a pass: on the CPU a file.

    Args:
        device: where the pass computes.
        folder: on a disk with room for the activations of a block.
        linears: the layers that the pass quantizes.
    """
    return OffloadFile(folder) if device.type == "cpu" else DeviceOffload(folder, room_on(device, linears))


def room_on(device: torch.device, linears: Sequence[LinearSpec]) -> Room:
    """What is left beside a pass over a model.

    Args:
        device: of CUDA.
        linears: the layers that the pass quantizes.
    """
    limited = budget().limit < float("inf")
    host = 0 if limited else int(_SHARE_OF_HOST * available_memory(torch.device("cpu")))
    return Room(max(0, int(free_on_device(device) - working_memory(linears))), host)


def free_on_device(device: torch.device) -> float:
    """Bytes that this process may still allocate on a device of CUDA."""
    share = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return min(share * total - torch.cuda.memory_allocated(device), available_memory(device))


def working_memory(linears: Sequence[LinearSpec]) -> int:
    """Bytes that solving the largest layer takes on the device, with what stays of the block, roughly: three matrices
    [in, in] and eight [out, in] in float32.
    """
    return max((4 * each.in_features * (3 * each.in_features + 8 * each.out_features) for each in linears), default=0)


class DeviceOffload(OffloadFile):
    """An `OffloadFile` that keeps tensors of CUDA where they are, or in main memory, while there is room.

    Args:
        folder: for the file.
        room: for the tensors that are offloaded between two calls of `empty`.
    """

    def __init__(self, folder: Path, room: Room) -> None:
        super().__init__(folder)
        self._room, self._left = room, room

    def empty(self) -> None:
        """Makes all room free again; every offloaded tensor must have been restored."""
        super().empty()
        self._left = self._room

    def reserve(self, size: int) -> bool:
        """Takes so many bytes from the device's room for as long as this object is used, if they are there."""
        found = size <= self._room.device
        if found:
            self._room = self._left = Room(self._room.device - size, self._room.host)
        return found

    def offload(self, storage: UntypedStorage) -> Restore:
        """Empties a storage, unless there is room on the device, and returns the function that fills it again.

        Raises:
            OSError: the disk is full.
        """
        size, left = storage.nbytes(), self._left
        if size <= left.device:
            self._left = Room(left.device - size, left.host)
            return stays
        if size <= left.host:
            self._left = Room(left.device, left.host - size)
            return _in_main_memory(storage)
        return super().offload(storage)


def _in_main_memory(storage: UntypedStorage) -> Restore:
    """Copies in both directions are queued on the device's stream: nothing waits for them but what comes after them."""
    size = storage.nbytes()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    host.copy_(_bytes_of(storage), non_blocking=True)
    storage.resize_(0)

    def restore(storage: UntypedStorage) -> None:
        storage.resize_(size)
        _bytes_of(storage).copy_(host, non_blocking=True)

    return restore


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
