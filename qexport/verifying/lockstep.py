"""Several models side by side, block by block: never more than one block's weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from qexport.architectures.runner import Batch, BlockRunner

BATCH_TOKENS: Final = 4096
"""Tokens that go through a block at a time."""


def windows_at_once(sequence_length: int) -> int:
    """How many windows make a batch."""
    return max(1, BATCH_TOKENS // sequence_length)


def run_in_lockstep(
    runners: Sequence[BlockRunner], input_ids: Tensor, finished: Callable[[int], None]
) -> list[list[Batch]]:
    """The hidden states behind the last block, for each model.

    Each block is run by one model, given back, and then run by the next.

    Args:
        runners: models with the same number of blocks.
        input_ids: int64 [windows, sequence_length].
        finished: is told the number of blocks that all models have run.

    Returns:
        One list of batches a model, with the same windows in the same order.
    """
    batches = [runner.embed(input_ids, windows_at_once(input_ids.shape[1])) for runner in runners]
    for index in range(len(runners[0].structure.blocks)):
        for runner, own in zip(runners, batches, strict=True):
            with runner.block(index) as block:
                for batch in own:
                    runner.forward(index, block, batch)
        finished(index + 1)
    return batches
