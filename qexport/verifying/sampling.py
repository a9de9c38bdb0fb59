"""Sampled continuations that depend on a seed and on the prompt, on nothing else.

The likeliest token after adding noise from the Gumbel distribution to the log-probabilities is a sample from them
(Gumbel 1954; Maddison, Tarlow and Minka 2014). The noise is drawn for each prompt by itself and is the same for both
models: as long as they agree, they draw the same tokens, and neither other prompts nor batches have a say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from qexport.verifying.settings import SamplingSettings


def sampling_noise(settings: SamplingSettings, ids: Sequence[str], sample: int) -> LogitsProcessorList:
    """What turns the likeliest token into a sample: temperature, top-p, and noise.

    Args:
        settings: the recipe's `verify.sampling`.
        ids: the prompts of a batch, in its order.
        sample: which of the samples of each prompt, from 0.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    processors.append(_GumbelNoise([_generator(settings.seed, sample, name) for name in ids]))
    return processors


class _GumbelNoise(LogitsProcessor):
    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self._generators]
        return scores - torch.stack(draws).log().to(scores.device)


def _generator(seed: int, sample: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {sample} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
