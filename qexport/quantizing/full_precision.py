"""The calibration text in the model before quantizing, beside the pass: what each layer would receive there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qexport.architectures.runner import BlockRunner
from qexport.quantizing.activations import OffloadFile, Restore
from qexport.quantizing.pauses import Group
from qexport.quantizing.products import FixedProducts
from qexport.quantizing.stream import Stream


class FullPrecisionStream:
    """Batches that go through each block before its layers are quantized.

    Args:
        runner: has the block in memory while `run` is called.
        stream: the calibration batches, with the states of this stream.
        offload_file: holds the inputs of a block's layers until they are used.
    """

    def __init__(self, runner: BlockRunner, stream: Stream, offload_file: OffloadFile) -> None:
        self._runner, self.stream, self._offload_file = runner, stream, offload_file
        self._inputs: dict[tuple[nn.Module, int], tuple[Tensor, Restore]] = {}

    def run(self, index: int, block: nn.Module, groups: Sequence[Group]) -> None:
        """Takes every batch through a block, and puts the inputs of the groups on the disk.

        Experts' inputs are left out: the tokens that reach an expert are not the same in both models.
        """
        stops = [group.stop for group in groups if group.experts is None]
        for number, batch in enumerate(self.stream.batches):
            self.stream.restore(number)
            with _recording(stops) as seen, FixedProducts():
                self._runner.forward(index, block, batch)
            for stop, inputs in seen.items():
                self._inputs[stop, number] = inputs, self._offload_file.offload(inputs.untyped_storage())
            self.stream.offload(index + 1, number)

    def inputs(self, group: Group, number: int) -> Tensor | None:
        """What a group's layers receive from a batch [..., tokens, in], which is not kept; None for experts."""
        if group.experts is not None:
            return None
        inputs, restore = self._inputs.pop((group.stop, number))
        restore(inputs.untyped_storage())
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
