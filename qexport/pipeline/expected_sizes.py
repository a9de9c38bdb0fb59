"""The sizes that memory, time and disk of a run depend on, from headers and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from qexport.architectures.structure import LinearSpec
from qexport.merge.merging import Merged
from qexport.quantizing.awq import Awq
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.gptq_pass import corrects
from qexport.quantizing.method import Method
from qexport.quantizing.mixed import Mixed
from qexport.tensors import GroupQuantizedSpec
from qexport.text.formats import read_format_prompts
from qexport.text.needles import ANSWER_TOKENS
from qexport.text.prompts import read_prompts
from qexport.text.refusals import read_requests
from qexport.verifying import VerifySettings
from qexport.verifying.verification import has_nearest_rival


@dataclass(frozen=True)
class ContinuedPrompts:
    """Prompts that are continued together.

    Attributes:
        prompts: how many.
        tokens: of each, roughly; they are not counted, since the tokenizer is not opened.
        new_tokens: of each continuation, at most.
        drift: whether both models run along the reference's continuations once more.
    """

    prompts: int
    tokens: int
    new_tokens: int
    drift: bool = False

    @property
    def along(self) -> int:
        """Tokens of the prompts and their continuations, if drift is measured along them."""
        return self.prompts * (self.tokens + self.new_tokens) if self.drift else 0


_PROMPT_TOKENS: Final = 64
"""Of a prompt in a file."""


def _continued(settings: VerifySettings, lengths: Sequence[int]) -> Iterator[ContinuedPrompts]:
    if settings.prompts:
        count = len(read_prompts(Path(settings.prompts)).prompts)
        yield ContinuedPrompts(count, _PROMPT_TOKENS, settings.max_new_tokens)
    if (formats := settings.formats) is not None:
        count = len(read_format_prompts(Path(formats.prompts)).formats)
        yield ContinuedPrompts(count, _PROMPT_TOKENS, formats.max_new_tokens, drift=True)
    if (refusals := settings.refusals) is not None:
        count = len(read_requests(Path(refusals.prompts)).prompt_set.prompts)
        yield ContinuedPrompts(count, _PROMPT_TOKENS, refusals.max_new_tokens)
    if settings.needles:
        yield from (ContinuedPrompts(settings.needles, length, ANSWER_TOKENS) for length in lengths)


class RunSizes:
    """The sizes that memory and time depend on; `bytes_` is that of a value in the merged model's dtype.

    Args:
        merged: the merged model.
        dtype: its dtype.
        quantized: [out, in] of each quantized module, by its path.
        grids: of those that are quantized in groups along their inputs.
        method: None if the artifact is finished.
        verify: None if nothing is measured.
    """

    def __init__(
        self,
        merged: Merged,
        dtype: torch.dtype,
        quantized: Mapping[str, tuple[int, int]],
        grids: Mapping[str, GroupQuantizedSpec],
        *,
        method: Method | None,
        verify: VerifySettings | None,
    ) -> None:
        self.quantized, self.grids, self.method, self.verify = quantized, grids, method, verify
        self.adapter, self.bytes_ = merged.adapter, dtype.itemsize
        self.structure = structure = merged.checkpoint.architecture.structure
        self.counts = {name: math.prod(shape) for name, shape in structure.parameters.items()}
        self.vocabulary, self.hidden = structure.parameters[f"{structure.embedding}.weight"]
        self.head = self.vocabulary * self.hidden
        self.total = sum(self.counts.values())
        in_blocks = sum(each.in_features * each.out_features for each in structure.block_linears)
        self.recoded = in_blocks if merged.base.origin.read_as else 0  # weights that come from codes at each read
        self.blocks = {block: self._in(block) for block in structure.blocks}
        self.block = max(self.blocks.values())
        self.outside = self.total - sum(self.blocks.values())
        self.linears = structure.linears[max(self.blocks, key=lambda name: self.blocks[name])]
        config = merged.checkpoint.architecture.parsed
        experts, used = (getattr(config, name, None) for name in ("num_local_experts", "num_experts_per_tok"))
        self.experts = experts or getattr(config, "num_experts", None) or 1
        self.share = (used or 1) / self.experts if self.experts > 1 else 1.0

    def _in(self, block: str) -> int:
        return sum(self.counts[name] for name in self.structure.parameters_of(block))

    @cached_property
    def continued(self) -> list[ContinuedPrompts]:
        """What is continued: the prompts, and those of the suites."""
        return list(_continued(self.verify, self.lengths)) if self.verify else []

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the windows of the suite of lengths."""
        found = (self.verify.lengths if self.verify else None) or []
        return [length for length in found if length <= (self.structure.context or math.inf)]

    @property
    def runtimes(self) -> int:
        """Runtimes that the artifact is measured through. A run asks no endpoint."""
        through = self.verify.through if self.verify else []
        return sum(each.runtime is not None or self.method is None for each in through)

    @property
    def whole(self) -> int:
        """Bytes of a whole model with its head in float32."""
        return self.total * self.bytes_ + 4 * self.head

    @cached_property
    def widest(self) -> int:
        """Values of a block's largest matrix."""
        return max(linear.out_features * linear.in_features for linear in self.linears)

    @cached_property
    def active(self) -> float:
        """Weights of all blocks that a token is multiplied with."""
        routed = sum(linear.out_features * linear.in_features for linear in self.linears if linear.expert)
        return sum(self.blocks.values()) - routed * (1 - self.share) * len(self.blocks)

    @cached_property
    def working(self) -> float:
        """Bytes of one token's values inside a block's forward: its widest layer's inputs and outputs, in each of the
        experts that it is sent to.
        """
        outs = max(self.sharing(linear) for linear in self.linears)
        routed = max(1.0, self.share * self.experts)
        return routed * (2 * self.bytes_ * outs + 4 * max(linear.in_features for linear in self.linears))

    def sharing(self, linear: LinearSpec) -> int:
        """Outputs of the layers that may have the same input as this one."""
        if linear.expert:
            return 2 * linear.out_features
        return sum(
            other.out_features for other in self.linears if other.in_features == linear.in_features and not other.expert
        )

    @cached_property
    def calibration(self) -> int:
        """Calibration tokens."""
        settings = self.method.calibration_settings if self.method else None
        return settings.samples * settings.sequence_length if settings else 0

    @cached_property
    def gptq(self) -> Gptq | None:
        """GPTQ's settings, also as the methods have them that use its pass."""
        method = self.method.gptq if isinstance(self.method, Mixed | Awq) else self.method
        return method if isinstance(method, Gptq) else None

    @property
    def high_effort(self) -> bool:
        """Whether the importance of tokens is measured, and codes are gone over again."""
        return self.gptq is not None and self.gptq.effort == "high"

    @property
    def streams(self) -> int:
        """How often the calibration text goes through the model: GPTQ may need it in full precision too."""
        settings = self.gptq.calibration if self.gptq is not None else None
        if self.gptq is None or settings is None or all(grid.bits == 8 for grid in self.grids.values()):
            return 1
        return 2 if corrects(self.gptq, settings.samples, settings.sequence_length) else 1

    @property
    def coded(self) -> int:
        """Weights that are quantized."""
        return sum(map(math.prod, self.quantized.values()))

    @property
    def compared(self) -> int:
        """Models that run side by side: reference, artifact, and the rivals that apply."""
        return 2 + has_nearest_rival(self.grids) + (self.adapter is not None)
