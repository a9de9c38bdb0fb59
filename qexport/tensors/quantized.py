"""Quantized weights as codes with their scales, unpacked. Only layouts pack them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from qexport.records import LayerRecord
from qexport.tensors.float4 import Float4Quantized, Float4QuantizedSpec
from qexport.tensors.float8 import Float8Quantized, Float8QuantizedSpec
from qexport.tensors.source import TensorSpec


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix quantized in groups along its inputs.

    The value of output o and input i is `(codes[o, i] - zeros[g_idx[i], o]) * scales[g_idx[i], o]`.

    Attributes:
        codes: uint8 [out, in], each in 0 .. 2**bits - 1.
        scales: float16 [groups, out], positive; of folders that other programs made perhaps bfloat16 or float32.
        zeros: uint8 [groups, out], true zero points (no format's offset subtracted).
        g_idx: int32 [in], the group of each input.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; all inputs if there is one group.
        sym: every zero point is 2**(bits - 1).
        desc_act: the groups follow activation order, so g_idx is not i // group_size.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @property
    def spec(self) -> GroupQuantizedSpec:
        """What is known before the codes are computed."""
        rows, columns = self.codes.shape
        return GroupQuantizedSpec(rows, columns, self.bits, self.group_size, self.sym, self.desc_act)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once to `dtype`."""
        codes, zeros, scales = (each.to(torch.float32) for each in (self.codes, self.zeros.t(), self.scales.t()))
        if self.in_order:
            groups = codes.view(len(codes), -1, self.group_size)  # broadcasting takes a fraction of indexing's time
            return groups.sub_(zeros[:, :, None]).mul_(scales[:, :, None]).flatten(1).to(dtype)
        group = self.g_idx.long()
        return codes.sub_(zeros[:, group]).mul_(scales[:, group]).to(dtype)

    @property
    def in_order(self) -> bool:
        """Whether g_idx is i // group_size, whatever `desc_act` says."""
        inputs = torch.arange(len(self.g_idx), dtype=self.g_idx.dtype, device=self.g_idx.device)
        return len(inputs) % self.group_size == 0 and torch.equal(self.g_idx, inputs // self.group_size)

    def rows(self, start: int, end: int) -> GroupQuantized:
        """The outputs from `start` up to `end`."""
        part = slice(start, end)
        return replace(self, codes=self.codes[part], scales=self.scales[:, part], zeros=self.zeros[:, part])

    @classmethod
    def joined(cls, parts: Sequence[GroupQuantized]) -> GroupQuantized:
        """The outputs of all parts, in their order. The parts differ in nothing else."""
        if len(parts) == 1:
            return parts[0]
        codes = torch.cat([part.codes for part in parts])
        scales, zeros = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("scales", "zeros"))
        return replace(parts[0], codes=codes, scales=scales, zeros=zeros)

    def cpu(self) -> GroupQuantized:
        """The same on the CPU, in contiguous storage."""
        parts = {name: getattr(self, name).cpu().contiguous() for name in ("codes", "scales", "zeros", "g_idx")}
        return replace(self, **parts)


