"""The calibration text in the model before quantizing, beside the pass: what each layer would receive there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qexport.architectures.runner import Batch, BlockRunner
from qexport.quantizing.activations import OffloadFile, Restore
from qexport.quantizing.pauses import Group
from qexport.quantizing.products import FixedProducts


class FullPrecisionStream:
    """Batches that go through each block before its layers are quantized.

    Args:
        runner: has the block in memory while `run` is called.
        batches: the calibration batches before the first block. Their hidden states are copied.
        offload_file: holds the inputs of a block's layers, and the hidden states after it, until they are used.
    """

    def __init__(self, runner: BlockRunner, batches: Sequence[Batch], offload_file: OffloadFile) -> None:
        self._runner, self._offload_file = runner, offload_file
        self._batches = [Batch(batch.hidden.clone(), batch.calls) for batch in batches]
        self._inputs: dict[tuple[nn.Module, int], tuple[Tensor, Restore]] = {}
        self._restore: list[Restore] = []

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states of each batch [windows, sequence_length, hidden_size]."""
        return [batch.hidden for batch in self._batches]

    def run(self, index: int, block: nn.Module, groups: Sequence[Group]) -> None:
        """Takes every batch through a block, and puts the inputs of the groups and the hidden states on the disk.

        Experts' inputs are left out: the tokens that reach an expert are not the same in both models.
        """
        stops = [group.stop for group in groups if group.experts is None]
        for number, batch in enumerate(self._batches):
            with _recording(stops) as seen, FixedProducts():
                self._runner.forward(index, block, batch)
            for stop, inputs in seen.items():
                self._inputs[stop, number] = inputs, self._offload_file.offload(inputs.untyped_storage())
            self._restore.append(self._offload_file.offload(batch.hidden.untyped_storage()))

    def inputs(self, group: Group, number: int) -> Tensor | None:
        """What a group's layers receive from a batch [..., tokens, in], which is not kept; None for experts."""
        if group.experts is not None:
            return None
        inputs, restore = self._inputs.pop((group.stop, number))
        restore()
        return inputs

    def restore(self) -> None:
        """Brings the hidden states back into memory."""
        while self._restore:
            self._restore.pop()()


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
