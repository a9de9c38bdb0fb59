"""Products of fixed shapes: the same bits with any number of threads, and right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from qexport.quantizing.layer import Hessian
from qexport.quantizing.products import COLUMNS, ROWS, FixedProducts

SHAPES = [(2048, 576, 1536), (1024, 1536, 576), (300, 576, 576), (300, 1536, 3 * COLUMNS), (ROWS + 1, 64, COLUMNS + 1)]
"""Tokens, inputs and outputs. With each of the first four, torch's own product has depended on the number of threads on
some CPU (AMX or AVX-512)."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_the_same_with_any_number_of_threads(
    shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    tokens, inputs, outputs = shape
    x, weight = made(2, tokens // 2, inputs, dtype=dtype), made(outputs, inputs, dtype=dtype)
    bias = made(outputs, dtype=dtype) if with_bias else None
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with FixedProducts():
            found.append(linear(x, weight, bias))
        assert torch.get_num_threads() == count
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    right = linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert float((found[0].double() - right).abs().max()) < tolerance * float(right.abs().max())


def test_a_small_layer_is_torchs_own_product() -> None:
    x, weight, bias = made(ROWS, 48, dtype=torch.float32), made(64, 48, dtype=torch.float32), torch.ones(64)
    torch.set_num_threads(1)
    with FixedProducts():
        found = linear(x, weight, bias)
    assert torch.equal(found, linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [576, 1536])
def test_a_hessian_is_the_same_with_any_number_of_threads(inputs: int, dtype: torch.dtype) -> None:
    x = made(2048, inputs, dtype=dtype)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        hessian = Hessian(inputs, torch.device("cpu"))
        hessian.add(x)
        found.append(hessian.matrix())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
