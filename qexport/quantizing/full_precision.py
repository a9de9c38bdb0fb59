"""The calibration text in the model before quantizing, beside the pass: what each layer would receive there.

One process takes a batch through the whole block at once. Of several workers each stops before every group of layers,
and goes on while the run solves the group: then the workers would have nothing to do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from qexport.architectures.runner import BlockRunner
from qexport.quantizing.activations import OffloadFile, Restore
from qexport.quantizing.parking import Parking
from qexport.quantizing.pauses import Group, PausedForward
from qexport.quantizing.products import FixedProducts
from qexport.quantizing.stream import Stream


class FullPrecisionStream(ABC):
    """Batches that go through each block before its layers are quantized.

    Args:
        runner: has the block in memory until its batches are through.
        stream: the calibration batches, with the states of this stream.
        offload_file: holds the inputs of a block's layers until they are used.
    """

    def __init__(self, runner: BlockRunner, stream: Stream, offload_file: OffloadFile) -> None:
        self._runner, self.stream, self._offload_file = runner, stream, offload_file

    @abstractmethod
    def begin(self, index: int, block: nn.Module, groups: Sequence[Group], parking: Parking) -> None:
        """Begins a block.

        Args:
            index: of the block.
            block: the block, whose layers have their own weights.
            groups: of its layers, in the order of the forward's calls. Experts' inputs are left out: the tokens that
                reach an expert are not the same in both models.
            parking: of the block's forwards.
        """

    @abstractmethod
    def go_on(self, group: int) -> None:
        """Takes every batch to a group, by its number, or to the end of the block after the last one. The layers before
        it must have their own weights still.
        """

    @abstractmethod
    def leave(self) -> None:
        """Gives up a block whose batches are not through."""

    @abstractmethod
    def inputs(self, group: Group, number: int) -> Tensor | None:
        """What a group's layers receive from a batch [..., tokens, in], which is not kept; None for experts."""


class WholeBlocks(FullPrecisionStream):
    """Takes a batch through a block at once. The inputs of all groups are on the disk meanwhile."""

    def __init__(self, runner: BlockRunner, stream: Stream, offload_file: OffloadFile) -> None:
        super().__init__(runner, stream, offload_file)
        self._inputs: dict[tuple[nn.Module, int], tuple[Tensor, Restore]] = {}

    def begin(self, index: int, block: nn.Module, groups: Sequence[Group], parking: Parking) -> None:
        """See `FullPrecisionStream`; the batches are through afterwards."""
        stops = [group.stop for group in groups if group.experts is None]
        for number, batch in enumerate(self.stream.batches):
            self.stream.restore(number)
            with _recording(stops) as seen, FixedProducts():
                self._runner.forward(index, block, batch)
            for stop, inputs in seen.items():
                self._inputs[stop, number] = inputs, self._offload_file.offload(inputs.untyped_storage())
            self.stream.offload(index + 1, number)

    def go_on(self, group: int) -> None:
        """Does nothing: the batches are through."""

    def leave(self) -> None:
        """See `FullPrecisionStream`."""
        self._inputs.clear()

    def inputs(self, group: Group, number: int) -> Tensor | None:
        """See `FullPrecisionStream`."""
        if group.experts is not None:
            return None
        inputs, restore = self._inputs.pop((group.stop, number))
        restore(inputs.untyped_storage())
        return inputs


class GroupByGroup(WholeBlocks):
    """Takes the batches from group to group; what the stopped forwards hold is on the disk meanwhile. Where layers of a
    group, or experts, may be called after the next group's stop, their weights would be quantized by then: such a block
    is gone through at once.
    """

    _forwards: Sequence[PausedForward] = ()

    def begin(self, index: int, block: nn.Module, groups: Sequence[Group], parking: Parking) -> None:
        """See `FullPrecisionStream`; `pausing_at` must be in force at the groups' stops from now on."""
        if any(group.late or group.experts is not None for group in groups):
            super().begin(index, block, groups, parking)
            return
        self._index, self._last, self._parking = index, len(groups), parking
        for number in range(len(self.stream.batches)):
            parking.hold(*self.stream.restorer(number))
        self._forwards = [
            PausedForward(partial(self._runner.forward, index, block, batch), parking) for batch in self.stream.batches
        ]
        self._arguments: list[tuple[Any, ...]] = [()] * len(self._forwards)

    def go_on(self, group: int) -> None:
        """See `FullPrecisionStream`."""
        for number, forward in enumerate(self._forwards):
            if group < self._last:
                self._arguments[number] = forward.advance()
            else:
                self._arguments[number] = ()
                forward.finish()
                self.stream.offload(self._index + 1, number)
            self._parking.park()

    def leave(self) -> None:
        """See `FullPrecisionStream`."""
        super().leave()
        self._forwards, self._arguments = (), []

    def inputs(self, group: Group, number: int) -> Tensor | None:
        """See `FullPrecisionStream`. The tensor must not be parked while it is used."""
        if not self._forwards:
            return super().inputs(group, number)
        inputs: Tensor = self._arguments[number][0]
        self._parking.restore(inputs)
        return inputs


@contextmanager
def _recording(stops: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Yields what the modules are called with, as copies: other tensors of the forward may share the memory."""
    seen: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[module] = args[0].clone()

    hooks = [stop.register_forward_pre_hook(record) for stop in stops]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
