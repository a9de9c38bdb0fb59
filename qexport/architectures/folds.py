"""Folds: powers of two by which a layer's inputs are divided where they are made, and its weights are multiplied.

A norm (or a linear layer) makes the channels that other layers take in. Dividing a channel by a power of two there, and
multiplying the columns that take it in, is exact in every floating dtype. So the folded model computes the same bits as
before, and a fold can be read off the weights: of an unquantized source bit by bit, of codes to the nearest power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from qexport.architectures.families import family
from qexport.architectures.structure import Structure
from qexport.tensors import GroupQuantized

MOST: Final = 8
"""The largest exponent of a fold, in either direction."""

_MOST_ERROR: Final = 0.25
"""The largest squared error of a channel, over its square, at which codes show its exponent."""

_MOST_DISTANCE: Final = 0.25
"""And the largest distance of the gain's logarithm from the exponent."""


@dataclass(frozen=True)
class Fold:
    """Modules between which powers of two can be moved.

    Attributes:
        source: the norm or the linear layer that makes the channels.
        consumers: the linear layers that take them in, each channel as the input of its number. Nothing else does.
    """

    source: str
    consumers: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the source's parameters."""
        return f"{self.source}.weight", f"{self.source}.bias"


def folds(structure: Structure) -> tuple[Fold, ...]:
    """Every fold of a model, by its family; none where the shapes do not fit, as between v_proj and o_proj where heads
    share keys and values.
    """
    found = []
    for block in structure.blocks:
        inputs = {linear.name: linear.in_features for linear in structure.linears[block] if not linear.expert}
        taken = set[str]()
        for source, consumers in family(structure.model_type).folds.items():
            names = tuple(f"{block}.{each}" for each in consumers if f"{block}.{each}" in inputs)
            names = tuple(each for each in names if each not in taken)
            channels = structure.parameters.get(f"{block}.{source}.weight", (0,))[0]
            if names and all(inputs[name] == channels for name in names):
                found.append(Fold(f"{block}.{source}", names))
                taken.update(names)
    return tuple(found)


@dataclass(frozen=True)
class Shown:
    """What weights show of the powers of two by which their channels were multiplied, each [channels].

    Attributes:
        exponents: int64.
        decided: bool, whether they show it; zeros and channels that are lost in rounding do not.
    """

    exponents: Tensor
    decided: Tensor

    @property
    def divided(self) -> Tensor:
        """The exponents by which the channels were divided, int64 [channels]; 0 where that is not decided."""
        return torch.where(self.decided, -self.exponents, 0)


@dataclass(frozen=True)
class Gains:
    """Sums over each channel of a stored matrix v and the reference's r, float64 [channels].

    Attributes:
        square: of r^2.
        product: of v * r.
        energy: of v^2.
    """

    square: Tensor
    product: Tensor
    energy: Tensor

    @classmethod
    def of(cls, values: Tensor, reference: Tensor, dim: int) -> Gains:
        """Of a part, float32 [rows, in], summed over a dimension."""
        pairs = (reference, reference), (values, reference), (values, values)
        return cls(*((one * other).sum(dim, dtype=torch.float64) for one, other in pairs))

    def plus(self, other: Gains) -> Gains:
        """The sums over both parts."""
        return Gains(self.square + other.square, self.product + other.product, self.energy + other.energy)

    @classmethod
    def joined(cls, parts: Sequence[Gains]) -> Gains:
        """The channels of all parts, in their order."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("square", "product", "energy")))

    def shown(self) -> Shown:
        """The nearest power of two, decided where nearly all of the stored channel is the reference's times that."""
        gain = (self.product / self.square).nan_to_num_(nan=0.0).clamp_(min=2.0**-64)
        exponents = gain.log2().round()
        factor = exponents.exp2()
        error = self.energy - 2 * factor * self.product + factor.square() * self.square
        near = (gain.log2() - exponents).abs() <= _MOST_DISTANCE
        decided = near & (self.square > 0) & (error <= _MOST_ERROR * factor.square() * self.square)
        return Shown(exponents.to(torch.int64), decided)


def shown_by_vector(stored: Tensor, reference: Tensor) -> Shown:
    """What an unquantized vector shows, such as a norm's weight: exactly, or nothing."""
    (own, own_exponents), (other, other_exponents) = stored.float().frexp(), reference.float().frexp()
    return Shown((own_exponents - other_exponents).to(torch.int64), (own == other) & (other != 0))


def agreed(divided: Tensor, consumers: Sequence[Shown]) -> Tensor:
    """The exponents of a fold, int64 [channels]: those that the source shows and the consumers' columns take back.

    Every consumer that shows one must show the source's, and one of them must. All other channels have 0, so that what
    is wrong with them differs from the reference as it would without folds.

    Args:
        divided: what the source shows.
        consumers: what each consumer's columns show.
    """
    same = torch.stack([each.decided for each in consumers]).any(0)
    for each in consumers:
        same &= ~each.decided | (each.exponents == divided)
    return torch.where(same, divided, 0)


def folded_inputs(matrix: Tensor, exponents: Tensor) -> Tensor:
    """A consumer's matrix [out, in], or anything whose last dimension is its inputs, times the powers of two."""
    return matrix * exponents.exp2().to(matrix.dtype)


def folded_outputs(value: Tensor, exponents: Tensor) -> Tensor:
    """A parameter of the source [channels, ...], divided by the powers of two."""
    factors = (-exponents).exp2().to(value.dtype)
    return value * factors.reshape(-1, *[1] * (value.dim() - 1))


def folded_codes(codes: GroupQuantized, exponents: Tensor) -> GroupQuantized:
    """The same of a source that is quantized: only its scales change."""
    return replace(codes, scales=codes.scales * (-exponents).exp2().to(codes.scales.dtype))


def room(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most exponent by which each channel of a source can be divided exactly, int64 [channels].

    Args:
        values: a vector [channels], or scales [groups, channels], that will be divided.
    """
    limits = torch.finfo(values.dtype)
    sizes = values.abs().float().reshape(-1, values.shape[-1])
    smallest = torch.where(sizes > 0, sizes, math.inf).amin(0)
    most = smallest.log2().floor() - math.log2(limits.tiny)
    least = sizes.amax(0).log2().floor() + 1 - math.floor(math.log2(limits.max))
    bounded = (each.nan_to_num(posinf=MOST, neginf=-MOST).clamp(-MOST, MOST) for each in (least, most))
    low, high = (each.to(torch.int64) for each in bounded)
    return low.clamp(max=0), high.clamp(min=0)
