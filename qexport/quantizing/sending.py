"""The model's tensors for workers that do not read them themselves: read and merged once, the next block's ahead.

Workers in other processes do not, and on CUDA this process does not either: its processor has time while the device
computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qexport.architectures.structure import Structure
from qexport.execution.workers import Execution, Later
from qexport.tensors import WeightSource

Sent = Later[Mapping[str, Tensor]]


def sends(execution: Execution, device: torch.device) -> bool:
    """Whether the workers of an execution, which compute on a device, get the tensors from a `Sender`."""
    return execution.apart or device.type == "cuda"


class Sender:
    """Reads tensors in a thread of its own, if they are sent.

    Args:
        weights: the merged model.
        structure: of it.
        execution: the workers.
        device: where each computes.
    """

    def __init__(self, weights: WeightSource, structure: Structure, execution: Execution, device: torch.device) -> None:
        self._weights, self._structure, self._execution = weights, structure, execution
        self._reader = ThreadPoolExecutor(1) if sends(execution, device) else None
        self._next: tuple[int, Future[Sent]] | None = None

    def close(self) -> None:
        """Ends the thread."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def block(self, index: int) -> Mapping[str, Tensor] | None:
        """What a worker gets of a block, as an argument of its calls; None if it reads itself."""
        if self._reader is None:
            return None
        ahead, self._next = self._next, None
        found = ahead[1] if ahead and ahead[0] == index else self._read(self._structure.blocks[index])
        if index + 1 < len(self._structure.blocks):
            self._next = index + 1, self._read(self._structure.blocks[index + 1])
        return found.result().argument

    def outside(self) -> Mapping[str, Tensor] | None:
        """The same of the tensors that are in no block."""
        return None if self._reader is None else self._read(None).result().argument

    def _read(self, block: str | None) -> Future[Sent]:
        """Begins to read a block, or what is in none."""
        assert self._reader is not None
        names = self._structure.outside if block is None else self._structure.parameters_of(block)
        return self._reader.submit(self._send, names)

    def _send(self, names: Sequence[str]) -> Sent:
        return self._execution.once({name: self._weights.read(name) for name in names})
