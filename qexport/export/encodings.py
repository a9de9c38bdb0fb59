"""How the parameters of a model are stored in safetensors files: one class for each format of tensors.

Bit layouts are in `qexport.packing`; here is which tensors, under which names, take a parameter's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qexport.errors import QexportError
from qexport.packing import (
    bitsandbytes_4bit,
    compressed_tensors,
    gptq,
    llm_int8,
    matmul_bnb4,
    matmul_integer,
    matmul_nbits,
)
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
    """One format of tensors. Encodings are equal where they store the same bytes for the same record."""

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The tensors that will be stored for a parameter, by name."""
        ...

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The tensors of a parameter, by name, as `specs` has said."""
        ...

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why such a matrix cannot be stored, or None. Needs no weights."""
        ...


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class OnnxInitializers:
    """The initializers of an ONNX graph; see `qexport.packing.matmul_nbits`, `.matmul_bnb4` and `.matmul_integer`.

    Attributes:
        dtype: of the activations, float32 or float16, which the scales of groups are stored in. Rows and blocks keep
            float32 scales: their nodes compute in float32.
        int8_activations: rows are multiplied with int8 activations (W8A8), not dequantized (LLM.int8).
    """

    dtype: torch.dtype
    int8_activations: bool = False

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """Two to four initializers for a quantized weight."""
        match spec:
            case TensorSpec():
                return {name: spec}
            case GroupQuantizedSpec():
                packed = matmul_nbits.group_specs(spec, self.dtype)
            case BlockQuantizedSpec():
                packed = matmul_bnb4.specs(spec)
            case RowQuantizedSpec() if self.int8_activations:
                packed = matmul_integer.specs(spec)
            case RowQuantizedSpec():
                packed = matmul_nbits.row_specs(spec, torch.float32)
        return {f"{_module(name)}.{part}": part_spec for part, part_spec in packed.items()}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """Two to four initializers for a quantized weight."""
        match record.value:
            case torch.Tensor():
                return {record.name: record.value}
            case GroupQuantized():
                packed = matmul_nbits.pack_groups(record.value, self.dtype)
            case BlockQuantized():
                packed = matmul_bnb4.pack(record.value)
            case RowQuantized() if self.int8_activations:
                packed = matmul_integer.pack(record.value)
            case RowQuantized():
                packed = matmul_nbits.pack_rows(record.value, torch.float32)
        return {f"{_module(record.name)}.{part}": tensor for part, tensor in packed.items()}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Blocks must be those that the operators of ONNX Runtime have."""
        if isinstance(spec, BlockQuantizedSpec):
            return matmul_bnb4.fault(spec)
        if isinstance(spec, RowQuantizedSpec) and self.int8_activations:
            return matmul_integer.fault(spec)
        return matmul_nbits.fault(spec)


@dataclass(frozen=True)
class LeftOut:
    """Another encoding without some of its tensors, which lie elsewhere.

    Attributes:
        encoding: the other.
        names: the tensors.
    """

    encoding: Encoding
    names: frozenset[str]

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """What is left of a parameter; perhaps nothing."""
        return {part: stored for part, stored in self.encoding.specs(name, spec).items() if part not in self.names}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """What is left of a parameter; perhaps nothing."""
        return {part: tensor for part, tensor in self.encoding.tensors(record).items() if part not in self.names}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """The other's."""
        return self.encoding.fault(spec)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _wrong_kind(name: str, value: Quantized) -> QexportError:
    return QexportError(f"{type(value).__name__} has reached a format that cannot hold it", where=name)
