"""Bits of ONNX initializers. The oracle reads them one value at a time, as the operators' descriptions say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import CompatibilityError, QexportError
from qexport.export.weight_files import WeightFiles
from qexport.formats import MergedFormat, Outputs
from qexport.formats.bitsandbytes import four_bit_tensors as bitsandbytes_4bit
from qexport.formats.format import Encoding
from qexport.formats.onnx import OnnxFormat, matmul_bnb4, matmul_integer, matmul_nbits, nibbles
from qexport.tensors import (
    BlockQuantizedSpec,
    GroupQuantized,
    GroupQuantizedSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorRecord,
    TensorSpec,
)
from quantized_models import gptq_method
from test_packing_gptq import make


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def spec_of(layer: GroupQuantized) -> GroupQuantizedSpec:
    out_features, in_features = layer.codes.shape
    return GroupQuantizedSpec(out_features, in_features, layer.bits, layer.group_size, layer.sym, layer.desc_act)


def bits_at(data: list[int], index: int, bits: int) -> int:
    """The index-th number of a run of bytes whose first number lies in the lowest bits."""
    return data[index * bits // 8] >> index * bits % 8 & (1 << bits) - 1


def read_nbits(tensors: dict[str, torch.Tensor], in_features: int, bits: int) -> torch.Tensor:
    """[out, in], one value after the other: what a MatMulNBits node with these initializers multiplies with."""
    scales, blocks = tensors["scales"].tolist(), tensors["scales"].shape[1]
    block = tensors["qweight"].shape[2] * 8 // bits
    order = tensors["order"].tolist() if "order" in tensors else list(range(in_features))
    matrix = torch.zeros(len(scales), in_features)
    for row, blobs in enumerate(tensors["qweight"].tolist()):
        zeros = [2 ** (bits - 1)] * blocks
        if "zero_points" in tensors:
            zeros = [bits_at(tensors["zero_points"][row].tolist(), at, bits) for at in range(blocks)]
        values = [
            (bits_at(blobs[place // block], place % block, bits) - zeros[place // block]) * scales[row][place // block]
            for place in range(blocks * block)
        ]
        assert not any(values[in_features:]), "padding stands for zero"
        matrix[row, order] = torch.tensor(values[:in_features])
    return matrix


@st.composite
def grouped_layers(draw: st.DrawFn) -> GroupQuantized:
    bits = draw(st.sampled_from((2, 4, 8)))
    if draw(st.booleans()):
        group_size = in_features = draw(st.integers(1, 150))
    else:
        group_size = 16 * draw(st.integers(1, 5))
        in_features = group_size * draw(st.integers(2, 4))
    out_features = draw(st.integers(1, 9))
    return make(bits, out_features, in_features, group_size, sym=draw(st.booleans()), seed=draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(grouped_layers())
def test_a_reader_of_single_values_finds_the_matrix_of_groups(layer: GroupQuantized) -> None:
    packed = matmul_nbits.pack_groups(layer, torch.float32)
    assert torch.equal(read_nbits(packed, layer.codes.shape[1], layer.bits), layer.dequantize())
    assert ("zero_points" in packed, "order" in packed) == (not layer.sym, layer.desc_act)


@settings(max_examples=60, deadline=None)
@given(grouped_layers(), st.sampled_from([torch.float32, torch.float16]))
def test_the_specs_known_beforehand_are_those_of_packed_groups(layer: GroupQuantized, dtype: torch.dtype) -> None:
    spec = spec_of(layer)
    packed = matmul_nbits.pack_groups(layer, dtype)
    assert specs_of(packed) == matmul_nbits.group_specs(spec, dtype)
    block = matmul_nbits.block_size(spec)
    assert block in matmul_nbits.BLOCK_SIZES
    assert packed["qweight"].shape[2] * 8 == block * layer.bits
    assert spec.groups == 1 or spec.group_size % block == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_rows_beyond_one_piece_of_work_are_packed_too(bits: int, sym: bool) -> None:
    layer = make(bits, 515, 48, 16, sym=sym, seed=1)
    packed = matmul_nbits.pack_groups(layer, torch.float32)
    assert torch.equal(read_nbits(packed, 48, bits), layer.dequantize())


def test_the_bytes_of_four_bits_are_the_golden_ones() -> None:
    layer = GroupQuantized(
        codes=torch.arange(48, dtype=torch.uint8)[None] % 16,
        scales=torch.ones(3, 1, dtype=torch.float16),
        zeros=torch.tensor([[1], [7], [15]], dtype=torch.uint8),
        g_idx=torch.arange(48, dtype=torch.int32) // 16,
        bits=4,
        group_size=16,
        sym=False,
        desc_act=False,
    )
    packed = matmul_nbits.pack_groups(layer, torch.float32)
    assert packed["qweight"].tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]] * 3]
    assert packed["zero_points"].tolist() == [[0x71, 0x0F]]


@pytest.mark.parametrize(
    ("in_features", "group_size", "block"),
    [(1152, 576, 64), (1024, 512, 256), (192, 96, 32), (96, 48, 16), (576, 576, 64), (568, 568, 64), (512, 512, 256)],
)
def test_blocks_of_groups(in_features: int, group_size: int, block: int) -> None:
    assert matmul_nbits.block_size(GroupQuantizedSpec(8, in_features, 4, group_size, True, False)) == block


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GroupQuantizedSpec(8, 96, 3, 32, True, False), "not 3"),
        (GroupQuantizedSpec(8, 96, 4, 8, True, False), "is not a multiple of 16"),
        (GroupQuantizedSpec(8, 96, 4, 24, True, False), "is not a multiple of 16"),
        (GroupQuantizedSpec(8, 100, 4, 32, True, False), "does not divide"),
    ],
)
def test_groups_that_the_operator_lacks_are_refused_from_the_spec(spec: GroupQuantizedSpec, reason: str) -> None:
    assert reason in (matmul_nbits.fault(spec) or "")
    with pytest.raises(CompatibilityError, match=reason):
        matmul_nbits.group_specs(spec, torch.float32)


@pytest.mark.parametrize("group_size", [24, 8])
def test_one_group_of_any_size_can_be_stored(group_size: int) -> None:
    assert matmul_nbits.fault(GroupQuantizedSpec(8, group_size, 4, group_size, False, True)) is None


def test_groups_that_contradict_themselves_are_refused() -> None:
    layer = make(4, 4, 64, 32)
    swapped = layer.g_idx.flip(0)
    uneven = layer.g_idx.clone()
    uneven[0] = 1
    for broken in (
        replace(layer, codes=layer.codes + 16),
        replace(layer, zeros=layer.zeros + 16),
        replace(layer, sym=True),
        replace(layer, g_idx=swapped),
        replace(layer, g_idx=uneven, desc_act=True),
        replace(layer, scales=-layer.scales),
        replace(layer, scales=layer.scales[:1]),
    ):
        with pytest.raises(QexportError, match="defect of the quantizer"):
            matmul_nbits.pack_groups(broken, torch.float32)
    matmul_nbits.pack_groups(replace(layer, g_idx=swapped, desc_act=True), torch.float32)


def rows(out_features: int, in_features: int, seed: int = 0) -> RowQuantized:
    """Random codes over the whole range; the first row is zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    absmax = torch.rand(out_features, generator=generator) + 0.01
    codes[0], absmax[0] = 0, 0
    return RowQuantized(codes, absmax)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 600), st.integers(0, 99))
