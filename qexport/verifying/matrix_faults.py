"""What of the difference between a quantized matrix and the reference's is a fault: of the whole, of its outputs, of
rows, of groups and of its grids.

The limits were set from what sound artifacts show, see docs/verification.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from qexport.tensors import Float4Quantized, GroupQuantized, Quantized
from qexport.tensors.float4 import GROUP_SIZES, LARGEST_FLOAT4
from qexport.verifying.grids import Groups, Strip

Part = Literal["row", "group"]

_MOST_ERROR: Final = 3.0
_MOST_ERROR_ROUNDED: Final = 1.05
_MOST_ERROR_OF: Final[dict[Part, float]] = {"row": 10.0, "group": 20.0}
"""The largest error of a sound matrix, and of a row or a group of one, over that of the nearest values."""

_MOST_GAIN: Final = 0.02
"""How far the size of a matrix may be from that of the nearest values on a fine grid. On coarse grids it may also be
smaller by the square of their relative error, or larger by half of that."""

_MOST_GAIN_OF: Final = 0.6
"""How far the size of a row or a group may be from that of its nearest values, at most."""

_MOST_SHIFT: Final = 0.6
"""How far the mean difference between the values of a matrix and the nearest ones may be from zero, as a share of the
root of the mean squared error. It is 0.83 and more where all values are one step of their grids too large."""

_SIGNIFICANT: Final = 0.3
"""The size of a row or a group says nothing where the relative error of its nearest values is above this."""

_NOT_LOST: Final = 0.2
"""GPTQ may leave a group empty where the typical error of a group in its row is above this share of its norm."""

_MOST_OUTPUT_ERROR: Final = 3.0
"""The largest error of a sound layer's outputs over that of the nearest values', on the inputs of the model before
quantizing. GPTQ makes it smaller; where a layer makes up for those before it, it is meant for other inputs, and a late
`down_proj` of SmolLM2, with few huge inputs, had 1.9."""

_SMALLEST: Final = 1e-6
"""Squared errors below this share of the reference's squares are rounding in float32 and 16 bits."""

_MOST_CUT_OFF: Final = 1.5
"""The largest weight of a group in e2m1 over the largest value that the group's scale gives. MXFP4's powers of two make
it up to 1.33, and NVFP4's scales up to 1.07, or 1.5 where they are the smallest of e4m3."""

_LARGEST: Final = 1e12
_NAMED: Final = 3


@dataclass(frozen=True)
class Fault:
    """Something that no sound artifact has.

    Attributes:
        severity: how far beyond the limit, 1 and more; infinite for what is wrong however little it changes.
        text: what and where inside the matrix, for people.
    """

    severity: float
    text: str


@dataclass
class Sums:
    """Sums over the inputs, each [units].

    Attributes:
        error: of (values - reference)^2.
        nearest_error: of (nearest - reference)^2.
        square: of reference^2.
        product: of values * reference.
        nearest_product: of nearest * reference.
        shift: of values - nearest.
        zero: bool, whether all values are zero although the reference's are not.
    """

    error: Tensor
    nearest_error: Tensor
    square: Tensor
    product: Tensor
    nearest_product: Tensor
    shift: Tensor
    zero: Tensor

    def ratio(self, typical: Tensor) -> Tensor:
        """The error over that of the nearest values, or over the typical one where that is larger."""
        yardstick = torch.maximum(self.nearest_error, typical).add(self.square, alpha=_SMALLEST)
        return (self.error / yardstick).nan_to_num_(nan=0.0, posinf=_LARGEST).sqrt()

    def lost(self, typical: Tensor) -> Tensor:
        """Bool, whether all values are zero although the group is large."""
        return self.zero & (typical <= self.square * _NOT_LOST**2)

    def used_by_size(self, typical: Tensor) -> Tensor:
        """How much of its limit the size of each unit takes; 1 is at the limit, 0 where the size says nothing."""
        relative = (torch.maximum(self.nearest_error, typical) / self.square).nan_to_num_(nan=math.inf).sqrt()
        allowed = (0.05 + 2 * relative).clamp_(max=_MOST_GAIN_OF)
        change = (self.product / self.nearest_product - 1).abs().nan_to_num_(nan=0.0) / allowed
        return torch.where(relative <= _SIGNIFICANT, change, 0.0)


