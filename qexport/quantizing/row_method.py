"""What `int8` and `w8a8` share: int8 codes with one scale per output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qexport.quantizing.method import RoundingMethod

if TYPE_CHECKING:
    import torch

    from qexport.architectures.structure import LinearSpec
    from qexport.tensors import QuantizedSpec, TensorSpec


class RowMethod(RoundingMethod):
    """A method that rounds each row of a matrix to int8 codes with one scale."""

    scales: Literal["float32", "float16"] = "float32"
    """`float16` rounds each scale to float16 before the codes are found. The layout `gguf` then has the values as Q8_0;
    the other layouts store such scales as they store any, and all have the same values."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """What `scales` names."""
        import torch

        return torch.float16 if self.scales == "float16" else torch.float32

    def spec(self, linear: LinearSpec, stored: TensorSpec) -> QuantizedSpec:
        """Rows of int8 codes."""
        from qexport.tensors import RowQuantizedSpec

        outputs, inputs = linear.out_features, linear.in_features
        return RowQuantizedSpec(outputs, inputs, stored.dtype, linear.transposed, self.scale_dtype)
