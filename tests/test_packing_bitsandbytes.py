"""bitsandbytes is the oracle for names, bytes and values."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import (
    create_dynamic_map,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_4bit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsandbytes_oracle import own_values, reads_right, values
from qexport.errors import InputError
from qexport.formats.bitsandbytes import four_bit_tensors as bitsandbytes_4bit
from qexport.formats.bitsandbytes import llm_int8
from qexport.formats.bitsandbytes.four_bit_tensors import QuantType, dynamic_values, four_bit_values
from qexport.tensors import BlockQuantizedSpec, RowQuantizedSpec, TensorSpec


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also the sign of a zero."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


STATE = "weight.quant_state.bitsandbytes__nf4"


def stored_by_bitsandbytes(weight: torch.Tensor, spec: BlockQuantizedSpec) -> tuple[dict[str, torch.Tensor], Any]:
    codes, state = quantize_4bit(
        weight, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type=spec.quant_type
    )
    return {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}, state


def example(double_quant: bool = True, quant_type: QuantType = "nf4") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    spec = BlockQuantizedSpec(48, 32, quant_type, 64, double_quant, torch.bfloat16)
    return stored_by_bitsandbytes(torch.randn(spec.shape, dtype=spec.dtype), spec)[0]


def test_the_code_books_are_those_of_bitsandbytes() -> None:
    for quant_type in ("nf4", "fp4"):
        assert same_bits(four_bit_values(quant_type), get_4bit_type(quant_type, device="cpu"))
    assert same_bits(dynamic_values(), create_dynamic_map())


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([64, 128]),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 2**32),
)
def test_tensors_and_values_are_those_of_bitsandbytes(
    rows: int, columns: int, quant_type: QuantType, block_size: int, double_quant: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = BlockQuantizedSpec(rows, columns, quant_type, block_size, double_quant, dtype)
    weight = torch.randn(spec.shape, generator=generator).mul_(0.1).to(dtype)
    stored, state = stored_by_bitsandbytes(weight, spec)
    quantized = bitsandbytes_4bit.unpack(stored)
    assert quantized.spec == spec
    again = bitsandbytes_4bit.pack(quantized)
    assert again.keys() == stored.keys()
    assert all(same_bits(again[name], stored[name]) for name in stored)
    planned = bitsandbytes_4bit.packed_specs(spec)
    assert all(planned[name].admits(TensorSpec(tuple(part.shape), part.dtype)) for name, part in stored.items())
    assert torch.equal(bitsandbytes_4bit.dequantize(quantized), values(stored["weight"], state))
    if reads_right(spec.shape, block_size):
        assert torch.equal(bitsandbytes_4bit.dequantize(quantized), own_values(stored["weight"], state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [32, 64, 128, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(1, 48), (2, 16), (3, 24), (5, 48), (40, 64), (6, 576), (3, 896), (2, 4160)])
def test_bitsandbytes_reads_right_just_where_the_oracle_says(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    """Every block has another absmax, so that a wrong one is seen."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten()
    for index, block in enumerate(weight.split(block_size)):
        block.mul_((index + 2) / block.abs().max())
    codes, state = quantize_4bit(weight.view(shape).to(dtype), blocksize=block_size, quant_type="nf4")
    right = torch.equal(own_values(codes, state), values(codes, state))
    assert right == reads_right(shape, block_size)


def test_values_of_more_than_one_piece_are_those_of_bitsandbytes() -> None:
    spec = BlockQuantizedSpec(1100, 1001, "nf4", 64, True, torch.bfloat16)
    stored, state = stored_by_bitsandbytes(torch.randn(spec.shape, dtype=spec.dtype), spec)
    found = bitsandbytes_4bit.dequantize(bitsandbytes_4bit.unpack(stored))
    assert torch.equal(found, values(stored["weight"], state))
    assert reads_right(spec.shape, spec.block_size)
    assert torch.equal(found, own_values(stored["weight"], state))


