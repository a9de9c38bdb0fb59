"""What held-out windows do not show of a graph: padding, and decoding with a cache. Found by trying."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qexport.artifact.report import Check
from qexport.verifying.padding import STEPS, check_padding, log_likelihoods, mean_kl
from qexport.verifying.prompt_batches import batch_prompts

_MOST_KL: Final = 1e-3
"""Nats. Rounding in float16 stays a hundred times below; a mask or a state that is not heeded is far above."""

_TOKENS: Final = 96
"""Of the longer prompt."""

_SETTINGS: Final = GenerationConfig(do_sample=False, num_beams=1, use_cache=True, max_new_tokens=STEPS, pad_token_id=0)


@torch.no_grad()
def check_graph(model: PreTrainedModel, input_ids: Tensor) -> list[Check]:
    """Tries whether left padding stays out of the arithmetic, and whether decoding with the cache predicts what one
    forward over all tokens does. Both are the graph's own affair, so no reference is needed.

    Args:
        model: the graph.
        input_ids: int64 [windows, sequence_length], held-out text.
    """
    longer = input_ids[0, : min(_TOKENS, max(2, input_ids.shape[1] - STEPS))].tolist()
    shorter = input_ids[-1, : max(1, len(longer) // 3)].tolist()
    return [
        _check("padding", "left padding", _padding(model, shorter, longer)),
        _check("cached decoding", "decoding with the cache", _decoding(model, torch.tensor([longer]))),
    ]


def _check(name: str, what: str, kl: float) -> Check:
    changes = f"{what} changes the predictions by {kl:.2g} nats"
    return Check(gate="graph", name=name, passed=kl <= _MOST_KL, detail=changes)


def _padding(model: PreTrainedModel, shorter: list[int], longer: list[int]) -> float:
    batches = batch_prompts([shorter, longer], new_tokens=STEPS, padded=True, fill=0)
    return check_padding(model, batches, _SETTINGS).kl or 0.0


def _decoding(model: PreTrainedModel, ids: Tensor) -> float:
    """`log_likelihoods` goes on with the last token again and again; so does the forward without a cache."""
    cached = log_likelihoods(model, ids, torch.ones_like(ids), _SETTINGS)
    full = torch.cat([ids, ids[:, -1:].expand(1, STEPS - 1)], 1)
    logits = model(input_ids=full.to(model.device), use_cache=False, logits_to_keep=STEPS).logits[0]
    return mean_kl(logits.log_softmax(-1, dtype=torch.float64), cached)
