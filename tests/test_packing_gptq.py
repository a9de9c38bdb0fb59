"""The oracle here is written independently: it reads the words as one string of binary digits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import InputError, QexportError
from qexport.packing import gptq
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, TensorSpec

BITS = (2, 3, 4, 8)


def make(
    bits: int, out_features: int, in_features: int, group_size: int, *, sym: bool = False, seed: int = 0
) -> GroupQuantized:
    """Random codes and zero points over the whole range; every second layer has its groups in another order."""
    generator = torch.Generator().manual_seed(seed)
    groups, largest = in_features // group_size, 2**bits - 1
    zeros = torch.randint(0, largest + 1, (groups, out_features), generator=generator, dtype=torch.uint8)
    zeros.view(-1)[0], zeros.view(-1)[-1] = 0, largest
    g_idx = torch.arange(in_features, dtype=torch.int32) // group_size
    if desc_act := seed % 2 == 1:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    return GroupQuantized(
        codes=torch.randint(0, largest + 1, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(groups, out_features, generator=generator) + 0.01).half(),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros,
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
    )


def read_stream(words: list[int], bits: int) -> list[int]:
    """Codes in a run of int32 words: all binary digits, the lowest of the first word first, cut every `bits`."""
    digits = "".join(format(word % 2**32, "032b")[::-1] for word in words)
    return [int(digits[start : start + bits][::-1], 2) for start in range(0, len(digits), bits)]


def read_codes(qweight: torch.Tensor, bits: int) -> list[list[int]]:
    return [read_stream(column, bits) for column in qweight.t().tolist()]


def read_zeros(qzeros: torch.Tensor, bits: int) -> list[list[int]]:
    return [[(stored + 1) % 2**bits for stored in read_stream(row, bits)] for row in qzeros.tolist()]


@st.composite
def layers(draw: st.DrawFn) -> GroupQuantized:
    bits = draw(st.sampled_from(BITS))
    step = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    out_features = step * draw(st.integers(1, 4))
    in_features = step * draw(st.integers(1, 6))
    divisors = [size for size in range(1, in_features + 1) if in_features % size == 0]
    return make(
        bits,
        out_features,
        in_features,
        draw(st.sampled_from(divisors)),
        sym=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=60, deadline=None)
@given(layers())
def test_a_bit_by_bit_reader_finds_every_code_and_zero_point(layer: GroupQuantized) -> None:
    packed = gptq.pack(layer)
    assert read_codes(packed["qweight"], layer.bits) == layer.codes.tolist()
    assert read_zeros(packed["qzeros"], layer.bits) == layer.zeros.tolist()
    assert torch.equal(packed["scales"], layer.scales)
    assert torch.equal(packed["g_idx"], layer.g_idx)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_unpacking_gives_back_what_was_packed(layer: GroupQuantized) -> None:
    again = gptq.unpack(
        gptq.pack(layer), bits=layer.bits, group_size=layer.group_size, sym=layer.sym, desc_act=layer.desc_act
    )
    for name, value in vars(layer).items():
        found = getattr(again, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_a_group_size_of_minus_one_means_one_group_over_all_inputs() -> None:
    layer = make(4, 16, 64, 64)
    again = gptq.unpack(gptq.pack(layer), bits=4, group_size=-1, sym=False, desc_act=False)
    assert again.group_size == 64
    assert torch.equal(again.dequantize(), layer.dequantize())
    with pytest.raises(InputError, match=r"expected .* found"):  # two groups are not one
        gptq.unpack(gptq.pack(make(4, 16, 64, 32)), bits=4, group_size=-1, sym=False, desc_act=False)


@settings(max_examples=30, deadline=None)
@given(layers())
def test_the_specs_known_beforehand_are_those_of_the_packed_tensors(layer: GroupQuantized) -> None:
    out_features, in_features = layer.codes.shape
    spec = GroupQuantizedSpec(out_features, in_features, layer.bits, layer.group_size, layer.sym, layer.desc_act)
    found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in gptq.pack(layer).items()}
    assert found == gptq.packed_specs(spec)
    assert all(tensor.is_contiguous() for tensor in gptq.pack(layer).values())


@pytest.mark.parametrize("bits", BITS)
def test_rows_beyond_one_piece_of_work_are_packed_too(bits: int) -> None:
    layer = make(bits, 544, 64, 32)
    assert read_codes(gptq.pack(layer)["qweight"], bits) == layer.codes.tolist()


def test_the_bytes_of_four_bits_are_the_golden_ones() -> None:
    codes = torch.arange(8, dtype=torch.uint8).expand(8, 8).contiguous()
    packed = gptq.pack(plain(codes, zeros=torch.tensor([[0, 1, 2, 7, 8, 9, 14, 15]], dtype=torch.uint8), bits=4))
    assert [word % 2**32 for word in packed["qweight"][0].tolist()] == [0x76543210] * 8
    assert [word % 2**32 for word in packed["qzeros"].flatten().tolist()] == [0xED87610F]


def test_the_bytes_of_three_bits_straddle_words_as_in_autogptq() -> None:
    """Word 1 holds codes 0 to 9 and two bits of code 10, word 2 ends with one bit of code 21."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[1, 21], codes[2, 31] = 0b111, 0b111, 0b101
    packed = gptq.pack(plain(codes, zeros=torch.full((1, 32), 1, dtype=torch.uint8), bits=3))
    words = [[word % 2**32 for word in row] for row in packed["qweight"].tolist()]
    assert [row[0] for row in words] == [0b11 << 30, 0b1, 0]
    assert [row[1] for row in words] == [0, 1 << 31, 0b11]
    assert [row[2] for row in words] == [0, 0, 0b101 << 29]
    assert packed["qzeros"].count_nonzero() == 0


