"""All shards of a pass: what each of them does, and what is summed over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Concatenate

import torch
from torch import Tensor

from qexport.execution.workers import Execution, Hosted, Later, Params, Value
from qexport.quantizing.layer import Hessian
from qexport.quantizing.shard import SharedInputs, WindowShard
from qexport.quantizing.sums import GroupSums, asymmetry_parts, hessian_parts, joined_hessians

_PARTS = 2
"""For each of several shards of a half, the parts that a sum is cut into: each is at another part."""


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
        self._all: Sequence[Hosted[WindowShard]] = execution.host(
            WindowShard, [(shared, batches) for batches in ranges]
        )
        self._halves = halves_of(ranges[-1].stop)

    def each(
        self, method: Callable[Concatenate[WindowShard, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> list[Value]:
        """The results of a method of every shard."""
        return [later.result() for later in [shard.call(method, *args, **kwargs) for shard in self._all]]

    def first(
        self, method: Callable[Concatenate[WindowShard, Params], Value], *args: Params.args, **kwargs: Params.kwargs
    ) -> Value:
        """The result of a method of the first shard."""
        return self._all[0].call(method, *args, **kwargs).result()

    def renew(self) -> None:
        """Replaces the shards whose workers have gone."""
        self._execution.renew(self._all)

    def summed(
        self, group: int, widths: Sequence[int], counts: Tensor | None, correcting: Sequence[str]
    ) -> tuple[list[Hessian], list[dict[str, Tensor]]]:
        """The sums over all batches of a group's inputs, the same bits for any number of shards.

        Args:
            group: its number in the block.
            widths: of its inputs.
            counts: how much each token counts, float32 [windows, tokens]; None for all alike.
            correcting: the layers that make up for what quantizing has done to their input, the group's first.

        Returns:
            The Hessian of each input, and of each half of the text what those layers are to make up for
            (`Asymmetry.take`).
        """
        if len(self._all) == 1:
            return self._summed_by_one(group, widths, counts, correcting)
        return self._summed_by_all(group, widths, counts, correcting)

    def _summed_by_one(
        self, group: int, widths: Sequence[int], counts: Tensor | None, correcting: Sequence[str]
    ) -> tuple[list[Hessian], list[dict[str, Tensor]]]:
        """Everything is added while a batch's inputs are there."""
        sums, taken = hessian_parts(widths, 1, self._device), []
        for numbers in self._halves:
            own = asymmetry_parts(widths[0], 1, self._device) if correcting else []
            found = self.first(WindowShard.add, group, numbers, [*sums, *own], counts)
            sums = found[:1]
            if correcting:
                taken.append(self.first(WindowShard.take, found[1:], correcting))
        return joined_hessians(sums, self._device), taken

    def _summed_by_all(
        self, group: int, widths: Sequence[int], counts: Tensor | None, correcting: Sequence[str]
    ) -> tuple[list[Hessian], list[dict[str, Tensor]]]:
        """Part after part goes from shard to shard. The shards of the first half begin with the Hessians, since those
        of the second half wait for them; those begin with their own asymmetry.
        """
        parts, (first, second) = self._parts, self._halves
        begun = [self._added(group, first, [part], counts) for part in hessian_parts(widths, parts, self._device)]
        taken = [
            [
                self._having(half)[-1].call(
                    WindowShard.take, self._added(group, half, [part], counts).argument, correcting
                )
                for part in asymmetry_parts(widths[0], parts, self._device)
            ]
            for half in (self._halves if correcting else [])
        ]
        hessians = [self._added(group, second, part.argument, counts) for part in begun]
        of_halves = [_side_by_side([part.result() for part in of_half], self._device) for of_half in taken]
        return joined_hessians([sums for part in hessians for sums in part.result()], self._device), of_halves

    @property
    def _parts(self) -> int:
        """The parts that a sum is cut into."""
        of_half = len(self._having(self._halves[0]))
        return 1 if of_half == 1 else _PARTS * of_half

    def _having(self, numbers: range) -> list[Hosted[WindowShard]]:
        """The shards that have some of the batches."""
        return [
            shard
            for shard, own in zip(self._all, self._ranges, strict=True)
            if range(max(own.start, numbers.start), min(own.stop, numbers.stop))
        ]

    def _added(
        self, group: int, numbers: range, sums: list[GroupSums], counts: Tensor | None
    ) -> Later[list[GroupSums]]:
        """Sends sums through the shards that have some of the batches."""
        first, *others = self._having(numbers)
        later = first.call(WindowShard.add, group, numbers, sums, counts)
        for shard in others:
            later = shard.call(WindowShard.add, group, numbers, later.argument, counts)
        return later


def _side_by_side(parts: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """The columns of all parts."""
    return {name: torch.cat([part[name].to(device) for part in parts], 1) for name in parts[0]}