@dataclass(frozen=True)
class GroupQuantizedSpec:
    """What is known of a `GroupQuantized` before it is computed.

    Attributes:
        out_features: rows of the matrix.
        in_features: columns of the matrix, a multiple of group_size.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; all inputs if there is one group.
        sym: every zero point is 2**(bits - 1).
        desc_act: the groups follow activation order.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @property
    def groups(self) -> int:
        """Groups along the inputs."""
        return self.in_features // self.group_size

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features


@dataclass(frozen=True)
class NestedAbsmax:
    """The second level of double quantization: the absmaxes minus their mean, as codes in blocks of 256.

    Attributes:
        absmax: float32 [ceil(blocks / 256)].
        offset: the mean that was subtracted from the absmaxes.
    """

    absmax: torch.Tensor
    offset: float


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix in one of bitsandbytes' 4-bit code books, in blocks of its values, row after row.

    Attributes:
        codes: uint8 [ceil(out * in / 2)], two codes per byte, the earlier value in the high bits.
        absmax: float32 [blocks], or uint8 [blocks] if `nested` is given.
        nested: what decodes the absmaxes, with double quantization.
        spec: shape, code book and block size.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    nested: NestedAbsmax | None
    spec: BlockQuantizedSpec


@dataclass(frozen=True)
class BlockQuantizedSpec:
    """What is known of a `BlockQuantized` before it is computed.

    Attributes:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        quant_type: the code book.
        block_size: values that share an absmax; the last block may be shorter.
        double_quant: the absmaxes are quantized too.
        dtype: of the matrix that was quantized, which it is dequantized to.
        transposed: the merged weight was [in, out] (GPT-2's Conv1D).
    """

    out_features: int
    in_features: int
    quant_type: Literal["nf4", "fp4"]
    block_size: int
    double_quant: bool
    dtype: torch.dtype
    transposed: bool = False

    bits: ClassVar[int] = 4

    @property
    def group_size(self) -> int:
        """Values that share a scale."""
        return self.block_size

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features


@dataclass(frozen=True)
class RowQuantized:
    """A matrix as symmetric int8 codes with one scale per row: LLM.int8, or the weights of W8A8.

    The value of output o and input i is `codes[o, i] * absmax[o] / 127`.

    Attributes:
        codes: int8 [out, in], in -127 .. 127; -128 only in folders that other programs made.
        absmax: float32 [out], the largest magnitude of each row.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    @property
    def scales(self) -> torch.Tensor:
        """float32 [out]: what a code is multiplied by."""
        return self.absmax / 127

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once to `dtype`."""
        return (self.codes.to(torch.float32) * self.scales[:, None]).to(dtype)

    def rows(self, start: int, end: int) -> RowQuantized:
        """The outputs from `start` up to `end`."""
        return RowQuantized(self.codes[start:end], self.absmax[start:end])


@dataclass(frozen=True)
class RowQuantizedSpec:
    """What is known of a `RowQuantized` before it is computed.

    Attributes:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        dtype: of the matrix that was quantized.
        transposed: the merged weight was [in, out] (GPT-2's Conv1D).
        scale_dtype: what the scales fit into without another rounding, float32 or float16.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    transposed: bool = False
    scale_dtype: torch.dtype = torch.float32

    bits: ClassVar[int] = 8

    @property
    def group_size(self) -> int:
        """Values that share a scale: a row."""
        return self.in_features

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features


@dataclass(frozen=True)
class ValuesQuantized:
    """A quantized matrix of which the values alone are known: those of a type of GGUF that qexport does not write.

    Attributes:
        values: float32 [out, in].
        bits: of a code.
        block_size: values along the inputs that share a scale, as far as a comparison needs it.
    """

    values: torch.Tensor
    bits: int
    block_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], rounded to `dtype`."""
        return self.values.to(dtype)

    def rows(self, start: int, end: int) -> ValuesQuantized:
        """The outputs from `start` up to `end`."""
        return replace(self, values=self.values[start:end])


Quantized = GroupQuantized | BlockQuantized | RowQuantized | Float8Quantized | Float4Quantized | ValuesQuantized
QuantizedSpec = GroupQuantizedSpec | BlockQuantizedSpec | RowQuantizedSpec | Float8QuantizedSpec | Float4QuantizedSpec
OutputSpec = TensorSpec | QuantizedSpec
"""What the pass produces for one parameter."""


@dataclass(frozen=True)
class TensorRecord:
    """One named tensor on its way to the layouts.

    Attributes:
        name: the parameter's name, for example `model.layers.0.self_attn.q_proj.weight`.
        value: the tensor as it is, or quantized.
        layer: the record of its quantization, if it was quantized.
        merged: the tensor before it was quantized, for layouts whose servers quantize it themselves; given by the
            methods whose codes no server reads.
    """

    name: str
    value: torch.Tensor | Quantized
    layer: LayerRecord | None = None
    merged: torch.Tensor | None = None
