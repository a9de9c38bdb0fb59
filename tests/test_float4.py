"""Codes in e2m1: compressed-tensors' own, kept as digests, and the nearest of all values in float64."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qexport.formats import float4_tensors
from qexport.quantizing import float4 as module
from qexport.quantizing.float4 import global_scale_of, mxfp4, nvfp4
from qexport.quantizing.rounding import rounding_of
from qexport.tensors import Float4Quantized, Float4QuantizedSpec, TensorSpec
from qexport.tensors.float4 import GROUP_SIZES, Float4Kind, float4_values, nearest_float4, powers_of_two
from qexport.verifying.grids import groups_of, strips
from qexport.verifying.matrices import compare_matrix

KINDS: tuple[Float4Kind, ...] = get_args(Float4Kind)
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

FOUND: Mapping[str, tuple[str, ...]] = {
    "nvfp4, plain": ("6e7832ffcc3245e2", "422c26fc7e0614bf", "6402f88b4c7165f2"),
    "nvfp4, rows of many sizes": ("f7abfbb2aba68c1b", "189f8844b43f6265", "3cc79df78af2f1c5"),
    "nvfp4, ties": ("b2e685ea75f63e4f", "341584bc70f479e2", "7a851fa1703894ca"),
    "nvfp4, zeros and denormals": ("7f397c2ed18ef60a", "d3803c75be064673", "6402f88b4c7165f2"),
    "nvfp4, huge": ("6e7832ffcc3245e2", "422c26fc7e0614bf", "1efef8e774f5fac8"),
    "nvfp4, tiny": ("eac649ffea2e23bc", "e1268c6c9d9cea08", "e00e5eb9444182f3"),
    "nvfp4, bfloat16": ("0934b6557cf67cb0", "5ab223a1b526f76b", "6402f88b4c7165f2"),
    "mxfp4, plain": ("69b054094d98c08d", "1af69fd9b479f17d"),
    "mxfp4, rows of many sizes": ("69b054094d98c08d", "83c2f0913bc51c81"),
    "mxfp4, ties": ("b2e685ea75f63e4f", "8563a4db8cd9da6f"),
    "mxfp4, zeros and denormals": ("7d6cc6e902ab7cae", "785f4b62edc5ef22"),
    "mxfp4, huge": ("69b054094d98c08d", "581696ad75496ecc"),
    "mxfp4, tiny": ("eac649ffea2e23bc", "2dfba633817046c7"),
    "mxfp4, bfloat16": ("f87dffc9385e2500", "2a983fa2150c2d08"),
}
"""SHA-256 of weight_packed, weight_scale and weight_global_scale that `calculate_qparams`, `generate_gparam` and the
compressors `NVFP4PackedCompressor` and `MXFP4PackedCompressor` of compressed-tensors 0.20.1 give for `matrix`, by kind
and by what the matrix is multiplied with."""


def quantized(weight: Tensor, kind: Float4Kind) -> Float4Quantized:
    return mxfp4(weight) if kind == "mxfp4" else nvfp4(weight, global_scale_of(float(weight.abs().max())))


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()


def matrix(form: str) -> Tensor:
    """[40, 192], the same everywhere."""
    weight = torch.stack([integers((40, 192), seed) for seed in range(4)]).sum(0) / 2048
    if form == "rows of many sizes":
        return weight * 2.0 ** (integers((40, 1), 9) / 8).round()
    if form == "ties":
        places = integers((40, 192), 5).long() % (2 * len(TIES))
        weight = torch.tensor([*TIES, *(-tie for tie in TIES)])[places]
        weight[:, ::16] = 6.0
    if form == "zeros and denormals":
        weight[3], weight[5, :32], weight[7] = 0.0, -0.0, weight[7] * 1e-40
    return weight * {"huge": 2.0**120, "tiny": 2.0**-132}.get(form, 1.0)


FORMS = ("plain", "rows of many sizes", "ties", "zeros and denormals", "huge", "tiny", "bfloat16")


def made(form: str) -> Tensor:
    return matrix(form).to(torch.bfloat16) if form == "bfloat16" else matrix(form)


def digest(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_compressed_tensors(kind: Float4Kind, form: str) -> None:
    weight = made(form)
    before = weight.clone()
    assert tuple(map(digest, float4_tensors.pack(quantized(weight, kind)).values())) == FOUND[f"{kind}, {form}"]
    assert torch.equal(weight, before), "the weight itself has changed"


def test_of_two_values_equally_near_the_even_code_is_taken_and_zeros_keep_their_sign() -> None:
    quotients = torch.tensor([*TIES, *(-tie for tie in TIES), 0.0, -0.0, -0.1, 1e30, -torch.inf])
    expected = [0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 0, 0, 8, 7, 15]
    assert nearest_float4(quotients).tolist() == expected
    below = torch.tensor(TIES).nextafter(torch.zeros(7))
    assert nearest_float4(below).tolist() == [0, 1, 2, 3, 4, 5, 6]
    above = torch.tensor(TIES).nextafter(torch.full((7,), 9.0))
    assert nearest_float4(above).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_the_sixteen_values() -> None:
    found = float4_values(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(found, torch.tensor(VALUES))
    assert found[8].signbit()


def test_powers_of_two_are_exact_down_to_the_smallest() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    assert powers_of_two(exponents).tolist() == [2.0 ** (each - 127) for each in range(255)]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=64))
def test_each_code_is_the_nearest_of_all_values(numbers: list[float]) -> None:
    found = float4_values(nearest_float4(torch.tensor(numbers))).double()
    distances = (torch.tensor(VALUES).double() - torch.tensor(numbers).double()[:, None]).abs()
    assert torch.equal((found - torch.tensor(numbers).double()).abs(), distances.amin(1))


@given(st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 5), st.integers(-90, 90), st.integers(0, 2**32))
def test_scales_use_the_range_of_e2m1(kind: Float4Kind, rows: int, groups: int, power: int, seed: int) -> None:
    """The largest magnitude of each group becomes 4 or 6, and the values are those that the documents state."""
    size = GROUP_SIZES[kind]
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    found = quantized(weight, kind)
    codes = (found.codes & 7).unflatten(1, (groups, size))
    assert bool((codes.amax(2) >= 6).all())
    values = torch.tensor(VALUES).double()[found.codes.long()].unflatten(1, (groups, size))
    if found.global_scale is None:
        scales = 2.0 ** (found.scales.double() - 127)
    else:
        scales = found.scales.double() / found.global_scale.double()
    assert torch.allclose(found.dequantize().double(), (values * scales[:, :, None]).flatten(1), rtol=1e-6, atol=0)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32))
def test_codes_come_back_from_their_bytes(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = float4_tensors.pack(Float4Quantized(codes, torch.zeros(rows, 1, dtype=torch.uint8), None))
    stored = packed["weight_packed"].tolist()
    for row in range(rows):
        assert stored[row] == [int(codes[row, 2 * at]) + 16 * int(codes[row, 2 * at + 1]) for at in range(pairs)]
    assert torch.equal(float4_tensors.unpack(packed["weight_packed"]), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_as_planned(kind: Float4Kind) -> None:
    packed = float4_tensors.pack(quantized(matrix("plain"), kind))
    found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    assert found == float4_tensors.specs(Float4QuantizedSpec(40, 192, kind))
    assert tuple(found) == float4_tensors.parts(kind)
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_do_not_show(kind: Float4Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized(matrix("plain"), kind)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 1000)
    assert quantized(matrix("plain"), kind).equals(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_have_the_values_of_the_whole(kind: Float4Kind) -> None:
    found = quantized(matrix("plain"), kind)
    parts = [found.rows(start, start + 15).dequantize() for start in range(0, 40, 15)]
    assert torch.equal(torch.cat(parts), found.dequantize())


def test_equal_is_equal_bit_for_bit() -> None:
    found = quantized(matrix("plain"), "nvfp4")
    assert found.global_scale is not None
    others = [
        Float4Quantized(found.codes ^ 8, found.scales, found.global_scale),
        Float4Quantized(found.codes, (found.scales.view(torch.uint8) ^ 1).view(found.scales.dtype), found.global_scale),
        Float4Quantized(found.codes, found.scales, found.global_scale * 2),
        quantized(matrix("plain"), "mxfp4"),
    ]
    assert found.equals(quantized(matrix("plain"), "nvfp4"))
    assert not any(found.equals(other) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_the_yardstick_of_verification_is_the_codes_themselves(kind: Float4Kind) -> None:
    found = quantized(matrix("plain"), kind)
    for strip in strips(found, matrix("plain")):
        assert torch.equal(strip.values, strip.nearest)
    groups = groups_of(found)
    assert groups is not None
    assert groups.size == GROUP_SIZES[kind]


@pytest.mark.parametrize("factor", [1.0, 0.25, 2**-5])
def test_codes_with_the_scale_of_a_larger_sibling_are_recognized(factor: float) -> None:
    weight = matrix("plain")
    found = nvfp4(weight, global_scale_of(float(weight.abs().max()) / factor))
    assert rounding_of(weight, found) is not None
    assert compare_matrix(found, weight, None, None, rounded=True).faults == []


def test_codes_with_a_scale_that_cuts_the_largest_weights_off_are_a_fault() -> None:
    weight = matrix("plain")
    found = nvfp4(weight, global_scale_of(float(weight.abs().max()) / 4))
    assert rounding_of(weight, found) is None
    assert compare_matrix(found, weight, None, None).faults != []
