"""How the parameters of a model are stored in safetensors files: one class for each format of tensors.

Bit layouts are in `qexport.packing`; here is which tensors, under which names, take a parameter's place.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qexport.errors import QexportError
from qexport.packing import bitsandbytes_4bit, compressed_tensors, gptq, llm_int8
from qexport.tensors import (
    BlockQuantized,
    BlockQuantizedSpec,
    GroupQuantized,
    GroupQuantizedSpec,
    OutputSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorRecord,
    TensorSpec,
)


class Encoding(Protocol):
    """One format of tensors. Two encodings of the same class are equal."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The tensors that will be stored for a parameter, by name."""
        ...

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The tensors of a parameter, by name, as `specs` has said."""
        ...

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why such a matrix cannot be stored, or None. Needs no weights."""
        ...


class Merged16:
    """The merged model's own tensors, also of what was quantized: for servers that quantize by themselves."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The parameter as it was merged."""
        if isinstance(spec, TensorSpec):
            return {name: spec}
        assert not isinstance(spec, GroupQuantizedSpec)
        return {name: TensorSpec(spec.shape[::-1] if spec.transposed else spec.shape, spec.dtype)}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The parameter as it was merged."""
        value = record.value if isinstance(record.value, torch.Tensor) else record.merged
        assert value is not None, f"{record.name} came without its merged weight"
        return {record.name: value}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Every matrix can be stored so."""
        return None


class AutoGptq:
    """AutoGPTQ v1: qweight, qzeros, scales, g_idx; see `qexport.packing.gptq`."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """Four tensors for a quantized weight."""
        if isinstance(spec, TensorSpec):
            return {name: spec}
        assert isinstance(spec, GroupQuantizedSpec)
        return {f"{_module(name)}.{part}": packed for part, packed in gptq.packed_specs(spec).items()}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """Four tensors for a quantized weight."""
        if isinstance(record.value, torch.Tensor):
            return {record.name: record.value}
        if not isinstance(record.value, GroupQuantized):
            raise _wrong_kind(record.name, record.value)
        return {f"{_module(record.name)}.{part}": tensor for part, tensor in gptq.pack(record.value).items()}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Codes must fill whole int32 words."""
        assert isinstance(spec, GroupQuantizedSpec)
        return gptq.check_shape(spec.out_features, spec.in_features, spec.bits, spec.group_size)


class CompressedTensors:
    """compressed-tensors: `int-quantized` rows, `pack-quantized` groups; see `qexport.packing.compressed_tensors`."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """Two tensors for rows; three or more for groups."""
        if isinstance(spec, TensorSpec):
            return {name: spec}
        if isinstance(spec, RowQuantizedSpec):
            parts = compressed_tensors.row_specs(spec)
        else:
            assert isinstance(spec, GroupQuantizedSpec)
            parts = compressed_tensors.group_specs(spec)
        return {f"{_module(name)}.{part}": stored for part, stored in parts.items()}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """Two tensors for rows; three or more for groups."""
        match record.value:
            case torch.Tensor() as dense:
                return {record.name: dense}
            case RowQuantized() as rows:
                parts = compressed_tensors.pack_rows(rows)
            case GroupQuantized() as groups:
                parts = compressed_tensors.pack_groups(groups)
            case other:
                raise _wrong_kind(record.name, other)
        return {f"{_module(record.name)}.{part}": tensor for part, tensor in parts.items()}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Codes in groups must fill whole int32 words."""
        return compressed_tensors.check_groups(spec) if isinstance(spec, GroupQuantizedSpec) else None


class Bitsandbytes:
    """bitsandbytes' tensors of 4 bits or LLM.int8; see `qexport.packing.bitsandbytes_4bit` and `.llm_int8`."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """Three to six tensors for a quantized weight."""
        match spec:
            case TensorSpec():
                return {name: spec}
            case BlockQuantizedSpec():
                packed = bitsandbytes_4bit.packed_specs(spec)
            case RowQuantizedSpec():
                packed = llm_int8.packed_specs(spec)
            case GroupQuantizedSpec():
                raise AssertionError(f"{name}: bitsandbytes has no groups")
        return {f"{_module(name)}.{part}": part_spec for part, part_spec in packed.items()}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """Three to six tensors for a quantized weight."""
        match record.value:
            case torch.Tensor():
                return {record.name: record.value}
            case BlockQuantized():
                packed = bitsandbytes_4bit.pack(record.value)
            case RowQuantized():
                packed = llm_int8.pack(record.value)
            case GroupQuantized():
                raise _wrong_kind(record.name, record.value)
        return {f"{_module(record.name)}.{part}": tensor for part, tensor in packed.items()}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Every matrix can be stored so."""
        return None


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _wrong_kind(name: str, value: Quantized) -> QexportError:
    return QexportError(f"{type(value).__name__} has reached a format that cannot hold it", where=name)
