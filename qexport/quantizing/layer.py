"""Quantizing the linear layers that share one input: their Hessian, and the checks and fallbacks around the solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from qexport.architectures.folds import folded_inputs
from qexport.architectures.memory import return_freed_memory_beyond
from qexport.errors import NumericalError
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution
from qexport.quantizing.asymmetry import agreed, made_up
from qexport.quantizing.factorization import side_by_side
from qexport.quantizing.refinement import refine
from qexport.quantizing.solver import ROWS_TOGETHER, Factor, Options, factorize, round_to_nearest, solve
from qexport.quantizing.strip_sum import StripSum
from qexport.quantizing.tiles import product, tile
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantized

_ROWS = 1024
"""Tokens that are multiplied at a time on the CPU."""

_TILE = 512
"""Inputs that are multiplied at a time for the error of the outputs, on the CPU."""

_GROWTH = 24 << 20
"""Bytes that the process may grow by, between the steps of a solution, before freed memory is returned."""


class Hessian(StripSum):
    """Sums `X^T X` over batches of inputs X [tokens, in], in float32, upper triangle only until it is read.

    Section 3 of arXiv:2210.17323 writes H = 2 X X^T with the inputs as columns; the factor drops out of every code.
    """

    strip = 128
    _complete = False

    def _of_part(self, whole: Tensor, part: range) -> Tensor:
        """Rows, right of the first one's diagonal: only the upper triangle is multiplied."""
        return whole[part.start : part.stop, part.start :]

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch of inputs [..., tokens, in], each token as often as its weight says, float32 [tokens]."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        if weights is not None:
            inputs = inputs * weights.sqrt().to(inputs.dtype)[:, None]
        self.tokens += inputs.shape[0]
        with _bfloat16_products(inputs.dtype):
            for part in inputs[:, self.part.start :].split(tile(_ROWS, inputs.device)):
                self._add_tokens(part if part.device.type == "cuda" else part.to(torch.float32))

    def _add_tokens(self, tokens: Tensor) -> None:
        total, size = self.total, self.strip_on(tokens.device)

        def add(start: int) -> None:
            strip, rows = tokens[:, start : min(start + size, len(total))], total[start : start + size, start:]
            if tokens.dtype == torch.float32:
                rows.addmm_(strip.t(), tokens[:, start:])
            else:
                rows += product(strip.t(), tokens[:, start:])

        with side_by_side(tokens.device) as run:
            run(partial(add, start) for start in range(0, len(total), size))

    def matrix(self) -> Tensor:
        """The mean of `x x^T` over the tokens: float32 [in, in], symmetric. A view; nothing may be added after it."""
        total = self.total
        if not self._complete:
            size = self.strip_on(total.device)
            for start in range(0, len(total), size):
                _mirror(total, slice(start, start + size))
            total /= max(self.tokens, 1)
            self._complete = True
        return total


