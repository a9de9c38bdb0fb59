"""The tensors of a linear in e4m3, which every format names alike but for the scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qexport.errors import InputError
from qexport.formats.stored_weight import Scheme, StoredLayer, Tensors, check_specs, place, scheme_of, widened
from qexport.tensors import Float8Quantized, Float8QuantizedSpec, TensorSpec
from qexport.tensors.float8 import Block


def specs(spec: Float8QuantizedSpec, scale: str) -> dict[str, TensorSpec]:
    """The shapes and dtypes of the tensors of `pack`, by their names inside the module.

    Args:
        spec: the matrix.
        scale: the name of the scales.
    """
    return {
        "weight": TensorSpec(spec.shape, torch.float8_e4m3fn),
        scale: TensorSpec(spec.scales_shape, torch.float32),
    }


def pack(quantized: Float8Quantized, scale: str) -> dict[str, torch.Tensor]:
    """The tensors of a linear: float8_e4m3fn [out, in], and float32 scales as `Float8Quantized` has them."""
    return {"weight": quantized.codes.contiguous(), scale: quantized.scales.contiguous()}


@dataclass(frozen=True)
class Float8Weight:
    """One module's codes in e4m3, and their scales in any floating dtype.

    Attributes:
        module: its path.
        shape: [out, in].
        scheme: how to read the codes; None if the module is unquantized according to the config.
        block: the rows and columns that share a scale, at most those of the matrix.
        scale: the name of the scales.
    """

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    block: Block
    scale: str

    grid = None

    @classmethod
    def found(
        cls, module: str, specs: Mapping[str, TensorSpec], scheme: Scheme | None, block: Block, scale: str
    ) -> Float8Weight:
        """The weight whose tensors have these specs.

        Raises:
            InputError: the codes are not a matrix in e4m3.
        """
        codes = specs[f"{module}.weight"]
        if len(codes.shape) != 2 or codes.dtype != torch.float8_e4m3fn:
            raise InputError(f"{codes.dtype} {list(codes.shape)} is not a matrix in e4m3", where=f"{module}.weight")
        rows, columns = codes.shape
        return cls(module, (rows, columns), scheme, (min(block[0], rows), min(block[1], columns)), scale)

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight.parts`."""
        return "weight", self.scale

    @property
    def layer(self) -> StoredLayer:
        """See `StoredWeight.layer`."""
        return StoredLayer("fp8", 8, self.block[1], self.shape, scheme_of(self).input_rounding)

    def quantized(self, tensors: Tensors) -> Float8Quantized:
        """See `StoredWeight.quantized`."""
        assert self.layer
        spec = Float8QuantizedSpec(*self.shape, self.block)
        found = {part: _as_matrix(tensor) if part == self.scale else tensor for part, tensor in tensors.items()}
        check_specs(found, specs(spec, self.scale), self.module)
        if bool((found[self.scale] < 0).any()):
            raise InputError("a scale is negative", where=place(self.module, self.scale))
        return Float8Quantized(found["weight"], found[self.scale], self.block)


def _as_matrix(scales: torch.Tensor) -> torch.Tensor:
    """Scales of any floating dtype and of one dimension fewer, as `Float8Quantized` has them."""
    wide = widened(scales)
    return wide if wide.dim() == 2 else wide.reshape(-1, 1)
