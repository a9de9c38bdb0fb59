"""Quantizing the linear layers that share one input, with the checks and fallbacks around the solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qexport.errors import NumericalError
from qexport.quantize.hessian import Hessian
from qexport.quantize.solver import Factor, Options, factorize, round_to_nearest, solve
from qexport.tensors import GroupQuantized, LayerReport


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's codes and what finding them did."""

    quantized: GroupQuantized
    report: LayerReport


def solve_together(
    weights: Mapping[str, Tensor],
    hessian: Hessian,
    options: Mapping[str, Options],
    on_failure: Literal["error", "round_to_nearest"],
) -> dict[str, SolvedLayer]:
    """Quantizes layers that share one input, so also one Hessian and one factorization.

    Args:
        weights: float32 [out, in] by module path.
        hessian: of the shared input.
        options: by module path.
        on_failure: what to do where the Hessian cannot be used.

    Raises:
        NumericalError: the Hessian is not finite or cannot be factorized, and `on_failure` is `error`.
    """
    names = list(weights)
    dead = int((hessian.matrix().diagonal() == 0).sum())
    try:
        matrix = _usable(hessian)
        factor = factorize(matrix, options[names[0]], rank_deficient=hessian.tokens < matrix.shape[0])
    except NumericalError as error:
        if on_failure == "error":
            raise NumericalError(error.what, where=", ".join(names), mend=error.mend) from error
        return {name: _rounded(name, weights[name], options[name], hessian, dead) for name in names}
    solved: dict[str, SolvedLayer] = {}
    for shared in dict.fromkeys(options[name] for name in names):
        members = [name for name in names if options[name] == shared]
        solved |= _solve_rows({name: weights[name] for name in members}, matrix, factor, shared, hessian.tokens, dead)
    return {name: solved[name] for name in names}


def _usable(hessian: Hessian) -> Tensor:
    """The Hessian, in place, with inputs that were always zero made solvable on their own."""
    matrix = hessian.matrix()
    if not hessian.tokens:
        raise NumericalError(
            "no calibration token reached this layer",
            mend="give more, or more varied, calibration text, or set on_failure: round_to_nearest",
        )
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(
            "the inputs of this layer are not finite",
            mend="the merged model overflows in this dtype: check the adapter, or set merge.dtype: float32",
        )
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.mean() if not bool(dead.all()) else 1.0
    return matrix


def _solve_rows(
    weights: Mapping[str, Tensor], matrix: Tensor, factor: Factor, options: Options, tokens: int, dead: int
) -> dict[str, SolvedLayer]:
    """Solves the rows of several layers at once: rows do not know each other."""
    joined = solve(torch.cat(list(weights.values())), matrix, factor, options)
    solved, start = {}, 0
    for name, weight in weights.items():
        quantized = joined.rows(start, start + weight.shape[0])
        start += weight.shape[0]
        report = LayerReport(
            name=name,
            method="gptq",
            loss=output_error(weight, quantized, matrix),
            rtn_loss=output_error(weight, round_to_nearest(weight, options), matrix),
            damp_percent=factor.damp_percent,
            tokens=tokens,
            dead_columns=dead,
        )
        solved[name] = SolvedLayer(quantized, report)
    return solved


def _rounded(name: str, weight: Tensor, options: Options, hessian: Hessian, dead: int) -> SolvedLayer:
    quantized = round_to_nearest(weight, options)
    loss = output_error(weight, quantized, hessian.matrix())
    return SolvedLayer(
        quantized, LayerReport(name, "round_to_nearest", loss, loss, options.damp_percent, hessian.tokens, dead)
    )


def output_error(weight: Tensor, quantized: GroupQuantized, matrix: Tensor) -> float | None:
    """Squared error of the outputs relative to the outputs' mean square: tr(E H E^T) / tr(W H W^T).

    Args:
        weight: float32 [out, in].
        quantized: what stands for it.
        matrix: the Hessian, float32 [in, in].

    Returns:
        The ratio; None where the Hessian is not finite or the layer puts out nothing, so that there is no ratio.
    """
    error = quantized.dequantize(torch.float32).sub_(weight)
    lost, whole = _energy(error, matrix), _energy(weight, matrix)
    return lost / whole if whole > 0 and math.isfinite(lost / whole) else None


def _energy(weight: Tensor, matrix: Tensor) -> float:
    """Row by row and then exactly: the bits of one sum over everything would depend on the number of threads."""
    rows = (weight @ matrix).mul_(weight).sum(1, dtype=torch.float64)
    return math.fsum(rows.tolist()) if bool(torch.isfinite(rows).all()) else math.nan
