"""How far the predictions depend on what each layer puts out for each token of the calibration text.

To second order an error e of a layer's output at one token costs `E[<g, e>^2] / 2` nats, where g is the gradient with
respect to that output of the log-probabilities of drawn tokens (`drawn_tokens`). So a token counts with |g|^2 in the
sums that a layer is solved with, as in GuidedQuant (arXiv:2505.07004). Of one draw, |g|^2 is noisy and its few largest
values would leave little of the text: on SmolLM2 it gains nothing, and its square root does (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.devices import single_thread
from qexport.architectures.sending import Sender, sends
from qexport.artifact.disk import sync
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution, Later, WorkerLostError, begun_anew
from qexport.progress import Notice, Progress, ProgressCallback
from qexport.quantizing.draws_ahead import DrawsAhead
from qexport.quantizing.importance_share import ImportanceInputs, ImportanceShare, pieces_at_head
from qexport.quantizing.method import PassInputs
from qexport.quantizing.shards import shared_out

AT_A_TIME: Final = 1 << 15
"""Tokens of a part of the text, in which tokens are drawn with one generator; no worker has more at a time, of which
the hidden states before every block are on the disk. For each part, or one for each worker, the model is read twice."""

_BATCH_TOKENS: Final = 2048
"""Tokens that go through a block at a time."""


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
        execution=inputs.execution,
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
    execution: Execution = INLINE,
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
        execution: the workers, to whom batches are dealt out.
        progress: is called with each block.

    Returns:
        Of each layer, bfloat16 [windows, tokens], with the same bits for every number of threads and workers.

    Raises:
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
        WorkerLostError: workers went in each attempt.
        OSError: the disk is full.
    """
    found, (windows, length) = list[dict[str, Tensor]](), input_ids.shape
    rounds = _rounds(windows, length, execution.workers)
    with closing(_Measurement(checkpoint, layers, input_ids, dtype, device, scratch, execution, rounds)) as work:
        for dealt in rounds:
            first = dealt[0][0].windows.start
            found += work.round(dealt, partial(_report, progress, first, windows), progress)
    return {name: torch.cat(parts) if len(parts := [each[name] for each in found]) > 1 else parts[0] for name in layers}


def _report(progress: ProgressCallback, start: int, windows: int, done: int, steps: int) -> None:
    progress(Progress("calibrate", done, steps, "block", f"importance, windows from {start + 1} of {windows}"))


@dataclass(frozen=True)
class _TextBatch:
    """Windows that go through a block together.

    Attributes:
        windows: their numbers.
        place: the batch's number in its part of the text.
    """

    windows: range
    place: int


_Dealt = list[list[_TextBatch]]
"""What is on its way at the same time: of each worker."""


def _rounds(windows: int, length: int, workers: int) -> list[_Dealt]:
    """All batches of the text: in each round as many parts as there are workers, about equally shared out."""
    size, in_part = max(1, _BATCH_TOKENS // length), max(1, AT_A_TIME // length)
    rounds = []
    for start in range(0, windows, workers * in_part):
        batches = [
            _TextBatch(range(first, min(first + size, part + in_part, windows)), place)
            for part in range(start, min(start + workers * in_part, windows), in_part)
            for place, first in enumerate(range(part, min(part + in_part, windows), size))
        ]
        rounds.append([batches[own.start : own.stop] for own in shared_out(len(batches), workers)])
    return rounds


class _Measurement:
    """The shares of all workers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Collection[str],
        input_ids: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Path,
        execution: Execution,
        rounds: Sequence[_Dealt],
    ) -> None:
        architecture = checkpoint.architecture
        device = torch.device(device.type) if execution.apart else device  # a worker sees its own only
        weights = None if sends(execution, device) else checkpoint.weights
        shared = ImportanceInputs(architecture, weights, list(layers), dtype, str(device), scratch)
        self._input_ids, self._execution, self._blocks = input_ids, execution, len(architecture.structure.blocks)
        self._shares = execution.host(ImportanceShare, [(shared,)] * max(map(len, rounds)))
        self._sender = Sender(checkpoint.weights, architecture.structure, execution, device)
        pieces, self._firsts = _pieces_of_part(rounds[0], input_ids.shape[1])
        wanted = {self._firsts[own[0].place] for dealt in rounds for own in dealt} | {0}
        self._draws = DrawsAhead(pieces, wanted, architecture.structure)

    def close(self) -> None:
        """Frees what the shares hold."""
        self._draws.close()
        self._sender.close()
        with suppress(WorkerLostError):
            for each in [share.call(ImportanceShare.close) for share in self._shares]:
                each.result()

    def round(
        self, dealt: _Dealt, report: Callable[[int, int], None], progress: ProgressCallback
    ) -> list[dict[str, Tensor]]:
        """What is found of a round's batches, share by share. If a worker goes meanwhile, all begin the round anew."""

        def renew(error: WorkerLostError) -> None:
            progress(Notice(f"{error.what}; the importance of its windows is measured anew"))
            self._execution.renew(self._shares)

        return begun_anew(partial(self._round, dealt, report), renew)

    def _round(self, dealt: _Dealt, report: Callable[[int, int], None]) -> list[dict[str, Tensor]]:
        shares, blocks, sender = self._shares[: len(dealt)], self._blocks, self._sender
        outside = sender.outside()
        _done(
            share.call(ImportanceShare.begin, [self._input_ids[each.windows] for each in own], outside)
            for share, own in zip(shares, dealt, strict=True)
        )
        for index in range(blocks):
            tensors = sender.block(index, min(index + 1, blocks - 1))
            _done(share.call(ImportanceShare.forward, index, tensors) for share in shares)
            report(index + 1, 2 * blocks)
        states = [self._states(own) for own in dealt]
        _done(share.call(ImportanceShare.at_head, own, outside) for share, own in zip(shares, states, strict=True))
        for index in reversed(range(blocks)):
            tensors = sender.block(index, index - 1)
            _done(share.call(ImportanceShare.back, index, tensors) for share in shares)
            report(2 * blocks - index, 2 * blocks)
        return [later.result() for later in [share.call(ImportanceShare.found) for share in shares]]

    def _states(self, own: Sequence[_TextBatch]) -> dict[int, Tensor]:
        """The generator's before a worker's first batch, and wherever a part begins, by the batch's number."""
        return {
            number: self._draws.before(self._firsts[batch.place])
            for number, batch in enumerate(own)
            if number == 0 or batch.place == 0
        }


def _pieces_of_part(dealt: _Dealt, length: int) -> tuple[list[int], list[int]]:
    """The sizes of all pieces of the first part, and the number of each of its batches' first piece. No part is longer,
    and as far as another goes, its pieces have the same sizes.
    """
    batches = [batch for own in dealt for batch in own]
    last = max(batch.place for batch in batches)
    of_batches = [pieces_at_head(len(batch.windows) * length) for batch in batches[: last + 1]]
    return list(chain.from_iterable(of_batches)), [0, *accumulate(map(len, of_batches))]


def _done(calls: Iterable[Later[None]]) -> None:
    """Makes all calls, then waits for them."""
    for later in list(calls):
        later.result()


def token_weights(importance: Mapping[str, Tensor], layers: Collection[str]) -> Tensor:
    """How much each token counts for layers that share an input: float32 [windows, tokens], 1 in the mean."""
    with single_thread():
        lengths = torch.stack([importance[name].double() for name in layers]).sum(0).sqrt()
        mean = lengths.mean()
        return (lengths / mean if mean > 0 else torch.ones_like(lengths)).float()