def plain(codes: torch.Tensor, *, zeros: torch.Tensor, bits: int) -> GroupQuantized:
    out_features, in_features = codes.shape
    scales = torch.ones(1, out_features, dtype=torch.float16)
    g_idx = torch.zeros(in_features, dtype=torch.int32)
    return GroupQuantized(codes, scales, zeros, g_idx, bits, in_features, False, False)


def test_a_zero_point_of_0_wraps_and_comes_back() -> None:
    layer = plain(torch.zeros(8, 8, dtype=torch.uint8), zeros=torch.zeros(1, 8, dtype=torch.uint8), bits=4)
    packed = gptq.pack(layer)
    assert packed["qzeros"].tolist() == [[-1]]
    assert gptq.unpack(packed, bits=4, group_size=8, sym=False, desc_act=False).zeros.count_nonzero() == 0


@pytest.mark.parametrize(
    ("out_features", "in_features", "bits", "group_size", "words"),
    [
        (584, 568, 4, 568, None),
        (4672, 4544, 4, 64, None),
        (64, 64, 3, 32, None),
        (584, 568, 3, 568, "the inputs are a multiple of 32, not 568"),
        (584, 576, 3, 64, "the outputs are a multiple of 32, not 584"),
        (64, 36, 4, 36, "the inputs are a multiple of 8, not 36"),
        (24, 64, 2, 32, "the outputs are a multiple of 16, not 24"),
        (6, 64, 8, 32, "the outputs are a multiple of 4, not 6"),
        (64, 64, 4, 48, "group_size 48 does not divide 64 inputs"),
    ],
)
def test_shapes_that_cannot_be_packed_are_told_beforehand(
    out_features: int, in_features: int, bits: int, group_size: int, words: str | None
) -> None:
    reason = gptq.check_shape(out_features, in_features, bits, group_size)
    assert reason is None if words is None else words in str(reason)


def replaced(layer: GroupQuantized, **changes: Any) -> GroupQuantized:
    return GroupQuantized(**(vars(layer) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes": torch.full((32, 64), 8, dtype=torch.uint8)}, "above 7"),
        ({"codes": torch.zeros(32, 64, dtype=torch.int32)}, "dtype"),
        ({"zeros": torch.full((2, 32), 8, dtype=torch.uint8)}, "above 7"),
        ({"zeros": torch.zeros(32, 2, dtype=torch.uint8)}, "zeros"),
        ({"scales": torch.zeros(2, 32, dtype=torch.float16)}, "not positive and finite"),
        ({"scales": torch.full((2, 32), float("inf"), dtype=torch.float16)}, "not positive and finite"),
        ({"scales": torch.full((2, 32), float("nan"), dtype=torch.float16)}, "not positive and finite"),
        ({"scales": torch.ones(2, 32)}, "dtype"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "outside the 2 groups"),
        ({"g_idx": torch.zeros(64, dtype=torch.int64)}, "int32"),
        ({"sym": True}, "not symmetric"),
        ({"group_size": 24}, "does not divide"),
    ],
)
def test_content_that_would_be_packed_wrong_is_refused(changes: dict[str, object], words: str) -> None:
    layer = make(3, 32, 64, 32)
    with pytest.raises(QexportError, match=words):
        gptq.pack(replaced(layer, **changes))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"qzeros": None}, "missing"),
        ({"qweight": torch.zeros(7, 16, dtype=torch.int32)}, r"\[8, 16\]"),
        ({"qweight": torch.zeros(8, 16, dtype=torch.int64)}, "int64"),
        ({"qzeros": torch.zeros(4, dtype=torch.int32)}, "2 dimensions"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "outside the 2 groups"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "outside the 2 groups"),
        ({"g_idx": torch.zeros(60, dtype=torch.int32)}, "multiple of 8"),
    ],
)
def test_packed_tensors_that_do_not_fit_together_are_refused(fault: dict[str, torch.Tensor | None], words: str) -> None:
    tensors = gptq.pack(make(4, 16, 64, 32)) | fault
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InputError, match=words) as caught:
        gptq.unpack(present, bits=4, group_size=32, sym=False, desc_act=False, module="model.layers.0.mlp.up_proj")
    assert str(caught.value.where).startswith("model.layers.0.mlp.up_proj.")


def test_a_config_that_claims_other_groups_or_symmetry_is_refused() -> None:
    packed = gptq.pack(make(4, 16, 64, 32))
    with pytest.raises(InputError, match=r"expected .* found"):
        gptq.unpack(packed, bits=4, group_size=64, sym=False, desc_act=False)
    with pytest.raises(InputError, match="sym"):
        gptq.unpack(packed, bits=4, group_size=32, sym=True, desc_act=False)


@pytest.mark.parametrize("bits", BITS)
def test_a_flipped_bit_changes_exactly_one_code(bits: int) -> None:
    layer = make(bits, 32, 64, 32)
    packed = gptq.pack(layer)
    row, column = random.Random(bits).randrange(packed["qweight"].shape[0]), 5
    packed["qweight"][row, column] ^= 1 << 13
    again = gptq.unpack(packed, bits=bits, group_size=32, sym=False, desc_act=False)
    assert int((again.codes != layer.codes).sum()) == 1
    assert torch.equal(again.zeros, layer.zeros)