def _mirror(total: Tensor, strip: slice) -> None:
    """Copies a strip of rows, right of the diagonal, to the columns below it."""
    square = total[strip, strip].triu_()
    square += square.triu(1).t()
    total[strip.stop :, strip] = total[strip, strip.stop :].t()


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
    """A layer's codes and the record of how they were found.

    Attributes:
        quantized: the codes.
        record: how they were found.
        exponents: of the powers of two by which the columns of the codes are multiplied, int64 [in]; None if they are
            not (`qexport.architectures.folds`).
    """

    quantized: GroupQuantized
    record: LayerRecord
    exponents: Tensor | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] for inputs that are not divided by the powers of two."""
        found = self.quantized.dequantize(dtype)
        return found if self.exponents is None else folded_inputs(found, -self.exponents)


@dataclass(frozen=True)
class FactorizedHessian:
    """What the rows of layers with one input are solved with.

    Attributes:
        matrix: the Hessian, float32 [in, in].
        factor: of it.
        device: where to compute, by its name; a worker in another process gets everything in main memory.
    """

    matrix: Tensor
    factor: Factor
    device: str


@dataclass(frozen=True)
class Rows:
    """Rows of layers with the same options.

    Attributes:
        weight: float32 [rows, in].
        agreed: what they make up for, from `asymmetry.agreed`, float32 [rows, in]; None if nothing.
        options: the solver's.
    """

    weight: Tensor
    agreed: Tensor | None
    options: Options


@dataclass(frozen=True)
class SolvedRows:
    """Codes of rows, and of each row v the mean squares v H v^T of its outputs: float64 [rows].

    Attributes:
        quantized: the codes.
        energy: of the weights that the codes were found for.
        error: of the error of the codes.
        nearest_error: of the error of round-to-nearest.
    """

    quantized: GroupQuantized
    energy: Tensor
    error: Tensor
    nearest_error: Tensor

    @classmethod
    def joined(cls, parts: Sequence[SolvedRows]) -> SolvedRows:
        """The rows of all parts, in their order."""
        quantized = GroupQuantized.joined([part.quantized for part in parts])
        sums = (torch.cat([getattr(part, name) for part in parts]) for name in ("energy", "error", "nearest_error"))
        return cls(quantized, *sums)

    def rows(self, start: int, stop: int) -> SolvedRows:
        """Some of the rows."""
        sums = (each[start:stop] for each in (self.energy, self.error, self.nearest_error))
        return SolvedRows(self.quantized.rows(start, stop), *sums)


def solve_together(
    weights: Mapping[str, Tensor],
    hessian: Hessian,
    options: Mapping[str, Options],
    on_failure: Literal["error", "round_to_nearest"],
    corrections: dict[str, tuple[Tensor, Tensor]] | None = None,
    execution: Execution = INLINE,
) -> dict[str, SolvedLayer]:
    """Quantizes layers that share one input, so also one Hessian and one factorization.

    Args:
        weights: float32 [out, in] by module path.
        hessian: of the shared input.
        options: by module path.
        on_failure: what to do if the Hessian cannot be used.
        corrections: of each weight, from the two halves of the text (`Asymmetry.take`), where the layers make up for
            what quantizing has done to their input; emptied.
        execution: the workers to whom the rows are dealt out. The bits do not depend on it.

    Raises:
        NumericalError: the Hessian is not finite or cannot be factorized, and `on_failure` is `error`.
    """
    names = list(weights)
    dead = int((hessian.matrix().diagonal() == 0).sum())
    try:
        matrix = usable(hessian)
        factor = factorize(matrix, options[names[0]], rank_deficient=hessian.tokens < matrix.shape[0])
    except NumericalError as error:
        if on_failure == "error":
            raise NumericalError(error.what, where=", ".join(names), mend=error.mend) from error
        return {name: rounded_layer(name, weights[name], options[name], hessian, dead) for name in names}
    return_freed_memory_beyond(_GROWTH)
    damp_percent, solved = factor.damp_percent, dict[str, SolvedRows]()
    for shared in dict.fromkeys(options[name] for name in names):
        own = {name: weight for name, weight in weights.items() if options[name] == shared}
        corrected = corrections if is_corrected(shared) else None
        agreements = None if corrected is None else {name: agreed(corrected.pop(name), factor) for name in own}
        return_freed_memory_beyond(_GROWTH)
        solved |= _solved_rows(
            own, agreements, shared, FactorizedHessian(matrix, factor, str(matrix.device)), execution
        )
    return {name: _solved(name, solved[name], hessian.tokens, damp_percent, dead) for name in names}


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


def _solved_rows(
    weights: Mapping[str, Tensor],
    agreements: dict[str, Tensor] | None,
    options: Options,
    problem: FactorizedHessian,
    execution: Execution,
) -> dict[str, SolvedRows]:
    """Solves the rows of all layers with the same options at once: rows are independent of each other."""
    weight = _together(weights)
    agreement = None if agreements is None else _together(agreements)
    if agreements is not None:
        agreements.clear()  # as large as the weights
    parts = (
        Rows(weight[part], None if agreement is None else agreement[part], options)
        for part in dealt_rows(len(weight), execution.workers, tile(ROWS_TOGETHER, problem.matrix.device))
    )
    joined, found, start = SolvedRows.joined([*execution.map(solve_rows, parts, problem)]), {}, 0
    for name, each in weights.items():
        found[name] = joined.rows(start, start + len(each))
        start += len(each)
    return found


def _together(matrices: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(matrices.values())) if len(matrices) > 1 else next(iter(matrices.values()))


def dealt_rows(rows: int, workers: int, together: int) -> list[slice]:
    """About equally many rows for each worker, cut where products are: then their bits are the same."""
    bounds = [min(rows, round(rows * number / workers / together) * together) for number in range(workers)]
    return [slice(start, stop) for start, stop in pairwise(dict.fromkeys([*bounds, rows]))]


def solve_rows(rows: Rows, problem: FactorizedHessian) -> SolvedRows:
    """Solves some rows, whose number but for the last ones is a multiple of what is multiplied together."""
    device, weight = problem.device, rows.weight.to(problem.device)
    matrix, factor = problem.matrix.to(device), problem.factor.to(device)
    if rows.agreed is not None:
        weight = made_up(weight, rows.agreed.to(device), factor)
    nearest = _energies(len(weight), _error_rows(weight, round_to_nearest(weight, rows.options)), matrix)
    quantized = solve(weight, matrix, factor, rows.options)
    if rows.options.refine:
        quantized = refine(weight, quantized, matrix, factor)
    return_freed_memory_beyond(_GROWTH)
    return SolvedRows(
        quantized, row_energies(weight, matrix), _energies(len(weight), _error_rows(weight, quantized), matrix), nearest
    )


def _solved(name: str, rows: SolvedRows, tokens: int, damp_percent: float, dead: int) -> SolvedLayer:
    energy = total(rows.energy)
    record = LayerRecord(
        name=name,
        method="gptq",
        bits=rows.quantized.bits,
        group_size=rows.quantized.group_size,
        loss=_relative(total(rows.error), energy),
        rtn_loss=_relative(total(rows.nearest_error), energy),
        damp_percent=damp_percent,
        tokens=tokens,
        dead_columns=dead,
    )
    return SolvedLayer(rows.quantized, record)


def rounded_layer(name: str, weight: Tensor, options: Options, hessian: Hessian, dead: int) -> SolvedLayer:
    """A layer rounded to nearest, whose Hessian cannot be used.

    Args:
        name: the module's path.
        weight: float32 [out, in].
        options: bits and groups.
        hessian: for the record.
        dead: inputs that were always zero.
    """
    matrix = hessian.matrix()
    weight = weight.to(matrix.device)
    quantized = round_to_nearest(weight, options)
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


def output_error(
    weight: Tensor, quantized: GroupQuantized, matrix: Tensor, energy: float, exponents: Tensor | None = None
) -> float | None:
    """Squared error of the outputs relative to the outputs' mean square: tr(E H E^T) / tr(W H W^T).

    Args:
        weight: float32 [out, in].
        quantized: its codes.
        matrix: the Hessian, float32 [in, in].
        energy: `output_energy` of the weight.
        exponents: see `SolvedLayer`.

    Returns:
        The ratio; None if the Hessian is not finite or all outputs are zero, so that there is no ratio.
    """
    return _relative(total(_energies(len(weight), _error_rows(weight, quantized, exponents), matrix)), energy)


def output_energy(weight: Tensor, matrix: Tensor) -> float:
    """The outputs' mean square, tr(W H W^T), of a weight [out, in]; NaN if the Hessian is not finite."""
    return total(row_energies(weight, matrix))


