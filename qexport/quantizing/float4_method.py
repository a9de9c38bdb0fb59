"""What `nvfp4` and `mxfp4` share: 4-bit floating point weights in groups along the inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qexport.quantizing.method import RoundingMethod

if TYPE_CHECKING:
    from qexport.architectures.structure import LinearSpec
    from qexport.formats import Format
    from qexport.tensors import QuantizedSpec, TensorSpec


class Float4Method(RoundingMethod):
    """A method that rounds each weight to e2m1 times the scale of its group."""

    method: Literal["nvfp4", "mxfp4"]

    @property
    def title(self) -> str:
        """In capitals, as the formats are known."""
        return self.method.upper()

    @property
    def layer_method(self) -> str:
        """The method's name."""
        return self.method

    def format(self) -> Format:
        """As compressed-tensors packs such codes."""
        from qexport.formats import Float4Format

        return Float4Format(self.method)

    def refusal(self, linear: LinearSpec) -> str | None:
        """Layers whose weights are stored [in, out], or whose inputs are not whole groups."""
        from qexport.tensors.float4 import GROUP_SIZES

        if linear.transposed:
            return (
                f"{self.method} does not fit layers whose weights are stored [in, out] (GPT-2's Conv1D): "
                "compressed-tensors knows no such layers; take gptq"
            )
        size = GROUP_SIZES[self.method]
        if linear.in_features % size:
            return (
                f"{self.method} has groups of {size} inputs, and {linear.name} has {linear.in_features}: "
                "name such layers in skip_modules"
            )
        return None

    def spec(self, linear: LinearSpec, stored: TensorSpec) -> QuantizedSpec:
        """Codes in e2m1 with a scale for each group."""
        from qexport.tensors import Float4QuantizedSpec

        return Float4QuantizedSpec(linear.out_features, linear.in_features, self.method)
