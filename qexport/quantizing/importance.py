"""How far the predictions depend on what each layer puts out for each token of the calibration text.

To second order an error e of a layer's output at one token costs `E[<g, e>^2] / 2` nats, where g is the gradient with
respect to that output of the log-probabilities of drawn tokens (`drawn_tokens`). So a token counts with |g|^2 in the
sums that a layer is solved with, as in GuidedQuant (arXiv:2505.07004). Of one draw, |g|^2 is noisy and its few largest
values would leave little of the text: on SmolLM2 it gains nothing, and its square root does (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.devices import single_thread
from qexport.architectures.memory import return_freed_memory
from qexport.architectures.runner import Batch, BlockRunner
from qexport.artifact.disk import sync
from qexport.progress import Progress, ProgressCallback
from qexport.quantizing.activations import OffloadFile, Restore
from qexport.quantizing.drawn_tokens import gradients_at_head
from qexport.quantizing.method import PassInputs
from qexport.quantizing.offloading import offload_on
from qexport.quantizing.products import FixedProducts

AT_A_TIME: Final = 1 << 15
"""Tokens whose hidden states before every block are on the disk. For each such part the model is read twice."""

_BATCH_TOKENS: Final = 2048
"""Tokens that go through a block at a time."""

AT_HEAD: Final = 128
"""Tokens whose logits are in memory."""


def kept_importance(inputs: PassInputs, layers: Collection[str]) -> dict[str, Tensor]:
    """What `token_importance` finds for a pass. An earlier run may have left it.

    Args:
        inputs: of the pass, which has calibration text.
        layers: names of linear layers in the blocks, no experts.
    """
    assert inputs.calibration is not None
    kept = inputs.resume and inputs.resume.folder / "importance.safetensors"
    if kept and kept.exists():
        return load_file(kept)
    found = token_importance(
        inputs.checkpoint,
        layers,
        inputs.calibration.input_ids,
        dtype=inputs.dtype,
        device=inputs.device,
        scratch=inputs.scratch,
        progress=inputs.progress,
    )
    if kept:
        _write(kept, found)
    return found


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file beside its path, then renames it: one that is there is whole.

    Raises:
        OSError: the disk is full, of which safetensors itself would raise an error of its own.
    """
    beside = path.with_suffix(".partial")
    beside.write_bytes(save(dict(tensors)))
    sync(beside)
    beside.replace(path)


def token_importance(
    checkpoint: Checkpoint,
    layers: Collection[str],
    input_ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path,
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """The squared length of the gradient at each layer's output, for every token.

    Args:
        checkpoint: the merged model.
        layers: names of linear layers in the blocks, no experts.
        input_ids: int64 [windows, tokens].
        dtype: that blocks compute in; the head computes in float32.
        device: where to compute.
        scratch: a folder on a disk with room for the hidden states before every block, of some windows.
        progress: is called with each block.

    Returns:
        Of each layer, bfloat16 [windows, tokens], with the same bits for every number of threads.

    Raises:
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
        OSError: the disk is full.
    """
    runner = BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=dtype, device=device)
    found = {name: torch.zeros(input_ids.shape, dtype=torch.bfloat16) for name in layers}
    parts = range(0, len(input_ids), max(1, AT_A_TIME // input_ids.shape[1]))
    for start in parts:
        windows = slice(start, start + parts.step)
        own = {name: values[windows] for name, values in found.items()}
        batches = runner.embed(input_ids[windows], max(1, _BATCH_TOKENS // input_ids.shape[1]))
        with offload_on(device, scratch, checkpoint.architecture.structure.block_linears) as file:
            _Part(runner, batches, own, file).run(partial(_report, progress, start, len(input_ids)))
    return found


def _report(progress: ProgressCallback, start: int, windows: int, done: int, steps: int) -> None:
    progress(Progress("calibrate", done, steps, "block", f"importance, windows from {start + 1} of {windows}"))


class _Part:
    """Some windows on their way through the model and back."""

    def __init__(
        self, runner: BlockRunner, batches: Sequence[Batch], found: Mapping[str, Tensor], file: OffloadFile
    ) -> None:
        self._runner, self._batches, self._found, self._file = runner, batches, found, file
        self._inputs: list[list[tuple[Tensor, Restore]]] = []

    def run(self, report: Callable[[int, int], None]) -> None:
        blocks = len(self._runner.structure.blocks)
        for index in range(blocks):
            self._forward(index)
            report(index + 1, 2 * blocks)
        upstream = self._at_head()
        for index in reversed(range(blocks)):
            self._back(index, upstream)
            return_freed_memory()
            report(2 * blocks - index, 2 * blocks)

    def _forward(self, index: int) -> None:
        kept: list[tuple[Tensor, Restore]] = []
        with self._runner.block(index) as block, FixedProducts():
            for batch in self._batches:
                before = batch.hidden
                self._runner.forward(index, block, batch)
                kept.append((before, self._file.offload(before.untyped_storage())))
        self._inputs.append(kept)

    def _at_head(self) -> list[Tensor]:
        """Of each batch, with respect to the hidden states after the last block, which are not kept."""
        shapes = [batch.hidden.shape for batch in self._batches]
        pieces = [piece[None] for batch in self._batches for piece in batch.hidden.flatten(0, 1).split(AT_HEAD)]
        for batch in self._batches:
            batch.hidden = batch.hidden.new_empty(0)  # so that its memory goes with the pieces
        gradients = torch.cat(gradients_at_head(self._runner, pieces), 1)[0]
        of_batches = gradients.split([shape[:2].numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(of_batches, shapes, strict=True)]

    def _back(self, index: int, upstream: list[Tensor]) -> None:
        """Replaces the gradients after a block by those before it."""
        linears = self._runner.structure.linears[self._runner.structure.blocks[index]]
        own = [linear for linear in linears if linear.name in self._found]
        end = 0
        with self._runner.block(index) as block:
            modules = {linear.name: self._runner.module(linear) for linear in own}
            for number, (batch, (before, restore)) in enumerate(zip(self._batches, self._inputs.pop(), strict=True)):
                restore(before.untyped_storage())
                start, end = end, end + len(before)
                noted = [(module, self._found[name][start:end]) for name, module in modules.items()]
                with _noting(noted), FixedProducts():
                    through = Batch(before, batch.calls)
                    upstream[number], _ = self._runner.gradients(index, block, through, upstream[number], [])


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


def token_weights(importance: Mapping[str, Tensor], layers: Collection[str]) -> Tensor:
    """How much each token counts for layers that share an input: float32 [windows, tokens], 1 in the mean."""
    with single_thread():
        lengths = torch.stack([importance[name].double() for name in layers]).sum(0).sqrt()
        mean = lengths.mean()
        return (lengths / mean if mean > 0 else torch.ones_like(lengths)).float()
