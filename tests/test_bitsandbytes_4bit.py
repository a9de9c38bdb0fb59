"""bitsandbytes' own quantization on the CPU is the oracle for every byte."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import quantize_4bit, quantize_blockwise
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.formats.bitsandbytes import four_bit_codes
from qexport.formats.bitsandbytes.four_bit_tensors import QuantType, four_bit_values
from qexport.tensors import BlockQuantizedSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QUANT_TYPES: list[QuantType] = ["nf4", "fp4"]


def assert_same_bytes(weight: torch.Tensor, quant_type: QuantType, block_size: int = 64) -> None:
    rows, columns = weight.shape
    for double_quant in (False, True):
        spec = BlockQuantizedSpec(rows, columns, quant_type, block_size, double_quant, weight.dtype)
        found = four_bit_codes.quantize(weight, spec)
        codes, state = quantize_4bit(
            weight, blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
        )
        assert torch.equal(found.codes, codes.reshape(-1))
        assert found.absmax.dtype == state.absmax.dtype
        assert torch.equal(found.absmax, state.absmax)
        if double_quant:
            assert found.nested is not None
            assert torch.equal(found.nested.absmax, state.state2.absmax)
            assert found.nested.offset == state.offset.item()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from(QUANT_TYPES),
    st.sampled_from([32, 64, 256]),
    st.integers(-60, 20),
    st.integers(0, 2**32),
)
def test_random_matrices_of_any_shape_and_size(
    rows: int, columns: int, dtype: torch.dtype, quant_type: QuantType, block_size: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(2.0**exponent).to(dtype)
    assert_same_bytes(weight.clamp(*bounds(dtype)), quant_type, block_size)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.floats(width=16, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 65504.0]),
        min_size=1,
        max_size=200,
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(QUANT_TYPES),
)
def test_values_that_random_matrices_do_not_hold(
    values: list[float], dtype: torch.dtype, quant_type: QuantType
) -> None:
    assert_same_bytes(torch.tensor([values]).to(dtype), quant_type)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=130))
def test_any_float32_denormals_included(values: list[float]) -> None:
    for quant_type in QUANT_TYPES:
        assert_same_bytes(torch.tensor([values]), quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_with_the_middles_of_the_code_book(quant_type: QuantType, dtype: torch.dtype) -> None:
    """Each middle and its neighbours, above and below, in blocks whose absmax is a power of two or not."""
    book = four_bit_values(quant_type).sort().values
    middles = ((book[:-1] + book[1:]) / 2).to(dtype)
    up, down = (torch.nextafter(middles, torch.full_like(middles, sign * math.inf)) for sign in (1, -1))
    block = torch.cat([torch.ones(1, dtype=dtype), middles, up, down, torch.zeros(18, dtype=dtype)])
    rows = torch.stack([block.float() * factor for factor in (1.0, 0.25, 3.0, 0.0703125, -1.5)]).to(dtype)
    assert_same_bytes(rows, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_zeros_and_of_nearly_nothing(quant_type: QuantType, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    rows = [torch.zeros(64), -torch.zeros(64), torch.full((64,), tiny), torch.linspace(-tiny, tiny, 64) / 4]
    assert_same_bytes(torch.stack(rows).to(dtype), quant_type)
    assert_same_bytes(torch.zeros(3, 5, dtype=dtype), quant_type)


def absmaxes_between_two_steps() -> torch.Tensor:
    """Where the rounding to one of 65536 steps turns over, and the neighbours of these values, in blocks up to 1."""
    edges = ((torch.arange(65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1).clamp(-1, 1).float()
    up, down = (torch.nextafter(edges, torch.full_like(edges, sign * math.inf)) for sign in (1, -1))
    values = torch.cat([up, edges, down]).clamp(-1, 1).view(-1, 192)
    return torch.cat([torch.ones(len(values), 32), values, -torch.ones(len(values), 32)], 1).view(-1)


@pytest.mark.parametrize(
    "absmax",
    [
        absmaxes_between_two_steps(),
        torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) ** 3,
        torch.rand(300, generator=torch.Generator().manual_seed(0)).mul_(1e-39),
        torch.full((300,), 0.25),
        torch.ones(1),
    ],
    ids=["between two steps", "random", "denormal", "equal", "one"],
)
def test_the_second_level_of_double_quantization(absmax: torch.Tensor) -> None:
    codes, nested = four_bit_codes._quantize_absmax(absmax)
    expected, state = quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(nested.absmax, state.absmax)


def test_matrices_of_several_pieces_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit_codes, "_VALUES_AT_ONCE", 1 << 12)
    weight = torch.randn(301, 207, generator=torch.Generator().manual_seed(0))
    for quant_type in QUANT_TYPES:
        assert_same_bytes(weight, quant_type)
    spec = BlockQuantizedSpec(301, 207, "nf4", 64, True, torch.float32)
    one = four_bit_codes.quantize(weight, spec)
    torch.set_num_threads(2)
    try:
        two = four_bit_codes.quantize(weight, spec)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.codes, two.codes)
    assert one.nested is not None
    assert two.nested is not None
    assert one.nested.offset == two.nested.offset


def test_a_matrix_that_is_not_contiguous_is_read_row_by_row() -> None:
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).t()
    spec = BlockQuantizedSpec(64, 128, "nf4", 64, False, torch.float32)
    found, copied = (four_bit_codes.quantize(each, spec) for each in (weight, weight.contiguous()))
    assert torch.equal(found.codes, copied.codes)


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    limits = torch.finfo(dtype)
    return limits.min, limits.max
