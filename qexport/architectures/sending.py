"""Models for workers that do not read the tensors themselves.

Workers in other processes do not: the run reads and merges each tensor once. On CUDA this process does not either: its
processor has time while the device computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.architectures.architecture import Architecture
from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import Structure
from qexport.execution.workers import Execution, Later
from qexport.tensors import TensorSpec, WeightSource
from qexport.tensors.input_rounding import InputRounding

Tensors = Mapping[str, Tensor]
"""By their names in files."""

Sent = Later[Tensors]


class ReceivedWeights:
    """A `WeightSource` of the tensors that a worker was sent."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    @contextmanager
    def holding(self, tensors: Tensors | None) -> Iterator[None]:
        """Has these tensors within the context; None where none were sent."""
        self._tensors.update(tensors or {})
        try:
            yield
        finally:
            self._tensors.clear()

    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource`."""
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        return self._tensors[name]


@dataclass(frozen=True)
class SentModel:
    """What a worker makes a runner of, without its tensors.

    Attributes:
        architecture: of the model.
        roundings: see `LazyModel.round_inputs`.
        dtype: which it computes in.
        device: where, by its name.
    """

    architecture: Architecture
    roundings: Mapping[str, InputRounding]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, runner: BlockRunner) -> SentModel:
        """What a worker makes the same runner of. A worker sees its own device only."""
        return cls(runner.architecture, runner.roundings, runner.dtype, runner.device.type)

    def runner(self, received: ReceivedWeights) -> BlockRunner:
        """The runner, with the tensors that are received."""
        runner = BlockRunner(self.architecture, received, dtype=self.dtype, device=torch.device(self.device))
        runner.round_inputs(self.roundings)
        return runner


def sends(execution: Execution, device: torch.device) -> bool:
    """Whether the workers of an execution, which compute on a device, get the tensors from a `Sender`."""
    return execution.apart or device.type == "cuda"


class Sender:
    """Reads tensors in a thread of its own, if they are sent: the next block's ahead.

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

    def block(self, index: int, following: int | None = None) -> Tensors | None:
        """What a worker gets of a block, as an argument of its calls; None if it reads itself.

        Args:
            index: of the block.
            following: of the block that is asked for next, by default the one after it.
        """
        if self._reader is None:
            return None
        ahead, self._next = self._next, None
        found = ahead[1] if ahead and ahead[0] == index else self._read(self._structure.blocks[index])
        following = index + 1 if following is None else following
        if following == index:
            self._next = index, found
        elif 0 <= following < len(self._structure.blocks):
            self._next = following, self._read(self._structure.blocks[following])
        return found.result().argument

    def outside(self) -> Tensors | None:
        """The same of the tensors that are in no block."""
        return None if self._reader is None else self._read(None).result().argument

    def _read(self, block: str | None) -> Future[Sent]:
        """Begins to read a block, or what is in none."""
        assert self._reader is not None
        names = self._structure.outside if block is None else self._structure.parameters_of(block)
        return self._reader.submit(self._send, names)

    def _send(self, names: Sequence[str]) -> Sent:
        return self._execution.once({name: self._weights.read(name) for name in names})
