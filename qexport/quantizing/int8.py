"""The method `int8`: bitsandbytes' LLM.int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from qexport.quantizing.row_method import RowMethod

if TYPE_CHECKING:
    import torch

    from qexport.formats import Format
    from qexport.gates import ProfileName
    from qexport.tensors import Quantized, QuantizedSpec


class Int8(RowMethod):
    """bitsandbytes' LLM.int8 (arXiv:2208.07339), for transformers; no calibration data."""

    method: Literal["int8"] = "int8"
    """Symmetric int8 codes with one scale per output."""

    threshold: Annotated[float, Field(ge=0)] = 6.0
    """Activations above it are multiplied in 16 bits when the model is served (llm_int8_threshold)."""

    layer_methods: ClassVar[tuple[str, ...]] = ("int8",)
    experts: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The paper's name."""
        return "LLM.int8"

    @property
    def layer_method(self) -> str:
        """`int8`."""
        return self.method

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """The same for every size."""
        return "int8"

    def format(self) -> Format:
        """As bitsandbytes' LLM.int8 layers."""
        from qexport.formats import LlmInt8Format

        return LlmInt8Format(self.threshold)

    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """The codes that bitsandbytes would compute, from the weight rounded to float16."""
        from qexport.quantizing.row_int8 import llm_int8

        return llm_int8(weight, self.scale_dtype)
