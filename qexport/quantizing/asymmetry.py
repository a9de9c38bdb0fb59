"""What a layer should compute, so that on the inputs that quantizing has changed its outputs are those of the model
before quantizing.

With the tokens' inputs X before quantizing and Y after it, of all weights T the one with the least
`||X W^T - Y T^T||^2` is `T = W + W D H^-1`, where `D = (X - Y)^T Y` and `H = Y^T Y`; for any codes Q,
`||X W^T - Y Q^T||^2` is `||Y (T - Q)^T||^2` and a constant. So GPTQ on T has the objective of GPTAQ
(arXiv:2504.02692), whose own form corrects each column inside the loop.

D is known from the calibration text alone, and the less exactly the fewer tokens there are for an input. So the two
halves of the text give two corrections C1 and C2, and a layer takes their mean as far as they agree: `<C1, C2>`,
measured at the outputs, is the size of what they have in common, the square of their mean holds the noise too, and the
ratio of the two is the share of the mean with the least expected error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qexport.architectures.devices import has_bfloat16_instructions
from qexport.quantizing.factorization import side_by_side
from qexport.quantizing.solver import ROWS_TOGETHER, Factor
from qexport.quantizing.strip_sum import StripSum
from qexport.quantizing.tiles import product, tile

TOKENS = 2048
"""Tokens that are multiplied at a time."""

_TILE = 512
"""Inputs that are multiplied at a time on the CPU."""


@dataclass(frozen=True)
class InputChange:
    """What quantizing has done to the inputs of some tokens.

    Attributes:
        change: (X - Y)^T [in, tokens], each token as often as it counts.
        after: Y [tokens, in].
    """

    change: Tensor
    after: Tensor


def changes(full: Tensor, inputs: Tensor, weights: Tensor | None = None) -> list[InputChange]:
    """What `Asymmetry` sums.

    Args:
        full: the inputs before quantizing, [..., tokens, in].
        inputs: those after it, of the same dtype.
        weights: how much each token counts, float32 [tokens].
    """
    full, inputs = (each.reshape(-1, each.shape[-1]) for each in (full, inputs))
    counts = [None] * len(inputs) if weights is None else weights.to(inputs.dtype)[:, None].split(TOKENS)
    in_float32 = inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and not has_bfloat16_instructions()
    found = []
    for before, after, count in zip(full.split(TOKENS), inputs.split(TOKENS), counts, strict=False):
        change = before - after
        change = (change if count is None else change * count).t().contiguous()
        found.append(InputChange(change.float(), after.float()) if in_float32 else InputChange(change, after))
    return found


class Asymmetry(StripSum):
    """Sums D = (X - Y)^T Y over batches. On the CPU the products of bfloat16 inputs are rounded to
    bfloat16, their sum is not.

    oneDNN repacks the right factor of a product, so it is the one that is cut into strips.
    """

    strip = 192

    def _of_part(self, whole: Tensor, part: range) -> Tensor:
        return whole[:, part.start : part.stop]

    def add(self, batch: Sequence[InputChange]) -> None:
        """Adds a batch, from `changes`."""
        for each in batch:
            self.tokens += len(each.after)
            self._add_tokens(each.change, each.after[:, self.part.start : self.part.stop])

    def _add_tokens(self, change: Tensor, after: Tensor) -> None:
        total, size = self.total, self.strip_on(after.device)

        def add(start: int) -> None:
            strip = slice(start, start + size)
            total[:, strip] += product(change, after[:, strip])

        with side_by_side(after.device) as run:
            run(partial(add, start) for start in range(0, after.shape[1], size))

    def take(self, weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """`scale * W D / tokens` for each weight W, float32 [out, in] as the results; of a part of the sum its columns.
        The sum begins anew.
        """
        scale, total, found = scale / max(self.tokens, 1), self.total, dict[str, Tensor]()
        size = self.strip_on(total.device)

        def times_sum(rows: Tensor) -> Tensor:
            strips = (total[:, start : start + size] for start in range(0, len(self.part), size))
            return torch.cat([rows @ strip for strip in strips], 1).mul_(scale)

        for name, weight in weights.items():
            found[name] = _by_rows(weight, weight.new_empty(len(weight), len(self.part)), times_sum)
        self.tokens, self._sum = 0, None
        return found


def agreed(halves: tuple[Tensor, Tensor], factor: Factor) -> Tensor:
    """What the halves of the text agree on: `r (S1 + S2) U^T / 2` with H^-1 = U^T U, for the permuted inputs, where r
    is the share of the correction that they have in common.

    Args:
        halves: S1 and S2, float32 [out, in], from `Asymmetry.take`; they are overwritten.
        factor: of the damped Hessian H, the mean over the tokens.
    """
    first, second = halves
    for half in halves:
        _by_rows(half, half, lambda rows: _times_transposed(rows[:, factor.order], factor.upper))
    share = _agreement(first, second) / 2
    return first.add_(second).mul_(share)


def made_up(weight: Tensor, agreement: Tensor, factor: Factor) -> Tensor:
    """What a layer aims at, `W + r (S1 + S2) H^-1 / 2`, for some of its rows.

    Args:
        weight: rows of W, float32 [rows, in].
        agreement: the same rows of what was `agreed`; they are overwritten.
        factor: that they agreed with.
    """

    def correction(rows: Tensor) -> Tensor:
        change = torch.empty_like(rows)
        change[:, factor.order] = _times_upper(rows, factor.upper)
        return change

    return _by_rows(agreement, agreement, correction).add_(weight)


def _agreement(first: Tensor, second: Tensor) -> float:
    """`4 <A, B> / |A + B|^2`, from 0 to 1: 1 for equal matrices, 0 for those that have nothing in common.

    The sums' bits do not depend on the number of threads.
    """
    common, all_ = _sum(first * second), _sum_of_squares(first + second)
    return min(max(4 * common / all_, 0.0), 1.0) if all_ > 0 and math.isfinite(common / all_) else 0.0


def _sum_of_squares(matrix: Tensor) -> float:
    return _sum(matrix.square())


def _sum(matrix: Tensor) -> float:
    """Rounded once, so that the bits do not depend on the number of threads."""
    rows = _by_rows(
        matrix, torch.empty(len(matrix), dtype=torch.float64), lambda part: part.sum(1, dtype=torch.float64)
    )
    return math.fsum(rows.tolist())


def _by_rows(matrix: Tensor, result: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Fills `result` with the function of some rows at a time, each part on one thread."""
    rows = tile(ROWS_TOGETHER, matrix.device)

    def fill(start: int) -> None:
        part = slice(start, start + rows)
        result[part] = function(matrix[part])

    with side_by_side(matrix.device) as run:
        run(partial(fill, start) for start in range(0, len(matrix), rows))
    return result


def _times_transposed(rows: Tensor, upper: Tensor) -> Tensor:
    """`rows U^T` for an upper triangular U, without the products with its zeros."""
    result = torch.empty_like(rows)
    for part in _tiles(upper):
        result[:, part] = rows[:, part.start :] @ upper[part, part.start :].t()
    return result


def _times_upper(rows: Tensor, upper: Tensor) -> Tensor:
    """`rows U`, likewise."""
    result = torch.empty_like(rows)
    for part in _tiles(upper):
        result[:, part] = rows[:, : part.stop] @ upper[: part.stop, part]
    return result


def _tiles(upper: Tensor) -> list[slice]:
    size, step = len(upper), tile(_TILE, upper.device)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
