"""The merged model that artifacts are compared with, and what is measured with it alone: noise floor and merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import Figure
from qexport.progress import Notice, ProgressCallback, Steps, silent
from qexport.statistics.samples import NOT_NEGATIVE
from qexport.tensors import GroupQuantizedSpec, Origin, Quantized, WeightSource
from qexport.text.prompts import EncodedPrompts
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.divergence import compare_two
from qexport.verifying.document_sums import Baseline
from qexport.verifying.estimates import divergence_figures, ratio_values
from qexport.verifying.kept import NOTHING_KEPT, Kept
from qexport.verifying.live_adapter import ComparedMerge, LiveAdapter, NotMeasured, compare_merge
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.suites import NO_SUITES, Suites
from qexport.verifying.units import Units, measured_once

TOKENS: Final = 1024
"""Enough: the divergence between two dtypes is nearly the same on every text."""

_WINDOWS: Final = 2
"""Used at least, whatever their length."""


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for models in 16 bits, float64 for those in 32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def noise_floor(
    reference: Checkpoint,
    input_ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    steps: Steps,
) -> Mapping[str, float]:
    """Every teacher-forced figure of the reference, compared with the same weights computed in a wider dtype.

    Args:
        reference: the merged model.
        input_ids: int64 [windows, sequence_length]; the first ones are used, with at least `TOKENS` tokens.
        dtype: what the blocks compute in.
        device: where to compute.
        steps: counts the steps.

    Returns:
        The figures' values by their names.
    """
    ids = input_ids[: max(_WINDOWS, math.ceil(TOKENS / input_ids.shape[1]))]
    runners = [_runner(reference, kind, device) for kind in (dtype, wider(dtype))]
    blocks, tokens = len(runners[0].structure.blocks), len(runners) * ids.numel()
    steps.expect(blocks)
    batches, _ = run_in_lockstep(
        runners, ids, lambda block: steps.finished_block("noise floor", block, blocks, tokens), drift=False
    )
    found = compare_two((runners[0], runners[1]), (batches[0], batches[1]), ids)
    units = Units([None] * len(ids), "window", found.kl.shape[1], len(ids))
    return {figure.name: figure.value for figure in divergence_figures(found, units)}


def _runner(reference: Checkpoint, dtype: torch.dtype, device: torch.device) -> BlockRunner:
    return BlockRunner(reference.architecture.in_dtype(dtype), reference.weights, dtype=dtype, device=device)


@dataclass(frozen=True)
class Preparation:
    """Figures of the reference alone.

    Attributes:
        noise_floor: by figure; see the function `noise_floor`.
        figures: `merge_kl` and `merge_error` if there is an adapter and they could be measured.
        unconfirmed: what could not be measured, and why.
    """

    noise_floor: Mapping[str, float]
    figures: Sequence[Figure] = ()
    unconfirmed: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for `of`."""
        return {
            "noise_floor": dict(self.noise_floor),
            "figures": [figure.model_dump(mode="json") for figure in self.figures],
            "unconfirmed": list(self.unconfirmed),
        }

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Preparation:
        """From the values that `as_dict` gave."""
        figures = [Figure.model_validate(figure) for figure in found["figures"]]
        return cls(found["noise_floor"], figures, found["unconfirmed"])


def prepare(
    reference: Checkpoint,
    live: LiveAdapter | None,
    held_out: HeldOut,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: ProgressCallback = silent,
) -> Preparation:
    """Measures the noise floor, and compares the merge with the adapter as PEFT computes it.

    Args:
        reference: the merged model.
        live: base and adapter; None if nothing was merged.
        held_out: the text.
        dtype: what the blocks compute in: the merged model's dtype.
        device: where to compute.
        progress: is called with each step.

    Raises:
        InputError: a tensor cannot be read.
        NumericalError: logits hold NaN or Inf.
    """
    steps = Steps(progress, "prepare")
    floor = noise_floor(reference, held_out.input_ids, dtype=dtype, device=device, steps=steps)
    if live is None:
        return Preparation(floor)
    try:
        found = compare_merge(reference, live, held_out.input_ids, dtype=wider(dtype), device=device, steps=steps)
    except NotMeasured as reason:
        cause = f" ({reason.__cause__})" if reason.__cause__ else ""
        progress(Notice(f"the merge was not compared with PEFT: {reason}{cause}"))
        return Preparation(floor, unconfirmed=[f"the merge against PEFT ({reason})"])
    return Preparation(floor, merge_figures(found, floor["mean_kl"], dtype))


