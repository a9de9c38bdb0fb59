"""Whether padding on the left stays out of a model's arithmetic, found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from qexport.verifying.prompt_batches import PromptBatch

STEPS: Final = 4
"""The prompt itself, and steps that read what the key-value cache or a recurrent state holds of it."""

MOST_KL: Final = 0.01
"""Rounding stays far below (bfloat16 against float32: 0.001 nat), a mask that is not heeded far above (0.4 nat)."""


@dataclass(frozen=True)
class Padding:
    """Whether prompts of different lengths may share a batch.

    Attributes:
        allowed: False where the model does not leave padding out of its arithmetic; then only equal lengths share one.
        kl: what padding changes: the mean KL divergence (nats) of the distributions of a few tokens after one prompt,
            alone against beside a longer one. None where no batch would be padded.
    """

    allowed: bool
    kl: float | None


@torch.no_grad()
def check_padding(model: PreTrainedModel, batches: Sequence[PromptBatch], settings: GenerationConfig) -> Padding:
    """Tries the batch with the most padding: its shortest prompt alone and beside the longest, as `generate` runs them.

    Args:
        model: with all its weights.
        batches: as `continue_all` will take them.
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
    """The mean KL divergence (nats) of log-probabilities [tokens, vocabulary]; NaN where there is one."""
    return float((ours.exp() * (ours - theirs)).sum(-1).mean().clamp(min=0.0))


def log_likelihoods(model: PreTrainedModel, ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    """Log-probabilities, float64 [tokens, vocabulary], behind the first row. Its last token is taken again each time.

    Args:
        model: with all its weights.
        ids: int64 [rows, tokens].
        mask: the same, 0 for padding.
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
    """Notes the first row's log-probabilities and goes on with its last token: what follows does not depend on them."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores[0].log_softmax(-1, dtype=torch.float64))
        return torch.zeros_like(scores).scatter(1, input_ids[:, -1:], 1.0)
