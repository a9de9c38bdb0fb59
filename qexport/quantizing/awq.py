"""The method `awq`: its settings and texts. `awq_pass` quantizes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from qexport.quantizing.gptq import Gptq, Override
from qexport.quantizing.method import CalibrationSettings, PassInputs, ProtectingMethod

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qexport.architectures.architecture import Checkpoint
    from qexport.formats import Outputs
    from qexport.gates import ProfileName
    from qexport.tensors import TensorRecord


_GroupSize = Literal[32, 64, 128]


class _SharedPass(Gptq):
    """GPTQ's settings for AWQ's pass."""

    group_sizes: ClassVar[tuple[int, ...] | None] = get_args(_GroupSize)


class Awq(ProtectingMethod):
    """AWQ (arXiv:2306.00978) with calibration data: 4-bit codes with zero points, rounded to nearest."""

    method: Literal["awq"] = "awq"
    """AWQ: inputs that matter more are rounded more finely. Their weights are multiplied before rounding, by powers of
    two that the norm or layer before is divided by; the clipping range of each group is searched."""

    group_size: _GroupSize = 128
    """Inputs that share a scale and a zero point. Must divide the inputs of every layer."""

    scale: bool = True
    """Multiply weights by powers of two where a norm or a layer before can be divided by them; the plan says where that
    is nowhere."""

    clip: bool = True
    """Search the clipping range of each group, instead of taking its smallest and largest value."""

    skip_modules: list[str] = []
    """Shell-style patterns of module paths that stay at 16 bits, for example `*.mlp.down_proj`. Each must match."""

    on_failure: Literal["error", "round_to_nearest"] = "error"
    """What to do with layers whose inputs are not finite, or experts that no token reached. The report records it."""

    calibration: CalibrationSettings | None = None
    """The text that the sizes of the inputs and the errors of the outputs are computed from."""

    layer_methods: ClassVar[tuple[str, ...]] = ("awq",)

    def without(self, modules: Sequence[str]) -> Self:
        """With further `skip_modules`."""
        return self.model_copy(update={"skip_modules": [*self.skip_modules, *modules]})

    @property
    def needs_calibration(self) -> bool:
        """Scales and clipping ranges are searched on the outputs of calibration text."""
        return True

    @property
    def calibration_settings(self) -> CalibrationSettings | None:
        """The recipe's `quantize.calibration`."""
        return self.calibration

    @property
    def title(self) -> str:
        """For example `AWQ 4-bit, group 64`."""
        return f"AWQ 4-bit, group {self.group_size}"

    @classmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """That of GPTQ with as many bits."""
        return Gptq.profile(bits, parameters)

    @property
    def gptq(self) -> Gptq:
        """The settings of the pass, which is GPTQ's with another way to find the codes of a layer."""
        return _SharedPass(
            group_size=self.group_size,
            sym=False,
            mse=self.clip,
            gptaq_alpha=0,
            on_failure=self.on_failure,
            overrides=[Override(modules=name, dense=True) for name in self.skip_modules],
            calibration=self.calibration,
        )

    def plan(self, checkpoint: Checkpoint) -> Outputs:
        """All linear layers in the blocks, except those that the family or the recipe keeps at 16 bits."""
        from qexport.formats import AwqFormat
        from qexport.quantizing.awq_pass import notes_on_folds
        from qexport.quantizing.gptq_pass import plan
        from qexport.quantizing.selection import refuse_unmatched

        structure = checkpoint.architecture.structure
        refuse_unmatched("skip_modules", self.skip_modules, structure)
        outputs = plan(self.gptq, checkpoint)
        notes = (*outputs.notes, *notes_on_folds(self, structure, outputs.quantized))
        return replace(outputs, format=AwqFormat(self.group_size), notes=notes)

    def quantize(self, inputs: PassInputs) -> Iterator[TensorRecord]:
        """Block by block, each layer with inputs from the quantized layers before it."""
        from qexport.quantizing.awq_pass import AwqPass
        from qexport.quantizing.gptq_pass import quantize

        return quantize(self.gptq, inputs, partial(AwqPass, scale=self.scale))
