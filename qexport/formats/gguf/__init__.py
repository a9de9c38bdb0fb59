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

_WIDE: Final = ("_norm.weight", "position_embd.weight")
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
        """A parameter's entry in the table."""
        if isinstance(spec, (GroupQuantizedSpec, RowQuantizedSpec)):
            return Entry(spec.shape, blocks.kind_of(spec))
        assert isinstance(spec, TensorSpec), f"{name} cannot be stored"
        return Entry(
            self.places.shape(name, spec.shape), Q8_0 if name in self.rounded else DTYPES[self._dtype(name, spec)]
        )

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The tensor in the file; of codes its bytes, uint8 [out, row_bytes]."""
        stored = self.places.names[name]
        if isinstance(spec, (GroupQuantizedSpec, RowQuantizedSpec)):
            return {stored: TensorSpec((spec.out_features, blocks.row_bytes(spec)), torch.uint8)}
        assert isinstance(spec, TensorSpec), f"{name} cannot be stored"
        if name in self.rounded:
            block, size = gguf.GGML_QUANT_SIZES[Q8_0]
            return {stored: TensorSpec((spec.shape[0], spec.shape[1] // block * size), torch.uint8)}
        return {stored: TensorSpec(self.places.shape(name, spec.shape), self._dtype(name, spec))}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The tensor in the file, with the shape and dtype of `specs`.

        Raises:
            QexportError: the codes are of a type that the format cannot hold.
        """
        name, value = record.name, record.value
        if isinstance(value, (GroupQuantized, RowQuantized)):
            return {self.places.names[name]: self.places.stored(name, blocks.pack(value))}
        if not isinstance(value, torch.Tensor):
            raise QexportError(f"{type(value).__name__} cannot be stored in GGUF", where=name)
        if name in self.rounded:
            return {self.places.names[name]: self.places.stored(name, blocks.rounded(value))}
        dtype = self._dtype(name, TensorSpec(tuple(value.shape), value.dtype))
        turned = self.places.turned(name, value)
        return {self.places.names[name]: self.places.stored(name, turned).to(dtype).contiguous()}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """Why this matrix cannot be stored value by value, or None if it can."""
        if isinstance(spec, (GroupQuantizedSpec, RowQuantizedSpec)):
            return blocks.fault(spec, inexact=self.inexact)
        return "GGUF has no type with these values: quantize with GPTQ"

    def _dtype(self, name: str, spec: TensorSpec) -> torch.dtype:
        stored = self.places.names[name]
        wide = len(spec.shape) <= 1 or stored.endswith(_WIDE) or not stored.endswith(".weight")
        return torch.float32 if wide else spec.dtype
