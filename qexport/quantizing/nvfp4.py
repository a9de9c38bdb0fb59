"""The method `nvfp4`: 4-bit floating point weights with scales in e4m3."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qexport.gates.profiles import by_size
from qexport.quantizing.float4_method import Float4Method

if TYPE_CHECKING:
    import torch

    from qexport.gates import ProfileName
    from qexport.tensors import Quantized, QuantizedSpec


class Nvfp4(Float4Method):
    """NVIDIA's 4-bit floating point: e2m1 weights in groups of 16, for vLLM and transformers; no calibration data."""

    method: Literal["nvfp4"] = "nvfp4"
    """Weights in e2m1, a scale in e4m3 for each 16 inputs, and a float32 scale for each matrix, which layers that
    servers join have in common; activations stay at 16 bits."""

    layer_methods: ClassVar[tuple[str, ...]] = ("nvfp4",)

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """By size, as for NF4, than which it drifts less."""
        return by_size(parameters, tiny="tiny-nf4", small="nf4", large="nf4-3b", largest="nf4-30b")

    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """Each weight rounded to the nearest value of e2m1 times its scale."""
        from qexport.quantizing.float4 import global_scale_of, nvfp4
        from qexport.tensors import Float4QuantizedSpec

        assert isinstance(spec, Float4QuantizedSpec)
        absmax = float(weight.abs().amax()) if spec.absmax is None else spec.absmax
        return nvfp4(weight, global_scale_of(absmax))