def sums_of(strip: Strip, groups: Groups | None) -> Sums:
    """The sums over each group of a strip, or over its rows without groups."""

    def total(values: Tensor) -> Tensor:
        return values.sum(1, keepdim=True) if groups is None else groups.sums(values)

    values, nearest, reference = strip.values, strip.nearest, strip.reference
    zero = (total(values.abs()) == 0) & (total(reference.abs()) > _SMALLEST)
    return Sums(
        total((values - reference).square_()),
        total((nearest - reference).square_()),
        total(reference.square()),
        total(values * reference),
        total(nearest * reference),
        total(values - nearest),
        zero,
    )


def over_rows(sums: Sums) -> Sums:
    """The sums over whole rows, [rows, 1], from those over groups."""
    added = {name: getattr(sums, name).sum(1, keepdim=True) for name in ADDED}
    return Sums(**added, zero=sums.zero.all(1, keepdim=True))


ADDED: Final = ("error", "nearest_error", "square", "product", "nearest_product", "shift")


@dataclass(frozen=True)
class Whole:
    """A matrix as a whole.

    Attributes:
        relative: the relative error of the values.
        nearest: that of the nearest values.
        gain: how large the values are beside the nearest ones.
        shift: the mean difference from the nearest values over the root of the mean squared error.
        most: the largest sound error, over that of the nearest values.
    """

    relative: float
    nearest: float
    gain: float
    shift: float
    most: float

    @classmethod
    def of(cls, totals: Tensor, count: int, *, each_rounded: bool) -> Whole:
        """From the sums over all rows, float64 [6] in the order of `ADDED`, and the number of values.

        Args:
            totals: the sums.
            count: the number of values.
            each_rounded: whether the method rounds each weight on its own.
        """
        most = _MOST_ERROR_ROUNDED if each_rounded else _MOST_ERROR
        error, nearest_error, square, product, nearest_product, shift = totals.tolist()
        relative, nearest = (math.sqrt(each / square) if square else 0.0 for each in (error, nearest_error))
        gain = product / nearest_product if nearest_product else 1.0
        squares = (error + square * _SMALLEST) * count
        return cls(relative, nearest, gain, shift / math.sqrt(squares) if squares else 0.0, most)

    @property
    def ratio(self) -> float:
        """The error over that of the nearest values."""
        return self.relative / max(self.nearest, math.sqrt(_SMALLEST))

    @property
    def smallest(self) -> float:
        """The smallest sound gain."""
        return 1 - _MOST_GAIN - self.nearest**2

    @property
    def largest(self) -> float:
        """The largest sound gain."""
        return 1 + _MOST_GAIN + self.nearest**2 / 2

    def used(self) -> dict[str, float]:
        """How much of each limit the matrix takes."""
        limit = self.largest if self.gain > 1 else self.smallest
        return {
            "error": self.ratio / self.most,
            "size": (self.gain - 1) / (limit - 1),
            "shift": abs(self.shift) / _MOST_SHIFT,
        }

    def faults(self) -> Iterator[Fault]:
        """At most one of the error, one of the size and one of the shift."""
        used = self.used()
        if used["error"] > 1:
            yield Fault(
                used["error"],
                f"relative error {self.relative:.3g}, {self.ratio:.3g} times that of rounding to nearest on the same "
                f"grid, where at most {self.most:g} is sound",
            )
        if not self.smallest <= self.gain <= self.largest:
            yield Fault(
                used["size"],
                f"values {self.gain:.3g} times as large as those of rounding to nearest on the same grid, where "
                f"{self.smallest:.3g} to {self.largest:.3g} is sound",
            )
        if used["shift"] > 1:
            yield Fault(
                used["shift"],
                f"values {'larger' if self.shift > 0 else 'smaller'} than those of rounding to nearest on the same "
                f"grid, on average by {abs(self.shift):.2g} of the error, where at most {_MOST_SHIFT:g} is sound: as "
                "if zero points were off by one",
            )


