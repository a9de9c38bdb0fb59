"""Several models side by side, block by block: never more than one block's weights in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner

BATCH_TOKENS: Final = 4096
"""Tokens that go through a block at a time."""


def windows_at_once(sequence_length: int) -> int:
    """How many windows make a batch."""
    return max(1, BATCH_TOKENS // sequence_length)


def run_in_lockstep(
    runners: Sequence[BlockRunner],
    input_ids: Tensor,
    finished: Callable[[int], None],
    *,
    windows: Sequence[int] | None = None,
    drift: bool = True,
) -> tuple[list[list[Batch]], list[float]]:
    """The hidden states behind the last block, for each model.

    Each block is run by one model, given back, and then run by the next.

    Args:
        runners: the models, with the same number of blocks.
        input_ids: int64 [windows, sequence_length].
        finished: is told the number of blocks that all models have run.
        windows: how many of the first windows each model runs; all where None. The first model runs all.
        drift: whether the second model runs all too, and is followed.

    Returns:
        One list of batches a model, with the same windows in the same order; and, where `drift` is asked for, how far
        the second model's hidden states are from the first one's behind each block: the norm of the difference over
        the norm of the first one's.
    """
    at_once, counts = windows_at_once(input_ids.shape[1]), windows or [len(input_ids)] * len(runners)
    batches = [runner.embed(input_ids[:count], at_once) for runner, count in zip(runners, counts, strict=True)]
    errors = []
    for index in range(len(runners[0].structure.blocks)):
        for runner, own in zip(runners, batches, strict=True):
            with runner.block(index) as block:
                for batch in own:
                    runner.forward(index, block, batch)
        if drift:
            errors.append(_relative_error(batches[0], batches[1]))
        finished(index + 1)
    return batches, errors


def _relative_error(ours: Sequence[Batch], theirs: Sequence[Batch]) -> float:
    """In float64 a window at a time, summed in an order that no number of threads changes."""
    difference, norm = 0.0, 0.0
    for own, other in zip(ours, theirs, strict=True):
        for states, others in zip(own.hidden, other.hidden, strict=True):
            wide = states.to(torch.float64)
            difference += _sum_of_squares(wide - others.to(torch.float64))
            norm += _sum_of_squares(wide)
    return math.sqrt(difference / norm) if norm else 0.0


def _sum_of_squares(values: Tensor) -> float:
    return math.fsum(values.square().sum(-1).tolist())
