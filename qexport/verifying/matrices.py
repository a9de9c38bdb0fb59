"""How far a quantized matrix is from the reference's, as a whole, by row and by group.

The yardstick is rounding to nearest on the very grids that are stored. Methods that round each weight have that error.
GPTQ has a larger one, since it makes up for the errors of other weights, but by a bounded factor, and the values stay
as large as the nearest ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.tensors import BlockQuantized, Quantized
from qexport.verifying.grids import groups_of, strips
from qexport.verifying.matrix_faults import (
    ADDED,
    Fault,
    Lost,
    Outputs,
    Whole,
    Worst,
    faults_of_grids,
    over_rows,
    sums_of,
)


@dataclass(frozen=True)
class MatrixErrors:
    """A quantized matrix beside the reference's.

    Attributes:
        relative_error: the norm of the difference over the norm of the reference.
        nearest_error: the same for the values of the stored grids that are nearest to the reference's.
        output_error: as `relative_error`, for the products with inputs; None without inputs.
        nearest_output_error: likewise.
        gain: the product of values and reference over that of the nearest values and the reference: 1.1 if all values
            are 1.1 times as large.
        worst_row: the row with the largest error over its nearest values'.
        worst_row_ratio: that ratio.
        worst_group: the group with the largest error over its nearest values', as its row and its number; None if the
            values of a row share one scale.
        worst_group_ratio: that ratio.
        change: what `projections` returns; None if the adapter does not change the matrix.
        used: how much of each limit the worst place takes, by the limit's name: `error`, `size`, `shift`, and for rows
            and groups `error of a row`, `size of a row` and so on; more than 1 is a fault. Empty if the codes are known
            to be right.
        faults: what is wrong however little it changes, then those of the whole, of rows and of groups.
    """

    relative_error: float
    nearest_error: float
    output_error: float | None
    nearest_output_error: float | None
    gain: float
    worst_row: int
    worst_row_ratio: float
    worst_group: tuple[int, int] | None
    worst_group_ratio: float | None
    change: Tensor | None
    used: Mapping[str, float]
    faults: list[Fault]


def compare_matrix(
    quantized: Quantized,
    reference: Tensor,
    base: Tensor | None = None,
    inputs: Tensor | None = None,
    *,
    rounded: bool = False,
) -> MatrixErrors:
    """Holds a quantized matrix against the reference's.

    Args:
        quantized: codes [out, in].
        reference: [out, in], of any floating dtype.
        base: the same matrix without the adapter, if the adapter changes it.
        inputs: float32 [tokens, in], what the layer multiplies the reference with.
        rounded: whether the codes are known to be those of the reference, rounded by the method itself; then there is
            nothing to find.
    """
    groups, totals = groups_of(quantized), torch.zeros(len(ADDED), dtype=torch.float64)
    rows, in_groups, lost, changes = Worst("row"), Worst("group"), Lost(), list[Tensor]()
    outputs = Outputs(None if rounded else inputs)
    for strip in strips(quantized, reference, rounded=rounded):
        own = sums_of(strip, groups)
        whole = over_rows(own)
        totals += torch.stack([getattr(whole, name).sum(dtype=torch.float64) for name in ADDED])
        rows.add(strip.first, whole, whole.nearest_error.mean())
        if groups is not None:
            typical = whole.nearest_error / own.error.shape[1]
            in_groups.add(strip.first, own, typical)
            lost.add_groups(strip.first, own.lost(typical) & ~whole.zero)
        lost.add_rows(strip.first, whole.zero)
        outputs.add(strip)
        if base is not None:
            changes.append(projections(strip.values, strip.reference, base[strip.first :][: len(strip.values)]))
    matrix = Whole.of(totals, reference.numel(), each_rounded=isinstance(quantized, BlockQuantized))
    used = matrix.used() | outputs.used() | rows.used() | (in_groups.used() if groups is not None else {})
    faults = [*matrix.faults(), *outputs.faults(), *rows.faults(), *in_groups.faults(), *lost.faults()]
    faults += faults_of_grids(quantized, reference)
    return MatrixErrors(
        matrix.relative,
        matrix.nearest,
        *outputs.errors(),
        matrix.gain,
        rows.place[0],
        rows.ratio,
        in_groups.place if groups is not None else None,
        in_groups.ratio if groups is not None else None,
        torch.cat(changes) if changes else None,
        {} if rounded else used,
        [] if rounded else sorted(faults, key=lambda fault: fault.severity < math.inf),
    )


def projections(values: Tensor, reference: Tensor, base: Tensor) -> Tensor:
    """The sums that the adapter's strength is estimated from; see `qexport.verifying.adapter_strength`.

    Args:
        values: of the artifact [rows, in].
        reference: the merged model's.
        base: the model's without the adapter.

    Returns:
        float64 [rows, 5]: with the change d = reference - base, the products bb, bd, dd, ab and ad of each row.
    """
    wide = base.to(torch.float32)
    change = reference.to(torch.float32) - wide
    pairs = ((wide, wide), (wide, change), (change, change), (values, wide), (values, change))
    return torch.stack([(one * other).sum(1, dtype=torch.float64) for one, other in pairs], 1)
