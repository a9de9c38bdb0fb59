"""All shards of a pass: what each of them does, and what is summed over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Concatenate, TypeVar

import torch
from torch import Tensor

from qexport.execution.workers import Execution, Hosted, Later, Params, Value
from qexport.quantizing.asymmetry import Asymmetry
from qexport.quantizing.layer import Hessian
from qexport.quantizing.shard import Shard, SharedInputs
from qexport.quantizing.sums import Sums, asymmetry_parts, hessian_parts, joined_asymmetry, joined_hessians

Taken = TypeVar("Taken")

_PARTS = 2
"""For each shard, the parts that a sum is cut into: while one adds to a part, the others are at other parts."""


def shared_out(batches: int, workers: int) -> list[range]:
    """Consecutive batches for each worker, about equally many; no worker has none."""
    count = min(batches, workers)
    bounds = [batches * number // count for number in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def halves_of(batches: int) -> list[range]:
    """The first and the second half of the batches, as far as they are not empty."""
    return [each for each in (range(batches // 2), range(batches // 2, batches)) if each]


class Shards:
    """The calibration windows, shared out to the workers.

    Args:
        execution: the workers.
        shared: what all shards have in common.
        ranges: the batches of each.
        device: where sums are completed.
    """

    def __init__(
        self, execution: Execution, shared: SharedInputs, ranges: Sequence[range], device: torch.device
    ) -> None:
        self._execution, self._ranges, self._device = execution, ranges, device
        self._all: Sequence[Hosted[Shard]] = execution.host(Shard, [(shared, batches) for batches in ranges])
        self._halves = halves_of(ranges[-1].stop)

    def each(
        self, method: Callable[Concatenate[Shard, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> list[Value]:
        """The results of a method of every shard."""
        return [later.result() for later in [shard.call(method, *args, **kwargs) for shard in self._all]]

    def first(
        self, method: Callable[Concatenate[Shard, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> Value:
        """The result of a method of the first shard."""
        return self._all[0].call(method, *args, **kwargs).result()

    def renew(self) -> None:
        """Replaces the shards whose workers have gone."""
        self._execution.renew(self._all)

    def summed(
        self,
        group: int,
        widths: Sequence[int],
        counts: Tensor | None,
        take: Callable[[Asymmetry], Taken] | None,
    ) -> tuple[list[Hessian], list[Taken]]:
        """The sums over all batches of a group's inputs, the same bits for any number of shards.

        Args:
            group: its number in the block.
            widths: of its inputs.
            counts: how much each token counts, float32 [windows, tokens]; None for all alike.
            take: what is made of the asymmetry of each half of the text, one after the other, since it is as large as a
                Hessian; None where the asymmetry is not asked for.

        Returns:
            The Hessian of each input, and what was taken.
        """
        if len(self._all) == 1:
            return self._summed_by_one(group, widths, counts, take)
        return self._summed_by_all(group, widths, counts, take)

    def _summed_by_one(
        self, group: int, widths: Sequence[int], counts: Tensor | None, take: Callable[[Asymmetry], Taken] | None
    ) -> tuple[list[Hessian], list[Taken]]:
        """Everything is added while a batch's inputs are there."""
        sums, taken = hessian_parts(widths, 1, self._device), list[Taken]()
        for numbers in self._halves:
            own = [] if take is None else asymmetry_parts(widths[0], 1, self._device)
            found = self.first(Shard.add, group, numbers, [*sums, *own], counts)
            sums = found[:1]
            if take is not None:
                taken.append(take(joined_asymmetry(found[1:], self._device)))
        return joined_hessians(sums, self._device), taken

    def _summed_by_all(
        self, group: int, widths: Sequence[int], counts: Tensor | None, take: Callable[[Asymmetry], Taken] | None
    ) -> tuple[list[Hessian], list[Taken]]:
        """Part after part goes from shard to shard. The shards of the first half begin with the Hessians, since those
        of the second half wait for them; those begin with their own asymmetry.
        """
        parts, (first, second) = _PARTS * len(self._all), self._halves
        begun = [self._add(group, first, [part], counts) for part in hessian_parts(widths, parts, self._device)]
        asymmetries = [
            [self._add(group, half, [part], counts) for part in asymmetry_parts(widths[0], parts, self._device)]
            for half in self._halves
            if take is not None
        ]
        hessians = [self._add(group, second, part.argument, counts) for part in begun]
        taken = [take(joined_asymmetry(_results(parts), self._device)) for parts in asymmetries if take is not None]
        return joined_hessians(_results(hessians), self._device), taken

    def _add(self, group: int, numbers: range, sums: list[Sums], counts: Tensor | None) -> Later[list[Sums]]:
        """Sends sums through the shards that have some of the batches."""
        later: Later[list[Sums]] | None = None
        for shard, own in zip(self._all, self._ranges, strict=True):
            if range(max(own.start, numbers.start), min(own.stop, numbers.stop)):
                later = shard.call(Shard.add, group, numbers, later.argument if later else sums, counts)
        assert later is not None, "the halves of the text are not empty"
        return later


def _results(parts: Sequence[Later[list[Sums]]]) -> list[Sums]:
    return [sums for part in parts for sums in part.result()]
