"""The method `mixed`: GPTQ with bits and groups for each layer, chosen for a quality or a size. Its settings and texts;
`sensitivity` measures, `allocation` chooses, `qexport/pipeline/mixing.py` brings them together with the layouts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from qexport.quantizing.gptq import Gptq, GroupSize, Override
from qexport.quantizing.method import CalibrationSettings, Method, PassInputs
from qexport.records import added
from qexport.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qexport.architectures.architecture import Checkpoint
    from qexport.formats import Outputs
    from qexport.gates import ProfileName
    from qexport.tensors import TensorRecord

OfferedBits = Literal[2, 3, 4, 8, 16]


def _each_once(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("each value once")
    return sorted(values)


class MixedTarget(Settings):
    """What the choice is made for: one of the two."""

    mean_kl: Annotated[float, Field(gt=0)] | None = None
    """The smallest artifact whose mean KL divergence from the merged model is expected to be at most this, in nats per
    token. It is a gate too, unless `verify.gates` has its own on `mean_kl`; so the choice is made for 0.85 of it. An
    artifact that does not pass is followed by a larger one, twice at most."""

    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    """The best artifact of at most this size: bytes of all tensors, embeddings and scales included, in bits per
    parameter, as the manifest has it in `sizes`."""

    @model_validator(mode="after")
    def _one_of_them(self) -> MixedTarget:
        if (self.mean_kl is None) == (self.bits_per_weight is None):
            raise ValueError("give either mean_kl or bits_per_weight")
        return self


class Mixed(Method):
    """GPTQ with the bits that each layer needs, for a size or a quality."""

    method: Literal["mixed"] = "mixed"
    """Measures how far each layer's rounding moves the predictions, chooses bits and groups by layer, quantizes with
    GPTQ, and goes back to the choice where the artifact misses the target."""

    target: MixedTarget
    """The size or the quality to reach."""

    bits: Annotated[list[OfferedBits], Field(min_length=1), AfterValidator(_each_once)] = [3, 4, 8, 16]
    """Bits to choose from; 16 leaves a layer unquantized. What a layout cannot carry is left out, and the plan says
    so."""

    group_sizes: Annotated[list[GroupSize], Field(min_length=1), AfterValidator(_each_once)] = [128]
    """Group sizes to choose from, as in `gptq`. A layer takes those that divide its inputs."""

    sym: bool = True
    """Symmetric codes, as in `gptq`."""

    windows: Annotated[int, Field(ge=8, le=4096)] = 32
    """Windows of calibration text in which the predictions are looked at; twice as many others are for Hessians. What
    is measured of one layer has an error of about the square root of 2 / windows, 25 % for 32."""

    window_tokens: Annotated[int, Field(ge=8, le=4096)] = 128
    """Tokens of each; at most `calibration.sequence_length`."""

    effort: Literal["standard", "high"] = added("standard")
    """As in `gptq`, once the choice is made."""

    overrides: list[Override] = []
    """Settings for single modules, as in `gptq`. These modules take no part in the choice."""

    calibration: CalibrationSettings | None = None
    """The text that the layers are measured on and the Hessians are computed from."""

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> Mixed:
        quantized = [bits for bits in self.bits if bits < 16]
        if not quantized or len(quantized) * len(self.group_sizes) + (16 in self.bits) < 2:
            raise ValueError("there is nothing to choose: give several bits or group_sizes, some bits below 16")
        return self

    @property
    def needs_calibration(self) -> bool:
        """For the measurement and for the Hessians."""
        return True

    @property
    def calibration_settings(self) -> CalibrationSettings | None:
        """The recipe's `quantize.calibration`."""
        return self.calibration

    @property
    def title(self) -> str:
        """For example `mixed bits for a mean KL divergence of 0.05`."""
        if self.target.mean_kl is not None:
            return f"mixed bits for a mean KL divergence of {self.target.mean_kl:g}"
        return f"mixed bits for {self.target.bits_per_weight:g} bits per weight"

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """That of GPTQ with the bits of most layers."""
        return Gptq.profile(bits, parameters)

    @property
    def gptq(self) -> Gptq:
        """What quantizes: GPTQ, of which bits and groups do not matter where every layer's are given."""
        values = {"bits": 4, "group_size": -1, "sym": self.sym, "effort": self.effort, "overrides": self.overrides}
        return Gptq.model_validate(values | {"calibration": self.calibration})

    def overridden(self, module: str) -> bool:
        """Whether an override names a module, so that it takes no part in the choice."""
        return any(fnmatchcase(module, override.modules) for override in self.overrides)

    def plan(self, checkpoint: Checkpoint) -> Outputs:
        """Before a choice is made, every layer alike; see `qexport/pipeline/choice_space.py`."""
        return self.gptq.plan(checkpoint)

    def quantize(self, inputs: PassInputs) -> Iterator[TensorRecord]:
        """With GPTQ, and for each layer the bits and groups of `inputs.outputs`."""
        return self.gptq.quantize(inputs)
