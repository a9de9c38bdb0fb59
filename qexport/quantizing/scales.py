"""Scales and zero points of groups of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SHRINK = tuple(1.0 - 0.025 * step for step in range(20))
"""Clipping ranges tried by the search, as fractions of the largest value."""

_CHUNK = 1 << 19
"""Weights searched at a time, so that the temporaries stay in the cache."""


@dataclass(frozen=True)
class Grid:
    """Uniform grids, one per group and output.

    Attributes:
        scales: float32 [groups, out], each a float16 value.
        zeros: float32 [groups, out], integers in 1 .. 2**bits - 1.
        bits: 2, 3, 4 or 8.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def codes(self, weights: Tensor, group: int | Tensor) -> Tensor:
        """The nearest codes (as float32) of weights whose grids are `scales[group]`, `zeros[group]`."""
        return _nearest(weights, self.scales[group], self.zeros[group], self.bits)

    def values(self, codes: Tensor, group: int | Tensor) -> Tensor:
        """The weights that the codes represent."""
        return (codes - self.zeros[group]) * self.scales[group]


def fit(weights: Tensor, *, bits: int, sym: bool, search: bool, importance: Tensor | None = None) -> Grid:
    """The grid of each group.

    Without a search the grid spans the group's largest value (symmetric) or its range with zero in it (asymmetric).
    With a search, the clipping range is the one with the least squared error, weighted by `importance`; for symmetric
    grids both 2**(bits-1) and 2**(bits-1) - 1 are tried as the divisor of the largest value, because the grid has one
    step more below zero than above.

    Args:
        weights: float32 [groups, group_size, out].
        bits: 2, 3, 4 or 8.
        sym: zero points fixed at 2**(bits-1).
        search: search for the best clipping range.
        importance: float32 [groups, group_size], the weight of each input in the error (the Hessian's diagonal).
    """
    low, high = weights.amin(1).clamp_(max=0), weights.amax(1).clamp_(min=0)
    best = _grid(low, high, bits, sym, _plain_divisor(bits))
    if not search:
        return best
    scales, zeros = [], []
    width = max(1, _CHUNK // (weights.shape[0] * weights.shape[1]))
    for start in range(0, weights.shape[2], width):
        part = slice(start, start + width)
        found = _search(weights[:, :, part], low[:, part], high[:, part], bits, sym, importance)
        scales.append(found.scales)
        zeros.append(found.zeros)
    return Grid(torch.cat(scales, 1), torch.cat(zeros, 1), bits)


def _search(weights: Tensor, low: Tensor, high: Tensor, bits: int, sym: bool, importance: Tensor | None) -> Grid:
    divisors = (_plain_divisor(bits), _plain_divisor(bits) + 1) if sym else (_plain_divisor(bits),)
    weight = None if importance is None else importance.unsqueeze(2)
    best: Grid | None = None
    best_error = torch.full_like(low, torch.inf)
    for divisor in divisors:
        for shrink in _SHRINK:
            grid = _grid(low * shrink, high * shrink, bits, sym, divisor)
            scale, zero = grid.scales.unsqueeze(1), grid.zeros.unsqueeze(1)
            error = _nearest(weights, scale, zero, bits).sub_(zero).mul_(scale).sub_(weights).square_()
            total = (error if weight is None else error.mul_(weight)).sum(1)
            better = total < best_error
            best_error = torch.where(better, total, best_error)
            best = grid if best is None else _choose(better, grid, best)
    assert best is not None
    return best


def _choose(where: Tensor, ours: Grid, theirs: Grid) -> Grid:
    scales = torch.where(where, ours.scales, theirs.scales)
    return Grid(scales, torch.where(where, ours.zeros, theirs.zeros), ours.bits)


def _plain_divisor(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1


def _grid(low: Tensor, high: Tensor, bits: int, sym: bool, divisor: int) -> Grid:
    levels = 2**bits - 1
    if not sym:  # AutoGPTQ stores zero - 1, and gptqmodel misreads a stored -1: keep one code below zero
        low = torch.minimum(low, -high / (levels - 1))
    scales = torch.maximum(-low, high) / divisor if sym else (high - low) / levels
    scales = torch.where(scales > 0, scales, 1.0).to(torch.float16).clamp_(min=2.0**-24).to(torch.float32)
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if sym else torch.round(-low / scales).clamp_(1, levels)
    return Grid(scales, zeros, bits)


def _nearest(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return torch.div(weights, scales).round_().add_(zeros).clamp_(0, 2**bits - 1)
