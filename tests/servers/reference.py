"""What our own reader says of an artifact: greedy tokens and log-probabilities, from dequantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexport.architectures.runner import BlockRunner
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.runtimes import ServedDtype

TIE = 0.5
"""In nats. Where our choice is no further ahead, the other side may choose another token."""


@dataclass(frozen=True)
class Tolerance:
    """How far a server may be from us.

    Attributes:
        dtype: what both sides compute in.
        mean: of the distances of the prompts' log-probabilities.
        flips: tokens of another choice where our margin is above `TIE`, as a fraction.
    """

    dtype: ServedDtype
    mean: float
    flips: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """How a server's answers compare with ours.

    Attributes:
        equal: greedy tokens that are our choice after the same text.
        ties: tokens that are not, where our margin is below `TIE`.
        flips: the other tokens.
        margin: how far our choice was ahead where theirs was another, at most, in nats.
        mean: the mean distance of the prompts' log-probabilities.
        largest: the largest of them.
    """

    equal: int
    ties: int
    flips: int
    margin: float
    mean: float
    largest: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the server computes the same model."""
        tokens = self.equal + self.ties + self.flips
        return self.flips <= tolerance.flips * tokens and self.mean <= tolerance.mean


@torch.no_grad()
def compare(folder: Path, prompts: list[list[int]], answers: list[dict[str, Any]], dtype: str) -> Comparison:
    """Reads the folder and judges every token of the answers after the text that the server saw."""
    equal = ties = flips = 0
    largest_margin = 0.0
    distances: list[Tensor] = []
    precision: torch.dtype = getattr(torch, dtype)
    with SafetensorsWeights(folder, dtype=precision) as source:
        runner = BlockRunner(source.architecture, source, dtype=precision, device=torch.device("cpu"))
        int8 = set(source.quantized) if (source.quantization or {}).get("format") == "int-quantized" else set()
        with runner.whole() as model, _int8_activations(model, int8):
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = torch.tensor([prompt + answer["tokens"]])
                ours = model(ids, use_cache=False).logits[0].log_softmax(-1)
                known = ours[: len(prompt) - 1].gather(1, ids[0, 1 : len(prompt), None])[:, 0]
                distances.append((known - torch.tensor(answer["prompt_logprobs"])).abs())
                chosen = ours[len(prompt) - 1 : -1]
                margin = chosen.amax(1) - chosen.gather(1, ids[0, len(prompt) :, None])[:, 0]
                equal += int((margin == 0).sum())
                ties += int(((margin > 0) & (margin <= TIE)).sum())
                flips += int((margin > TIE).sum())
                largest_margin = max(largest_margin, float(margin.max()))
    off = torch.cat(distances)
    return Comparison(equal, ties, flips, largest_margin, float(off.mean()), float(off.max()))


@contextmanager
def _int8_activations(model: nn.Module, modules: set[str]) -> Iterator[None]:
    """W8A8's servers round the inputs of quantized layers: symmetric int8, one scale a token."""
    hooks = [model.get_submodule(module).register_forward_pre_hook(_rounded) for module in sorted(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values = inputs[0].float()
    scales = values.abs().amax(-1, keepdim=True) / 127
    return ((values / scales.clamp(min=1e-10)).round().clamp(-127, 127).mul(scales).to(inputs[0].dtype), *inputs[1:])
