"""The column kernel against the plain loop: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qexport.quantizing.column_kernel import kernel_loop
from qexport.quantizing.solver import Grid, Options, factorize, plain_loop, solve
from test_gptq_solver import problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qexport.quantizing import column_kernel
types = dict.fromkeys(column_kernel._program.arg_names, "i32")
types |= dict.fromkeys(["columns", "errors", "upper", "scales", "zeros"], "*fp32")
types |= {"codes": "*u8", "groups": "*i64"} | dict.fromkeys(["TOP", "WIDTH", "OUTPUTS"], "constexpr")
source = ASTSource(column_kernel._program, types, {"TOP": 15.0, "WIDTH": 128, "OUTPUTS": column_kernel.ROWS})
options = {"num_warps": column_kernel.WARPS, "enable_fp_fusion": False}
print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def _of_two(x, y, z, found):  # type: ignore[no-untyped-def]
    tl.store(found, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


def rounds_once() -> bool:
    """Whether Triton's `fma` has one rounding here: it has on a GPU, and in the interpreter of its newer versions."""
    value, found = torch.tensor([1 + 2.0**-12], device=DEVICE), torch.zeros(1, device=DEVICE)
    triton.jit(_of_two)[(1,)](value, value, -value * value, found)
    return bool(found)


def oracle(
    columns: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, grid: Grid, groups: Tensor, first: int, last: int
) -> None:
    """The plain loop, with `w - u e` rounded as Triton does here. In float64 the product is exact."""
    exact = torch.float64 if rounds_once() else torch.float32
    for index in range(first, last):
        plain_loop(columns.clone(), codes, errors, upper, grid, groups, index, index + 1)
        product = upper[index, index + 1 :, None].to(exact) * errors[index].to(exact)
        columns[index + 1 :] = (columns[index + 1 :].to(exact) - product).float()


def column_block(width: int, outputs: int, bits: int) -> tuple[list[Tensor], Tensor, Grid, Tensor]:
    """Columns, room for codes and errors; a factor, grids, and the groups of the columns."""
    generator = torch.Generator().manual_seed(width + bits)
    inputs = torch.randn(4 * width, width, generator=generator)
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs.t() @ inputs)).t().contiguous()
    grid = Grid(
        (torch.rand(5, outputs, generator=generator) / 8 + 0.05).half().float(),
        torch.full((5, outputs), float(2 ** (bits - 1))),
        bits,
    )
    columns = torch.randn(width, outputs, generator=generator)
    room = [columns, torch.zeros(width, outputs, dtype=torch.uint8), torch.zeros(width, outputs)]
    grid = Grid(grid.scales.to(DEVICE), grid.zeros.to(DEVICE), bits)
    groups = torch.randint(5, (width,), generator=generator).to(DEVICE)
    return [each.to(DEVICE) for each in room], upper.to(DEVICE), grid, groups


@pytest.mark.parametrize(
    ("width", "outputs", "bits"), [(128, 70, 4), (128, 32, 2), (96, 33, 3), (64, 1, 8), (1, 40, 4)]
)
def test_it_computes_what_the_plain_loop_computes(width: int, outputs: int, bits: int) -> None:
    room, upper, grid, groups = column_block(width, outputs, bits)
    ours, theirs = ([each.clone() for each in room] for _ in range(2))
    bounds = sorted({0, width // 3, width})
    for first, last in pairwise(bounds):
        kernel_loop(ours[0], ours[1], ours[2], upper, grid, groups, first, last)
        oracle(theirs[0], theirs[1], theirs[2], upper, grid, groups, first, last)
        assert torch.equal(ours[0][last:], theirs[0][last:])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])


def test_a_factor_that_is_read_at_another_place_is_noticed() -> None:
    room, upper, grid, groups = column_block(32, 8, 4)
    ours, theirs = ([each.clone() for each in room] for _ in range(2))
    kernel_loop(ours[0], ours[1], ours[2], upper.t().contiguous(), grid, groups, 0, 32)
    oracle(theirs[0], theirs[1], theirs[2], upper, grid, groups, 0, 32)
    assert not torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize(("order", "group_size"), [("static", 64), ("original", 32), ("dynamic", 160)])
def test_a_solved_matrix_has_the_same_codes(order: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = (each.float().to(DEVICE) for each in problem(out_features=40))
    options = Options(bits=4, group_size=group_size, order=order, sym=True, damp_percent=0.01, search=True)
    factor = factorize(hessian, options)
    found = []
    for loop in (kernel_loop, plain_loop):
        monkeypatch.setattr("qexport.quantizing.solver.loop_on", lambda device, loop=loop: loop)
        found.append(solve(weight, hessian, factor, options))
    assert (found[0].codes == found[1].codes).float().mean() > 0.999


def test_compiled_for_hopper_it_rounds_as_it_says() -> None:
    """Without a GPU: divisions rounded to nearest, the updates as fused operations and no others."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    updates = 128 * 32 // (32 * 4)  # of each thread
    assert found.stdout.count("fma.rn.f32") == updates
    assert found.stdout.count("div.rn.f32") == 2
    assert not any(word in found.stdout for word in ("div.full", "div.approx", "mul.f32", ".local"))
