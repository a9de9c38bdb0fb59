"""The tensors of a linear in e2m1, as compressed-tensors names them.

The reference is compressed-tensors 0.20.1 (`compressors/nvfp4`, `compressors/mxfp4`), whose formats vLLM and
transformers read: two codes fill a byte, that of the earlier input in its low bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from qexport.errors import InputError
from qexport.formats.stored_weight import Scheme, StoredLayer, Tensors, check_specs, place, scheme_of
from qexport.tensors import Float4Quantized, Float4QuantizedSpec, TensorSpec
from qexport.tensors.float4 import GROUP_SIZES, LARGEST_EXPONENT, Float4Kind

CODES: Final = "weight_packed"
_SCALE: Final = "weight_scale"
GLOBAL_SCALE: Final = "weight_global_scale"

_LOW: Final = 15
_BITS: Final = 4


def specs(spec: Float4QuantizedSpec) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack`, by their names inside the module."""
    rows, columns = spec.shape
    nvfp4 = spec.kind == "nvfp4"
    scales = TensorSpec((rows, columns // spec.group_size), torch.float8_e4m3fn if nvfp4 else torch.uint8)
    shared = {GLOBAL_SCALE: TensorSpec((1,), torch.float32)} if nvfp4 else {}
    return {CODES: TensorSpec((rows, columns // 2), torch.uint8), _SCALE: scales} | shared


def pack(quantized: Float4Quantized) -> dict[str, torch.Tensor]:
    """The tensors of a linear.

    Returns:
        weight_packed uint8 [out, in / 2]; weight_scale float8_e4m3fn [out, in / 16] and weight_global_scale float32 [1]
        for NVFP4, weight_scale uint8 [out, in / 32] for MXFP4.
    """
    packed = quantized.codes[:, 0::2] | quantized.codes[:, 1::2] << _BITS
    tensors = {CODES: packed, _SCALE: quantized.scales.contiguous()}
    return tensors if quantized.global_scale is None else tensors | {GLOBAL_SCALE: quantized.global_scale}


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes [out, in] in `weight_packed`."""
    return torch.stack((packed & _LOW, packed >> _BITS), 2).flatten(1)


def parts(kind: Float4Kind) -> tuple[str, ...]:
    """The names of the tensors inside the module."""
    return (CODES, _SCALE, GLOBAL_SCALE) if kind == "nvfp4" else (CODES, _SCALE)


@dataclass(frozen=True)
class Float4Weight:
    """One module's packed codes in e2m1, and their scales.

    Attributes:
        module: its path.
        shape: [out, in].
        scheme: how to read the codes; None if the module is unquantized according to the config.
        kind: which scales it has.
    """

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    kind: Float4Kind

    grid = None

    @classmethod
    def found(
        cls, module: str, specs: Mapping[str, TensorSpec], scheme: Scheme | None, kind: Float4Kind
    ) -> Float4Weight:
        """The weight whose tensors have these specs.

        Raises:
            InputError: the codes are not a matrix of bytes that holds whole groups.
        """
        codes, size = specs[f"{module}.{CODES}"], GROUP_SIZES[kind]
        if len(codes.shape) != 2 or codes.dtype != torch.uint8 or codes.shape[1] % (size // 2):
            raise InputError(
                f"{codes.dtype} {list(codes.shape)} is not a matrix of packed codes in groups of {size}",
                where=f"{module}.{CODES}",
            )
        rows, columns = codes.shape
        return cls(module, (rows, 2 * columns), scheme, kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight.parts`."""
        return parts(self.kind)

    @property
    def layer(self) -> StoredLayer:
        """See `StoredWeight.layer`."""
        return StoredLayer(self.kind, 4, GROUP_SIZES[self.kind], self.shape, scheme_of(self).input_rounding)

    def quantized(self, tensors: Tensors) -> Float4Quantized:
        """See `StoredWeight.quantized`."""
        assert self.layer
        check_specs(tensors, specs(Float4QuantizedSpec(*self.shape, self.kind)), self.module)
        if reason := _fault(tensors, self.kind):
            raise InputError(reason[1], where=place(self.module, reason[0]))
        return Float4Quantized(unpack(tensors[CODES]), tensors[_SCALE], tensors.get(GLOBAL_SCALE))


def _fault(tensors: Tensors, kind: Float4Kind) -> tuple[str, str] | None:
    """A tensor with a value out of range, and why."""
    scales = tensors[_SCALE]
    if kind == "mxfp4":
        return (_SCALE, "a scale above 2 ** 125 gives infinite weights") if scales.max() > LARGEST_EXPONENT else None
    if bool((scales.to(torch.float32) < 0).any()):
        return _SCALE, "a scale is negative"
    shared = tensors[GLOBAL_SCALE]
    return None if bool((shared > 0) & shared.isfinite()) else (GLOBAL_SCALE, "the scale is not a positive number")
