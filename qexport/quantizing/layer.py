"""Quantizing the linear layers that share one input: their Hessian, and the checks and fallbacks around the solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qexport.architectures.memory import return_freed_memory_beyond
from qexport.errors import NumericalError
from qexport.quantizing.asymmetry import target
from qexport.quantizing.factorization import side_by_side
from qexport.quantizing.refinement import refine
from qexport.quantizing.solver import Factor, Options, factorize, round_to_nearest, solve
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantized

_COLUMNS = 128
"""Columns of one strip. Only the strips' upper parts are multiplied, half of the square for a wide layer."""

_ROWS = 1024
"""Tokens that are multiplied at a time."""

_TILE = 512
"""Outputs and inputs that are multiplied at a time for the error of the outputs."""

_GROWTH = 8 << 20
"""Bytes that the process may grow by, between the steps of a solution, before freed memory is returned."""


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

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch of inputs [..., tokens, in], each token as often as its weight says, float32 [tokens]."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        if weights is not None:
            inputs = inputs * weights.sqrt().to(inputs.dtype)[:, None]
        self.tokens += inputs.shape[0]
        with _bfloat16_products(inputs.dtype):
            for part in inputs.split(_ROWS):
                self._add_rows(part.to(torch.float32))

    def _add_rows(self, rows: Tensor) -> None:
        def add(start: int) -> None:
            strip = rows[:, start : start + _COLUMNS]
            self._sum[start : start + _COLUMNS, start:].addmm_(strip.t(), rows[:, start:])

        with side_by_side(rows.device) as run:
            run(partial(add, start) for start in range(0, rows.shape[1], _COLUMNS))

    def matrix(self) -> Tensor:
        """The mean of `x x^T` over the tokens: float32 [in, in], symmetric. A view; nothing may be added after it."""
        if not self._complete:
            for start in range(0, len(self._sum), _COLUMNS):
                self._mirror(slice(start, start + _COLUMNS))
            self._sum /= max(self.tokens, 1)
            self._complete = True
        return self._sum

    def _mirror(self, strip: slice) -> None:
        """Copies a strip of rows, right of the diagonal, to the columns below it."""
        square = self._sum[strip, strip].triu_()
        square += square.triu(1).t()
        self._sum[strip.stop :, strip] = self._sum[strip, strip.stop :].t()


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
    corrections: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, SolvedLayer]:
    """Quantizes layers that share one input, so also one Hessian and one factorization.

    Args:
        weights: float32 [out, in] by module path.
        hessian: of the shared input.
        options: by module path.
        on_failure: what to do if the Hessian cannot be used.
        corrections: of each weight, from the two halves of the text (`Asymmetry.take`), where the layers make up for
            what quantizing has done to their input; they are overwritten.

    Raises:
        NumericalError: the Hessian is not finite or cannot be factorized, and `on_failure` is `error`.
    """
    weights, names = dict(weights), list(weights)
    dead = int((hessian.matrix().diagonal() == 0).sum())
    try:
        matrix = usable(hessian)
        factor = factorize(matrix, options[names[0]], rank_deficient=hessian.tokens < matrix.shape[0])
    except NumericalError as error:
        if on_failure == "error":
            raise NumericalError(error.what, where=", ".join(names), mend=error.mend) from error
        return {name: _rounded(name, weights[name], options[name], hessian, dead) for name in names}
    return_freed_memory_beyond(_GROWTH)
    if corrections is not None:
        weights |= {
            name: target(weights[name], corrections[name], factor) for name in names if is_corrected(options[name])
        }
    return_freed_memory_beyond(_GROWTH)
    quantized = _solve_rows(weights, matrix, factor, options)
    damp_percent = factor.damp_percent
    del factor  # as large as the Hessian
    return_freed_memory_beyond(_GROWTH)
    return {
        name: _solved(name, weights[name], quantized[name], options[name], hessian, damp_percent, dead)
        for name in names
    }


def is_corrected(options: Options) -> bool:
    """Whether a layer makes up for those before it: not with 8 bits.

    Among layers of 4 bits their errors are far larger than its own, and it could not be told from a damaged one.
    """
    return options.bits < 8


