"""The method `mixed` in a run: its layers are measured, and each unit of them gets its bits and groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from qexport.amounts import counted, size
from qexport.artifact.figures import GateResult
from qexport.errors import CompatibilityError
from qexport.export.layouts import Layout
from qexport.pipeline.choice_space import ChoiceSpace, Option
from qexport.progress import ProgressCallback
from qexport.quantizing.allocation import Allocation, Priced
from qexport.quantizing.gptq_pass import corrects
from qexport.quantizing.selection import solver_options
from qexport.quantizing.sensitivity import Unit, measure
from qexport.tensors import CalibrationSet

_SAFE: Final = 0.95
"""Of a limit that is corrected by what was measured."""

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


@dataclass(frozen=True)
class Tried:
    """A choice that missed its target.

    Attributes:
        chosen: the index of each unit's option.
        expected: the mean KL divergence that it was made for, in nats per token.
        measured: the artifact's.
    """

    chosen: list[int]
    expected: float
    measured: float


@dataclass(frozen=True)
class Choice:
    """What was measured, and what was chosen.

    Attributes:
        losses: of each unit and option, the mean KL divergence that it costs alone, in nats per token.
        chosen: the index of each unit's option.
        expected: the sum of the chosen losses.
        tried: the choices before this one.
    """

    losses: list[list[float]]
    chosen: list[int]
    expected: float
    tried: list[Tried] = field(default_factory=list)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Choice:
        """The choice that a journal has kept."""
        return cls(**{**kept, "tried": [Tried(**each) for each in kept["tried"]]})

    def as_dict(self) -> dict[str, Any]:
        """For a journal."""
        return asdict(self)


@dataclass(frozen=True)
class Missed:
    """How far an artifact is from its target.

    Attributes:
        value: its mean KL divergence, in nats per token.
        worst: the end of the interval that lies above the target, where all windows together did not decide; else the
            value.
    """

    value: float
    worst: float


@dataclass(frozen=True)
class Share:
    """The layers with one option.

    Attributes:
        option: theirs.
        layers: how many.
        bytes_: of all together.
        mean_kl: what they are expected to cost together, in nats per token.
    """

    option: Option
    layers: int
    bytes_: int
    mean_kl: float

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {**asdict(self.option), "layers": self.layers, "bytes": self.bytes_, "mean_kl": self.mean_kl}


@dataclass(frozen=True)
class MadeChoice:
    """A choice, and what it was made from.

    Attributes:
        space: what could be chosen.
        layout: the one whose bytes were counted, as planned with the first option of each unit.
        choice: what was chosen.
    """

    space: ChoiceSpace
    layout: Layout
    choice: Choice

    @property
    def options(self) -> list[Option]:
        """The option of each unit."""
        return self.space.chosen(self.choice.chosen)

    @property
    def attempt(self) -> int:
        """The number of the attempt, from 1."""
        return len(self.choice.tried) + 1

    @property
    def notes(self) -> list[str]:
        """What was chosen and what it is expected to cost, after what was tried before; for report and manifest."""
        space, title, found = self.space, self.space.method.title, list[str]()
        for number, tried in enumerate(self.choice.tried, 1):
            found.append(
                f"{title}, attempt {number}: {space.counted(tried.chosen)}; the mean KL divergence was "
                f"{tried.measured:.3g}, and {tried.expected:.3g} was expected"
            )
        own = f"{title}, attempt {self.attempt}" if found else title
        words = f"{space.counted(self.choice.chosen)}; the expected mean KL divergence is {self.choice.expected:.3g}"
        return [*found, f"{own}: {words}"]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole artifact."""
        return 8 * self.total_bytes / self.layout.weights.parameters

    @property
    def total_bytes(self) -> int:
        """Of all tensors of the artifact."""
        chosen = zip(self.space.stored(self.layout), self.choice.chosen, strict=True)
        return sum(sizes[index] for sizes, index in chosen) + _beside(self.space, self.layout)

    def as_dict(self) -> dict[str, Any]:
        """What was chosen, as JSON values; `mean_kl` is the expected one."""
        return {
            "options": [each.as_dict() for each in self._shares],
            "bytes": self.total_bytes,
            "bits_per_weight": self.bits_per_weight,
            "mean_kl": self.choice.expected,
        }

    def lines(self) -> list[str]:
        """The same as lines for the terminal."""
        shares = self._shares
        return [
            f"chosen    {self.bits_per_weight:.2f} bits per weight; the expected mean KL divergence is "
            f"{self.choice.expected:.3g}, of which",
            *(
                f"{each.layers:>5} {f'at {each.option}':<24}  {size(each.bytes_, decimals=1)}, {each.mean_kl:.2g}"
                for each in shares
            ),
        ]

    @property
    def _shares(self) -> list[Share]:
        found: dict[Option, Share] = {}
        stored = self.space.stored(self.layout)
        of_units = zip(self.space.units, self.options, stored, self.choice.losses, self.choice.chosen, strict=True)
        for unit, option, sizes, losses, index in of_units:
            before = found.get(option, Share(option, 0, 0, 0.0))
            found[option] = Share(
                option, before.layers + len(unit), before.bytes_ + sizes[index], before.mean_kl + losses[index]
            )
        return [found[option] for option in sorted(found)]

    def missed(self, gates: Iterable[GateResult]) -> Missed | None:
        """How far the artifact is from the target's mean KL divergence, where the gate on it did not pass and it is
        above the target; None else, and where a check has failed, which no bits can mend.

        Args:
            gates: of all the artifact's layouts.
        """
        target, failing = self.space.method.target.mean_kl, [gate for gate in gates if not gate.passed]
        if target is None or any(gate.figure is None for gate in failing):
            return None
        of_target = [gate for gate in failing if gate.name == "mean_kl"]
        found = max(map(_missed, of_target), key=lambda each: each.worst, default=None)
        return found if found is not None and found.worst > target else None

    def larger(self, missed: Missed) -> MadeChoice | None:
        """The choice after one that has missed the target: the losses are taken to be as much too small as the chosen
        ones were.

        Returns:
            None if nothing that is offered would reach the target.
        """
        choice, target = self.choice, self.space.method.target.mean_kl
        if target is None or not choice.expected:
            return None
        scale = missed.value / choice.expected
        losses = [[scale * loss for loss in own] for own in choice.losses]
        allocation = _allocation(self.space, self.layout, losses)
        chosen = allocation.reaching(_SAFE * target * missed.value / missed.worst)
        if chosen is None:
            return None
        tried = [*choice.tried, Tried(choice.chosen, choice.expected, missed.value)]
        return replace(self, choice=Choice(losses, chosen, allocation.loss(chosen), tried))

    def outcome(self, missed: Missed) -> str:
        """What was measured of a choice that has missed the target."""
        high = f" (up to {missed.worst:.3g})" if missed.worst > missed.value else ""
        return f"the mean KL divergence is {missed.value:.3g}{high}, and {self.choice.expected:.3g} was expected"

    def advice(self, missed: Missed) -> str:
        """What to set after the last attempt."""
        target, larger = self.space.method.target.mean_kl, self.larger(missed)
        if larger is None:
            return f"{self.outcome(missed)}; no choice that is offered would reach {target:g}: offer more bits"
        bits = math.ceil(100 * larger.bits_per_weight) / 100
        return (
            f"{self.outcome(missed)}; the next larger choice has {bits:.2f} bits per weight "
            f"({size(larger.total_bytes, decimals=1)}): set quantize.target to {{bits_per_weight: {bits:.2f}}} and "
            f"verify.gates to {{mean_kl: {{at_most: {target:g}}}}}"
        )