@dataclass
class Outputs:
    """The errors of a matrix's products with inputs.

    Attributes:
        inputs: float32 [tokens, in]; None measures nothing.
        sums: sums of squares of the products' errors, of those of the nearest values, and of the reference's products.
    """

    inputs: Tensor | None
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add(self, strip: Strip) -> None:
        """Adds the rows of a strip."""
        if self.inputs is not None:
            parts = (strip.values - strip.reference, strip.nearest - strip.reference, strip.reference)
            for index, part in enumerate(parts):
                self.sums[index] += (part @ self.inputs.t()).square_().sum(dtype=torch.float64)

    def errors(self) -> tuple[float | None, float | None]:
        """Relative, of the values and of the nearest ones; None if nothing was measured."""
        error, nearest_error, square = self.sums.tolist()
        return (math.sqrt(error / square), math.sqrt(nearest_error / square)) if square else (None, None)

    @property
    def ratio(self) -> float:
        """The error over that of the nearest values; 0 if nothing was measured."""
        error, nearest = self.errors()
        return 0.0 if error is None or nearest is None else error / max(nearest, math.sqrt(_SMALLEST))

    def used(self) -> dict[str, float]:
        """How much of the limit is taken; empty if nothing was measured."""
        return {"outputs": self.ratio / _MOST_OUTPUT_ERROR} if self.ratio else {}

    def faults(self) -> Iterator[Fault]:
        """At most one."""
        if self.ratio > _MOST_OUTPUT_ERROR:
            yield Fault(
                self.ratio / _MOST_OUTPUT_ERROR,
                f"relative error of its outputs {self.errors()[0]:.3g}, {self.ratio:.3g} times that of rounding to "
                f"nearest on the same grid, where at most {_MOST_OUTPUT_ERROR:g} is sound",
            )


@dataclass
class Worst:
    """The unit with the largest error over the nearest values', and the units beyond their limits.

    Attributes:
        part: what the units are.
        ratio: of the first.
        place: its row and its group.
        size: how much of its limit the size of a unit takes, at most.
        beyond: how far the worst units are beyond their limits, with their places and gains.
        count: how many there are.
    """

    part: Part
    ratio: float = -1.0
    place: tuple[int, int] = (0, 0)
    size: float = 0.0
    beyond: list[tuple[float, int, int, float]] = field(default_factory=list)
    count: int = 0

    def add(self, first: int, sums: Sums, typical: Tensor) -> None:
        """Adds the units of a strip whose first row is given."""
        ratio = sums.ratio(typical)
        at = int(ratio.argmax())
        if float(ratio.flatten()[at]) > self.ratio:
            row, group = divmod(at, ratio.shape[1])
            self.ratio, self.place = float(ratio.flatten()[at]), (first + row, group)
        size = sums.used_by_size(typical)
        self.size = max(self.size, float(size.max()))
        excess = torch.maximum(ratio / _MOST_ERROR_OF[self.part], size)
        if bool((excess > 1).any()):
            self.count += int((excess > 1).sum())
            self.beyond = sorted([*self.beyond, *_largest(excess, sums, first)], reverse=True)[:_NAMED]

    def used(self) -> dict[str, float]:
        """How much of each limit the worst unit takes."""
        return {
            f"error of a {self.part}": self.ratio / _MOST_ERROR_OF[self.part],
            f"size of a {self.part}": self.size,
        }

    def faults(self) -> Iterator[Fault]:
        """At most one."""
        if not self.beyond:
            return
        severity = self.beyond[0][0]
        named = [
            f"row {row}{'' if self.part == 'row' else f', group {group}'} ({gain:.3g} times as large)"
            for _, row, group, gain in self.beyond
        ]
        rest = f" and {self.count - len(named)} more" if self.count > len(named) else ""
        yield Fault(severity, f"{self.part}s that are not the reference's: {'; '.join(named)}{rest}")


def _largest(excess: Tensor, sums: Sums, first: int) -> list[tuple[float, int, int, float]]:
    gains = (sums.product / sums.nearest_product).nan_to_num_(nan=1.0, posinf=_LARGEST, neginf=-_LARGEST)
    found = excess.flatten().topk(min(_NAMED, excess.numel()))
    pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
    places = [(value, divmod(index, excess.shape[1])) for value, index in pairs if value > 1]
    return [(value, first + row, group, float(gains[row, group])) for value, (row, group) in places]


