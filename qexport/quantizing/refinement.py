"""Better codes and scales for a layer that GPTQ has solved: each code in turn where all others stay, and all scales.

Both are steps down in GPTQ's own objective, `tr((T - Q) H (T - Q)^T)` with the damped Hessian: a code moves to the
value nearest to the minimum along its own axis (coordinate descent, as in CDQuant, arXiv:2406.17542), the scales of a
row go to their joint minimum (least squares), and are rounded to float16.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from qexport.quantizing.factorization import side_by_side
from qexport.quantizing.solver import ROWS_TOGETHER, Factor
from qexport.quantizing.tiles import tile
from qexport.tensors import GroupQuantized

_BLOCK: Final = 128
"""Inputs whose codes are looked at before the products of the others with their changes are made."""


def refine(weight: Tensor, quantized: GroupQuantized, hessian: Tensor, factor: Factor) -> GroupQuantized:
    """Goes over all codes, then all scales, then all codes again.

    Args:
        weight: T, what the layer aims at: float32 [out, in].
        quantized: its codes, with groups in the order of the inputs.
        hessian: float32 [in, in].
        factor: has the damping that the codes were found with.
    """
    damped = hessian.clone()
    damped.diagonal().add_(factor.damp_percent * float(hessian.diagonal().mean()))
    codes, scales = torch.empty_like(quantized.codes), torch.empty_like(quantized.scales)
    together = tile(ROWS_TOGETHER, weight.device)

    def solve(start: int) -> None:
        rows = slice(start, start + together)
        part = _Rows(weight[rows], quantized.rows(start, min(start + together, len(weight))), damped)
        part.move_codes()
        part.fit_scales()
        part.move_codes()
        codes[rows], scales[:, rows] = part.codes.t().to(codes.dtype), part.scales.to(scales.dtype)

    with side_by_side(weight.device) as run:
        run(partial(solve, start) for start in range(0, len(weight), together))
    return replace(quantized, codes=codes, scales=scales)


class _Rows:
    """Some rows of a matrix, transposed: [in, rows]."""

    def __init__(self, weight: Tensor, quantized: GroupQuantized, hessian: Tensor) -> None:
        self._target, self._hessian, self._size = weight.t().contiguous(), hessian, quantized.group_size
        self._top = 2**quantized.bits - 1
        self.codes = quantized.codes.t().to(torch.float32).contiguous()
        self.scales = quantized.scales.to(torch.float32)
        self._zeros = quantized.zeros.to(torch.float32)

    def _expanded(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self._size, 0)

    def move_codes(self) -> None:
        """Coordinate descent over the inputs, once."""
        values = (self.codes - self._expanded(self._zeros)) * self._expanded(self.scales)
        error = self._target - values
        for start in range(0, len(error), _BLOCK):
            end = min(start + _BLOCK, len(error))
            slope = self._hessian[start:end] @ error
            for index in range(start, end):
                row, group = index - start, index // self._size
                wanted = slope[row].div_(self._hessian[index, index]).add_(values[index])
                code = wanted.div_(self.scales[group]).add_(self._zeros[group]).round_().clamp_(0, self._top)
                change = (code - self._zeros[group]).mul_(self.scales[group]).sub_(values[index])
                self.codes[index] = code
                error[index] -= change
                slope[row + 1 :].addr_(self._hessian[index + 1 : end, index], change, alpha=-1)

    def fit_scales(self) -> None:
        """The scales of all groups of a row, by least squares. Where that is no positive number, the old ones stay."""
        levels, groups = self.codes - self._expanded(self._zeros), len(self.scales)
        moments = levels.new_empty(levels.shape[1], groups, groups)
        for group in range(groups):
            part = slice(group * self._size, (group + 1) * self._size)
            seen = (self._hessian[:, part] @ levels[part]).mul_(levels)
            moments[:, group] = seen.unflatten(0, (groups, self._size)).sum(1).t()
        wanted = (self._hessian @ self._target).mul_(levels).unflatten(0, (groups, self._size)).sum(1).t()
        moments.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6)
        found, failed = torch.linalg.solve_ex(moments, wanted.unsqueeze(2))
        fitted = found.squeeze(2).t().to(torch.float16).to(torch.float32)
        usable = torch.isfinite(fitted) & (fitted > 0) & (failed == 0)
        self.scales = torch.where(usable, fitted, self.scales)
