"""How much of the adapter's change is in an artifact's weights. `qexport.verifying.estimates` has the same by
predictions.
"""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from qexport.artifact.figures import Figure

_NORMAL: Final = 1.959964
"""The two-sided 95 % point of the normal distribution."""

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
    half = _NORMAL * math.sqrt(float(influence.square().sum()))
    low, high = strength - half, strength + half
    return Figure(
        name="adapter_strength_weights", value=strength, low=low, high=high, sequence_low=low, sequence_high=high,
        n=len(projections), unit="row",
    )  # fmt: skip
