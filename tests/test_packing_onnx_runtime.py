"""ONNX Runtime is the oracle: fed with unit vectors, a node must give back the dequantized matrix, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from bitsandbytes_oracle import own_values, reads_right, values
from qexport.architectures.activation_rounding import round_blocks
from qexport.formats.bitsandbytes import four_bit_tensors as bitsandbytes_4bit
from qexport.formats.onnx import OnnxFormat, matmul_bnb4, matmul_integer, matmul_nbits
from qexport.formats.onnx.matmul_nbits_reading import NBitsMatrix
from qexport.tensors import GroupQuantized, RowQuantized, RowQuantizedSpec
from test_packing_gptq import make
from test_packing_onnx import rows, spec_of

pytest.importorskip("onnxruntime")

from onnx_nodes import OneNode

WHOLE = 10**6


def groups_node(layer: GroupQuantized, dtype: torch.dtype = torch.float32, *, accuracy_level: int = 0) -> OneNode:
    spec = spec_of(layer)
    return OneNode(
        "MatMulNBits",
        groups_parts(layer, dtype),
        dtype=dtype,
        K=spec.in_features,
        N=spec.out_features,
        bits=layer.bits,
        block_size=block_of(layer),
        accuracy_level=accuracy_level,
    )


def groups_parts(layer: GroupQuantized, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    parts: dict[str, torch.Tensor | None] = {"qweight": None, "scales": None}
    return parts | matmul_nbits.pack_groups(layer, dtype)


def rows_node(layer: RowQuantized) -> OneNode:
    out_features, in_features = layer.codes.shape
    block = matmul_nbits.block_size(RowQuantizedSpec(out_features, in_features, torch.float32))
    packed = matmul_nbits.pack_rows(layer, torch.float32)
    return OneNode(
        "MatMulNBits",
        packed,
        dtype=torch.float32,
        K=in_features,
        N=out_features,
        bits=8,
        block_size=block,
        accuracy_level=0,
    )


SHAPES = [(576, 16), (576, 32), (576, 64), (576, 96), (576, 192), (576, 288), (576, 576), (1024, 512)]
RAGGED = [(568, 568), (600, 600), (24, 24), (7, 7)]


@pytest.mark.parametrize(("in_features", "group_size"), SHAPES + RAGGED)
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_exact(bits: int, sym: bool, desc_act: bool, in_features: int, group_size: int) -> None:
    for out_features in (13, 40):
        layer = make(bits, out_features, in_features, group_size, sym=sym, seed=int(desc_act))
        node, expected = groups_node(layer), layer.dequantize()
        for at_once in (WHOLE, 16):
            assert torch.equal(node.matrix(in_features, torch.float32, at_once), expected)
        units = torch.eye(in_features)[:: in_features // 7]
        singles = torch.cat([node(unit[None]) for unit in units])
        assert torch.equal(singles, expected.t()[:: in_features // 7])


@pytest.mark.parametrize(("in_features", "group_size"), [(576, 64), (576, 288), (568, 568)])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_rounded_once_with_float16_activations(
    bits: int, sym: bool, desc_act: bool, in_features: int, group_size: int
) -> None:
    layer = make(bits, 13, in_features, group_size, sym=sym, seed=int(desc_act))
    node, expected = groups_node(layer, torch.float16), layer.dequantize(torch.float16)
    for at_once in (WHOLE, 16):
        assert torch.equal(node.matrix(in_features, torch.float16, at_once), expected)
    assert torch.equal(node(torch.eye(in_features).half()[5:6])[0], expected[:, 5])


@pytest.mark.parametrize("in_features", [16, 31, 568, 576, 600, 1024])
@pytest.mark.parametrize("out_features", [3, 13, 40])
def test_rows_are_exact(in_features: int, out_features: int) -> None:
    layer = rows(out_features, in_features)
    node, expected = rows_node(layer), layer.dequantize()
    for at_once in (WHOLE, 16):
        assert torch.equal(node.matrix(in_features, torch.float32, at_once), expected)
    assert torch.equal(node(torch.eye(in_features)[5:6])[0], expected[:, 5])


def pair_node(layer: GroupQuantized | RowQuantized) -> OneNode:
    out_features, in_features = layer.codes.shape
    row_spec = RowQuantizedSpec(out_features, in_features, torch.float32)
    spec = spec_of(layer) if isinstance(layer, GroupQuantized) else row_spec
    parts = OnnxFormat(torch.float32).pack(layer)
    return OneNode.pair(parts, columns=in_features, block_size=matmul_nbits.block_size(spec))


@pytest.mark.parametrize(("in_features", "group_size"), [(576, 16), (576, 64), (1024, 512), (568, 568), (7, 7)])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_two_nodes_of_nibbles_are_exact(sym: bool, desc_act: bool, in_features: int, group_size: int) -> None:
    layer = make(8, 13, in_features, group_size, sym=sym, seed=int(desc_act))
    node, expected = pair_node(layer), layer.dequantize()
    for at_once in (WHOLE, 16):
        assert torch.equal(node.matrix(in_features, torch.float32, at_once), expected)
    assert torch.equal(node(torch.eye(in_features)[5:6])[0], expected[:, 5])


@pytest.mark.parametrize("in_features", [16, 31, 568, 1024])
def test_two_nodes_of_nibbles_of_rows_are_rounded_as_often_as_their_sum(in_features: int) -> None:
    """Their scales have all 24 bits of float32, so that each product and the sum are rounded."""
    layer = rows(13, in_features)
    node, expected = pair_node(layer), layer.dequantize()
    bound = 2**-24 * 256 * layer.scales[:, None]
    for found in (node.matrix(in_features, torch.float32, WHOLE), node.matrix(in_features, torch.float32, 1)):
        assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("tokens", [1, 16])
def test_sums_of_two_nodes_of_nibbles_are_those_of_float32(tokens: int) -> None:
    layer = make(8, 13, 568, 568, seed=1)
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 568), layer.dequantize().double()
    largest = 256 * layer.scales[0].double()
    bound = (568 + 4) * 2**-24 * x.double().abs().sum(1, keepdim=True) * largest
    assert bool(((pair_node(layer)(x) - x.double() @ weight.t()).abs() <= bound).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 16])
def test_products_with_any_activations_are_those_of_float32_sums(bits: int, tokens: int) -> None:
    """Unit vectors show the matrix, not what becomes of sums. The bound is that of a sum in any order."""
    layer = make(bits, 13, 568, 568, seed=1)
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 568), layer.dequantize().double()
    bound = (568 + 2) * 2**-24 * (x.double().abs() @ weight.abs().t())
    assert bool(((groups_node(layer)(x) - x.double() @ weight.t()).abs() <= bound).all())


@pytest.mark.parametrize(
    ("quant_type", "block_size", "shape"),
    [
        ("nf4", 64, (13, 576)),
        ("fp4", 64, (13, 576)),
        ("nf4", 32, (3, 96)),
        ("fp4", 128, (40, 640)),
        ("nf4", 256, (1, 256)),
    ],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_blocks_are_those_of_bitsandbytes(
    quant_type: str, block_size: int, shape: tuple[int, int], double_quant: bool
) -> None:
    torch.manual_seed(0)
    codes, state = quantize_4bit(
        torch.randn(shape), blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
    )
    stored = {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    quantized = bitsandbytes_4bit.unpack(stored)
    packed = {name.replace(".", "_"): part for name, part in matmul_bnb4.pack(quantized).items()}
    assert matmul_bnb4.fault(quantized.spec) is None
    node = OneNode(
        "MatMulBnb4",
        packed,
        dtype=torch.float32,
        K=shape[1],
        N=shape[0],
        block_size=block_size,
        quant_type=int(quant_type == "nf4"),
    )
    assert reads_right(shape, block_size)
    expected = own_values(codes, state)
    assert torch.equal(expected, values(codes, state))
    for at_once in (WHOLE, 16, 1):
        assert torch.equal(node.matrix(shape[1], torch.float32, at_once), expected)
    assert torch.equal(expected, bitsandbytes_4bit.dequantize(quantized))


def integer_node(layer: RowQuantized) -> OneNode:
    zero = torch.tensor(matmul_integer.ZERO_POINT, dtype=torch.uint8)
    parts = {"qweight": matmul_integer.pack(layer)["qweight"], "x_zero": zero, "zero": zero}
    return OneNode("MatMulInteger", parts, dtype=torch.uint8, result=torch.int32, domain="")


@pytest.mark.parametrize(("out_features", "in_features"), [(13, 568), (40, 576), (300, 4544), (3, 31)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_integer_sums_are_exact_at_the_extremes(tokens: int, out_features: int, in_features: int) -> None:
    """Kernels that add pairs of products in 16 bits would saturate."""
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(out_features, in_features, dtype=torch.int8)
    signs = torch.randint(0, 2, ones.shape, generator=generator, dtype=torch.int8) * 2 - 1
    for codes in (127 * ones, -127 * ones, 127 * signs, rows(out_features, in_features).codes):
        node = integer_node(RowQuantized(codes, torch.ones(out_features)))
        for token in (127 * ones[:1], -127 * ones[:1], 127 * signs[:1], -128 * ones[:1]):
            x = token.to(torch.int64).expand(tokens, -1).contiguous()
            assert torch.equal(node((x + 128).to(torch.uint8)), (x @ codes.to(torch.int64).t()).to(torch.int32))


@pytest.mark.parametrize(("in_features", "group_size"), [(576, 16), (576, 64), (512, 256), (568, 568)])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_at_level_4_the_inputs_are_rounded_as_our_reading_rounds_them(
    bits: int, sym: bool, desc_act: bool, in_features: int, group_size: int
) -> None:
    layer = make(bits, 40, in_features, group_size, sym=sym, seed=int(desc_act))
    node, parts, block = groups_node(layer, accuracy_level=4), groups_parts(layer), block_of(layer)
    matrix = NBitsMatrix((40, in_features), bits, block, 4, "", "scales", "", "order" if "order" in parts else "")
    rounding = matrix.input_rounding(Stored(parts))  # type: ignore[arg-type]
    inputs, values = torch.randn(70, in_features, generator=torch.manual_seed(1)), layer.dequantize().double().t()
    unrounded = inputs.double() @ values
    expected = unrounded if rounding is None else round_blocks(inputs, rounding).double() @ values
    for tokens in (slice(0, 1), slice(0, 70)):
        assert distance(node(inputs[tokens]), expected[tokens]) < 1e-5
    assert (distance(unrounded, expected) > 1e-3) is (bits > 2 or block in (32, 64, 128))


class Stored:
    """The initializers of a node in place of a graph's."""

    def __init__(self, parts: dict[str, torch.Tensor | None]) -> None:
        self._parts = parts

    def read(self, name: str) -> torch.Tensor:
        found = self._parts[name]
        assert found is not None
        return found


def block_of(layer: GroupQuantized) -> int:
    return matmul_nbits.block_size(spec_of(layer))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
