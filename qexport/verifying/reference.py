"""The merged model that artifacts are compared with, and the text and prompts that both are measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.tensors import GroupQuantizedSpec, Origin, WeightSource
from qexport.text.held_out import HeldOut
from qexport.text.prompts import EncodedPrompts
from qexport.verifying.preparation import Preparation
from qexport.verifying.settings import VerifySettings

Nearest = Callable[[Mapping[str, GroupQuantizedSpec], frozenset[str]], WeightSource]
"""From the grids of an artifact's layers, and the layers whose weights are [in, out] in files, to the merged model
rounded to nearest on those grids."""


@dataclass(frozen=True)
class Reference:
    """What an artifact is compared with, and the text and prompts that both are measured on.

    Attributes:
        merged: the merged model, read from its source again.
        base: the base model, without the adapter.
        adapter: where the adapter came from; None if there is no adapter.
        nearest: makes the merged model rounded to nearest.
        prepared: what was measured with the merged model alone.
        held_out: the text, as many windows as may be used.
        prompts: what both models continue; None for no prompts.
        open_tokenizer: opens the merged model's tokenizer, whose tens of megabytes are not in memory while a run
            quantizes.
        settings: the recipe's `verify`.
        dtype: what the blocks compute in: the merged model's dtype.
        device: where to compute.
    """

    merged: Checkpoint
    base: Checkpoint
    adapter: Origin | None
    nearest: Nearest
    prepared: Preparation
    held_out: HeldOut
    prompts: EncodedPrompts | None
    open_tokenizer: Callable[[], PreTrainedTokenizerBase]
    settings: VerifySettings
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The merged model's tokenizer. It is opened at the first use, and kept."""
        return self.open_tokenizer()

    @property
    def base_rival(self) -> Checkpoint | None:
        """The model without the adapter; None if there is no adapter, or if the adapter changes shapes."""
        if self.adapter is None:
            return None
        merged, base = (
            {name: spec.shape for name, spec in each.weights.specs().items()} for each in (self.merged, self.base)
        )
        return self.base if merged == base else None

    def runner(self, checkpoint: Checkpoint) -> BlockRunner:
        """Runs a model block by block, with the dtype and device of the merged one."""
        return BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=self.dtype, device=self.device)