def row_energies(weight: Tensor, matrix: Tensor) -> Tensor:
    """Of each output its mean square, v H v^T for the row v of a weight [out, in]: float64 [out]."""
    return _energies(len(weight), lambda start, end: weight[start:end], matrix)


def _relative(lost: float, energy: float) -> float | None:
    return lost / energy if energy > 0 and math.isfinite(lost / energy) else None


def _error_rows(
    weight: Tensor, quantized: GroupQuantized, exponents: Tensor | None = None
) -> Callable[[int, int], Tensor]:
    def error(start: int, end: int) -> Tensor:
        values = quantized.rows(start, end).dequantize(torch.float32)
        return (values if exponents is None else folded_inputs(values, -exponents)).sub_(weight[start:end])

    return error


def total(values: Tensor) -> float:
    """The exact sum, rounded once; NaN if a value is not finite."""
    return math.fsum(values.tolist()) if bool(torch.isfinite(values).all()) else math.nan


def _energies(outputs: int, rows: Callable[[int, int], Tensor], matrix: Tensor) -> Tensor:
    """V H v^T for the rows v of a matrix [outputs, in], which `rows(start, end)` gives: float64 [outputs]."""
    sums, together = torch.zeros(outputs, dtype=torch.float64), tile(ROWS_TOGETHER, matrix.device)

    def add(start: int) -> None:
        end = min(start + together, outputs)
        sums[start:end] = _squares(rows(start, end), matrix).cpu()

    with side_by_side(matrix.device) as run:
        run(partial(add, start) for start in range(0, outputs, together))
    return sums


def _squares(rows: Tensor, matrix: Tensor) -> Tensor:
    """Of each row v, v H v^T: float64 [rows]. H is symmetric: what is right of its diagonal is counted twice."""
    sums = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    step = tile(_TILE, matrix.device)
    for start in range(0, len(matrix), step):
        end = start + step
        right = rows[:, end:] @ matrix[start:end, end:].t()
        product = right.addmm_(rows[:, start:end], matrix[start:end, start:end], beta=2)
        sums += product.mul_(rows[:, start:end]).sum(1, dtype=torch.float64)
    return sums
