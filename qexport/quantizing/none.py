"""The method `none`: the merged model, unquantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qexport.quantizing.method import Method, PassInputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qexport.architectures.architecture import Checkpoint
    from qexport.formats import Outputs
    from qexport.gates import ProfileName
    from qexport.tensors import TensorRecord


class NoQuantization(Method):
    """No quantization: the merged model in `merge.dtype` is the artifact."""

    method: Literal["none"] = "none"
    """The merged weights, unquantized."""

    @property
    def title(self) -> str:
        """What the weights are."""
        return "16 bits"

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """The same for every size."""
        return "16bit"

    def plan(self, checkpoint: Checkpoint) -> Outputs:
        """Every tensor as it was merged."""
        from qexport.formats import MergedFormat, Outputs

        return Outputs(MergedFormat(), dict(checkpoint.weights.specs()))

    def quantize(self, inputs: PassInputs) -> Iterator[TensorRecord]:
        """One tensor after the other."""
        from qexport.quantizing.rounding import quantize

        return quantize(None, inputs)
