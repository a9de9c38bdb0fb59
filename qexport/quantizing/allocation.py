"""Which choice for each unit costs the least together: a knapsack, solved by dynamic programming over bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_STEPS: Final = 1 << 14
"""Sizes that are told apart, from the smallest artifact to the largest."""


@dataclass(frozen=True)
class Priced:
    """What a unit may be, and what that costs.

    Attributes:
        bytes_: of each option.
        losses: of each option, at least zero.
    """

    bytes_: tuple[int, ...]
    losses: tuple[float, ...]


class Allocation:
    """The least loss for every size, if the units' losses add up.

    Sizes are counted in steps of the units' common divisor, or of the range's 16,384th part where that is larger: then
    each unit is rounded up, so that no choice is larger than it is said to be.

    Args:
        units: at least one option each.
    """

    def __init__(self, units: Sequence[Priced]) -> None:
        self._units = units
        self.least, self.most = (sum(map(each, (unit.bytes_ for unit in units))) for each in (min, max))
        extras = [[size - min(unit.bytes_) for size in unit.bytes_] for unit in units]
        common = math.gcd(*(size for sizes in extras for size in sizes)) or 1
        self._step = max(common, math.ceil((self.most - self.least) / _STEPS))
        steps = [[math.ceil(size / self._step) for size in sizes] for sizes in extras]
        self._steps, self._chosen = steps, list[Tensor]()
        best = torch.zeros(sum(map(max, steps)) + 1, dtype=torch.float64)
        for unit, sizes in zip(units, steps, strict=True):
            rows = torch.full((len(sizes), len(best)), torch.inf, dtype=torch.float64)
            for row, size, loss in zip(rows, sizes, unit.losses, strict=True):
                row[size:] = best[: len(best) - size] + loss
            best, chosen = rows.min(0)
            self._chosen.append(chosen.to(torch.int8))
        self._best = best

    def within(self, total: int) -> list[int] | None:
        """The options with the least loss of at most so many bytes, one for each unit; None if there are none."""
        spare = (total - self.least) // self._step
        return None if spare < 0 else self._at(min(spare, len(self._best) - 1))

    def reaching(self, loss: float) -> list[int] | None:
        """The smallest options with at most this loss; None if there are none."""
        enough = (self._best <= loss).nonzero()
        return self._at(int(enough[0])) if len(enough) else None

    @property
    def lossless(self) -> list[int]:
        """The options that cost least, whatever their size."""
        return [unit.losses.index(min(unit.losses)) for unit in self._units]

    def total(self, chosen: Sequence[int]) -> int:
        """Bytes of these options together."""
        return sum(unit.bytes_[option] for unit, option in zip(self._units, chosen, strict=True))

    def loss(self, chosen: Sequence[int]) -> float:
        """The loss of these options together."""
        return math.fsum(unit.losses[option] for unit, option in zip(self._units, chosen, strict=True))

    def _at(self, place: int) -> list[int]:
        options = []
        for sizes, chosen in zip(reversed(self._steps), reversed(self._chosen), strict=True):
            options.append(int(chosen[place]))
            place -= sizes[options[-1]]
        return options[::-1]
