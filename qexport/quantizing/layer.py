"""Quantizing the linear layers that share one input: their Hessian, and the checks and fallbacks around the solver."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qexport.errors import NumericalError
from qexport.quantizing.solver import Factor, Options, factorize, round_to_nearest, solve
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantized

_COLUMNS = 128
"""Columns of one strip. Only the strips' upper parts are multiplied, half of the square for a wide layer."""

_ROWS = 1024
"""Tokens that are multiplied at a time. From 2048 on, oneDNN divides the sum over the tokens among the threads, and the
sum's bits depend on the number of threads."""


class Hessian:
    """Sums `X^T X` over batches of inputs X [tokens, in], in float32, upper triangle only until it is read.

    Section 3 of arXiv:2210.17323 writes H = 2 X X^T with the inputs as columns; the factor drops out of every code.
    The batches must come in the same order with the same shapes for the sum to have the same bits.

    Args:
        in_features: the number of inputs.
        device: where to sum.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._complete = False
        self._sum = torch.zeros(in_features, in_features, device=device)

    def add(self, inputs: Tensor) -> None:
        """Adds a batch of inputs [..., tokens, in]."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += inputs.shape[0]
        with _bfloat16_products(inputs.dtype):
            for part in inputs.split(_ROWS):
                self._add_rows(part.to(torch.float32))

    def _add_rows(self, rows: Tensor) -> None:
        for start in range(0, rows.shape[1], _COLUMNS):
            strip = rows[:, start : start + _COLUMNS]
            self._sum[start : start + _COLUMNS, start:].addmm_(strip.t(), rows[:, start:])

    def matrix(self) -> Tensor:
        """The mean of `x x^T` over the tokens: float32 [in, in], symmetric. A view; nothing may be added after it."""
        if not self._complete:
            self._sum.triu_()
            self._sum += self._sum.triu(1).t()
            self._sum /= max(self.tokens, 1)
            self._complete = True
        return self._sum


@contextmanager
def _bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets float32 products round their factors to bfloat16, which changes nothing if they are bfloat16 values.

    The sums stay float32. CPUs with bfloat16 instructions are a quarter faster this way; others compute as before.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to torch's own types
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's codes and the record of how they were found."""

    quantized: GroupQuantized
    record: LayerRecord


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
        on_failure: what to do if the Hessian cannot be used.

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
    """The Hessian, changed in place: inputs that were always zero get a diagonal above zero."""
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
    """Solves the rows of several layers at once: rows are independent of each other."""
    joined = solve(torch.cat(list(weights.values())), matrix, factor, options)
    solved, start = {}, 0
    for name, weight in weights.items():
        quantized = joined.rows(start, start + weight.shape[0])
        start += weight.shape[0]
        record = LayerRecord(
            name=name,
            method="gptq",
            bits=quantized.bits,
            group_size=quantized.group_size,
            loss=output_error(weight, quantized, matrix),
            rtn_loss=output_error(weight, round_to_nearest(weight, options), matrix),
            damp_percent=factor.damp_percent,
            tokens=tokens,
            dead_columns=dead,
        )
        solved[name] = SolvedLayer(quantized, record)
    return solved


def _rounded(name: str, weight: Tensor, options: Options, hessian: Hessian, dead: int) -> SolvedLayer:
    quantized = round_to_nearest(weight, options)
    loss = output_error(weight, quantized, hessian.matrix())
    record = LayerRecord(
        name=name,
        method="round_to_nearest",
        bits=quantized.bits,
        group_size=quantized.group_size,
        loss=loss,
        rtn_loss=loss,
        damp_percent=options.damp_percent,
        tokens=hessian.tokens,
        dead_columns=dead,
    )
    return SolvedLayer(quantized, record)


def output_error(weight: Tensor, quantized: GroupQuantized, matrix: Tensor) -> float | None:
    """Squared error of the outputs relative to the outputs' mean square: tr(E H E^T) / tr(W H W^T).

    Args:
        weight: float32 [out, in].
        quantized: its codes.
        matrix: the Hessian, float32 [in, in].

    Returns:
        The ratio; None if the Hessian is not finite or all outputs are zero, so that there is no ratio.
    """
    error = quantized.dequantize(torch.float32).sub_(weight)
    lost, whole = _energy(error, matrix), _energy(weight, matrix)
    return lost / whole if whole > 0 and math.isfinite(lost / whole) else None


def _energy(weight: Tensor, matrix: Tensor) -> float:
    """Row by row and then exactly: the bits of one sum over everything would depend on the number of threads."""
    rows = (weight @ matrix).mul_(weight).sum(1, dtype=torch.float64)
    return math.fsum(rows.tolist()) if bool(torch.isfinite(rows).all()) else math.nan
