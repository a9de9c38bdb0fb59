"""The method `w8a8`: int8 weights, and int8 activations, which the server quantizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qexport.quantizing.row_method import RowMethod

if TYPE_CHECKING:
    import torch

    from qexport.architectures.structure import LinearSpec
    from qexport.formats import Format
    from qexport.gates import ProfileName
    from qexport.tensors import Quantized, QuantizedSpec


class W8a8(RowMethod):
    """int8 weights and activations (compressed-tensors `int-quantized`), for vLLM and TGI; no calibration data."""

    method: Literal["w8a8"] = "w8a8"
    """Symmetric int8 weights with one scale per output; the server quantizes activations, with one scale per token."""

    layer_methods: ClassVar[tuple[str, ...]] = ("w8a8",)

    @property
    def title(self) -> str:
        """8-bit weights, 8-bit activations."""
        return "W8A8"

    @property
    def layer_method(self) -> str:
        """`w8a8`."""
        return self.method

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """The same for every size."""
        return "w8a8"

    def format(self) -> Format:
        """Rows of int8 codes for int8 activations."""
        from qexport.formats import W8A8Format

        return W8A8Format()

    def refusal(self, linear: LinearSpec) -> str | None:
        """compressed-tensors has no layers whose weights are stored [in, out]."""
        if not linear.transposed:
            return None
        return (
            "w8a8 does not fit layers whose weights are stored [in, out] (GPT-2's Conv1D): compressed-tensors knows no "
            "such layers, and vLLM would transpose their codes; take gptq"
        )

    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """Each row rounded to 127 steps on either side of zero."""
        from qexport.quantizing.row_int8 import w8a8

        return w8a8(weight, self.scale_dtype)