def merge_figures(found: ComparedMerge, floor: float, dtype: torch.dtype) -> list[Figure]:
    """`merge_kl`, and `merge_error` if the adapter has an effect on the text.

    The unrounded merge differs from the adapter in PEFT by float32's rounding alone. Its noise floor is estimated from
    that of the narrower dtype: as if divergences grew with the rounding step, while most grow with its square. (Where
    experts are chosen, noise changes the choice of a few tokens, whose number grows with the step.)

    Args:
        found: the divergences.
        floor: the noise floor of `mean_kl`.
        dtype: the merged model's.
    """
    windows, predicted = found.merged.kl.shape
    units = Units([None] * windows, "window", predicted, windows)
    figures = [_fixed(units.mean("merge_kl", units.means(found.merged.kl), NOT_NEGATIVE), floor)]
    errors, effects = units.means(found.unrounded.kl), units.means(found.base.kl)
    effect = float(effects.mean())
    if effect > 0:
        noise = floor * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps / effect
        figures.append(_fixed(units.mean("merge_error", ratio_values(errors, effects), NOT_NEGATIVE), noise))
    return figures


def _fixed(figure: Figure, floor: float) -> Figure:
    """The gate is decided on the interval for a fixed number of windows, since more are never added."""
    return measured_once(figure).model_copy(update={"noise_floor": floor})


Nearest = Callable[[Mapping[str, GroupQuantizedSpec], frozenset[str]], WeightSource]
"""From the grids of an artifact's layers, and the layers whose weights are [in, out] in files, to the merged model
rounded to nearest on those grids."""


Rounding = Callable[[Tensor], Quantized]
"""How a method rounds a matrix [out, in], each weight on its own."""

RoundingOf = Callable[[Tensor, Quantized], Rounding | None]
"""How the codes of a matrix [out, in] were found, if they are exactly those that a method gives by rounding; else
None."""


@dataclass(frozen=True)
class Reference:
    """What an artifact is compared with, and the text and prompts that both are measured on.

    Attributes:
        merged: the merged model, read from its source again.
        base: the base model, without the adapter.
        adapter: where the adapter came from; None if there is no adapter.
        changed: the tensors that the adapter changes, by their names in the files.
        nearest: makes the merged model rounded to nearest.
        rounding_of: recognizes the codes of methods that round each weight on its own.
        prepared: what was measured with the merged model alone.
        held_out: the text, as many windows as may be used.
        prompts: what both models continue; None for no prompts.
        suites: what else they are asked.
        open_tokenizer: opens the merged model's tokenizer, whose tens of megabytes are not in memory while a run
            quantizes.
        settings: the recipe's `verify`.
        dtype: what the blocks compute in: the merged model's dtype.
        device: where to compute.
        baseline: the release that artifacts are compared with; None for none.
        unrounded: the merged model before its tensors are rounded to its dtype; None if that is not known.
        kept: what other artifacts' measurements have left, and this one's leaves.
        ends_early: whether an artifact is not measured further once one of its gates has failed.
    """

    merged: Checkpoint
    base: Checkpoint
    adapter: Origin | None
    changed: frozenset[str]
    nearest: Nearest
    rounding_of: RoundingOf
    prepared: Preparation
    held_out: HeldOut
    prompts: EncodedPrompts | None
    open_tokenizer: Callable[[], PreTrainedTokenizerBase]
    settings: VerifySettings
    dtype: torch.dtype
    device: torch.device
    suites: Suites = NO_SUITES
    baseline: Baseline | None = None
    unrounded: Checkpoint | None = None
    kept: Kept = NOTHING_KEPT
    ends_early: bool = False

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
