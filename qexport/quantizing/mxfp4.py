"""The method `mxfp4`: 4-bit floating point weights with powers of two as scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qexport.gates.profiles import by_size
from qexport.quantizing.float4_method import Float4Method

if TYPE_CHECKING:
    import torch

    from qexport.gates import ProfileName
    from qexport.tensors import Quantized, QuantizedSpec


class Mxfp4(Float4Method):
    """The OCP's 4-bit floating point: e2m1 weights in groups of 32, for vLLM and transformers; no calibration data."""

    method: Literal["mxfp4"] = "mxfp4"
    """Weights in e2m1, and a power of two as the scale of each 32 inputs; activations stay at 16 bits."""

    layer_methods: ClassVar[tuple[str, ...]] = ("mxfp4",)

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """By size, those above NF4's: it drifts 1.3 times as much."""
        return by_size(parameters, tiny="tiny-mxfp4", small="gptq-3bit", large="nf4", largest="nf4-3b")

    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """Each weight rounded to the nearest value of e2m1 times its scale."""
        from qexport.quantizing.float4 import mxfp4

        return mxfp4(weight)
