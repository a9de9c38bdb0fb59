"""How much of the adapter's change is in an artifact's weights, and how much of it rounding has left.
`qexport.verifying.estimates` has the same by predictions.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from qexport.artifact.figures import Figure

_NORMAL: Final = 1.959964
"""The two-sided 95 % point of the normal distribution."""

_ROWS_AT_ONCE: Final = 512

_COLLINEAR: Final = 1e-9
"""Where base and change point the same way up to this, their shares cannot be told apart."""


def strength_by_weights(projections: Tensor) -> Figure | None:
    """`adapter_strength_weights`: the artifact's weights, fitted as u b + v d with the base b and the adapter's change
    d, give the strength v / u.

    The quotient, because coarse grids shrink all weights alike, base and change. The rows are the units of the interval
    (delta method with the rows' residuals), since every method quantizes one row independently of the others.

    Args:
        projections: float64 [rows, 5], see `qexport.verifying.matrices.projections`.

    Returns:
        The figure; None if there is nothing to fit.
    """
    return _fitted("adapter_strength_weights", projections)


def _fitted(name: str, projections: Tensor) -> Figure | None:
    bb, bd, dd, ab, ad = projections.sum(0).tolist()
    determinant = bb * dd - bd * bd
    if determinant <= _COLLINEAR * bb * dd:
        return None
    of_base, of_change = (dd * ab - bd * ad) / determinant, (bb * ad - bd * ab) / determinant
    if of_base <= 0:
        return None
    rows = projections.unbind(1)
    left = rows[3] - of_base * rows[0] - of_change * rows[1], rows[4] - of_base * rows[1] - of_change * rows[2]
    strength = of_change / of_base
    influence = ((bb + strength * bd) * left[1] - (bd + strength * dd) * left[0]) / determinant / of_base
    return _by_rows(name, strength, influence)


def _by_rows(name: str, value: float, influence: Tensor) -> Figure:
    """A figure whose units are rows: float64 [rows], each one's part in the estimate's error."""
    half = _NORMAL * math.sqrt(float(influence.square().sum()))
    low, high = value - half, value + half
    return Figure(
        name=name, value=value, low=low, high=high, sequence_low=low, sequence_high=high, n=len(influence), unit="row"
    )


SURVIVAL: Final = "adapter_survival"


def moved_by_rounding(stored: Tensor, base: Tensor, change: Tensor) -> Tensor:
    """float64 [rows, 2]: <Q(B + D) - Q(B), D> and <D, D> of each row.

    Args:
        stored: Q(B + D), the artifact's weights [out, in], in float32.
        base: Q(B), the base's weights rounded in the same way, likewise.
        change: D, before anything is rounded, likewise.
    """
    pairs = zip(*(each.split(_ROWS_AT_ONCE) for each in (stored, base, change)), strict=True)
    return torch.cat([_products(one - other, part) for one, other, part in pairs])


def _products(moved: Tensor, change: Tensor) -> Tensor:
    return torch.stack([(each * change).sum(1, dtype=torch.float64) for each in (moved, change)], 1)


def survival(rows: Tensor) -> Figure | None:
    """`adapter_survival`: how much of the adapter's change is left after all rounding.

    Where each weight was rounded on its own it is <Q(B + D) - Q(B), D> / <D, D>. Of other codes nobody knows what they
    would be for the base; there it is the strength of D in them, as for `strength_by_weights`.

    Args:
        rows: float64 [rows, 2] of `moved_by_rounding`, or [rows, 5] of `qexport.verifying.matrices.projections` with
            the unrounded change.

    Returns:
        The figure; None if there is nothing to tell.
    """
    if rows.shape[1] != 2:
        return _fitted(SURVIVAL, rows)
    kept, change = rows.sum(0).tolist()
    if change <= 0:
        return None
    share = kept / change
    return _by_rows(SURVIVAL, share, (rows[:, 0] - share * rows[:, 1]) / change)
