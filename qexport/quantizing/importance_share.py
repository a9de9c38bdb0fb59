"""Calibration text on its way through the model and back, on one worker, for `importance`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from qexport.architectures.architecture import Architecture
from qexport.architectures.memory import return_freed_memory
from qexport.architectures.runner import Batch, BlockRunner
from qexport.architectures.sending import ReceivedWeights, Tensors
from qexport.errors import ResourceError
from qexport.quantizing.activations import OffloadFile, Restore
from qexport.quantizing.drawn_tokens import gradients_at_head
from qexport.quantizing.offloading import offload_on
from qexport.quantizing.products import FixedProducts
from qexport.tensors import WeightSource

AT_HEAD: Final = 128
"""Tokens whose logits are in memory."""


def pieces_at_head(tokens: int) -> list[int]:
    """The tokens of each piece of a batch that is at the head at a time."""
    return [min(AT_HEAD, tokens - start) for start in range(0, tokens, AT_HEAD)]


@dataclass(frozen=True)
class ImportanceInputs:
    """What all shares have in common.

    Attributes:
        architecture: of the merged model.
        weights: its tensors; None where they are sent.
        layers: names of linear layers in the blocks, no experts.
        dtype: that blocks compute in.
        device: where to compute, by its name.
        scratch: a folder on a disk with room for the hidden states of a share's text before every block.
    """

    architecture: Architecture
    weights: WeightSource | None
    layers: Sequence[str]
    dtype: torch.dtype
    device: str
    scratch: Path


class ImportanceShare:
    """Some batches of windows."""

    def __init__(self, inputs: ImportanceInputs) -> None:
        if not inputs.scratch.is_dir():
            raise ResourceError(
                "a worker does not see the output's folder",
                where=str(inputs.scratch),
                mend="use a folder that all machines of the cluster see at the same path",
            )
        self._inputs, self._received, device = inputs, ReceivedWeights(), torch.device(inputs.device)
        source = self._received if inputs.weights is None else inputs.weights
        self._runner = BlockRunner(inputs.architecture, source, dtype=inputs.dtype, device=device)
        self._file: OffloadFile | None = None

    def begin(self, input_ids: Sequence[Tensor], tensors: Tensors | None) -> None:
        """Takes other batches to the first block; what had been begun is given up.

        Args:
            input_ids: int64 [windows, tokens] of each batch.
            tensors: those outside the blocks, where they are sent.
        """
        self.close()
        inputs, structure = self._inputs, self._runner.structure
        self._file = offload_on(self._runner.device, inputs.scratch, structure.block_linears)
        shape = sum(map(len, input_ids)), input_ids[0].shape[1]
        self._found = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in inputs.layers}
        self._kept: list[list[tuple[Tensor, Restore]]] = []
        with self._received.holding(tensors):
            self._batches = self._runner.embed_batches(input_ids)

    def close(self) -> None:
        """Frees the disk."""
        if self._file is not None:
            self._file.__exit__(None, None, None)

    def forward(self, index: int, tensors: Tensors | None) -> None:
        """Takes the batches through a block, whose tensors are those that are sent, if they are."""
        assert self._file is not None
        kept: list[tuple[Tensor, Restore]] = []
        with self._received.holding(tensors), self._runner.block(index) as block, FixedProducts():
            for batch in self._batches:
                before = batch.hidden
                self._runner.forward(index, block, batch)
                kept.append((before, self._file.offload(before.untyped_storage())))
        self._kept.append(kept)

    def at_head(self, states: Mapping[int, Tensor], tensors: Tensors | None) -> None:
        """Computes the gradients with respect to the hidden states after the last block, which are not kept.

        Args:
            states: of the generator before the draws of some batches, see `gradients_at_head`.
            tensors: those outside the blocks, where they are sent.

        Raises:
            NumericalError: the model's predictions are not finite.
        """
        shapes, of_pieces, pieces = [batch.hidden.shape for batch in self._batches], dict[int, Tensor](), list[Tensor]()
        for number, batch in enumerate(self._batches):
            if number in states:
                of_pieces[len(pieces)] = states[number]
            flat = batch.hidden.flatten(0, 1)
            pieces += [piece[None] for piece in flat.split(pieces_at_head(len(flat)))]
            batch.hidden = batch.hidden.new_empty(0)  # so that its memory goes with the pieces
        del flat
        with self._received.holding(tensors):
            gradients = torch.cat(gradients_at_head(self._runner, pieces, of_pieces), 1)[0]
        of_batches = gradients.split([shape[:2].numel() for shape in shapes])
        self._upstream = [part.view(shape) for part, shape in zip(of_batches, shapes, strict=True)]

    def back(self, index: int, tensors: Tensors | None) -> None:
        """Replaces the gradients after a block by those before it."""
        linears = self._runner.structure.linears[self._runner.structure.blocks[index]]
        own, end = [linear for linear in linears if linear.name in self._found], 0
        with self._received.holding(tensors), self._runner.block(index) as block:
            modules = {linear.name: self._runner.module(linear) for linear in own}
            for number, (batch, (before, restore)) in enumerate(zip(self._batches, self._kept.pop(), strict=True)):
                restore(before.untyped_storage())
                start, end = end, end + len(before)
                noted = [(module, self._found[name][start:end]) for name, module in modules.items()]
                with _noting(noted), FixedProducts():
                    through = Batch(before, batch.calls)
                    self._upstream[number], _ = self._runner.gradients(
                        index, block, through, self._upstream[number], []
                    )
        return_freed_memory()

    def found(self) -> dict[str, Tensor]:
        """What `token_importance` returns of the batches."""
        return self._found


@contextmanager
def _noting(noted: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Fills the tensor [windows, tokens] of each module with the squared lengths of the gradients at its output."""

    def note(values: Tensor, gradient: Tensor) -> None:
        values.copy_(gradient.float().square().sum(-1).view_as(values))

    def watch(values: Tensor, _: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(partial(note, values))

    hooks = [module.register_forward_hook(partial(watch, values)) for module, values in noted]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
