"""Prompts side by side in one forward, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_ROWS: Final = 32
_TOKENS: Final = 4096
"""Prompts and their continuations together: the key-value cache of a batch stays small beside the weights."""


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts, each ending in the last column.

    Attributes:
        indices: the prompts' places in the list that they came from.
        input_ids: int64 [rows, width].
        attention_mask: int64 [rows, width], 0 where a row is padded.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def padded(self) -> int:
        """Tokens of padding in the shortest row."""
        return self.input_ids.shape[1] - int(self.attention_mask.sum(1).min())


def batch_prompts(inputs: Sequence[Sequence[int]], *, new_tokens: int, padded: bool, fill: int) -> list[PromptBatch]:
    """All prompts, sorted by length and cut into batches.

    Args:
        inputs: token ids, at least one in each.
        new_tokens: how many tokens will follow each prompt at most.
        padded: whether lengths may differ within a batch.
        fill: the token to pad with.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(inputs)), key=lambda index: len(inputs[index])):
        if not groups or not _joins(groups[-1], len(inputs[index]), inputs, new_tokens, padded=padded):
            groups.append([])
        groups[-1].append(index)
    return [_batch(group, inputs, fill) for group in groups]


def _joins(group: list[int], length: int, inputs: Sequence[Sequence[int]], new_tokens: int, *, padded: bool) -> bool:
    rows = len(group) + 1
    fits = rows <= _ROWS and rows * (length + new_tokens) <= _TOKENS
    return fits and (padded or len(inputs[group[0]]) == length)


def _batch(group: Sequence[int], inputs: Sequence[Sequence[int]], fill: int) -> PromptBatch:
    width = max(len(inputs[index]) for index in group)
    rows = [[fill] * (width - len(inputs[index])) + list(inputs[index]) for index in group]
    masks = [[0] * (width - len(inputs[index])) + [1] * len(inputs[index]) for index in group]
    return PromptBatch(tuple(group), torch.tensor(rows), torch.tensor(masks))
