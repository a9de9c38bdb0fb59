"""Prompts side by side in one forward, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

_ROWS: Final = 32
_TOKENS: Final = 4096
"""Prompts and their continuations together: the key-value cache of a batch stays small beside the weights."""

_MOST_KL: Final = 0.01
"""Rounding stays far below (bfloat16 against float32: 0.001 nat), a mask that is not heeded far above (0.4 nat)."""


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


@dataclass(frozen=True)
class Padding:
    """Whether prompts of different lengths may share a batch.

    Attributes:
        allowed: False where the model does not leave padding out of its arithmetic; then only equal lengths share one.
        kl: what padding changes, as KL divergence (nats) of the next token's distribution after one prompt, alone
            against beside a longer one. None where no batch would be padded.
    """

    allowed: bool
    kl: float | None


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


@torch.no_grad()
def check_padding(model: PreTrainedModel, batches: Sequence[PromptBatch]) -> Padding:
    """Tries the batch with the most padding: its shortest prompt alone, and beside the longest."""
    most = max(batches, key=lambda batch: batch.padded, default=None)
    if most is None or not most.padded:
        return Padding(allowed=True, kl=None)
    alone, beside = (
        _next_token(model, ids, mask)
        for ids, mask in (
            (most.input_ids[:1, most.padded :], most.attention_mask[:1, most.padded :]),
            (most.input_ids[[0, -1]], most.attention_mask[[0, -1]]),
        )
    )
    kl = max(0.0, float((alone.exp() * (alone - beside)).sum()))
    return Padding(allowed=kl <= _MOST_KL, kl=kl)


def _next_token(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    logits = last_logits(model, input_ids, attention_mask, 1)
    return logits[0, 0].log_softmax(-1, dtype=torch.float64)


def last_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
    """The logits [rows, count, vocabulary] of the last columns; positions are counted from each row's first token."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    on_device: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = model(**on_device, use_cache=False, logits_to_keep=count).logits
    assert isinstance(logits, Tensor)
    return logits