@dataclass
class Lost:
    """Rows, and groups of other rows, that are all zero and whose nearest values are not.

    Attributes:
        rows: their numbers.
        groups: rows and groups.
        count: the number of groups.
    """

    rows: list[int] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0

    def add_rows(self, first: int, lost: Tensor) -> None:
        """Adds the rows of a strip [rows, 1] whose first row is given."""
        self.rows += [first + row for row in lost[:, 0].nonzero()[:, 0].tolist()]

    def add_groups(self, first: int, lost: Tensor) -> None:
        """Adds the groups of a strip [rows, groups]."""
        if bool(lost.any()):
            self.count += int(lost.sum())
            self.groups += [(first + row, group) for row, group in lost.nonzero()[:_NAMED].tolist()]

    def faults(self) -> Iterator[Fault]:
        """At most two."""
        if self.rows:
            yield Fault(math.inf, f"all values are zero in rows {places(self.rows)}")
        if self.groups:
            row, group = self.groups[0]
            count = "a group" if self.count == 1 else f"{self.count} groups, the first one"
            yield Fault(math.inf, f"all values are zero in {count}: row {row}, group {group}")


def faults_of_grids(quantized: Quantized, reference: Tensor) -> Iterator[Fault]:
    """Negative scales (the readers of other codes than groups refuse them), and groups that no method makes."""
    if isinstance(quantized, Float4Quantized):
        yield from _cut_off(quantized, reference)
    if isinstance(quantized, GroupQuantized):
        yield from _faults_of_g_idx(quantized)
        negative = (quantized.scales.t() < 0).nonzero()
        if len(negative):
            row, group = negative[0].tolist()
            count = "a negative scale" if len(negative) == 1 else f"{len(negative)} negative scales, the first one"
            yield Fault(math.inf, f"{count} in row {row}, group {group}")
        groups = quantized.g_idx.to(reference.device)
        for row, group in (quantized.scales.t() == 0).nonzero().tolist():
            if bool(reference[row][groups == group].any()):
                yield Fault(math.inf, f"the scale is zero in row {row}, group {group}")
                return


def _cut_off(quantized: Float4Quantized, reference: Tensor) -> Iterator[Fault]:
    """At most one: codes on a grid that is too small are the nearest ones all the same."""
    absmax = reference.abs().unflatten(1, (-1, GROUP_SIZES[quantized.kind])).amax(2).to(torch.float32)
    excess = (absmax / (quantized.scale_of_groups * LARGEST_FLOAT4)).nan_to_num_(nan=0.0, posinf=_LARGEST)
    if float(excess.max()) > _MOST_CUT_OFF * (1 + _SMALLEST):
        row, group = divmod(int(excess.argmax()), excess.shape[1])
        yield Fault(
            float(excess.max()) / _MOST_CUT_OFF,
            f"weights {float(excess.max()):.3g} times the largest value of their scale are cut off in row {row}, group "
            f"{group}, where at most {_MOST_CUT_OFF:g} is sound",
        )


def _faults_of_g_idx(quantized: GroupQuantized) -> Iterator[Fault]:
    g_idx, columns = quantized.g_idx.long(), quantized.codes.shape[1]
    counts = g_idx.bincount(minlength=len(quantized.scales))
    expected = torch.arange(columns) // quantized.group_size
    if not quantized.desc_act and not torch.equal(g_idx.cpu(), expected):
        first = int((g_idx.cpu() != expected).nonzero()[0])
        yield Fault(
            math.inf,
            f"g_idx gives input {first} the group {int(g_idx[first])}, not {int(expected[first])}, although the groups "
            "are in order",
        )
    elif columns % len(counts) == 0 and bool((counts != columns // len(counts)).any()):
        group = int((counts != columns // len(counts)).nonzero()[0])
        yield Fault(math.inf, f"g_idx gives group {group} {int(counts[group])} inputs, not {columns // len(counts)}")


def places(numbers: Sequence[int]) -> str:
    """Rising numbers in words, those that follow one another as a range: `rows 0 to 15, 40`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    named = [str(low) if low == high else f"{low} to {high}" for low, high in runs[:_NAMED]]
    return ", ".join([*named, *([f"and {len(runs) - _NAMED} more"] if len(runs) > _NAMED else [])])
