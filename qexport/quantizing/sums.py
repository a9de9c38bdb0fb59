"""What is summed over the calibration text for layers that share inputs: whole in one process, in parts over several.

Over several processes each sum goes from one to the next, and each adds its own batches, so the bits are those of one
process. It is cut into parts: the next process begins with the first part while the one before is at the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from qexport.quantizing.asymmetry import Asymmetry, InputChange, changes
from qexport.quantizing.layer import Hessian


@dataclass(frozen=True)
class GroupInputs:
    """What a group of layers receives from a batch.

    Attributes:
        inputs: of each input, [..., tokens, in].
        full: the first one before quantizing, if that is known.
        weights: how much each token counts, float32 [tokens]; None for all alike.
    """

    inputs: Sequence[Tensor]
    full: Tensor | None
    weights: Tensor | None

    @cached_property
    def changes(self) -> list[InputChange]:
        """What quantizing has done to the first input."""
        return [] if self.full is None else changes(self.full, self.inputs[0], self.weights)


@dataclass
class GroupSums:
    """Sums over batches of the inputs of a group of layers, or parts of some of them.

    Attributes:
        hessians: by the number of the group's input.
        asymmetry: what quantizing has done to the first input.
    """

    hessians: dict[int, Hessian] = field(default_factory=dict)
    asymmetry: Asymmetry | None = None

    def add(self, batch: GroupInputs) -> None:
        """Adds a batch."""
        for number, hessian in self.hessians.items():
            hessian.add(batch.inputs[number], batch.weights)
        if self.asymmetry is not None:
            self.asymmetry.add(batch.changes)


def hessian_parts(widths: Sequence[int], parts: int, device: torch.device) -> list[GroupSums]:
    """Empty Hessians of inputs of these widths. Several inputs are not cut: each is a part.

    Args:
        widths: of the inputs.
        parts: how many there are to be; 1 for all in one.
        device: where to sum.
    """
    if parts == 1:
        return [GroupSums({number: Hessian(width, device) for number, width in enumerate(widths)})]
    if len(widths) > 1:
        return [GroupSums({number: Hessian(width, device)}) for number, width in enumerate(widths)]
    bounds = (1 - (1 - number / parts) ** 0.5 for number in range(1, parts))  # of equal parts of a triangle
    return [
        GroupSums({0: Hessian(widths[0], device, part)})
        for part in _cut(widths[0], list(bounds), Hessian.strip_on(device))
    ]


def asymmetry_parts(width: int, parts: int, device: torch.device) -> list[GroupSums]:
    """Empty sums of the asymmetry of an input, in about so many parts."""
    bounds = [number / parts for number in range(1, parts)]
    return [
        GroupSums(asymmetry=Asymmetry(width, device, part)) for part in _cut(width, bounds, Asymmetry.strip_on(device))
    ]


def joined_hessians(parts: Sequence[GroupSums], device: torch.device) -> list[Hessian]:
    """The whole Hessians from their parts, in the order of the inputs. The parts are emptied."""
    numbers = dict.fromkeys(number for part in parts for number in part.hessians)
    return [
        Hessian.joined([part.hessians.pop(number) for part in parts if number in part.hessians], device)
        for number in numbers
    ]


def _cut(width: int, bounds: Sequence[float], strip: int) -> list[range]:
    """Inputs between bounds, which are shares of the width, rounded to whole strips."""
    whole = sorted({0, width, *(min(width, round(width * bound / strip) * strip) for bound in bounds)})
    return [range(start, stop) for start, stop in pairwise(whole)]