def _missed(gate: GateResult) -> Missed:
    value = gate.value or 0.0
    return Missed(value, max(value, gate.high or 0.0) if gate.verdict == "undecided" else value)


def measure_units(
    space: ChoiceSpace, calibration: CalibrationSet, *, device: torch.device, progress: ProgressCallback
) -> list[list[float]]:
    """Measures what each option of each unit costs: the mean KL divergence in nats per token, if it is alone.

    Args:
        space: what may be chosen.
        calibration: the text to measure on.
        device: where to compute.
        progress: is called with each block.

    Raises:
        CompatibilityError: there is too little text.
        NumericalError: the model's predictions are not finite.
        InputError: a tensor cannot be read.
    """
    input_ids, hessian_ids = _measured_on(space, calibration)
    effects = measure(space.checkpoint, _measured(space), input_ids, hessian_ids, device=device, progress=progress)
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
    allocation, target = _allocation(space, layout, losses), space.method.target
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


def _allocation(space: ChoiceSpace, layout: Layout, losses: Sequence[Sequence[float]]) -> Allocation:
    stored = space.stored(layout)
    return Allocation([Priced(tuple(sizes), tuple(each)) for sizes, each in zip(stored, losses, strict=True)])


def _beside(space: ChoiceSpace, layout: Layout) -> int:
    """Bytes of a layout's tensors that are not chosen, as planned with the first option of each unit."""
    return layout.weights.total_bytes + layout.weights.shared_bytes - sum(sizes[0] for sizes in space.stored(layout))


def _allowed(space: ChoiceSpace, layout: Layout, bits_per_weight: float) -> int:
    """Bytes of the chosen layers in an artifact of this size."""
    return int(bits_per_weight * layout.weights.parameters / 8) - _beside(space, layout)


def _out_of_reach(
    space: ChoiceSpace, layout: Layout, allocation: Allocation, bits_per_weight: float
) -> CompatibilityError:
    least, most = (
        8 * (each + _beside(space, layout)) / layout.weights.parameters for each in (allocation.least, allocation.most)
    )
    return CompatibilityError(
        f"{bits_per_weight:g} bits per weight are too few: with what stays at 16 bits, as the embeddings do, the "
        f"choices make {least:.2f} to {most:.2f}",
        where="quantize.target.bits_per_weight",
        mend=f"allow {least:.2f} or more, or offer fewer bits",
    )
