"""What a run will quantize and what it will leave unquantized, counted by type of layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qexport.amounts import size
from qexport.architectures.structure import Structure
from qexport.formats import Outputs
from qexport.tensors import OutputSpec, QuantizedSpec, TensorSpec

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class LayerType:
    """Parameters that stand at the same place of their blocks, and are stored in the same way.

    Attributes:
        name: inside a block, with an asterisk for numbers of experts: `self_attn.q_proj`; else the whole name.
        count: how many there are.
        shape: of each.
        stored: `4 bits, groups of 64`, or the dtype of what stays unquantized.
        bits: bits per code; None for what stays unquantized.
        parameters: of all together.
        total_bytes: of all together, in the method's own format.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    stored: str
    bits: int | None
    parameters: int
    total_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "type": self.name,
            "count": self.count,
            "shape": list(self.shape),
            "stored": self.stored,
            "bits": self.bits,
            "parameters": self.parameters,
            "bytes": self.total_bytes,
        }


def layer_types(outputs: Outputs, structure: Structure) -> list[LayerType]:
    """The types of a run's outputs, in the order of the files: quantized ones first."""
    found: dict[tuple[str, tuple[int, ...], str], LayerType] = {}
    for name, spec in outputs.specs.items():
        each = _type_of(name, spec, outputs, structure)
        key = (each.name, each.shape, each.stored)
        found[key] = _sum(found[key], each) if key in found else each
    return sorted(found.values(), key=lambda each: each.bits is None)


def type_lines(types: list[LayerType]) -> Iterator[str]:
    """The types as lines for the terminal."""
    names = max((len(each.name) for each in types), default=0)
    for each in types:
        shape = " x ".join(map(str, each.shape))
        yield f"{each.count:>5} {each.name:<{names}}  {shape}, {each.stored}, {size(each.total_bytes, decimals=1)}"


def _type_of(name: str, spec: OutputSpec, outputs: Outputs, structure: Structure) -> LayerType:
    total = sum(stored.nbytes for stored in outputs.format.specs(name, spec).values())
    kind = _NUMBER.sub("*", _inside_block(name.removesuffix(".weight"), structure))
    if isinstance(spec, TensorSpec):
        stored, bits = str(spec.dtype).removeprefix("torch."), None
    else:
        stored, bits = _described(spec), spec.bits
    return LayerType(kind, 1, tuple(spec.shape), stored, bits, math.prod(spec.shape), total)


def _described(spec: QuantizedSpec) -> str:
    shared = "a scale for each row" if spec.group_size == spec.shape[1] else f"groups of {spec.group_size}"
    return f"{spec.bits} bits, {shared}"


def _inside_block(name: str, structure: Structure) -> str:
    block = structure.block_of(name)
    return name if block is None else name.removeprefix(f"{block}.")


def _sum(one: LayerType, other: LayerType) -> LayerType:
    return replace(
        one,
        count=one.count + other.count,
        parameters=one.parameters + other.parameters,
        total_bytes=one.total_bytes + other.total_bytes,
    )
