"""What a layer should compute, so that on the inputs that quantizing has changed its outputs are those of the model
before quantizing.

With the tokens' inputs X before quantizing and Y after it, of all weights T the one with the least
`||X W^T - Y T^T||^2` is `T = W + W D H^-1`, where `D = (X - Y)^T Y` and `H = Y^T Y`; for any codes Q,
`||X W^T - Y Q^T||^2` is `||Y (T - Q)^T||^2` and a constant. So GPTQ on T has the objective of GPTAQ
(arXiv:2504.02692), whose own form corrects each column inside the loop. The whole way to T would follow the calibration
text too closely: a layer goes a share of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qexport.architectures.devices import has_bfloat16_instructions
from qexport.quantizing.factorization import side_by_side
from qexport.quantizing.solver import Factor

_STRIP = 128
"""Inputs of one strip of the sum."""

_TOKENS = 1024
"""Tokens that are multiplied at a time."""

_TILE = 512
"""Outputs and inputs that are multiplied at a time."""


class Asymmetry:
    """Sums D = (X - Y)^T Y over batches. The products of bfloat16 inputs are rounded to bfloat16, their sum is not.

    The batches must come in the same order with the same shapes for the sum to have the same bits.

    Args:
        in_features: the number of inputs.
        device: where to sum.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, device=device)

    def add(self, full: Tensor, inputs: Tensor) -> None:
        """Adds a batch of the inputs before and after quantizing, both [..., tokens, in] of the same dtype."""
        full, inputs = (each.reshape(-1, each.shape[-1]) for each in (full, inputs))
        self.tokens += len(inputs)
        for before, after in zip(full.split(_TOKENS), inputs.split(_TOKENS), strict=True):
            self._add_rows((before - after).t().contiguous(), after)

    def _add_rows(self, change: Tensor, after: Tensor) -> None:
        if after.dtype == torch.bfloat16 and after.device.type == "cpu" and not has_bfloat16_instructions():
            change, after = change.to(torch.float32), after.to(torch.float32)

        def add(start: int) -> None:
            strip = slice(start, start + _STRIP)
            self._sum[strip] += change[strip] @ after

        with side_by_side(after.device) as run:
            run(partial(add, start) for start in range(0, len(change), _STRIP))

    def shift(self, weight: Tensor, share: float) -> Tensor:
        """The share of `W D / tokens` for a weight W, float32 [out, in] as the result."""

        def of_rows(rows: Tensor) -> Tensor:
            return (rows @ self._sum).mul_(share / max(self.tokens, 1))

        return _by_rows(weight, torch.empty_like(weight), of_rows)


def target(weight: Tensor, shift: Tensor, factor: Factor) -> Tensor:
    """The weight T = W + S H^-1, which is written over S.

    Args:
        weight: W, float32 [out, in].
        shift: S, from `Asymmetry.shift`.
        factor: of the damped Hessian H, the mean over the tokens.
    """

    def of_rows(rows: Tensor) -> Tensor:
        change = torch.empty_like(rows)
        change[:, factor.order] = _times_inverse(rows[:, factor.order], factor.upper)
        return change

    return _by_rows(shift, shift, of_rows).add_(weight)


def _by_rows(matrix: Tensor, result: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Fills `result` with the function of some rows at a time, each part on one thread."""

    def fill(start: int) -> None:
        part = slice(start, start + _TILE)
        result[part] = function(matrix[part])

    with side_by_side(matrix.device) as run:
        run(partial(fill, start) for start in range(0, len(matrix), _TILE))
    return result


def _times_inverse(rows: Tensor, upper: Tensor) -> Tensor:
    """`rows U^T U` for an upper triangular U, without the products with its zeros."""
    half, whole = torch.empty_like(rows), torch.empty_like(rows)
    tiles = [slice(start, min(start + _TILE, len(upper))) for start in range(0, len(upper), _TILE)]
    for tile in tiles:
        half[:, tile] = rows[:, tile.start :] @ upper[tile, tile.start :].t()
    for tile in tiles:
        whole[:, tile] = half[:, : tile.stop] @ upper[: tile.stop, tile]
    return whole
