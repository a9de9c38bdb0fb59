"""The merged model, prepared as the reference of a verification."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from qexport.loading.small_files import open_tokenizer
from qexport.merge.merging import Merged
from qexport.pipeline.texts import Evaluation
from qexport.progress import Reporter, silent
from qexport.quantizing.nearest import NearestSource
from qexport.verifying.live_adapter import LiveAdapter
from qexport.verifying.preparation import prepare
from qexport.verifying.reference import Reference
from qexport.verifying.settings import VerifySettings


def prepare_reference(
    merged: Merged,
    evaluation: Evaluation,
    settings: VerifySettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    report: Reporter = silent,
) -> Reference:
    """Measures what the reference alone can tell: the noise floor and the proof of the merge.

    Args:
        merged: the model and what it was merged from.
        evaluation: text and prompts.
        settings: how to compare.
        dtype: what the blocks compute in.
        device: where to compute.
        report: is told of each step.

    Raises:
        InputError: a tensor cannot be read.
        NumericalError: logits hold NaN or Inf.
    """
    checkpoint, adapter = merged.checkpoint, merged.adapter
    live = LiveAdapter(merged.base, adapter.folder) if adapter else None
    reference = Reference(
        merged=checkpoint,
        base=merged.base,
        adapter=adapter.origin if adapter else None,
        nearest=partial(NearestSource, checkpoint.weights),
        prepared=prepare(checkpoint, live, evaluation.held_out, dtype=dtype, device=device, report=report),
        held_out=evaluation.held_out,
        prompts=evaluation.prompts,
        open_tokenizer=partial(open_tokenizer, checkpoint),
        settings=settings,
        dtype=dtype,
        device=device,
    )
    if adapter is None or reference.base_rival is not None:
        return reference
    unmeasured = [*reference.prepared.unconfirmed, "the artifact against the base (the adapter changes shapes)"]
    return replace(reference, prepared=replace(reference.prepared, unconfirmed=unmeasured))
