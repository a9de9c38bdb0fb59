"""A model's parameters as one GGUF file holds them, written; read back by `qexport.reading.gguf_weights`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import gguf
import torch
from gguf import GGMLQuantizationType

from qexport.errors import QexportError
from qexport.formats.gguf import blocks
from qexport.formats.gguf.families import Places
from qexport.tensors import (
    GroupQuantized,
    GroupQuantizedSpec,
    OutputSpec,
    QuantizedSpec,
    RowQuantized,
    RowQuantizedSpec,
    TensorRecord,
    TensorSpec,
)

DTYPES: Final = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
"""How unquantized tensors are stored."""

_WIDE: Final = ("_norm.weight", "position_embd.weight", "ffn_gate_inp.weight")
"""The ends of names of tensors that llama.cpp has in float32, whatever their shape."""

Q8_0: Final = GGMLQuantizationType.Q8_0


@dataclass(frozen=True)
class Entry:
    """One tensor in the table of a file.

    Attributes:
        shape: in torch's order, slowest dimension first.
        kind: how the values are stored.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        count = 1
        for each in self.shape:
            count *= each
        return int(count // block * size)


@dataclass(frozen=True)
class GgufFormat:
    """Codes in blocks of Q4_0 or Q8_0, matrices that stay unquantized at 16 bits, vectors in float32.

    llama.cpp has no kernels for norms and biases in 16 bits. All values are those that other layouts hold.

    Attributes:
        places: where parameters are in the file.
        rounded: matrices that stay unquantized in other layouts, and are rounded to Q8_0 here.
        inexact: whether asymmetric codes are stored, with minima rounded to float16.
    """

    places: Places
    rounded: frozenset[str] = frozenset()
    inexact: bool = False

    def entry(self, name: str, spec: OutputSpec) -> Entry:
        """The entry in the table of the tensor that a parameter is, or is one expert's part of."""
        count = self.places.stacks.get(self.places.names[name])
        shape, kind = self._stored_as(name, spec)
        return Entry(shape if count is None else (count, *shape), kind)

    def _stored_as(self, name: str, spec: OutputSpec) -> tuple[tuple[int, ...], GGMLQuantizationType]:
        """The shape in the file, of an expert's part without the dimension of experts, and how values are stored."""
        if isinstance(spec, (GroupQuantizedSpec, RowQuantizedSpec)):
            return spec.shape, blocks.kind_of(spec)
        assert isinstance(spec, TensorSpec), f"{name} cannot be stored"
        kind = Q8_0 if name in self.rounded else DTYPES[self._dtype(name, spec)]
        return self.places.shape(name, spec.shape), kind

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """What a parameter is in the file, by `Places.part`; of codes their bytes, uint8 [out, row_bytes]."""
        stored = self.places.part(name)
        if isinstance(spec, (GroupQuantizedSpec, RowQuantizedSpec)):
            return {stored: TensorSpec((spec.out_features, blocks.row_bytes(spec)), torch.uint8)}
        assert isinstance(spec, TensorSpec), f"{name} cannot be stored"
        if name in self.rounded:
            block, size = gguf.GGML_QUANT_SIZES[Q8_0]
            return {stored: TensorSpec((spec.shape[0], spec.shape[1] // block * size), torch.uint8)}
        return {stored: TensorSpec(self.places.shape(name, spec.shape), self._dtype(name, spec))}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """What a parameter is in the file, with the shape and dtype of `specs`.

        Raises:
            QexportError: the codes are of a type that the format cannot hold.
        """
        name, value = record.name, record.value
        part = self.places.part(name)
        if isinstance(value, (GroupQuantized, RowQuantized)):
            return {part: self.places.stored(name, blocks.pack(value))}
        if not isinstance(value, torch.Tensor):
            raise QexportError(f"{type(value).__name__} cannot be stored in GGUF", where=name)
        if name in self.rounded:
            return {part: self.places.stored(name, blocks.rounded(value))}
        dtype = self._dtype(name, TensorSpec(tuple(value.shape), value.dtype))
        turned = self.places.turned(name, value)
        return {part: self.places.stored(name, turned).to(dtype).contiguous()}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why this matrix cannot be stored value by value, or None if it can."""
        if isinstance(spec, (GroupQuantizedSpec, RowQuantizedSpec)):
            return blocks.fault(spec, inexact=self.inexact)
        return "GGUF has no type with these values: quantize with GPTQ"

    def _dtype(self, name: str, spec: TensorSpec) -> torch.dtype:
        stored = self.places.names[name]
        wide = len(spec.shape) <= 1 or stored.endswith(_WIDE) or not stored.endswith(".weight")
        return torch.float32 if wide else spec.dtype
