"""GPTQ: codes for the rows of a matrix that keep the error of its outputs small.

Algorithm 1 of arXiv:2210.17323; the reference implementation is `fasterquant` in IST-DASLab/gptq. The weights are kept
transposed, [in, out], so that a column of the paper is a contiguous row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from qexport.errors import NumericalError
from qexport.quantizing.factorization import Task, factorize_inverse, side_by_side
from qexport.quantizing.tiles import tile
from qexport.tensors import GroupQuantized

_SHRINK = tuple(1.0 - 0.025 * step for step in range(20))
"""Clipping ranges tried by the search, as fractions of the largest value."""

_CHUNK = 1 << 18
"""Weights searched at a time, so that the temporaries stay in the cache."""

_CHUNK_ON_CUDA = 1 << 24
"""Likewise, so that there is enough to do for each start of a kernel."""

_ROWS = 512
"""Rows of a wide matrix that are copied, or updated by one thread, at a time."""


ROWS_TOGETHER = 96
"""Outputs of one product on the CPU, wherever outputs are independent of each other; on CUDA see `tiles`. So a matrix
that is cut at a multiple of it is solved with the same bits as the whole.
"""


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

    def fill(groups: slice, outputs: slice) -> None:
        weight = None if importance is None else importance[groups]
        part = low[groups, outputs], high[groups, outputs]
        found = _search(weights[groups, :, outputs], *part, bits, sym, weight)
        best.scales[groups, outputs], best.zeros[groups, outputs] = found.scales, found.zeros

    if search:
        with side_by_side(weights.device) as run:
            chunk = _CHUNK if weights.device.type == "cpu" else _CHUNK_ON_CUDA
            run(partial(fill, *part) for part in _parts(*weights.shape, chunk=chunk))
    return best


def _parts(groups: int, group_size: int, outputs: int, *, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Groups and outputs of some `chunk` weights, as many outputs as possible: they are contiguous in memory."""
    width = min(outputs, max(1, chunk // group_size))
    height = max(1, chunk // (group_size * width))
    for group in range(0, groups, height):
        for output in range(0, outputs, width):
            yield slice(group, group + height), slice(output, output + width)


def _search(weights: Tensor, low: Tensor, high: Tensor, bits: int, sym: bool, importance: Tensor | None) -> Grid:
    """The grids with the least error; the first of equals."""
    grids = _candidates(low, high, bits, sym)
    weight = weights.new_ones(len(weights), weights.shape[1]) if importance is None else importance
    negative = weights.transpose(0, 1).neg()  # [group_size, groups, out]: a scale is used for whole rows
    negative, error = negative.contiguous(), torch.empty_like(negative, memory_format=torch.contiguous_format)
    total, least = weights.new_empty(low.shape), weights.new_full(low.shape, torch.inf)
    best = torch.zeros_like(low, dtype=torch.int64)
    for number, (scale, zero) in enumerate(zip(grids.scales, grids.zeros, strict=True)):
        lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sym else (-zero, 2**bits - 1 - zero)
        torch.mul(negative, -1 / scale, out=error).round_().clamp_(lowest, highest)
        torch.addcmul(negative, error, scale, out=error).square_()
        torch.bmm(weight.unsqueeze(1), error.transpose(0, 1), out=total.unsqueeze(1))
        best.masked_fill_(total < least, number)
        torch.minimum(total, least, out=least)
    scales, zeros = (each.gather(0, best[None])[0] for each in (grids.scales, grids.zeros))
    return Grid(scales, zeros, bits)


def _candidates(low: Tensor, high: Tensor, bits: int, sym: bool) -> Grid:
    """All that are tried for each of some groups and outputs: scales and zeros [candidates, groups, out]."""
    shrink = torch.tensor(_SHRINK, device=low.device)[:, None, None]
    divisors = (_plain_divisor(bits), _plain_divisor(bits) + 1) if sym else (_plain_divisor(bits),)
    grids = [_grid(low * shrink, high * shrink, bits, sym, divisor) for divisor in divisors]
    return Grid(torch.cat([grid.scales for grid in grids]), torch.cat([grid.zeros for grid in grids]), bits)


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


COLUMN_BLOCK = 128
"""At most this many columns are quantized before their errors are applied to the rest of the matrix (the paper's B)."""

DAMPING_STEPS = (1.0, 3.0, 10.0, 30.0)
"""Multiples of damp_percent that are tried, in this order, until the factorization succeeds."""


@dataclass(frozen=True)
class Options:
    """The settings of one solve; `Gptq` explains each.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs in a group, a divisor of the number of inputs.
        order: `original`, `static` (static act-order) or `dynamic` (desc_act).
        sym: zero points fixed at 2**(bits-1).
        damp_percent: fraction of the mean diagonal that is added to the diagonal.
        search: search for each group's clipping range.
        refine: go over codes and scales again (`refinement`).
    """

    bits: int
    group_size: int
    order: str
    sym: bool
    damp_percent: float
    search: bool
    refine: bool = False


@dataclass(frozen=True)
class Factor:
    """A Hessian, factorized for the solver.

    Attributes:
        upper: float32 [in, in], U with H^-1 = U^T U, for the permuted inputs.
        order: int64 [in], the inputs in the order in which they are solved.
        damp_percent: the damping that the factorization needed.
    """

    upper: Tensor
    order: Tensor
    damp_percent: float

    def to(self, device: str) -> Factor:
        """The same on a device."""
        return Factor(self.upper.to(device), self.order.to(device), self.damp_percent)


def factorize(hessian: Tensor, options: Options, *, rank_deficient: bool = False) -> Factor:
    """Orders, damps and factorizes a Hessian [in, in]. Dead inputs must have a diagonal above zero already.

    A Hessian of fewer tokens than inputs starts with the second damping step, because its null space is exact.

    Beside the Hessian there is one more matrix of its size, which becomes the factor.

    Raises:
        NumericalError: not positive definite with any damping of `DAMPING_STEPS`.
    """
    inputs = hessian.shape[0]
    diagonal = hessian.diagonal()
    original = torch.arange(inputs, device=hessian.device)
    order = original if options.order == "original" else torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.mean())
    matrix = torch.empty_like(hessian)
    for step in DAMPING_STEPS[int(rank_deficient) :]:
        for rows, chosen in zip(matrix.split(_ROWS), order.split(_ROWS), strict=True):
            rows.copy_(hessian[chosen][:, order])
        matrix.diagonal().add_(options.damp_percent * step * mean)
        if factorize_inverse(matrix):
            return Factor(matrix, order, options.damp_percent * step)
    raise NumericalError(
        f"the Hessian is not positive definite, even with a damping of {options.damp_percent * DAMPING_STEPS[-1]:g}",
        mend="give more calibration tokens, raise quantize.damp_percent, or set on_failure: round_to_nearest",
    )


def solve(weight: Tensor, hessian: Tensor, factor: Factor, options: Options) -> GroupQuantized:
    """The codes of a matrix.

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in]; its diagonal weighs the search for clipping ranges.
        factor: from `factorize` with the same options.
        options: bits, groups and order.
    """
    columns = weight.t()[factor.order].contiguous()
    importance = hessian.diagonal().clone()  # the search would read a view of the diagonal at a cache miss per value
    groups = weight.shape[1] // options.group_size
    original = torch.arange(weight.shape[1], device=weight.device) // options.group_size
    if options.order == "static":
        group_of, grid = original[factor.order], fit_matrix(weight, options, importance)
    else:
        empty = torch.empty(groups, weight.shape[0], device=weight.device, dtype=weight.dtype)
        group_of, grid = original, Grid(empty, empty.clone(), options.bits)
    codes = _columns(columns, factor.upper, group_of, grid, importance[factor.order], options)
    inverse = torch.argsort(factor.order)
    g_idx = original if options.order != "dynamic" else original[inverse]
    return _quantized(codes[inverse].t(), grid, g_idx, options)


def round_to_nearest(weight: Tensor, options: Options, importance: Tensor | None = None) -> GroupQuantized:
    """Plain rounding on grids that span each group's largest value, or on those of the search for clipping ranges.

    Args:
        weight: float32 [out, in].
        options: bits and groups; the order is not used.
        importance: float32 [in], for the search; None for no search.
    """
    grid = fit_matrix(weight, options, importance)
    grouped = weight.t().unflatten(0, (-1, options.group_size))
    codes = _nearest(grouped, grid.scales.unsqueeze(1), grid.zeros.unsqueeze(1), options.bits).flatten(0, 1)
    g_idx = torch.arange(weight.shape[1], device=weight.device) // options.group_size
    return _quantized(codes.t(), grid, g_idx, options)


def fit_matrix(weight: Tensor, options: Options, importance: Tensor | None) -> Grid:
    """The grids of all groups of a matrix [out, in]; searched if `importance` [in] is given and the options say so."""
    grouped = weight.t().reshape(-1, options.group_size, weight.shape[0])
    weights = None if importance is None else importance.reshape(-1, options.group_size)
    search = options.search and importance is not None
    return fit(grouped, bits=options.bits, sym=options.sym, search=search, importance=weights)


def _columns(
    columns: Tensor, upper: Tensor, group_of: Tensor, grid: Grid, importance: Tensor, options: Options
) -> Tensor:
    """Quantizes column after column and spreads each one's error over the columns that follow.

    `columns` [in, out] is overwritten; if the groups are not static, each group's grid is fitted when the group begins.
    """
    inputs = columns.shape[0]
    codes, loop = torch.empty_like(columns, dtype=torch.uint8), loop_on(columns.device)
    fitted = inputs if options.order == "static" else options.group_size
    with side_by_side(columns.device) as run:
        for start, end in _column_blocks(inputs, options.group_size):
            part, errors = slice(start, end), torch.empty_like(columns[start:end])
            for first in range(start, end, fitted):
                if options.order != "static" and first % options.group_size == 0:
                    _fit_group(columns, grid, first // options.group_size, first, importance, options)
                bounds = first - start, min(first + fitted, end) - start
                loop(columns[part], codes[part], errors, upper[part, part], grid, group_of[part], *bounds)
            run(_spread_tasks(columns, upper, start, end, errors))
    return codes


Loop = Callable[[Tensor, Tensor, Tensor, Tensor, Grid, Tensor, int, int], None]
"""Quantizes some columns of a column block, and applies their errors to the columns of the block after them: see
`plain_loop`."""


def loop_on(device: torch.device) -> Loop:
    """The fastest loop on a device: on CUDA the kernel, if triton is there."""
    if device.type == "cpu" or find_spec("triton") is None:
        return plain_loop
    from qexport.quantizing.column_kernel import kernel_loop

    return kernel_loop


def plain_loop(
    columns: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, grid: Grid, groups: Tensor, first: int, last: int
) -> None:
    """The loop with an operation of torch for each step.

    Args:
        columns: float32 [columns of the block, out]; those from `first` on are overwritten.
        codes: uint8, of the same shape; those of the columns are written.
        errors: float32, likewise.
        upper: the block's square of the factor, float32 [columns of the block, columns of the block].
        grid: the grids of all groups.
        groups: int64 [columns of the block], the group of each.
        first: the first of the columns.
        last: where they end.
    """
    for index, group in enumerate(groups[first:last].tolist(), first):
        column, error = columns[index], errors[index]
        code = grid.codes(column, group)
        codes[index] = code
        torch.sub(column, grid.values(code, group), out=error).div_(upper[index, index])
        columns[index + 1 :].addr_(upper[index, index + 1 :], error, alpha=-1)


def _spread_tasks(columns: Tensor, upper: Tensor, start: int, end: int, errors: Tensor) -> Iterator[Task]:
    """Applies the errors of a column block to the columns after it."""
    rows, together = tile(_ROWS, columns.device), tile(ROWS_TOGETHER, columns.device)

    def spread(first: int, output: int) -> None:
        part, outputs = slice(first, first + rows), slice(output, output + together)
        columns[part, outputs].addmm_(upper[start:end, part].t(), errors[:, outputs], alpha=-1)

    for first in range(end, len(columns), rows):
        yield from (partial(spread, first, output) for output in range(0, columns.shape[1], together))


def _column_blocks(inputs: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Bounds of column blocks, such that a group begins only after all errors of earlier columns were applied to it."""
    span = group_size if group_size > COLUMN_BLOCK else COLUMN_BLOCK // group_size * group_size
    for first in range(0, inputs, span):
        last = min(first + span, inputs)
        for start in range(first, last, COLUMN_BLOCK):
            yield start, min(start + COLUMN_BLOCK, last)


def _fit_group(columns: Tensor, grid: Grid, group: int, start: int, importance: Tensor, options: Options) -> None:
    part = slice(start, start + options.group_size)
    found = fit(
        columns[None, part],
        bits=options.bits,
        sym=options.sym,
        search=options.search,
        importance=importance[None, part],
    )
    grid.scales[group], grid.zeros[group] = found.scales[0], found.zeros[0]


def _quantized(codes: Tensor, grid: Grid, g_idx: Tensor, options: Options) -> GroupQuantized:
    return GroupQuantized(
        codes=codes.to(torch.uint8).contiguous(),
        scales=grid.scales.to(torch.float16),
        zeros=grid.zeros.to(torch.uint8),
        g_idx=g_idx.to(torch.int32),
        bits=options.bits,
        group_size=options.group_size,
        sym=options.sym,
        desc_act=options.order == "dynamic",
    )
