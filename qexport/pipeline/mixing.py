"""The method `mixed` in a run: its layers are measured, and each unit of them gets its bits and groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qexport.amounts import counted
from qexport.errors import CompatibilityError
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution
from qexport.export.layouts import Layout
from qexport.pipeline.choice_space import ChoiceSpace
from qexport.pipeline.made_choice import Choice, allocation_of
from qexport.progress import ProgressCallback
from qexport.quantizing.allocation import Allocation
from qexport.quantizing.gptq_pass import corrects
from qexport.quantizing.selection import solver_options
from qexport.quantizing.sensitivity import Unit, measure
from qexport.tensors import CalibrationSet

_AIMED: Final = 0.85
"""Of a target of quality, for which a choice is made: the estimates were up to 6 % too low, and the gate wants the end
of the measured interval within the target.
"""

_NOISE: Final = 1.2
"""Losses whose ratio is closer to one are taken as equal. On Gemma3-270M a choice that was expected to cost a tenth
less than 4 bits in groups of 32 cost 8 % more."""

_HESSIAN_WINDOWS: Final = 2
"""For each window in which the predictions are looked at."""

_UNCORRECTED: Final = 0.65
"""What is left of the divergence where each layer makes up for the quantized ones before it (`gptaq_alpha`), of which
the measurement of single layers knows nothing: 0.65 and 0.67 on SmolLM2, 0.65 and 0.73 on Gemma3-270M."""


def measure_units(
    space: ChoiceSpace,
    calibration: CalibrationSet,
    *,
    device: torch.device,
    execution: Execution = INLINE,
    progress: ProgressCallback,
) -> list[list[float]]:
    """Measures what each option of each unit costs: the mean KL divergence in nats per token, if it is alone.

    Args:
        space: what may be chosen.
        calibration: the text to measure on.
        device: where to compute.
        execution: the workers.
        progress: is called with each block.

    Raises:
        CompatibilityError: there is too little text.
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
    """
    input_ids, hessian_ids = _measured_on(space, calibration)
    effects = measure(
        space.checkpoint,
        _measured(space),
        input_ids,
        hessian_ids,
        device=device,
        execution=execution,
        progress=progress,
    )
    share = _UNCORRECTED if corrects(space.method.gptq, *calibration.input_ids.shape) else 1.0
    found = [[share * loss for loss in each.losses] for each in effects]
    return [
        [*losses, *[0.0] * (len(options) - len(losses))]  # 16 bits, the last option, cost nothing
        for losses, options in zip(found, space.options, strict=True)
    ]


def choose(space: ChoiceSpace, layout: Layout, losses: list[list[float]]) -> Choice:
    """Chooses for the recipe's target.

    Args:
        space: what may be chosen.
        layout: the one whose bytes are counted, as planned with the first option of each unit.
        losses: of the space's units, from `measure_units`.

    Raises:
        CompatibilityError: the target is out of reach.
    """
    allocation, target = allocation_of(space, layout, losses), space.method.target
    if target.bits_per_weight is not None:
        allowed = _allowed(space, layout, target.bits_per_weight)
        chosen = allocation.within(allowed)
        if chosen is None:
            raise _out_of_reach(space, layout, allocation, target.bits_per_weight)
        chosen = list(_or_alike(space, allocation, chosen, allowed))
    else:
        assert target.mean_kl is not None
        chosen = _reaching(allocation, target.mean_kl)
    return Choice(losses, chosen, allocation.loss(chosen))


def _or_alike(space: ChoiceSpace, allocation: Allocation, chosen: Sequence[int], allowed: int) -> Sequence[int]:
    """The same option for all units, if it has no more bytes than are allowed and its loss is equal within the noise.
    At the size of uniform bits there is next to nothing to gain.
    """
    everywhere = [option for option in space.offered if all(option in options for options in space.options)]
    alike = [[options.index(option) for options in space.options] for option in everywhere]
    fitting = [each for each in alike if allocation.total(each) <= allowed]
    best = min(fitting, key=allocation.loss, default=chosen)
    return best if allocation.loss(best) <= _NOISE * allocation.loss(chosen) else chosen


def _reaching(allocation: Allocation, mean_kl: float) -> list[int]:
    """The smallest choice that is expected to keep to a part of a mean KL divergence; else the largest, if that is
    expected to keep to all of it.
    """
    chosen = allocation.reaching(_AIMED * mean_kl)
    if chosen is not None:
        return chosen
    least = allocation.loss(allocation.lossless)
    if least > mean_kl:
        raise CompatibilityError(
            f"no choice keeps to a mean KL divergence of {mean_kl:g}: the largest is expected to cost {least:.2g}",
            where="quantize.target.mean_kl",
            mend="offer more bits, for example 16, or choose a larger target",
        )
    return allocation.lossless


def _measured_on(space: ChoiceSpace, calibration: CalibrationSet) -> tuple[Tensor, Tensor]:
    """Windows of equal length, spread over the calibration text, and twice as many others for the Hessians.

    Returns:
        int64 [windows, tokens] each. Where there is less text, every third window is one of the first.
    """
    method = space.method
    tokens = min(method.window_tokens, calibration.input_ids.shape[1])
    pieces = _pieces(calibration, tokens)
    count = min((1 + _HESSIAN_WINDOWS) * method.windows, len(pieces))
    if count <= _HESSIAN_WINDOWS:
        raise CompatibilityError(
            f"the calibration text makes {counted(len(pieces), 'window')} of {tokens} tokens, and layers are measured "
            f"on {method.windows} and {_HESSIAN_WINDOWS * method.windows} others",
            where="quantize.calibration",
            mend="give more text, or raise samples",
        )
    spread = pieces[[index * len(pieces) // count for index in range(count)]]
    first = torch.arange(count) % (1 + _HESSIAN_WINDOWS) == 0
    return spread[first], spread[~first]


def _pieces(calibration: CalibrationSet, tokens: int) -> Tensor:
    """Windows of so many tokens, each with the beginning-of-text token where the calibration windows begin with it:
    without it, Gemma3-270M's predictions are those of another model.
    """
    ids, start = calibration.input_ids, calibration.start
    if start is None or not bool((ids[:, 0] == start).all()):
        return ids.unfold(1, tokens, tokens).flatten(0, 1)
    body = ids[:, 1:].unfold(1, tokens - 1, tokens - 1).flatten(0, 1)
    return torch.cat([body.new_full((len(body), 1), start), body], 1)


def _measured(space: ChoiceSpace) -> list[Unit]:
    """The units with those of their options that change anything."""
    gptq = space.method.gptq
    return [
        Unit(
            unit,
            tuple(
                solver_options(gptq, option.bits, unit[0].in_features if option.group_size == -1 else option.group_size)
                for option in options
                if not option.unquantized
            ),
        )
        for unit, options in zip(space.units, space.options, strict=True)
    ]


def _allowed(space: ChoiceSpace, layout: Layout, bits_per_weight: float) -> int:
    """Bytes of the chosen layers in an artifact of this size."""
    return int(bits_per_weight * layout.weights.parameters / 8) - space.beside(layout)


def _out_of_reach(
    space: ChoiceSpace, layout: Layout, allocation: Allocation, bits_per_weight: float
) -> CompatibilityError:
    least, most = (
        8 * (each + space.beside(layout)) / layout.weights.parameters for each in (allocation.least, allocation.most)
    )
    return CompatibilityError(
        f"{bits_per_weight:g} bits per weight are too few: with what stays at 16 bits, as the embeddings do, the "
        f"choices make {least:.2f} to {most:.2f}",
        where="quantize.target.bits_per_weight",
        mend=f"allow {least:.2f} or more, or offer fewer bits",
    )
