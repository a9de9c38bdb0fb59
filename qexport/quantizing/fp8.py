"""The method `fp8`: weights in 8-bit floating point, and such activations, which the server quantizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qexport.quantizing.method import RoundingMethod

if TYPE_CHECKING:
    import torch

    from qexport.architectures.structure import LinearSpec
    from qexport.formats import Format
    from qexport.gates import ProfileName
    from qexport.tensors import Quantized, QuantizedSpec, TensorSpec


class Fp8(RoundingMethod):
    """8-bit floating point (e4m3) weights and activations, for vLLM, TGI and transformers; no calibration data."""

    method: Literal["fp8"] = "fp8"
    """Weights in e4m3 with stored scales; the server quantizes activations to e4m3, with scales that it computes."""

    strategy: Literal["channel", "block"] = "channel"
    """What shares a scale: `channel` the weights of one output (compressed-tensors `float-quantized`), `block` 128
    outputs x 128 inputs (DeepSeek's format, `quant_method: fp8`)."""

    layer_methods: ClassVar[tuple[str, ...]] = ("fp8",)

    @property
    def title(self) -> str:
        """With the strategy where it is not the usual one."""
        return "FP8" if self.strategy == "channel" else "FP8, blocks of 128 x 128"

    @property
    def layer_method(self) -> str:
        """`fp8`."""
        return self.method

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """The same for every size."""
        return "fp8"

    def format(self) -> Format:
        """By the strategy."""
        from qexport.formats import BlockFp8Format, FloatQuantizedFormat

        return FloatQuantizedFormat() if self.strategy == "channel" else BlockFp8Format()

    def refusal(self, linear: LinearSpec) -> str | None:
        """Neither format has layers whose weights are stored [in, out]."""
        if not linear.transposed:
            return None
        return (
            "fp8 does not fit layers whose weights are stored [in, out] (GPT-2's Conv1D): its formats know no such "
            "layers, and vLLM would transpose their codes; take gptq"
        )

    def spec(self, linear: LinearSpec, stored: TensorSpec) -> QuantizedSpec:
        """Codes in e4m3 with a scale for each row or block."""
        from qexport.formats.block_fp8 import BLOCK
        from qexport.tensors import Float8QuantizedSpec

        block = (1, linear.in_features) if self.strategy == "channel" else BLOCK
        return Float8QuantizedSpec(linear.out_features, linear.in_features, block)

    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """Each weight rounded to the nearest value of e4m3 times its scale."""
        from qexport.quantizing.float8 import float8
        from qexport.tensors import Float8QuantizedSpec

        assert isinstance(spec, Float8QuantizedSpec)
        return float8(weight, spec.block)
