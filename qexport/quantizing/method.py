"""The interface of a method: its settings, the tensors that it yields, its pass over the model, and its texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field

from qexport.execution.inline import INLINE
from qexport.progress import ProgressCallback, silent
from qexport.records import added
from qexport.settings import Settings, required_in_recipes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from qexport.architectures.architecture import Checkpoint
    from qexport.architectures.structure import LinearSpec
    from qexport.execution.workers import Execution
    from qexport.formats import Format, Outputs
    from qexport.gates import ProfileName
    from qexport.tensors import CalibrationSet, Quantized, QuantizedSpec, TensorRecord, TensorSpec


class CalibrationSettings(Settings):
    """The text that the method calibrates on."""

    source: str | Annotated[list[str], Field(min_length=1)]
    """Files (`.jsonl` with a `text` or `messages` field, or `.txt`), or `hub:org/dataset` (extra `datasets`)."""

    split: str = "train"
    """The split of a hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    field: str = "text"
    """The field of a JSON line that holds the text."""

    chat_template: bool = False
    """Render each text as a user's message (or its `messages`) with the model's chat template."""

    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Number of windows to take."""

    sequence_length: Annotated[int, Field(ge=2, le=131_072)] = 512
    """Tokens per window."""

    packing: Literal["packed", "document"] = "packed"
    """`packed` joins documents with the end-of-text token and cuts windows, each of which begins with the
    beginning-of-text token if the tokenizer begins texts with it; `document` takes one per sample."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Decides which documents come first."""


Save = Callable[[], "Sequence[Path]"]
"""Writes what a pass needs to go on after a unit, and returns the files. What the unit before needed is lost then."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a pass begins, and whom it tells what is finished.

    A unit is what a pass finishes together: a block, or for the methods without a forward the tensors that are next to
    each other in the checkpoint and belong to the same block.

    Attributes:
        units: how many an earlier run has finished, from the first one on. Their tensors are not yielded again.
        folder: for the files that the pass needs to go on. The earlier run's are there.
        finished: is called after each unit, when all its tensors have been yielded.
    """

    units: int
    folder: Path
    finished: Callable[[Save], None]


@dataclass(frozen=True)
class PassInputs:
    """What a pass works on, and where.

    Attributes:
        checkpoint: the merged model.
        outputs: what `Method.plan` returned for it.
        calibration: the calibration tokens, for the methods that need them.
        dtype: the merged model's dtype, which a forward computes in.
        device: where to compute.
        scratch: a folder on a disk with room for a block's activations. Their files have no names.
        execution: the workers that compute.
        resume: where to begin, for a pass that can be continued after it was stopped; None for the whole pass.
        progress: is called with each step.
    """

    checkpoint: Checkpoint
    outputs: Outputs
    calibration: CalibrationSet | None
    dtype: torch.dtype
    device: torch.device
    scratch: Path
    execution: Execution = INLINE
    resume: ResumePoint | None = None
    progress: ProgressCallback = silent

    @property
    def finished_units(self) -> int:
        """How many units an earlier run has finished."""
        return self.resume.units if self.resume else 0


class Method(Settings, ABC):
    """One method: its fields are the keys of a recipe's `quantize`.

    Each file has one subclass. It imports neither torch nor transformers before it is used, so that checking a recipe
    is fast.

    Attributes:
        method: the name in a recipe.
        layer_methods: the names in reports for how a layer's codes were found.
    """

    model_config = ConfigDict(json_schema_extra=required_in_recipes("method", "calibration"))

    method: str

    layer_methods: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the method uses calibration text."""
        return False

    @property
    def calibration_settings(self) -> CalibrationSettings | None:
        """The recipe's calibration text; None if the method uses none or the recipe names none."""
        return None

    @property
    @abstractmethod
    def title(self) -> str:
        """The method in a few words, for display."""

    @classmethod
    @abstractmethod
    def profile(cls, bits: int, parameters: int) -> ProfileName:
        """The profile of gates for an artifact most of whose layers are quantized with this method.

        Args:
            bits: per code.
            parameters: of the merged model; a tied head counts once.
        """

    @abstractmethod
    def plan(self, checkpoint: Checkpoint) -> Outputs:
        """What `quantize` will yield, from headers alone.

        Raises:
            CompatibilityError: the settings do not fit the model, or nothing would be quantized.
        """

    @abstractmethod
    def quantize(self, inputs: PassInputs) -> Iterator[TensorRecord]:
        """Yields every tensor of the model as `plan` describes it, with the memory of one block at most.

        Args:
            inputs: the model, and where to begin. Tensors of finished units are left out.

        Raises:
            NumericalError: a weight or a Hessian cannot be quantized; see the method.
            InputError: a tensor cannot be read.
            ResourceError: the activations of an earlier run are damaged.
            OSError: the disk is full.
        """


class ProtectingMethod(Method):
    """A method that can leave layers unquantized where it would round away what the adapter changes."""

    protect_adapter: bool = added(False)
    """Leave layers unquantized that would keep less than 80 % of the adapter's change, and what servers join with them.
    The plan names them."""

    @abstractmethod
    def without(self, modules: Sequence[str]) -> Self:
        """The same method, which leaves these modules unquantized too.

        Args:
            modules: their paths.
        """


class RoundingMethod(ProtectingMethod):
    """A method that rounds each weight on its own: no forward pass, no calibration text."""

    skip_modules: list[str] = []
    """Shell-style patterns of module paths that stay at 16 bits, for example `*.mlp.down_proj`. Each must match."""

    force_modules: list[str] = []
    """Patterns of modules to quantize although their family keeps them at 16 bits. Each must match such a module."""

    experts: ClassVar[bool] = True
    """Whether the experts of a mixture are quantized; otherwise they stay at 16 bits."""

    def without(self, modules: Sequence[str]) -> Self:
        """With further `skip_modules`."""
        return self.model_copy(update={"skip_modules": [*self.skip_modules, *modules]})

    @abstractmethod
    def format(self) -> Format:
        """The stored format of the quantized layers."""

    @property
    @abstractmethod
    def layer_method(self) -> str:
        """The one of `layer_methods` that these settings select."""

    @abstractmethod
    def spec(self, linear: LinearSpec, stored: TensorSpec) -> QuantizedSpec:
        """What a layer will be quantized to.

        Args:
            linear: the layer.
            stored: its merged weight.
        """

    @abstractmethod
    def codes(self, weight: torch.Tensor, spec: QuantizedSpec) -> Quantized:
        """Rounds one merged matrix [out, in].

        Raises:
            NumericalError: a value is out of the method's range.
        """

    def refusal(self, linear: LinearSpec) -> str | None:
        """Why the method cannot quantize this layer, and what to do instead; None if it can."""
        return None

    def plan(self, checkpoint: Checkpoint) -> Outputs:
        """All linear layers in the blocks, except those that the family or the recipe keeps at 16 bits."""
        from qexport.quantizing.rounding import plan

        return plan(self, checkpoint)

    def quantize(self, inputs: PassInputs) -> Iterator[TensorRecord]:
        """One tensor after the other; no model is built."""
        from qexport.quantizing.rounding import quantize

        return quantize(self, inputs)