def test_a_reader_of_single_values_finds_the_matrix_of_rows(out_features: int, in_features: int, seed: int) -> None:
    layer, spec = rows(out_features, in_features, seed), RowQuantizedSpec(out_features, in_features, torch.bfloat16)
    packed = matmul_nbits.pack_rows(layer, torch.float32)
    assert specs_of(packed) == matmul_nbits.row_specs(spec, torch.float32)
    assert packed["qweight"].shape[2] == matmul_nbits.block_size(spec)
    assert matmul_nbits.fault(spec) is None
    assert torch.equal(read_nbits(packed, in_features, 8), layer.dequantize())


def test_rows_beyond_one_piece_of_work_keep_their_scales() -> None:
    layer = rows(1030, 40)
    packed = matmul_nbits.pack_rows(layer, torch.float32)
    assert torch.equal(read_nbits(packed, 40, 8), layer.dequantize())


def read_pair(tensors: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
    """[out, in], one value after the other: 16 times the matrix of the high nibbles, and that of the low ones."""
    shared = {name: tensors[name] for name in ("scales", "order") if name in tensors}
    halves = [
        {part: tensors[f"{part}_{half}"] for part in ("qweight", "zero_points") if f"{part}_{half}" in tensors}
        for half in ("high", "low")
    ]
    high, low = (read_nbits(shared | half, in_features, 4).double() for half in halves)
    return (16 * high + low).float()


@settings(max_examples=60, deadline=None)
@given(grouped_layers().filter(lambda layer: layer.bits == 8))
def test_nibbles_of_groups_add_up_to_the_codes(layer: GroupQuantized) -> None:
    encoding = OnnxFormat(torch.float32)
    packed = encoding.pack(layer)
    assert specs_of(packed) == encoding.parts(spec_of(layer))
    assert torch.equal(read_pair(packed, layer.codes.shape[1]), layer.dequantize())
    assert ("zero_points_high" in packed) is (not layer.sym)
    assert "qweight" not in packed


@pytest.mark.parametrize(("out_features", "in_features"), [(5, 33), (600, 40), (1, 1), (3, 256)])
def test_nibbles_of_rows_add_up_to_the_codes(out_features: int, in_features: int) -> None:
    layer, spec = rows(out_features, in_features), RowQuantizedSpec(out_features, in_features, torch.bfloat16)
    packed = OnnxFormat(torch.float32).pack(layer)
    assert specs_of(packed) == OnnxFormat(torch.float32).parts(spec)
    assert torch.equal(packed["scales"], layer.scales[:, None].expand_as(packed["scales"]))
    ones = packed | {"scales": torch.ones_like(packed["scales"])}
    assert torch.equal(read_pair(ones, in_features), layer.codes.float())


def test_the_bytes_of_nibbles_are_the_golden_ones() -> None:
    parts = {
        "qweight": torch.tensor([[[0x12, 0x34, 0x56, 0x78]]], dtype=torch.uint8),
        "scales": torch.ones(1, 3),
        "zero_points": torch.tensor([[0x9A, 0xBC, 0xDE]], dtype=torch.uint8),
    }
    found = {name: tensor.flatten().tolist() for name, tensor in nibbles.split(parts).items() if name != "scales"}
    assert found == {
        "qweight_high": [0x31, 0x75], "qweight_low": [0x42, 0x86],
        "zero_points_high": [0xB9, 0x0D], "zero_points_low": [0xCA, 0x0E],
    }  # fmt: skip


def test_8_bits_are_whole_where_they_are_fast_or_sums_would_be_rounded() -> None:
    groups, row = spec_of(make(8, 8, 64, 32)), RowQuantizedSpec(8, 64, torch.bfloat16)
    expected = {
        OnnxFormat(torch.float32): (True, True),
        OnnxFormat(torch.float16): (False, True),
        OnnxFormat(torch.float32, accuracy_level=4): (False, False),
        OnnxFormat(torch.float32, int8_activations=True): (True, False),
    }
    for encoding, found in expected.items():
        assert (encoding.in_nibbles(groups), encoding.in_nibbles(row)) == found, encoding
        assert [("qweight" in encoding.parts(spec)) for spec in (groups, row)] == [not each for each in found]
        assert not encoding.in_nibbles(spec_of(make(4, 8, 64, 32)))


def test_scales_are_never_rounded() -> None:
    with pytest.raises(QexportError, match="rounded in float16"):
        matmul_nbits.pack_rows(rows(4, 32), torch.float16)
    exact = RowQuantized(torch.ones(2, 16, dtype=torch.int8), torch.tensor([127.0, 254.0]))
    assert matmul_nbits.pack_rows(exact, torch.float16)["scales"].tolist() == [[1.0], [2.0]]
    with pytest.raises(QexportError, match="rounded in bfloat16"):
        matmul_nbits.pack_groups(make(4, 4, 64, 32), torch.bfloat16)


@pytest.mark.parametrize(("out_features", "in_features"), [(5, 7), (600, 33), (1, 1)])
def test_w8a8_codes_lie_transposed_about_128(out_features: int, in_features: int) -> None:
    layer, spec = rows(out_features, in_features), RowQuantizedSpec(out_features, in_features, torch.bfloat16)
    packed = matmul_integer.pack(layer)
    assert specs_of(packed) == matmul_integer.specs(spec)
    assert torch.equal(packed["qweight"].to(torch.int32) - 128, layer.codes.t().to(torch.int32))
    assert torch.equal(packed["scales"], layer.absmax / 127)
    assert matmul_integer.fault(spec) is None


def test_w8a8_rows_whose_sums_may_not_fit_are_refused() -> None:
    longest = (2**31 - 1) // (128 * 127)
    assert matmul_integer.fault(RowQuantizedSpec(1, longest, torch.float32)) is None
    assert "int32" in (matmul_integer.fault(RowQuantizedSpec(1, longest + 1, torch.float32)) or "")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bnb4_absmaxes_are_those_that_bitsandbytes_reads(quant_type: str, double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 128)
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type)
    stored = {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    quantized = bitsandbytes_4bit.unpack(stored)
    packed = matmul_bnb4.pack(quantized)
    assert specs_of(packed) == matmul_bnb4.specs(quantized.spec)
    assert torch.equal(packed["weight"], codes.flatten())
    expected = dequantize_blockwise(state.absmax, state.state2) + state.offset if double_quant else state.absmax
    assert torch.equal(packed["weight.absmax"], expected)


@pytest.mark.parametrize(("in_features", "block_size"), [(1024, 512), (4096, 4096), (96, 64), (31, 64), (64, 8)])
def test_bnb4_blocks_that_do_not_fit_are_refused_from_the_spec(in_features: int, block_size: int) -> None:
    spec = BlockQuantizedSpec(4, in_features, "nf4", block_size, False, torch.float32)
    assert matmul_bnb4.fault(spec)
    with pytest.raises(CompatibilityError):
        matmul_bnb4.specs(spec)


def test_the_encoding_names_initializers_after_their_module() -> None:
    single, half = OnnxFormat(torch.float32), OnnxFormat(torch.float16)
    integer = OnnxFormat(torch.float32, int8_activations=True)
    groups, row = make(4, 8, 64, 32, seed=1), rows(8, 64)
    row_spec = RowQuantizedSpec(8, 64, torch.bfloat16)
    dense = torch.ones(3, dtype=torch.bfloat16)
    cases: list[tuple[OnnxFormat, Quantized, QuantizedSpec, list[str]]] = [
        (half, groups, spec_of(groups), ["qweight", "scales", "zero_points", "order"]),
        (half, row, row_spec, ["qweight_high", "qweight_low", "scales", "zero_points_low"]),
        (integer, row, row_spec, ["qweight", "scales"]),
    ]
    for encoding, value, spec, parts in cases:
        tensors = encoding.tensors(TensorRecord("a.b.weight", value))
        assert list(tensors) == [f"a.b.{part}" for part in parts]
        assert specs_of(tensors) == encoding.specs("a.b.weight", spec)
        assert encoding.fault(spec) is None
    assert half.specs("a.b.weight", spec_of(groups))["a.b.scales"].dtype == torch.float16
    assert half.specs("a.b.weight", row_spec)["a.b.scales"].dtype == torch.float32
    assert single.specs("n.weight", TensorSpec((3,), dense.dtype)) == {"n.weight": TensorSpec((3,), dense.dtype)}
    assert single.tensors(TensorRecord("n.weight", dense))["n.weight"] is dense


def test_encodings_are_equal_where_they_store_the_same() -> None:
    assert OnnxFormat(torch.float32) == OnnxFormat(torch.float32)
    assert OnnxFormat(torch.float32) != OnnxFormat(torch.float16)
    assert OnnxFormat(torch.float32) != OnnxFormat(torch.float32, int8_activations=True)
    assert OnnxFormat(torch.float32) != OnnxFormat(torch.float32, accuracy_level=4)
    plain: list[Encoding] = [gptq_method(), MergedFormat()]
    assert plain[0] == gptq_method()
    assert plain[0] != plain[1]


def test_layouts_share_initializers_only_of_the_same_dtype() -> None:
    outputs = Outputs(MergedFormat(), {})
    single, half = (WeightFiles(OnnxFormat(dtype), outputs, 100) for dtype in (torch.float32, torch.float16))
    assert single.equal(WeightFiles(OnnxFormat(torch.float32), outputs, 100))
    assert not single.equal(WeightFiles(OnnxFormat(torch.float32), outputs, 99))
    assert not single.equal(half)
    assert not single.equal(WeightFiles(MergedFormat(), outputs, 100))
