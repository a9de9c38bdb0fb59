"""The oracle is written independently; the library's own reader is held against the same tensors in `tests/servers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import InputError, QexportError
from qexport.formats.compressed_tensors import tensors as compressed_tensors
from qexport.formats.gptq import tensors as gptq
from qexport.quantizing.row_int8 import w8a8
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, RowQuantized, RowQuantizedSpec, TensorSpec
from test_packing_gptq import make, read_stream


@st.composite
def layers(draw: st.DrawFn) -> GroupQuantized:
    bits = draw(st.sampled_from((2, 4, 8)))
    step = 32 // bits
    in_features = step * draw(st.integers(1, 6))
    divisors = [size for size in range(1, in_features + 1) if in_features % size == 0]
    return make(
        bits,
        step * draw(st.integers(1, 4)),
        in_features,
        draw(st.sampled_from(divisors)),
        sym=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def unpack(tensors: dict[str, torch.Tensor], layer: GroupQuantized) -> GroupQuantized:
    return compressed_tensors.unpack_groups(
        tensors, bits=layer.bits, group_size=layer.group_size, sym=layer.sym, desc_act=layer.desc_act
    )


@settings(max_examples=60, deadline=None)
@given(layers())
def test_a_bit_by_bit_reader_finds_every_code_and_zero_point(layer: GroupQuantized) -> None:
    packed = compressed_tensors.pack_groups(layer)
    rows = [read_stream(row, layer.bits) for row in packed["weight_packed"].tolist()]
    assert rows == layer.codes.tolist()
    assert torch.equal(packed["weight_scale"], layer.scales.t())
    assert packed["weight_shape"].tolist() == list(layer.codes.shape)
    assert ("weight_zero_point" in packed) == (not layer.sym)
    if not layer.sym:
        columns = packed["weight_zero_point"].t().tolist()
        assert [read_stream(column, layer.bits) for column in columns] == layer.zeros.tolist()


@settings(max_examples=60, deadline=None)
@given(layers())
def test_unpacking_gives_back_what_was_packed(layer: GroupQuantized) -> None:
    again = unpack(compressed_tensors.pack_groups(layer), layer)
    for name, value in vars(layer).items():
        found = getattr(again, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_a_group_size_of_minus_one_means_one_group_over_all_inputs() -> None:
    layer = make(4, 16, 64, 64)
    packed = compressed_tensors.pack_groups(layer)
    again = compressed_tensors.unpack_groups(packed, bits=4, group_size=-1, sym=False, desc_act=False)
    assert again.group_size == 64
    assert torch.equal(again.dequantize(), layer.dequantize())
    two = compressed_tensors.pack_groups(make(4, 16, 64, 32))
    with pytest.raises(InputError, match=r"expected .* found"):  # two groups are not one
        compressed_tensors.unpack_groups(two, bits=4, group_size=-1, sym=False, desc_act=False)


@settings(max_examples=30, deadline=None)
@given(layers())
def test_the_specs_known_beforehand_are_those_of_the_packed_tensors(layer: GroupQuantized) -> None:
    rows, columns = layer.codes.shape
    spec = GroupQuantizedSpec(rows, columns, layer.bits, layer.group_size, layer.sym, layer.desc_act)
    packed = compressed_tensors.pack_groups(layer)
    assert described(packed) == compressed_tensors.group_specs(spec)
    assert all(tensor.is_contiguous() for tensor in packed.values())


def described(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_the_codes_are_those_that_the_gptq_layout_holds() -> None:
    layer = make(4, 16, 64, 32, sym=True)
    again = gptq.unpack(gptq.pack(layer), bits=4, group_size=32, sym=True, desc_act=False)
    assert torch.equal(unpack(compressed_tensors.pack_groups(layer), layer).codes, again.codes)


def test_the_bytes_of_four_bits_are_the_golden_ones() -> None:
    codes = torch.arange(8, dtype=torch.uint8).expand(8, 8).contiguous()
    zeros = torch.tensor([[0, 1, 2, 7, 8, 9, 14, 15]], dtype=torch.uint8)
    scales, g_idx = torch.ones(1, 8, dtype=torch.float16), torch.zeros(8, dtype=torch.int32)
    packed = compressed_tensors.pack_groups(GroupQuantized(codes, scales, zeros, g_idx, 4, 8, False, False))
    assert packed["weight_packed"].flatten().tolist() == [0x76543210] * 8
    assert [word % 2**32 for word in packed["weight_zero_point"].flatten().tolist()] == [0xFE987210]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GroupQuantizedSpec(64, 64, 4, 32, True, False), None),
        (GroupQuantizedSpec(63, 64, 4, 32, True, False), None),
        (GroupQuantizedSpec(63, 64, 4, 32, False, False), "outputs are a multiple of 8"),
        (GroupQuantizedSpec(64, 60, 4, 30, True, False), "inputs are a multiple of 8"),
        (GroupQuantizedSpec(64, 64, 4, 48, True, False), "group_size 48"),
        (GroupQuantizedSpec(64, 96, 3, 32, True, False), "3 bits"),
    ],
)
def test_shapes_that_cannot_be_packed_are_told_beforehand(spec: GroupQuantizedSpec, words: str | None) -> None:
    reason = compressed_tensors.check_groups(spec)
    assert reason is None if words is None else words in str(reason)


def test_one_group_has_no_order_whatever_desc_act_says() -> None:
    layer = make(4, 16, 64, 64, seed=1)
    packed = compressed_tensors.pack_groups(layer)
    assert layer.desc_act
    assert "weight_g_idx" not in packed
    assert torch.equal(unpack(packed, layer).dequantize(), layer.dequantize())


def test_three_bits_are_not_packed() -> None:
    with pytest.raises(QexportError, match="3 bits"):
        compressed_tensors.pack_groups(make(3, 32, 96, 32))


def test_rows_come_back_with_the_scales_of_the_file() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(513, 64, generator=generator) * torch.rand(513, 1, generator=generator)
    weight[3] = 0
    rows = w8a8(weight)
    packed = compressed_tensors.pack_rows(rows)
    assert described(packed) == compressed_tensors.row_specs(RowQuantizedSpec(513, 64, torch.float32))
    again = compressed_tensors.unpack_rows(packed)
    assert torch.equal(again.codes, rows.codes)
    assert torch.equal(again.scales, packed["weight_scale"][:, 0])
    assert torch.equal(again.dequantize(), rows.dequantize())


def test_every_scale_of_a_binade_comes_back() -> None:
    absmax = (torch.arange(0, 2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    packed = compressed_tensors.pack_rows(RowQuantized(torch.zeros(2**23, 1, dtype=torch.int8), absmax))
    assert torch.equal(compressed_tensors.unpack_rows(packed).scales[:, None], packed["weight_scale"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"weight_scale": None}, "missing"),
        ({"weight_shape": None}, "shape of a packed layer"),
        ({"weight_shape": torch.tensor([16, 0])}, "shape of a packed layer"),
        ({"weight_shape": torch.tensor([16, 72])}, "group_size"),
        ({"weight_packed": torch.zeros(16, 7, dtype=torch.int32)}, r"\[16, 8\]"),
        ({"weight_scale": torch.ones(16, 2, dtype=torch.float64)}, "float16"),
        ({"weight_zero_point": None}, "missing"),
        ({"weight_g_idx": torch.full((64,), 2, dtype=torch.int32)}, "outside the 2 groups"),
        ({"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}, "outside the 2 groups"),
    ],
)
def test_packed_tensors_that_do_not_fit_together_are_refused(fault: dict[str, torch.Tensor | None], words: str) -> None:
    layer = make(4, 16, 64, 32, seed=1)
    assert layer.desc_act
    tensors = compressed_tensors.pack_groups(layer) | fault
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InputError, match=words) as caught:
        compressed_tensors.unpack_groups(
            present, bits=4, group_size=32, sym=False, desc_act=True, module="model.layers.0.mlp.up_proj"
        )
    assert str(caught.value.where).startswith("model.layers.0.mlp.up_proj.")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"weight": None}, "missing"),
        ({"weight": torch.zeros(4, 8)}, "int8"),
        ({"weight_scale": torch.ones(4)}, r"\[4, 1\]"),
        ({"weight_scale": torch.full((4, 1), -1.0)}, "absmax"),
        ({"weight_scale": torch.full((4, 1), torch.nan)}, "absmax"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(fault: dict[str, Any], words: str) -> None:
    tensors = compressed_tensors.pack_rows(w8a8(torch.ones(4, 8))) | fault
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InputError, match=words):
        compressed_tensors.unpack_rows(present)
