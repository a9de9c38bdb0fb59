"""Codes in e4m3: compressed-tensors' own, kept as digests, and the nearest of all values in float64."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qexport.quantizing import float8 as module
from qexport.quantizing.float8 import float8
from qexport.tensors import Float8Quantized
from qexport.tensors.float8 import Block
from qexport.tensors.source import is_finite
from qexport.verifying.grids import groups_of, strips

BLOCKS = {"channel": (1, 1 << 30), "block": (128, 128)}

FOUND = {
    ("channel", torch.float32): ("26068f44f8d59cdf", "7bf691c94ec30eee"),
    ("channel", torch.bfloat16): ("5c91a03c219668f7", "a65655568a81243b"),
    ("block", torch.float32): ("b5a1a89bcce24a28", "c432e358e878ad04"),
    ("block", torch.bfloat16): ("8db50dc35607e360", "ce5b2abe2429d37b"),
}
"""SHA-256 of codes and scales that `calculate_qparams` and `FloatQuantizationCompressor.compress` of compressed-tensors
0.20.1 give for `matrix`, rounded to the dtype and widened to float32 again."""


def matrix() -> Tensor:
    """[200, 300], the same everywhere, with rows of other sizes and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(-127, 128, (200, 300), generator=generator).float() for _ in range(4)]
    weight = torch.stack(values).sum(0) / 2048 * torch.randint(1, 9, (200, 1), generator=generator).float()
    weight[3] = 0
    return weight


def digest(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("strategy", "dtype"), FOUND)
def test_codes_and_scales_are_those_of_compressed_tensors(strategy: str, dtype: torch.dtype) -> None:
    weight = matrix().to(dtype)
    before = weight.clone()
    found = float8(weight, BLOCKS[strategy])
    assert (digest(found.codes), digest(found.scales)) == FOUND[strategy, dtype]
    assert torch.equal(weight, before), "the weight itself has changed"


@pytest.mark.parametrize(
    ("block", "codes", "scales"),
    [
        (
            (1, 4),
            [[126, 56, 192, 42], [0, 0, 0, 0], [0, 0, 128, 0], [216, 27, 81, 126]],
            [1, 2**-23, 2**-23, 100 / 448],
        ),
        ((128, 128), [[126, 56, 192, 42], [0, 0, 0, 0], [0, 0, 128, 0], [199, 10, 63, 108]], [1]),
    ],
    ids=["channel", "block"],
)
def test_rows_of_nothing_have_the_smallest_step_of_float32(
    block: Block, codes: list[list[int]], scales: list[float]
) -> None:
    weight = torch.tensor([[448.0, 1, -2, 0.3], [0, 0, 0, 0], [1e-44, 0, -1e-44, 0], [-3.7, 0.02, 1.9, 100]])
    found = float8(weight, block)
    assert found.codes.view(torch.uint8).tolist() == codes
    assert torch.equal(found.scales.reshape(-1), torch.tensor(scales, dtype=torch.float32))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_each_code_is_the_nearest_value_of_its_blocks_grid(
    rows: int, columns: int, high: int, wide: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = float8(weight, (high, wide))
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()]
    for row in range(rows):
        for column in range(columns):
            scale = found.scales[row // found.block[0], column // found.block[1]].double()
            least = (values * scale - weight[row, column].double()).abs().min()
            error = (found.codes[row, column].double() * scale - weight[row, column].double()).abs()
            assert error <= least * (1 + 1e-5) + float(scale) * 1e-5
    expected = (
        found.codes.float() * found.scales.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    )
    assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_the_pieces_do_not_show(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = float8(matrix(), block)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 1000)
    assert float8(matrix(), block).equals(whole)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_some_rows_have_the_values_of_the_whole(block: Block) -> None:
    found = float8(matrix(), block)
    parts = [found.rows(start, start + 70).dequantize() for start in range(0, 200, 70)]
    assert torch.equal(torch.cat(parts), found.dequantize())


def test_equal_is_equal_bit_for_bit() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    made = [Float8Quantized(each.to(torch.float8_e4m3fn), one, (1, 1)) for each in (zero, -zero, one)]
    assert made[0].equals(made[0])
    assert not made[0].equals(made[1])
    assert not made[0].equals(made[2])


@pytest.mark.parametrize("block", [(1, 300), (50, 100)], ids=["row", "block"])
def test_the_yardstick_of_verification_is_the_codes_themselves(block: Block) -> None:
    found = float8(matrix(), block)
    for strip in strips(found, matrix()):
        assert torch.equal(strip.values, strip.nearest)
    groups = groups_of(found)
    assert (groups is None) == (block[0] == 1)
    assert groups is None or groups.size == 100


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_in_eight_bits_is_found(dtype: torch.dtype) -> None:
    values = torch.ones(5).to(dtype)
    assert is_finite(values)
    values.view(torch.uint8)[4] = 0x7F
    assert not is_finite(values)
