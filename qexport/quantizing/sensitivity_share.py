"""Windows on their way through the model and back, on one worker, for `sensitivity`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from qexport.architectures.architecture import Architecture
from qexport.architectures.devices import single_thread
from qexport.architectures.memory import return_freed_memory
from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.sending import ReceivedWeights, Tensors
from qexport.architectures.structure import LinearSpec
from qexport.quantizing.drawn_tokens import gradients_at_head
from qexport.quantizing.layer import Hessian
from qexport.quantizing.products import FixedProducts
from qexport.tensors import GroupQuantized, WeightSource

_KEPT: Final = torch.bfloat16
"""Of the hidden states between the passes: there are those of every block."""

Codes = dict[str, GroupQuantized]
"""What one option makes of a unit's layers, by their names."""


@dataclass(frozen=True)
class SensitivityInputs:
    """What all shares have in common.

    Attributes:
        architecture: of the merged model, in float32.
        weights: its tensors; None where they are sent.
        device: where to compute, by its name.
    """

    architecture: Architecture
    weights: WeightSource | None
    device: str


class SensitivityShare:
    """Some of the windows in which the predictions are looked at, and some batches of those for the Hessians."""

    def __init__(self, inputs: SensitivityInputs) -> None:
        self._received = ReceivedWeights()
        source = self._received if inputs.weights is None else inputs.weights
        self._runner = BlockRunner(inputs.architecture, source, dtype=torch.float32, device=torch.device(inputs.device))
        self._loaded, self._index = ExitStack(), -1

    def begin(self, windows: Sequence[Tensor], batches: Sequence[Tensor], tensors: Tensors | None) -> None:
        """Takes the text to the first block; what had been begun is given up.

        Args:
            windows: int64 [1, tokens] of each.
            batches: int64 [windows, tokens] of each, for the Hessians.
            tensors: those outside the blocks, where they are sent.
        """
        self.close()
        with self._received.holding(tensors):
            embedded = self._runner.embed_batches([*windows, *batches])
        self._windows, self._batches = embedded[: len(windows)], embedded[len(windows) :]
        self._kept: list[tuple[list[Tensor], list[Tensor]]] = []

    def close(self) -> None:
        """Releases the block that is loaded."""
        self._loaded.close()
        self._index = -1

    def forward(self, index: int, tensors: Tensors | None) -> None:
        """Takes all of the text through a block, but for what only the Hessians need through the last one."""
        windows, batches = self._windows, self._batches
        self._kept.append(([each.hidden.to(_KEPT) for each in windows], [each.hidden.to(_KEPT) for each in batches]))
        last = index + 1 == len(self._runner.structure.blocks)
        with self._received.holding(tensors), self._runner.block(index) as block, FixedProducts():
            for batch in windows if last else [*windows, *batches]:
                self._runner.forward(index, block, batch)

    def at_head(self, state: Tensor, tensors: Tensors | None) -> None:
        """Computes the gradients with respect to the hidden states after the last block.

        Args:
            state: of the generator before the draws of the first window, see `gradients_at_head`.
            tensors: those outside the blocks, where they are sent.

        Raises:
            NumericalError: the model's predictions are not finite.
        """
        hidden = [window.hidden for window in self._windows]
        with self._received.holding(tensors):
            self._upstream = gradients_at_head(self._runner, hidden, {0: state})

    def add(
        self, index: int, hessians: list[Hessian], layers: Sequence[LinearSpec], tensors: Tensors | None
    ) -> list[Hessian]:
        """Adds the share's batches to Hessians.

        Args:
            index: of the block.
            hessians: changed.
            layers: of each, one of the layers whose input it is of.
            tensors: the block's, where they are sent.

        Returns:
            The same Hessians.
        """
        block = self._block(index, tensors)
        modules = [self._runner.module(layer) for layer in layers]
        hooks = [
            module.register_forward_pre_hook(partial(_add, hessian))
            for module, hessian in zip(modules, hessians, strict=True)
        ]
        try:
            for batch, hidden in zip(self._batches, self._kept[index][1], strict=True):
                with FixedProducts():
                    self._runner.forward(index, block, Batch(hidden.to(self._runner.dtype), batch.calls))
        finally:
            for hook in hooks:
                hook.remove()
        self._kept[index][1].clear()
        return hessians

    def matrices(self, index: int, linears: Sequence[LinearSpec], tensors: Tensors | None) -> dict[str, Tensor]:
        """The weights of some of a block's layers, contiguous float32 [out, in]."""
        self._block(index, tensors)
        return {linear.name: self._matrix(linear) for linear in linears}

    def back(
        self, index: int, codes: list[list[Codes]], linears: Mapping[str, LinearSpec], tensors: Tensors | None
    ) -> list[Tensor]:
        """Takes the gradients of the share's windows back through a block.

        Args:
            index: of the block.
            codes: of each unit and option; emptied.
            linears: the layers of all units, by their names.
            tensors: the block's, where they are sent.

        Returns:
            Of each unit, float64 [windows, options]: the products of the gradients with what each option changes.
        """
        block, windows = self._block(index, tensors), self._windows
        changes = [[dict(self._changes(option, linears)) for option in unit] for unit in codes]
        names = list(dict.fromkeys(name for unit in changes for option in unit for name in option))
        products = [torch.zeros(len(windows), len(unit), dtype=torch.float64) for unit in changes]
        for number, (window, hidden) in enumerate(zip(windows, self._kept.pop()[0], strict=True)):
            through = Batch(hidden.to(self._runner.dtype), window.calls)
            with FixedProducts():
                self._upstream[number], of_weights = self._runner.gradients(
                    index, block, through, self._upstream[number], names
                )
            with single_thread():
                for unit, options in zip(products, changes, strict=True):
                    for column, change in enumerate(options):
                        unit[number, column] = sum(_product(of_weights[name], each) for name, each in change.items())
        del block, changes
        self.close()
        return_freed_memory()
        return products

    def _block(self, index: int, tensors: Tensors | None) -> nn.Module:
        """The block with its weights, which stay until another one is asked for."""
        if index != self._index:
            self.close()
            self._loaded.enter_context(self._received.holding(tensors))
            self._opened = self._loaded.enter_context(self._runner.block(index))
            self._index = index
        return self._opened

    def _matrix(self, linear: LinearSpec) -> Tensor:
        weight = self._runner.parameter(f"{linear.name}.weight").detach()
        return (weight.t() if linear.transposed else weight).contiguous()

    def _changes(self, option: Codes, linears: Mapping[str, LinearSpec]) -> Iterator[tuple[str, Tensor]]:
        """What an option changes in the weights, by their names and in the shapes of files."""
        while option:
            name = next(iter(option))
            difference = option.pop(name).dequantize().to(self._runner.device).sub_(self._matrix(linears[name]))
            yield f"{name}.weight", difference.t() if linears[name].transposed else difference


def _add(hessian: Hessian, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    hessian.add(args[0])


def _product(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.reshape(-1), other.reshape(-1)))
