"""How much of an adapter's change survives the merge's rounding and the quantization, from the weights alone.

With the base's weights B, the change D before anything is rounded, the merge's dtype R and the quantization Q it is
<Q(R(B + D)) - Q(R(B)), D> / <D, D>: 1 if the stored weights move as the adapter says, on average over all of them, and
0 if it moves none of them to another value. What is small beside the steps of a grid survives on average, because some
weights lie near the middle between two values. It does not where the base lies on the grid already: bfloat16's own, in
which most bases are stored, or the code book that training rounded the base to.

GPTQ's codes depend on calibration text. Before they are known its layers are rounded to nearest, on grids without a
search: that tells what the grids can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.formats import Outputs
from qexport.quantizing.method import Method, RoundingMethod
from qexport.quantizing.rounding import nearest_on
from qexport.reading.quantized_linear import dequantize
from qexport.tensors import GroupQuantizedSpec, OutputSpec, TensorSpec

SAMPLED: Final = 8_000_000
"""Weights that are rounded where an estimate is enough, some tenths of a second's work."""


@dataclass(frozen=True)
class Survival:
    """How much of the change of one or more layers survives.

    Attributes:
        change: the sum of <D, D>.
        merged: the sum of <R(B + D) - R(B), D>.
        kept: the sum of <Q(R(B + D)) - Q(R(B)), D>.
    """

    change: float
    merged: float
    kept: float

    @property
    def share(self) -> float:
        """What survives both; 1 if nothing changes."""
        return self.kept / self.change if self.change else 1.0

    @property
    def merged_share(self) -> float:
        """What survives the rounding of the merge."""
        return self.merged / self.change if self.change else 1.0


def together(layers: Iterable[Survival]) -> Survival:
    """Some layers as one."""
    sums = [math.fsum(each) for each in zip(*((one.change, one.merged, one.kept) for one in layers), strict=True)]
    return Survival(*sums)


class Merged(Protocol):
    """A model, and what it was merged from."""

    @property
    def base(self) -> Checkpoint:
        """The model without the adapter."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """The merged model."""
        ...

    @property
    def unrounded(self) -> Checkpoint:
        """The merged model in float32, before its tensors are rounded."""
        ...


Rounded = Callable[[torch.Tensor], torch.Tensor]
"""From a matrix [out, in] to the values that stand for it, in float32."""


def survival(base: torch.Tensor, merged: torch.Tensor, unrounded: torch.Tensor, rounded: Rounded) -> Survival:
    """What survives in one layer.

    Args:
        base: [out, in], as it is stored.
        merged: [out, in], in the dtype of the merge.
        unrounded: [out, in], the merged matrix in float32.
        rounded: Q.
    """
    before = base.to(merged.dtype)
    change = unrounded - base.to(torch.float32)
    moved = merged.to(torch.float32) - before.to(torch.float32)
    kept = rounded(merged) - rounded(before)
    return Survival(*(_product(each, change) for each in (change, moved, kept)))


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return math.fsum((one * other).sum(1, dtype=torch.float64).tolist())


def survivals(method: Method, outputs: Outputs, merged: Merged, names: Iterable[str]) -> Iterator[tuple[str, Survival]]:
    """What survives in each layer, one after the other. A layer takes its matrix six times in float32.

    Args:
        method: quantizes the layers.
        outputs: what it will yield.
        merged: base and adapter.
        names: the layers' weights, matrices.
    """
    transposed = merged.checkpoint.architecture.structure.transposed
    for name in names:
        module, spec = name.removesuffix(".weight"), outputs.specs[name]
        matrices = (each.weights.read(name) for each in (merged.base, merged.checkpoint, merged.unrounded))
        turned = [each.t().contiguous() if module in transposed else each for each in matrices]
        yield module, survival(turned[0], turned[1], turned[2], _rounding(method, spec))


def _rounding(method: Method, spec: OutputSpec) -> Rounded:
    """What a method makes of a matrix, by rounding alone."""

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        if isinstance(spec, TensorSpec):
            return matrix.to(torch.float32)
        if isinstance(method, RoundingMethod):
            return dequantize(method.codes(matrix, spec), torch.float32)
        assert isinstance(spec, GroupQuantizedSpec)
        return dequantize(nearest_on(matrix, spec), torch.float32)

    return rounded


def spread(sizes: Mapping[str, int], limit: int) -> list[str]:
    """Layers at equal distances from one another, as many as have at most `limit` weights together, but at least one.

    Args:
        sizes: the weights of each layer, in order.
        limit: how many to take.
    """
    names, step = list(sizes), 1
    while step < len(names) and sum(sizes[name] for name in names[::step]) > limit:
        step += 1
    return names[::step]
