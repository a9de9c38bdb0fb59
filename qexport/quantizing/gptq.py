"""The method `gptq`: its settings and texts. `selection` chooses the layers, `gptq_pass` quantizes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from qexport.gates.profiles import TINY_PARAMETERS, by_size
from qexport.quantizing.method import CalibrationSettings, PassInputs, ProtectingMethod
from qexport.records import added
from qexport.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qexport.architectures.architecture import Checkpoint
    from qexport.formats import Format, Outputs
    from qexport.gates import ProfileName
    from qexport.tensors import TensorRecord


Bits = Literal[2, 3, 4, 8]


def _check_group_size(group_size: int) -> int:
    if group_size != -1 and not 16 <= group_size <= 1024:
        raise ValueError(f"must be -1 or 16 to 1024, not {group_size}")
    return group_size


GroupSize = Annotated[int, AfterValidator(_check_group_size)]

_PROFILES: Final[dict[int, ProfileName]] = {8: "gptq-8bit", 3: "gptq-3bit", 2: "gptq-2bit"}


class Override(Settings):
    """Other settings for the modules that a pattern matches."""

    modules: str
    """A shell-style pattern of module paths, for example `*.mlp.down_proj`. It must match a linear layer."""

    bits: Bits | None = None
    """Bits per code, instead of the method's."""

    group_size: GroupSize | None = None
    """Inputs that share a scale, instead of the method's."""

    dense: bool = False
    """Leave these modules at 16 bits."""

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.dense == (self.bits is not None or self.group_size is not None):
            raise ValueError("give either dense: true, or bits and/or group_size")
        return self


class Gptq(ProtectingMethod):
    """GPTQ (arXiv:2210.17323) with calibration data."""

    method: Literal["gptq"] = "gptq"
    """GPTQ: each column's rounding error is compensated in the columns that are not yet quantized."""

    bits: Bits = 4
    """Bits per code."""

    group_size: GroupSize = 128
    """Inputs that share a scale and a zero point: 16 to 1024, or -1 for a whole row. Must divide the inputs of every
    layer."""

    sym: bool = True
    """Symmetric codes: every zero point is 2**(bits-1). vLLM and the fast kernels require it."""

    desc_act: bool = False
    """Dynamic act-order: groups follow activation order. Slower to serve; vLLM refuses it. See `static_groups`."""

    static_groups: bool = True
    """Quantize columns in order of decreasing activation, with groups and scales fixed before, in the original order:
    act-order's gain in a plain `desc_act: false` file."""

    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (percdamp, dampening_frac)."""

    true_sequential: bool = True
    """Quantize the linear layers of a block one after the other, each with inputs from the quantized ones before it."""

    mse: bool = True
    """Search the clipping range of each group, instead of taking its largest value."""

    gptaq_alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
    """How far each layer makes up for what quantizing has done to its inputs, by aiming at the outputs of the model
    before quantizing (GPTAQ, arXiv:2504.02692): a share of what two halves of the calibration text agree on. 0 leaves
    this out, which takes little more than half the time. Experts and layers of 8 bits are left out, and texts of one
    batch (2048 tokens).
    """

    effort: Literal["standard", "high"] = added("standard")
    """`high` takes two to three times the time for less drift: tokens on which the predictions depend more count more
    (after one pass back through the model), and codes and scales are gone over again when a layer is solved. Experts
    have all tokens alike."""

    on_failure: Literal["error", "round_to_nearest"] = "error"
    """What to do with a layer whose Hessian cannot be factorized with any damping. The report records it."""

    lm_head: bool = False
    """Quantize the output head too (never with tied embeddings)."""

    overrides: list[Override] = []
    """Settings for single modules; if several match, the last one applies."""

    calibration: CalibrationSettings | None = None
    """The text that the Hessians are computed from."""

    layer_methods: ClassVar[tuple[str, ...]] = ("gptq", "round_to_nearest")

    group_sizes: ClassVar[tuple[int, ...] | None] = None
    """Those that the recipe could name instead; None for all of `GroupSize`."""

    @model_validator(mode="after")
    def _possible(self) -> Gptq:
        if self.desc_act and self.static_groups:
            raise ValueError("desc_act and static_groups exclude each other: set static_groups: false with desc_act")
        if self.desc_act and self.effort == "high":
            raise ValueError("effort: high goes over groups in the order of the inputs: leave desc_act out")
        return self

    def without(self, modules: Sequence[str]) -> Self:
        """With an override for each module."""
        return self.model_copy(
            update={"overrides": [*self.overrides, *(Override(modules=name, dense=True) for name in modules)]}
        )

    @property
    def needs_calibration(self) -> bool:
        """The Hessians are sums over calibration text."""
        return True

    @property
    def calibration_settings(self) -> CalibrationSettings | None:
        """The recipe's `quantize.calibration`."""
        return self.calibration

    @property
    def title(self) -> str:
        """For example `GPTQ 4-bit, group 64`."""
        group = "one group per row" if self.group_size == -1 else f"group {self.group_size}"
        return f"GPTQ {self.bits}-bit, {group}"

    @property
    def order(self) -> Literal["original", "static", "dynamic"]:
        """The order in which columns are solved."""
        if self.desc_act:
            return "dynamic"
        return "static" if self.static_groups else "original"

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """By bits; at 4 bits by size too, and tiny models have their own profile at fewer. 5 and 6 bits, which files of
        other makers have, are held to the limits of 4.
        """
        if 4 <= bits < 8:
            return by_size(parameters, tiny="tiny", small="gptq-4bit", large="gptq-4bit-3b", largest="gptq-4bit-30b")
        return "tiny-3bit" if bits < 4 and parameters < TINY_PARAMETERS else _PROFILES[bits]

    def format(self) -> Format:
        """As in AutoGPTQ's quantize_config.json."""
        from qexport.formats import GptqFormat

        return GptqFormat(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.desc_act,
            static_groups=self.static_groups,
            damp_percent=self.damp_percent,
            true_sequential=self.true_sequential,
        )

    def plan(self, checkpoint: Checkpoint) -> Outputs:
        """All linear layers in the blocks, except those that the family or an override keeps at 16 bits.

        The head too, if the recipe says so.
        """
        from qexport.quantizing.gptq_pass import plan

        return plan(self, checkpoint)

    def quantize(self, inputs: PassInputs) -> Iterator[TensorRecord]:
        """Block by block, each layer solved with inputs from the quantized layers before it."""
        from qexport.quantizing.gptq_pass import quantize

        return quantize(self, inputs)
