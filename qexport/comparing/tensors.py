"""The parameters of two sides, compared one after the other: first the bytes that store them, then their values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch

from qexport.amounts import counted
from qexport.comparing.sides import Side
from qexport.errors import InputError

State = Literal["equal", "equal values", "changed", "other shape", "unreadable", "only in A", "only in B"]

_VALUES_AT_ONCE: Final = 1 << 22
_HALF: Final = 32
_LOW: Final = (1 << _HALF) - 1

WORDS: Final[dict[State, str]] = {
    "equal": "equal",
    "equal values": "equal in value, stored in other ways",
    "changed": "changed",
    "other shape": "of another shape",
    "unreadable": "not readable",
    "only in A": "only in A",
    "only in B": "only in B",
}


@dataclass(frozen=True)
class ParameterDifference:
    """One parameter in both sides.

    Attributes:
        name: the parameter's.
        state: how the two compare.
        relative: the norm of the difference over A's norm; None unless the values were compared and are finite.
        largest: the largest difference of two values.
        share: of the values that differ.
        note: the shapes, or why it cannot be read.
    """

    name: str
    state: State
    relative: float | None = None
    largest: float | None = None
    share: float | None = None
    note: str = ""

    @property
    def differs(self) -> bool:
        """Whether the values are not known to be equal."""
        return self.state not in ("equal", "equal values")

    def words(self) -> str:
        """The difference for the terminal."""
        if self.relative is None or self.largest is None or self.share is None:
            return f"{WORDS[self.state]}{f': {self.note}' if self.note else ''}"
        return f"by {self.relative:.3g} of its norm, by {self.largest:.3g} at most, {self.share:.3%} of the values"

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def compare_parameters(
    a: Side, b: Side, *, step: Callable[[str, int, int], None] = lambda name, done, total: None
) -> list[ParameterDifference]:
    """Every parameter of either side, A's first. Of each side one is in memory at a time.

    Args:
        a: one side.
        b: the other.
        step: is called with each name, and how many of how many are compared.
    """
    ours, theirs = a.parameters.specs(), b.parameters.specs()
    names = [*ours, *(name for name in theirs if name not in ours)]
    found = list[ParameterDifference]()
    for done, name in enumerate(names, 1):
        found.append(_compare(a, b, name))
        step(name, done, len(names))
    return found


def counts(differences: list[ParameterDifference]) -> dict[State, int]:
    """How many parameters are in each state."""
    return dict(Counter(each.state for each in differences))


def _compare(a: Side, b: Side, name: str) -> ParameterDifference:
    ours, theirs = a.parameters.specs().get(name), b.parameters.specs().get(name)
    if ours is None or theirs is None:
        return ParameterDifference(name, "only in B" if ours is None else "only in A")
    if ours.shape != theirs.shape:
        return ParameterDifference(name, "other shape", note=f"{list(ours.shape)}, {list(theirs.shape)}")
    try:
        if _same_bytes(a, b, name):
            return ParameterDifference(name, "equal")
        return _compare_values(name, a.parameters.read(name), b.parameters.read(name))
    except InputError as error:
        return ParameterDifference(name, "unreadable", note=f"{error.what} ({error.where})")


def _same_bytes(a: Side, b: Side, name: str) -> bool:
    """Whether the same tensors store it with the same bytes."""
    places = a.places(name)
    if a.stored is None or b.stored is None or places != b.places(name):
        return False
    ours, theirs = a.stored.specs(), b.stored.specs()
    if any(ours[place] != theirs[place] for place in places):
        return False
    return all(
        bytes(left) == bytes(right)
        for place in places
        for left, right in zip(a.stored.chunks(place), b.stored.chunks(place), strict=True)
    )


def _compare_values(name: str, a: torch.Tensor, b: torch.Tensor) -> ParameterDifference:
    """Equal are equal numbers, the same infinity, and NaN and NaN. Sizes are of the numbers alone."""
    squares = reference = largest = 0.0
    differing = without = 0
    for left, right in _pieces(a, b):
        change = _change(left, right).abs()
        same = (change == 0) | (left == right) | ((left != left) & (right != right))
        numbers = change.isfinite()
        differing += int((~same).sum())
        without += int((~same & ~numbers).sum())
        change = change.masked_fill(~numbers, 0.0)
        squares += float(change.square().sum())
        reference += float(_magnitudes(left).square().nan_to_num(0.0, posinf=0.0).sum())
        largest = max(largest, float(change.max()))
    if not differing:
        return ParameterDifference(name, "equal values")
    if without:
        return ParameterDifference(name, "changed", note=f"{counted(without, 'value')} NaN or Inf in one alone")
    relative = math.sqrt(squares / reference) if reference else math.inf
    if not math.isfinite(relative):
        return ParameterDifference(name, "changed", note=f"A is all zeros, B is not: {largest:.3g} at most")
    return ParameterDifference(name, "changed", relative, largest, differing / max(1, a.numel()))


def _magnitudes(values: torch.Tensor) -> torch.Tensor:
    return (values if values.is_complex() else values.double()).abs().double()


def _change(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """B minus A in float64 or complex128; zero only where they are equal, whole numbers beyond 2^53 included."""
    if left.is_complex() or right.is_complex():
        return right.to(torch.complex128) - left.to(torch.complex128)
    if left.is_floating_point() or right.is_floating_point():
        return right.double() - left.double()
    (low, high), (other_low, other_high) = _halves(left), _halves(right)
    return (other_high - high).double() * 2.0**_HALF + (other_low - low).double()


def _halves(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low 32 bits of whole numbers, and what is above them: int64."""
    if whole.dtype == torch.uint64:
        bits = whole.view(torch.int64)
        return bits & _LOW, (bits >> _HALF) & _LOW
    bits = whole.long()
    return bits & _LOW, bits >> _HALF


def _pieces(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    left, right = a.reshape(-1), b.reshape(-1)
    for start in range(0, left.numel(), _VALUES_AT_ONCE):
        yield left[start : start + _VALUES_AT_ONCE], right[start : start + _VALUES_AT_ONCE]
