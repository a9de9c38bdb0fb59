"""What can be measured of the reference alone, before hours of work go into an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qexport.artifact.figures import Figure
from qexport.progress import Notice, Reporter, silent
from qexport.statistics.samples import NOT_NEGATIVE
from qexport.tensors import Checkpoint
from qexport.text.held_out import HeldOut
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.estimates import Units, window_means
from qexport.verifying.live_adapter import LiveAdapter, NotMeasured, compare_merge
from qexport.verifying.noise_floor import noise_floor, wider
from qexport.verifying.steps import Steps


@dataclass(frozen=True)
class Preparation:
    """The reference's own figures.

    Attributes:
        noise_floor: see `qexport.verifying.noise_floor`; by figure.
        figures: `merge_kl` where there is an adapter and it could be measured.
        unconfirmed: what could not be measured, and why.
    """

    noise_floor: Mapping[str, float]
    figures: Sequence[Figure] = ()
    unconfirmed: Sequence[str] = ()


def prepare(
    reference: Checkpoint,
    live: LiveAdapter | None,
    held_out: HeldOut,
    *,
    dtype: torch.dtype,
    device: torch.device,
    report: Reporter = silent,
) -> Preparation:
    """Measures the noise floor, and holds the merge against the adapter as PEFT computes it.

    Args:
        reference: the merged model.
        live: base and adapter; None where nothing was merged.
        held_out: the text.
        dtype: what the blocks compute in: the merged model's dtype.
        device: where to compute.
        report: is told of each step.

    Raises:
        InputError: a tensor cannot be read.
        NumericalError: logits hold NaN or Inf.
    """
    steps = Steps(report, "prepare")
    floor = noise_floor(reference, held_out.input_ids, dtype=dtype, device=device, steps=steps)
    if live is None:
        return Preparation(floor)
    try:
        tokens = compare_merge(reference, live, held_out.input_ids, dtype=wider(dtype), device=device, steps=steps)
    except NotMeasured as reason:
        cause = f" ({reason.__cause__})" if reason.__cause__ else ""
        report(Notice(f"the merge was not held against PEFT: {reason}{cause}"))
        return Preparation(floor, unconfirmed=[f"the merge against PEFT ({reason})"])
    return Preparation(floor, [_merge_kl(tokens, floor["mean_kl"])])


def _merge_kl(tokens: TokenFigures, floor: float) -> Figure:
    """Its gate is decided on the interval for a fixed number of windows, since more are never added."""
    windows, predicted = tokens.kl.shape
    units = Units([None] * windows, "window", predicted, windows)
    found = units.mean("merge_kl", window_means(tokens.kl), NOT_NEGATIVE)
    ends = {"sequence_low": found.low, "sequence_high": found.high}
    return found.model_copy(update={**ends, "noise_floor": floor})