def usable(hessian: Hessian) -> Tensor:
    """The Hessian, changed in place: inputs that were always zero get a diagonal above zero.

    Raises:
        NumericalError: it is not finite, or of no tokens.
    """
    matrix = hessian.matrix()
    if not hessian.tokens:
        raise NumericalError(
            "no calibration token reached this layer",
            mend="give more, or more varied, calibration text, or set on_failure: round_to_nearest",
        )
    if not bool(torch.isfinite(matrix.diagonal()).all()):  # no other element is larger, by Cauchy-Schwarz
        raise NumericalError(
            "the inputs of this layer are not finite",
            mend="the merged model overflows in this dtype: check the adapter, or set merge.dtype: float32",
        )
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.mean() if not bool(dead.all()) else 1.0
    return matrix


def _solve_rows(
    weights: Mapping[str, Tensor], matrix: Tensor, factor: Factor, options: Mapping[str, Options]
) -> dict[str, GroupQuantized]:
    """Solves the rows of all layers with the same options at once: rows are independent of each other."""
    quantized = {}
    for shared in dict.fromkeys(options[name] for name in weights):
        members = {name: weight for name, weight in weights.items() if options[name] == shared}
        rows = list(members.values())
        together = torch.cat(rows) if len(rows) > 1 else rows[0]
        joined = solve(together, matrix, factor, shared)
        if shared.refine:
            joined = refine(together, joined, matrix, factor)
        start = 0
        for name, weight in members.items():
            quantized[name] = joined.rows(start, start + weight.shape[0])
            start += weight.shape[0]
    return quantized


def _solved(
    name: str,
    weight: Tensor,
    quantized: GroupQuantized,
    options: Options,
    hessian: Hessian,
    damp_percent: float,
    dead: int,
) -> SolvedLayer:
    matrix = hessian.matrix()
    energy = output_energy(weight, matrix)
    record = LayerRecord(
        name=name,
        method="gptq",
        bits=quantized.bits,
        group_size=quantized.group_size,
        loss=output_error(weight, quantized, matrix, energy),
        rtn_loss=output_error(weight, round_to_nearest(weight, options), matrix, energy),
        damp_percent=damp_percent,
        tokens=hessian.tokens,
        dead_columns=dead,
    )
    return SolvedLayer(quantized, record)


def _rounded(name: str, weight: Tensor, options: Options, hessian: Hessian, dead: int) -> SolvedLayer:
    quantized, matrix = round_to_nearest(weight, options), hessian.matrix()
    loss = output_error(weight, quantized, matrix, output_energy(weight, matrix))
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


def output_error(weight: Tensor, quantized: GroupQuantized, matrix: Tensor, energy: float) -> float | None:
    """Squared error of the outputs relative to the outputs' mean square: tr(E H E^T) / tr(W H W^T).

    Args:
        weight: float32 [out, in].
        quantized: its codes.
        matrix: the Hessian, float32 [in, in].
        energy: `output_energy` of the weight.

    Returns:
        The ratio; None if the Hessian is not finite or all outputs are zero, so that there is no ratio.
    """

    def error(start: int, end: int) -> Tensor:
        return quantized.rows(start, end).dequantize(torch.float32).sub_(weight[start:end])

    lost = _energy(len(weight), error, matrix)
    return lost / energy if energy > 0 and math.isfinite(lost / energy) else None


def output_energy(weight: Tensor, matrix: Tensor) -> float:
    """The outputs' mean square, tr(W H W^T), of a weight [out, in]; NaN if the Hessian is not finite."""
    return _energy(len(weight), lambda start, end: weight[start:end], matrix)


def _energy(outputs: int, rows: Callable[[int, int], Tensor], matrix: Tensor) -> float:
    """tr(V H V^T) of the matrix [outputs, in] whose rows `rows(start, end)` gives: fixed shapes, then an exact sum.

    The bits of one sum over everything would depend on the number of threads.
    """
    sums = torch.zeros(outputs, dtype=torch.float64)

    def add(start: int) -> None:
        end = min(start + _TILE, outputs)
        sums[start:end] = _squares(rows(start, end), matrix).cpu()

    with side_by_side(matrix.device) as run:
        run(partial(add, start) for start in range(0, outputs, _TILE))
    return math.fsum(sums.tolist()) if bool(torch.isfinite(sums).all()) else math.nan


def _squares(rows: Tensor, matrix: Tensor) -> Tensor:
    """Of each row v, v H v^T: float64 [rows]. H is symmetric: what is right of its diagonal is counted twice."""
    sums = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(matrix), _TILE):
        end = start + _TILE
        right = rows[:, end:] @ matrix[start:end, end:].t()
        product = right.addmm_(rows[:, start:end], matrix[start:end, start:end], beta=2)
        sums += product.mul_(rows[:, start:end]).sum(1, dtype=torch.float64)
    return sums
