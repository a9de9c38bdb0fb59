"""What held-out windows do not show of a graph: padding, and decoding with a cache. Found by trying."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qexport.artifact.report import Check
from qexport.verifying.padding import MOST_KL, STEPS, check_padding, log_likelihoods, mean_kl
from qexport.verifying.prompt_batches import batch_prompts

_MOST_KL: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-4, torch.float16: MOST_KL}
"""Nats, by the graph's activations. In float32 rounding stays below a millionth, and the past of one layer that is not
heeded may change no more than a thousandth; float16 leaves less to be seen, least where inputs are rounded to 8 bits.
"""

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
        _check("padding", "left padding", _padding(model, shorter, longer), _MOST_KL[model.dtype]),
        _check("cached decoding", "decoding with the cache", _decoding(model, longer), _MOST_KL[model.dtype]),
    ]


def _check(name: str, what: str, kl: float, most: float) -> Check:
    changes = f"{what} changes the predictions by {kl:.2g} nats"
    return Check(gate="graph", name=name, passed=kl <= most, detail=changes)


def _padding(model: PreTrainedModel, shorter: list[int], longer: list[int]) -> float:
    batches = batch_prompts([shorter, longer], new_tokens=STEPS, padded=True, fill=0)
    return check_padding(model, batches, _SETTINGS).kl or 0.0


def _decoding(model: PreTrainedModel, prompt: list[int]) -> float:
    """`log_likelihoods` goes on with the last token again and again; so does the forward without a cache."""
    ids = torch.tensor([prompt])
    cached = log_likelihoods(model, ids, torch.ones_like(ids), _SETTINGS)
    full = torch.cat([ids, ids[:, -1:].expand(1, STEPS - 1)], 1)
    logits = model(input_ids=full.to(model.device), use_cache=False, logits_to_keep=STEPS).logits[0]
    return mean_kl(logits.log_softmax(-1, dtype=torch.float64), cached)
