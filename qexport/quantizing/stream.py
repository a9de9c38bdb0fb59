"""The calibration text on its way through the blocks, with the memory of one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qexport.architectures.runner import Batch
from qexport.quantizing.activations import Restore, StateFiles, stays


class Stream:
    """Batches whose hidden states are on the disk between two blocks.

    Args:
        states: where they are; several streams may share it.
        first: the number of this stream's first batch there.
    """

    def __init__(self, states: StateFiles, first: int) -> None:
        self._states, self._first = states, first
        self._restores: list[Restore] = []
        self.batches: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """Takes over a batch with the states before the first block."""
        self.batches.append(batch)
        self._restores.append(self._offloaded(0, len(self.batches) - 1))

    def add_empty(self, batch: Batch) -> None:
        """Takes over a batch whose states will be taken over too."""
        batch.hidden = torch.empty_like(batch.hidden, memory_format=torch.contiguous_format)
        if not self._states.on_device:
            batch.hidden.untyped_storage().resize_(0)
        self.batches.append(batch)

    def read(self, blocks: int) -> None:
        """Goes on with the states that were written after some blocks.

        Raises:
            ResourceError: they are not there, or damaged.
        """
        hidden = {self._first + number: batch.hidden for number, batch in enumerate(self.batches)}
        self._restores = self._states.read(blocks, hidden)

    def restorer(self, number: int) -> tuple[Tensor, Restore]:
        """A batch's states, without memory, and what fills them."""
        return self.batches[number].hidden, self._restores[number]

    def restore(self, number: int) -> Tensor:
        """A batch's states, in memory until they are offloaded."""
        hidden, restore = self.restorer(number)
        restore(hidden.untyped_storage())
        return hidden

    @contextmanager
    def restored(self, number: int) -> Iterator[Tensor]:
        """A batch's states, which do not change, in memory for a while."""
        yield self.restore(number)
        if self._restores[number] is not stays:
            self.batches[number].hidden.untyped_storage().resize_(0)

    def offload(self, blocks: int, number: int) -> None:
        """Writes a batch's states after some blocks, and frees their memory."""
        self._restores[number] = self._offloaded(blocks, number)

    def _offloaded(self, blocks: int, number: int) -> Restore:
        batch = self.batches[number]
        if not batch.hidden.is_contiguous() or batch.hidden.untyped_storage().nbytes() != batch.hidden.nbytes:
            batch.hidden = batch.hidden.clone(memory_format=torch.contiguous_format)
        return self._states.offload(blocks, self._first + number, batch.hidden)