def change_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (lambda tensors: tensors.pop("weight"), "weight"),
        (lambda tensors: tensors.pop("weight.absmax"), "weight.absmax"),
        (lambda tensors: tensors.pop("weight.nested_absmax"), "weight.nested_absmax"),
        (lambda tensors: tensors.pop(STATE), "quant_state"),
        (lambda tensors: tensors.update({"weight.extra": torch.ones(1)}), "weight.extra"),
        (lambda tensors: tensors.update({STATE.replace("nf4", "fp4"): tensors[STATE]}), "quant_state"),
        (lambda tensors: tensors.update({STATE.replace("nf4", "fp4"): tensors.pop(STATE)}), "fp4"),
        (lambda tensors: tensors.update({"weight": tensors["weight"][1:]}), "weight"),
        (lambda tensors: tensors.update({"weight.absmax": tensors["weight.absmax"].float()}), "absmax"),
        (lambda tensors: tensors.update({"weight.quant_map": torch.linspace(-1, 1, 16)}), "quant_map"),
        (lambda tensors: tensors.update({"weight.nested_quant_map": torch.zeros(256)}), "nested_quant_map"),
        (lambda tensors: tensors.update({STATE: tensors[STATE][1:]}), "quant_state"),
        (lambda tensors: tensors.update({STATE: tensors[STATE].float()}), "quant_state"),
        (change_state(shape=[48]), "quant_state"),
        (change_state(shape=[48, 33]), "weight"),
        (change_state(shape=[-48, -32]), "quant_state"),
        (change_state(blocksize=48), "quant_state"),
        (change_state(blocksize=[]), "quant_state"),
        (change_state(dtype="int8"), "quant_state"),
        (change_state(dtype=["bfloat16"]), "quant_state"),
        (change_state(nested_offset=None), "quant_state"),
        (change_state(nested_offset=float("nan")), "quant_state"),
        (change_state(nested_blocksize=64), "quant_state"),
        (change_state(extra=1), "quant_state"),
    ],
)
def test_a_planted_fault_is_found(plant: Callable[[dict[str, torch.Tensor]], object], where: str) -> None:
    tensors = example()
    plant(tensors)
    with pytest.raises(InputError) as caught:
        bitsandbytes_4bit.unpack(tensors, module="model.up_proj")
    assert where in str(caught.value.where)
    assert "model.up_proj" in str(caught.value.where)


def int8_example() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    codes, absmax, _ = int8_vectorwise_quant(torch.randn(6, 8).half())
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def test_int8_tensors_come_back_as_they_were() -> None:
    tensors = int8_example()
    again = llm_int8.pack(llm_int8.unpack(tensors))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    planned = llm_int8.packed_specs(RowQuantizedSpec(6, 8, torch.bfloat16))
    assert {name: (spec.shape, spec.dtype) for name, spec in planned.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in again.items()
    }


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (lambda tensors: tensors.pop("weight"), "weight"),
        (lambda tensors: tensors.pop("SCB"), "SCB"),
        (lambda tensors: tensors.pop("weight_format"), "weight_format"),
        (lambda tensors: tensors.update({"SCB": tensors["SCB"][1:]}), "SCB"),
        (lambda tensors: tensors.update({"SCB": tensors["SCB"].half()}), "SCB"),
        (lambda tensors: tensors.update({"weight": tensors["weight"].float()}), "weight"),
        (lambda tensors: tensors.update({"weight": tensors["weight"][0]}), "weight"),
        (lambda tensors: tensors.update({"weight_format": torch.tensor(1, dtype=torch.uint8)}), "weight_format"),
        (lambda tensors: tensors.update({"extra": torch.ones(1)}), "extra"),
    ],
)
def test_a_planted_fault_in_int8_tensors_is_found(
    plant: Callable[[dict[str, torch.Tensor]], object], where: str
) -> None:
    tensors = int8_example()
    plant(tensors)
    with pytest.raises(InputError) as caught:
        llm_int8.unpack(tensors, module="model.up_proj")
    assert where in str(caught.value.where)
