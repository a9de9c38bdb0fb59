"""Rows of int8 codes: bitsandbytes is the oracle for LLM.int8, the definition in float64 for W8A8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericalError
from qexport.quantizing import row_int8
from qexport.quantizing.row_int8 import llm_int8, w8a8
from qexport.tensors import RowQuantized


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(-30, 10),
    st.integers(0, 2**32),
)
def test_codes_and_absmaxes_are_those_of_bitsandbytes(
    rows: int, columns: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(2.0**exponent).to(dtype)
    codes, absmax, _ = int8_vectorwise_quant(weight.half())
    found = llm_int8(weight)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.absmax, absmax)


@pytest.mark.parametrize("quantize", [llm_int8, w8a8])
def test_a_row_of_zeros_has_codes_and_absmax_of_zero(quantize: Callable[[torch.Tensor], RowQuantized]) -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8)])
    codes, absmax, _ = int8_vectorwise_quant(weight.half())
    found = quantize(weight)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.absmax, absmax)


@pytest.mark.parametrize("quantize", [llm_int8, w8a8])
def test_the_pieces_do_not_show(
    quantize: Callable[[torch.Tensor], RowQuantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 16, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight)
    monkeypatch.setattr(row_int8, "_VALUES_AT_ONCE", 50)
    pieces = quantize(weight)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.absmax, pieces.absmax)


def test_a_weight_beyond_float16_is_an_error() -> None:
    with pytest.raises(NumericalError, match="float16"):
        llm_int8(torch.tensor([[1.0, 70000.0]], dtype=torch.bfloat16))


def test_codes_are_the_nearest_steps_of_each_rows_absmax() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(65, 48, generator=generator) * torch.rand(65, 1, generator=generator)).bfloat16()
    rows = w8a8(weight)
    steps = weight.double().abs().amax(1, keepdim=True) / 127
    assert torch.equal(rows.absmax, weight.float().abs().amax(1))
    assert int(rows.codes.abs().max()) == 127
    off = (rows.codes.double() - weight.double() / steps).abs()
    assert float(off.max()) <= 0.5 + 1e-5


def test_a_matrix_of_several_pieces_has_the_codes_of_its_rows() -> None:
    weight = torch.randn(5, 1 << 20, generator=torch.Generator().manual_seed(1))
    whole = w8a8(weight)
    for index in range(5):
        alone = w8a8(weight[index : index + 1])
        assert torch.equal(whole.codes[index], alone.codes[0])
        assert torch.equal(whole.absmax[index], alone.absmax[0])


def test_a_row_whose_scale_would_be_zero_has_codes_of_zero() -> None:
    weight = torch.tensor([[1e-44, 0.0, -1e-44], [1.0, -0.5, 0.0]])
    found = w8a8(weight)
    assert found.scales[0] == 0
    assert found.codes.tolist() == [[0, 0, 0], [127, -64, 0]]


@pytest.mark.parametrize("rounding", [w8a8, llm_int8])
def test_scales_in_float16_fit_exactly_and_cost_little(rounding: Callable[..., RowQuantized]) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)) * 0.03
    weight[3], weight[5] = 0.0, weight[5] * 1e-6
    own, wide = rounding(weight, torch.float16), rounding(weight)
    assert torch.equal(own.scales, own.scales.half().float())
    assert own.absmax[3] == 0
    assert own.codes[3].abs().max() == 0
    assert own.codes[5].abs().max() > 0
    rows = torch.tensor([row for row in range(64) if row not in (3, 5)])
    errors = [float((each.dequantize() - weight)[rows].square().sum()) for each in (own, wide)]
    assert errors[0] < 1.005 * errors[1]
    codes = (weight / own.scales.clamp_min(2.0**-24)[:, None]).round().clamp(-127, 127)
    assert int((codes - own.codes).abs().max()) <= (1 if rounding is llm_int8 else 0)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(NumericalError, match="scale is out of the range"):
        w8a8(torch.full((2, 32), 1e8), torch.float16)
