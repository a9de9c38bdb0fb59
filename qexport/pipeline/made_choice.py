"""A choice of the method `mixed`: what it is expected to cost, and which follows where its artifact misses a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from qexport.amounts import size
from qexport.artifact.figures import GateResult
from qexport.export.layouts import Layout
from qexport.pipeline.choice_space import ChoiceSpace, Option
from qexport.quantizing.allocation import Allocation, Priced

_SAFE: Final = 0.95
"""Of a limit that is corrected by what was measured."""


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
        return sum(sizes[index] for sizes, index in chosen) + self.space.beside(self.layout)

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
        longest = max(len(str(each.option)) for each in shares)
        return [
            f"chosen    {self.bits_per_weight:.2f} bits per weight; the expected mean KL divergence is "
            f"{self.choice.expected:.3g}, of which",
            *(
                f"{each.layers:>5} layers at {each.option!s:<{longest}}  {size(each.bytes_, decimals=1)}, "
                f"{each.mean_kl:.2g}"
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
        allocation = allocation_of(self.space, self.layout, losses)
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


def allocation_of(space: ChoiceSpace, layout: Layout, losses: Sequence[Sequence[float]]) -> Allocation:
    """The choice to be made, with the bytes of a layout.

    Args:
        space: what may be chosen.
        layout: as planned with the first option of each unit.
        losses: of each unit and option.
    """
    stored = space.stored(layout)
    return Allocation([Priced(tuple(sizes), tuple(each)) for sizes, each in zip(stored, losses, strict=True)])
