"""Batches of prompts, padded on the left, and a check that the padding does not change the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

ROWS: Final = 32
"""Prompts in a batch, at most."""

_TOKENS: Final = 4096
"""Prompts and their continuations together: the key-value cache of a batch stays small beside the weights."""


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts, each ending in the last column.

    Attributes:
        indices: of the prompts in the list that they came from.
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
        new_tokens: the most tokens that will follow each prompt.
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
    fits = rows <= ROWS and rows * (length + new_tokens) <= _TOKENS
    return fits and (padded or len(inputs[group[0]]) == length)


def _batch(group: Sequence[int], inputs: Sequence[Sequence[int]], fill: int) -> PromptBatch:
    width = max(len(inputs[index]) for index in group)
    rows = [[fill] * (width - len(inputs[index])) + list(inputs[index]) for index in group]
    masks = [[0] * (width - len(inputs[index])) + [1] * len(inputs[index]) for index in group]
    return PromptBatch(tuple(group), torch.tensor(rows), torch.tensor(masks))


STEPS: Final = 4
"""The prompt itself, and steps that read the key-value cache or a recurrent state."""

MOST_KL: Final = 0.01
"""Rounding stays far below (bfloat16 compared with float32: 0.001 nat), an ignored mask is far above (0.4 nat)."""


@dataclass(frozen=True)
class Padding:
    """Whether prompts of different lengths may share a batch.

    Attributes:
        allowed: False if padding changes the model's predictions; then only prompts of equal length share a batch.
        kl: the mean KL divergence (nats) of the distributions of a few tokens after one prompt, run alone, from those
            when it is run beside a longer one. None if no batch would be padded.
    """

    allowed: bool
    kl: float | None


@torch.no_grad()
def check_padding(model: PreTrainedModel, batches: Sequence[PromptBatch], settings: GenerationConfig) -> Padding:
    """Checks the batch with the most padding: its shortest prompt, alone and beside the longest, with `generate`.

    Args:
        model: with all its weights.
        batches: those that `continue_all` will run.
        settings: from `greedy_settings`.
    """
    most = max(batches, key=lambda batch: batch.padded, default=None)
    if most is None or not most.padded:
        return Padding(allowed=True, kl=None)
    tried = deepcopy(settings)
    tried.max_new_tokens, tried.eos_token_id = min(STEPS, settings.max_new_tokens or STEPS), None
    alone = log_likelihoods(model, most.input_ids[:1, most.padded :], most.attention_mask[:1, most.padded :], tried)
    beside = log_likelihoods(model, most.input_ids[[0, -1]], most.attention_mask[[0, -1]], tried)
    kl = mean_kl(alone, beside)
    return Padding(allowed=kl <= MOST_KL, kl=kl)


def mean_kl(ours: Tensor, theirs: Tensor) -> float:
    """The mean KL divergence (nats) of log-probabilities [tokens, vocabulary]; NaN if they hold NaN."""
    return float((ours.exp() * (ours - theirs)).sum(-1).mean().clamp(min=0.0))


def log_likelihoods(model: PreTrainedModel, ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    """Log-probabilities, float64 [tokens, vocabulary], after the first row, whose last token is repeated at each step.

    Args:
        model: with all its weights.
        ids: int64 [rows, tokens].
        mask: of the same shape, 0 for padding.
        settings: how many tokens to generate.
    """
    assert isinstance(model, GenerationMixin)
    watched = _Watched()
    model.generate(  # type: ignore[misc]  # transformers gives self the type of a protocol
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([watched]),
    )
    return torch.stack(watched.steps)


class _Watched(LogitsProcessor):
    """Records the first row's log-probabilities and repeats its last token: the next input does not depend on them."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores[0].log_softmax(-1, dtype=torch.float64))
        return torch.zeros_like(scores).scatter(1, input_ids[:, -1:], 1.0)
