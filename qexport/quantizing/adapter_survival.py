"""How much of an adapter's change survives the rounding of a layer, from the weights alone.

With the base's weights B, the change D and the rounding Q it is <Q(B + D) - Q(B), D> / <D, D>: 1 if the rounded
weights move as the weights do, on average over all of them, and 0 if the adapter moves none across a boundary. A change
that is small beside the steps of the grid survives on average, because some weights lie near a boundary. It does not if
the base lies on the grid already, as one does that was rounded to the same code book in training.

GPTQ's codes depend on calibration text. Its layers are rounded to nearest here, on grids without a search: that tells
what the grid can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.formats import Outputs
from qexport.quantizing.method import Method, RoundingMethod
from qexport.quantizing.rounding import nearest_on
from qexport.reading.filled_model import dequantize
from qexport.tensors import GroupQuantizedSpec, QuantizedSpec

SAMPLED: Final = 32_000_000
"""Weights that are rounded where an estimate is enough."""


@dataclass(frozen=True)
class Survival:
    """How much of the change of one or more layers survives.

    Attributes:
        kept: the sum of <Q(B + D) - Q(B), D>.
        change: the sum of <D, D>.
    """

    kept: float
    change: float

    @property
    def share(self) -> float:
        """What survives; 1 if nothing changes."""
        return self.kept / self.change if self.change else 1.0


def together(layers: Sequence[Survival]) -> Survival:
    """Some layers as one."""
    return Survival(sum(each.kept for each in layers), sum(each.change for each in layers))


Rounded = Callable[[torch.Tensor], torch.Tensor]
"""From a matrix [out, in] to the values that stand for it, in float32."""


def kept_of_rows(base: torch.Tensor, merged: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    """float64 [out, 2]: <Q(B + D) - Q(B), D> and <D, D> of each row.

    Args:
        base: [out, in], in the dtype of the merged matrix.
        merged: [out, in].
        rounded: Q.
    """
    change = merged.to(torch.float32) - base.to(torch.float32)
    moved = rounded(merged) - rounded(base)
    return torch.stack([(each * change).sum(1, dtype=torch.float64) for each in (moved, change)], 1)


def survivals(
    method: Method, outputs: Outputs, merged: Checkpoint, base: Checkpoint, names: Sequence[str]
) -> Iterator[tuple[str, Survival]]:
    """The share of each layer, one after the other. A layer takes its matrix four times in float32.

    Args:
        method: rounds the layers.
        outputs: what it will yield.
        merged: base and adapter.
        base: the weights that the adapter was merged into.
        names: the layers' weights, all of them quantized.
    """
    transposed = merged.architecture.structure.transposed
    for name in names:
        module, spec = name.removesuffix(".weight"), outputs.specs[name]
        assert isinstance(spec, QuantizedSpec)
        after = merged.weights.read(name)
        before = base.weights.read(name).to(after.dtype)
        pair = [each.t().contiguous() if module in transposed else each for each in (before, after)]
        kept, change = kept_of_rows(pair[0], pair[1], rounding_of(method, spec)).sum(0).tolist()
        yield module, Survival(kept, change)


def rounding_of(method: Method, spec: QuantizedSpec) -> Rounded:
    """What a method makes of a matrix, by rounding alone."""

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
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
