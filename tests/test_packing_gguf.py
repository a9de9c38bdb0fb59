"""Q4_0 and Q8_0 against the gguf package and against an unpacker with loops."""

from __future__ import annotations

import struct
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import QexportError
from qexport.formats.gguf import blocks
from qexport.formats.gguf.families import rotary_pairs
from qexport.quantizing.row_int8 import llm_int8, w8a8
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, RowQuantized, RowQuantizedSpec


def codes(rows: int, columns: int, bits: int, group_size: int, seed: int) -> GroupQuantized:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    return GroupQuantized(
        codes=torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(groups, rows, generator=generator) * 2.0 ** torch.randint(-14, 3, (groups, rows))).half(),
        zeros=torch.full((groups, rows), 1 << bits - 1, dtype=torch.uint8),
        g_idx=torch.arange(columns, dtype=torch.int32) // group_size,
        bits=bits,
        group_size=group_size,
        sym=True,
        desc_act=False,
    )


def slowly_unpacked(packed: bytes, columns: int, bits: int) -> list[float]:
    """One row, by the definition in ggml-quants.c, value by value."""
    size = 34 if bits == 8 else 18
    values: list[float] = []
    for start in range(0, columns // 32 * size, size):
        block = packed[start : start + size]
        (scale,) = struct.unpack("<e", block[:2])
        for place in range(32):
            if bits == 8:
                code = struct.unpack("<b", block[2 + place : 3 + place])[0]
            else:
                byte = block[2 + place % 16]
                code = (byte & 15 if place < 16 else byte >> 4) - 8
            values.append(scale * code)
    return values


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    wide=st.integers(1, 3),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_the_codes(rows: int, groups: int, wide: int, bits: int, seed: int) -> None:
    value = codes(rows, groups * wide * 32, bits, wide * 32, seed)
    packed, exact = blocks.pack(value), value.dequantize()
    assert packed.shape == (rows, blocks.row_bytes(value.spec))
    assert np.array_equal(gguf.dequantize(packed.numpy(), blocks.KINDS[bits]), exact.numpy())
    for row in range(rows):
        assert slowly_unpacked(packed[row].numpy().tobytes(), exact.shape[1], bits) == exact[row].tolist()
    found = blocks.unpack(packed, bits)
    assert found.bits == bits
    assert torch.equal(found.codes, value.codes)
    assert torch.equal(found.dequantize(), exact)
    assert torch.equal(blocks.pack(found), packed)


@pytest.mark.parametrize("rounding", [w8a8, llm_int8])
def test_rows_of_codes_are_blocks_with_equal_scales(rounding: Callable[..., RowQuantized]) -> None:
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)) * 0.02
    value = rounding(weight, torch.float16)
    packed = blocks.pack(value)
    assert np.array_equal(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q8_0), value.dequantize().numpy())
    assert torch.equal(blocks.unpack(packed, 8).dequantize(), value.dequantize())
    with pytest.raises(QexportError, match="does not fit into float16"):
        blocks.pack(rounding(weight))


@given(content=st.binary(min_size=34 * 2, max_size=34 * 2), bits=st.sampled_from([4, 8]))
@settings(max_examples=40, deadline=None)
def test_any_bytes_are_read_as_the_package_reads_them(content: bytes, bits: int) -> None:
    size = blocks.block_bytes(bits)
    rows = np.frombuffer(content, dtype=np.uint8)[: 68 // size * size].reshape(1, -1)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(rows, blocks.KINDS[bits])
    assert np.array_equal(
        blocks.unpack(torch.from_numpy(rows.copy()), bits).dequantize().numpy(), wanted, equal_nan=True
    )


@pytest.mark.parametrize(
    ("lowest", "highest", "bits"), [(6, 9, 2), (5, 9, 3), (6, 10, 3), (4, 11, 3), (3, 8, 4), (8, 12, 4)]
)
def test_codes_need_as_many_bits_as_their_range(lowest: int, highest: int, bits: int) -> None:
    """One step outside of the range of fewer bits takes one bit more, and no value changes."""
    value = codes(2, 64, 4, 32, 1)
    value.codes.clamp_(lowest, highest)
    value.codes[0, 0], value.codes[1, 63] = lowest, highest
    packed = blocks.pack(value)
    assert blocks.needed_bits(value.codes) == bits
    found = blocks.unpack(packed, 2)
    assert (found.bits, found.sym) == (bits, True)
    assert torch.equal(found.dequantize(), value.dequantize())
    assert torch.equal(blocks.pack(found), packed)


FAULTS: dict[str, tuple[GroupQuantizedSpec | RowQuantizedSpec, str]] = {
    "3 bits": (GroupQuantizedSpec(64, 64, 3, 32, sym=False, desc_act=False), "no type for 3 bits with zero points"),
    "5 bits": (GroupQuantizedSpec(64, 64, 5, 32, sym=True, desc_act=False), "no type for 5 bits"),
    "zero points": (GroupQuantizedSpec(64, 64, 4, 32, sym=False, desc_act=False), "set sym: true"),
    "act-order": (GroupQuantizedSpec(64, 64, 4, 32, sym=True, desc_act=True), "no order of columns"),
    "rows": (RowQuantizedSpec(64, 64, torch.bfloat16), "set scales: float16"),
    "rows of 40": (RowQuantizedSpec(64, 40, torch.bfloat16, scale_dtype=torch.float16), "40 inputs are no multiple"),
    "group 16": (GroupQuantizedSpec(64, 64, 4, 16, sym=True, desc_act=False), "group_size of 16"),
    "rows of 48": (GroupQuantizedSpec(64, 48, 4, 48, sym=True, desc_act=False), "group_size of 48"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_has_no_exact_type_is_named(fault: str) -> None:
    spec, words = FAULTS[fault]
    assert words in (blocks.fault(spec) or "")
    assert blocks.fault(GroupQuantizedSpec(64, 64, 4, 64, sym=True, desc_act=False)) is None


def test_pairs_are_beside_each_other_in_the_order_of_the_rotary_embedding() -> None:
    assert rotary_pairs(2, 12).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
