"""The loop over the columns of a column block as one CUDA kernel, in Triton. `solver` has the plain loop.

One program has all columns of some outputs in its registers and goes over them one after the other: the plain loop
starts some ten kernels for each column, and a model of eight billion weights has over half a million columns.

The operations are those of the plain loop, in its order, in float32: divisions are rounded to nearest, halves to even,
and `w - u e` is a multiplication and addition with one rounding; no other is contracted (`enable_fp_fusion`). On CUDA
the bits are those of the plain loop if torch's compiler has contracted its `addr` too; else last bits differ.

This module needs triton, which comes with torch's builds for CUDA on Linux. With TRITON_INTERPRET=1 it runs on the CPU.
"""

# Triton finds the types of a kernel's arguments when it is started.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.quantizing.solver import Grid

ROWS = 32
"""Outputs of one program."""

WARPS = 4
"""Of one program. A thread then has 32 of the 128 x 32 weights."""

_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2**23: added and subtracted again, it rounds what is below 2**22 to the nearest integer, halves to even. Larger
quotients stay beyond all codes."""


def kernel_loop(
    columns: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, grid: Grid, groups: Tensor, first: int, last: int
) -> None:
    """`solver.plain_loop` in one start of a kernel; a column block has at most 128 columns."""
    width, outputs = columns.shape
    scales, zeros = grid.scales, grid.zeros
    assert all(each.stride(1) == 1 for each in (columns, codes, errors, upper, scales, zeros))
    with torch.cuda.device_of(columns):  # Triton starts kernels on the current device
        _program[(triton.cdiv(outputs, ROWS),)](
            columns, codes, errors, upper, scales, zeros, groups,
            columns.stride(0), codes.stride(0), errors.stride(0), upper.stride(0), scales.stride(0), zeros.stride(0),
            outputs, width, first, last,
            TOP=float(2**grid.bits - 1), WIDTH=triton.next_power_of_2(width), OUTPUTS=ROWS,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _of_outputs(
    columns, codes, errors, upper, scales, zeros, groups,
    columns_row, codes_row, errors_row, upper_row, scales_row, zeros_row,
    outputs, width, first, last,
    TOP: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One program: pointers, the distances of their rows in elements, and the bounds of `kernel_loop`."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, WIDTH)
    there = output < outputs
    inside = (row < width)[:, None] & there[None, :]
    places = columns + row[:, None] * columns_row + output[None, :]
    tile = tl.load(places, mask=inside, other=0.0)
    for index in range(first, last):
        column = tl.sum(tl.where((row == index)[:, None], tile, 0.0), axis=0)
        group = tl.load(groups + index)
        scale = tl.load(scales + group * scales_row + output, mask=there, other=1.0)
        zero = tl.load(zeros + group * zeros_row + output, mask=there, other=0.0)
        code = (tl.div_rn(column, scale) + _EVEN) - _EVEN + zero
        code = tl.minimum(tl.maximum(code, 0.0), TOP)
        pivot = tl.load(upper + index * upper_row + index)
        error = tl.div_rn(column - (code - zero) * scale, tl.zeros_like(column) + pivot)
        tl.store(codes + index * codes_row + output, code.to(tl.uint8), mask=there)
        tl.store(errors + index * errors_row + output, error, mask=there)
        after = row > index
        factors = tl.load(upper + index * upper_row + row, mask=after & (row < width), other=0.0)
        changed = tl.fma(tl.zeros_like(tile) - factors[:, None], tl.zeros_like(tile) + error[None, :], tile)
        tile = tl.where(after[:, None], changed, tile)
    tl.store(places, tile, mask=inside & (row >= last)[:, None])


_program = triton.jit(_of_outputs)
