"""Quantized weights as codes with their scales, unpacked. Only layouts pack them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix quantized in groups along its inputs.

    The value of output o and input i is `(codes[o, i] - zeros[g_idx[i], o]) * scales[g_idx[i], o]`.

    Attributes:
        codes: uint8 [out, in], each in 0 .. 2**bits - 1.
        scales: float16 [groups, out], positive.
        zeros: uint8 [groups, out], true zero points (no format's offset subtracted).
        g_idx: int32 [in], the group of each input.
        bits: 2, 3, 4 or 8.
        group_size: inputs in a group; the number of inputs where there is one group.
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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once to `dtype`."""
        group = self.g_idx.long()
        codes = self.codes.to(torch.float32)
        zeros = self.zeros.t().to(torch.float32)[:, group]
        scales = self.scales.t().to(torch.float32)[:, group]
        return ((codes - zeros) * scales).to(dtype)

    def rows(self, start: int, end: int) -> GroupQuantized:
        """The outputs from `start` up to `end`."""
        part = slice(start, end)
        return replace(self, codes=self.codes[part], scales=self.scales[:, part], zeros=self.zeros[:, part])

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
        group_size: inputs in a group; the number of inputs where there is one group.
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


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one layer did.

    Attributes:
        name: the module's path.
        method: how the codes were found.
        loss: mean squared error of the layer's outputs on the calibration tokens, relative to the mean square
            of the outputs; None where that ratio does not exist.
        rtn_loss: the same for plain round-to-nearest with the same bits and groups.
        damp_percent: the damping that the factorization used, as a fraction of the mean of the Hessian's diagonal.
        tokens: calibration tokens that the layer saw.
        dead_columns: inputs that were zero for every token.
    """

    name: str
    method: Literal["gptq", "round_to_nearest"]
    loss: float | None
    rtn_loss: float | None
    damp_percent: float
    tokens: int
    dead_columns: int


@dataclass(frozen=True)
class TensorRecord:
    """One named tensor on its way to the layouts.

    Attributes:
        name: the parameter's name, for example `model.layers.0.self_attn.q_proj.weight`.
        value: the tensor as it is, or quantized.
        report: what quantizing it did, where it was quantized.
    """

    name: str
    value: torch.Tensor | GroupQuantized
    report: LayerReport | None = None
