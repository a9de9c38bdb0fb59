"""The merged model as the thing that artifacts are measured against, and on what."""

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
    """What an artifact is measured against, and on what.

    Attributes:
        merged: the merged model, read from its source again.
        base: the model without the adapter; the merged model's base where there is none.
        adapter: where the adapter came from; None where there is none.
        nearest: makes the merged model rounded to nearest.
        prepared: what was measured of the merged model alone.
        held_out: the text, as many windows as may be taken.
        prompts: what both models continue; None for nothing.
        open_tokenizer: opens the merged model's tokenizer, tens of megabytes that are not held while a run quantizes.
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
        """The merged model's. It is opened when it is first asked for, and kept."""
        return self.open_tokenizer()

    @property
    def base_rival(self) -> Checkpoint | None:
        """The model without the adapter, where there is one and the adapter leaves its shapes as they are."""
        if self.adapter is None:
            return None
        merged, base = (
            {name: spec.shape for name, spec in each.weights.specs().items()} for each in (self.merged, self.base)
        )
        return self.base if merged == base else None

    def runner(self, checkpoint: Checkpoint) -> BlockRunner:
        """Runs a model as the merged one is run."""
        return BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=self.dtype, device=self.device)
