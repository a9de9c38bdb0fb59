"""The method `nf4`: bitsandbytes' 4-bit code books, NF4 and FP4."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qexport.gates.profiles import by_size
from qexport.quantizing.method import RoundingMethod

if TYPE_CHECKING:
    import torch

    from qexport.architectures.structure import LinearSpec
    from qexport.formats import Format
    from qexport.gates import ProfileName
    from qexport.tensors import Quantized, QuantizedSpec, TensorSpec


class Nf4(RoundingMethod):
    """bitsandbytes' 4 bits (arXiv:2305.14314), for transformers; no calibration data."""

    method: Literal["nf4"] = "nf4"
    """Codes from a code book of 16 values, in blocks of the flattened matrix."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The code book: NormalFloat, or 4-bit floating point."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Values that share an absmax. transformers writes only 64, and reads all of them."""

    double_quant: bool = False
    """Quantize the absmaxes too, which saves 0.4 bits per weight."""

    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype in which transformers multiplies the dequantized weights."""

    layer_methods: ClassVar[tuple[str, ...]] = ("nf4", "fp4")
    experts: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """`NF4` or `FP4`, and `double quantization` if it is on."""
        return f"{self.quant_type.upper()}{', double quantization' if self.double_quant else ''}"

    @property
    def layer_method(self) -> str:
        """The code book."""
        return self.quant_type

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """By size."""
        return by_size(parameters, tiny="tiny-nf4", small="nf4", large="nf4-3b", largest="nf4-30b")

    def format(self) -> Format:
        """As bitsandbytes' 4-bit layers."""
        from qexport.formats import FourBitFormat

        return FourBitFormat(self.quant_type, self.block_size, self.double_quant, self.compute_dtype)

    def spec(self, linear: LinearSpec, stored: TensorSpec) -> QuantizedSpec:
        """Blocks of the flattened matrix."""
        from qexport.tensors import BlockQuantizedSpec

        return BlockQuantizedSpec(
            linear.out_features,
            linear.in_features,
            self.quant_type,
            self.block_size,
            self.double_quant,
            stored.dtype,
            linear.transposed,
        )

    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """The bytes that bitsandbytes would compute."""
        from qexport.formats.bitsandbytes.four_bit_codes import quantize
        from qexport.tensors import BlockQuantizedSpec

        assert isinstance(spec, BlockQuantizedSpec)
        return quantize(weight, spec)
