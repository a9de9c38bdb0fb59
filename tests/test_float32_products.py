from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from qexport.architectures import devices
from qexport.architectures.devices import multiply_in_float32


@pytest.mark.parametrize("kind", [nn.Linear, FalconLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_bfloat16_but_for_the_order_of_sums(
    kind: type[nn.Linear], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_VALUES_AT_ONCE", 1 << 14)
    torch.manual_seed(0)
    usual = kind(256, 320, bias=bias).bfloat16()
    ours = copy.deepcopy(usual)
    multiply_in_float32(ours)
    inputs = torch.randn(2, 24, 256).bfloat16()
    with torch.no_grad():
        expected, found = usual(inputs), ours(inputs)
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert float((found == expected).float().mean()) > 0.995
    assert torch.allclose(found, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("rows", [1, 15])
def test_few_rows_and_other_dtypes_go_the_usual_way(rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 320)
    usual = copy.deepcopy(linear)
    multiply_in_float32(linear)
    inputs = torch.randn(rows, 256)
    assert torch.equal(linear(inputs), usual(inputs))
    assert torch.equal(linear.bfloat16()(inputs.bfloat16()), usual.bfloat16()(inputs.bfloat16()))


def test_small_layers_keep_their_forward() -> None:
    linear = nn.Linear(16, 16)
    multiply_in_float32(linear)
    assert "forward" not in vars(linear)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1536, 576).bfloat16()
    multiply_in_float32(linear)
    inputs = torch.randn(512, 1536).bfloat16()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(linear(inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
