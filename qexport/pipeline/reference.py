"""The merged model as the thing that artifacts are held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qexport.loading.small_files import open_tokenizer
from qexport.merge.merging import Merged
from qexport.pipeline.texts import Evaluation
from qexport.progress import Reporter, silent
from qexport.quantizing.nearest import NearestSource
from qexport.tensors import Checkpoint
from qexport.verifying.live_adapter import LiveAdapter
from qexport.verifying.preparation import Preparation, prepare
from qexport.verifying.settings import VerifySettings
from qexport.verifying.verification import Given


@dataclass(frozen=True)
class Reference:
    """The merged model, with what it is compared on and what was measured of it alone.

    Attributes:
        merged: the model and what it was merged from.
        evaluation: text and prompts.
        settings: how to compare.
        prepared: the noise floor and the proof of the merge.
        dtype: what the blocks compute in.
        device: where to compute.
    """

    merged: Merged
    evaluation: Evaluation
    settings: VerifySettings
    prepared: Preparation
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def prepare(
        cls,
        merged: Merged,
        evaluation: Evaluation,
        settings: VerifySettings,
        *,
        dtype: torch.dtype,
        device: torch.device,
        report: Reporter = silent,
    ) -> Reference:
        """Measures what the reference alone can tell.

        Raises:
            InputError: a tensor cannot be read.
            NumericalError: logits hold NaN or Inf.
        """
        live = LiveAdapter(merged.base, merged.adapter.folder) if merged.adapter else None
        prepared = prepare(merged.checkpoint, live, evaluation.held_out, dtype=dtype, device=device, report=report)
        found = cls(merged, evaluation, settings, prepared, dtype, device)
        if merged.adapter is not None and found.base is None:
            unmeasured = [*prepared.unconfirmed, "the artifact against the base (the adapter changes shapes)"]
            return replace(found, prepared=replace(prepared, unconfirmed=unmeasured))
        return found

    @property
    def base(self) -> Checkpoint | None:
        """The model without the adapter, where there is one and the adapter leaves its shapes as they are."""
        merged, base = self.merged.checkpoint, self.merged.base
        if self.merged.adapter is None:
            return None
        shapes = ({name: spec.shape for name, spec in each.weights.specs().items()} for each in (merged, base))
        first, second = shapes
        return base if first == second else None

    def given(self) -> Given:
        """The same for the stage. Opens the tokenizer."""
        weights = self.merged.checkpoint.weights
        return Given(
            reference=self.merged.checkpoint,
            base=self.base,
            nearest=lambda grids, transposed: NearestSource(weights, grids, transposed),
            prepared=self.prepared,
            held_out=self.evaluation.held_out,
            prompts=self.evaluation.prompts,
            tokenizer=open_tokenizer(self.merged.checkpoint),
            settings=self.settings,
            dtype=self.dtype,
            device=self.device,
        )
