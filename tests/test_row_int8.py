"""bitsandbytes' own quantization is the oracle for LLM.int8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import NumericalError
from qexport.quantize import row_int8
from qexport.quantize.row_int8 import llm_int8, w8a8
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
