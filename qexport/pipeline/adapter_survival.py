"""What rounding leaves of the adapter, before a run: methods that would erase it are refused, and where the recipe asks
for it, layers that would lose much of it stay unquantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qexport.amounts import counted
from qexport.architectures.joined import joined_modules
from qexport.errors import CompatibilityError, RecipeError
from qexport.formats import Outputs
from qexport.gates.deciding import LEAST_SURVIVAL
from qexport.merge import MergeSettings, TrainedOn
from qexport.merge.merging import Merged
from qexport.merge.trained_base import quantized_layers
from qexport.quantizing.adapter_survival import SAMPLED, Survival, spread, survivals, together
from qexport.quantizing.method import Method, ProtectingMethod
from qexport.quantizing.nf4 import Nf4

_LOST: Final = 0.5
"""A base that lies on no grid keeps nearly all of a change, however small it is: rounding is right on average."""


def refuse_same_grid(settings: MergeSettings, method: Method, merged: Merged, outputs: Outputs) -> None:
    """Refuses to round a base to the grid that it lies on already: most of what the adapter adds is rounded away then.

    Raises:
        CompatibilityError: with the share of the adapter that would be left.
    """
    names = changed_layers(merged, outputs)
    if settings.trained_on is not None:
        _refuse_same_code_book(settings.trained_on, method, merged, outputs, names)
    elif merged.base.origin.read_as is not None and names:
        left = share_of(method, merged, outputs, names)
        if left.share < _LOST:
            raise _erased(
                f"the base lies on the grid of {merged.base.origin.read_as.removesuffix(', dequantized')}",
                left,
                where=f"load.base, with quantize.method: {method.method}",
                mend="name the 16-bit model that it was made from as load.base, or choose another method",
            )


def _refuse_same_code_book(
    how: TrainedOn, method: Method, merged: Merged, outputs: Outputs, changed: list[str]
) -> None:
    if not isinstance(method, Nf4) or (method.quant_type, method.block_size) != (how.quant_type, how.block_size):
        return
    trained = quantized_layers(merged.base.architecture, how)
    if names := [name for name in changed if name in trained]:
        raise _erased(
            f"the base was rounded to {method.quant_type.upper()} in blocks of {how.block_size} in training",
            share_of(method, merged, outputs, names),
            where="merge.base: as_trained, with quantize.method: nf4",
            mend="set merge.base: stored, or choose another method, for example gptq or int8",
        )


def _erased(reason: str, left: Survival, *, where: str, mend: str) -> CompatibilityError:
    return CompatibilityError(
        f"the adapter would not survive this: {reason}, and rounded to it again, only {left.share:.1%} of the "
        "adapter's change is left",
        where=where,
        mend=mend,
    )


def changed_layers(merged: Merged, outputs: Outputs) -> list[str]:
    """The weights that the adapter changes and the method quantizes, in the order of the files."""
    changed = set(merged.adapter.changed) if merged.adapter else set()
    return [f"{module}.weight" for module in outputs.quantized if f"{module}.weight" in changed]


@dataclass(frozen=True)
class SampledSurvival:
    """What is left of the adapter in some of the layers that it changes.

    Attributes:
        layers: each by its path.
        of: how many layers the adapter changes and the method quantizes; if it quantizes none, how many matrices it
            changes.
    """

    layers: Mapping[str, Survival]
    of: int

    @property
    def whole(self) -> Survival:
        """Those layers as one."""
        return together(self.layers.values())

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "share": self.whole.share,
            "share_after_merge": self.whole.merged_share,
            "layers": {name: each.share for name, each in self.layers.items()},
            "of": self.of,
        }

    def line(self) -> str:
        """The same for the terminal."""
        worst = min(self.layers, key=lambda name: self.layers[name].share)
        layers = f"{len(self.layers)} of {self.of} layers" if len(self.layers) < self.of else f"{self.of} layers"
        whole = self.whole
        return (
            f"{whole.share:.1%} of the adapter's change is left after rounding, {whole.merged_share:.1%} after the "
            f"merge alone ({layers}; least {self.layers[worst].share:.1%} in {worst})"
        )

    def notes(self, dtype: str) -> list[str]:
        """What to do about a small share.

        Args:
            dtype: of the merge.
        """
        if self.whole.share >= LEAST_SURVIVAL:
            return []
        merge = self.whole.merged_share < LEAST_SURVIVAL
        mend = (
            f"merge.dtype: {'float16 or float32' if dtype == 'bfloat16' else 'float32'}"
            if merge and dtype != "float32"
            else "more bits, or quantize.protect_adapter: true"
        )
        return [
            f"the adapter is weak beside the rounding: {self.whole.share:.1%} of its change is left, and the gate "
            f"adapter_strength asks for {LEAST_SURVIVAL:.0%}; try {mend}"
        ]


def sampled_survival(method: Method, merged: Merged, outputs: Outputs) -> SampledSurvival | None:
    """What is left of the adapter, estimated from some layers; None if it changes no matrix."""
    specs = merged.checkpoint.weights.specs()
    changed = merged.adapter.changed if merged.adapter else ()
    matrices = [name for name in changed if len(specs[name].shape) == 2 and _same_shape(merged, name)]
    names = [name for name in changed_layers(merged, outputs) if name in matrices] or matrices
    if not names:
        return None
    return SampledSurvival(dict(survivals(method, outputs, merged, _spread(merged, names))), len(names))


def _same_shape(merged: Merged, name: str) -> bool:
    base = merged.base.weights.specs()
    return name in base and base[name].shape == merged.checkpoint.weights.specs()[name].shape


def share_of(method: Method, merged: Merged, outputs: Outputs, names: list[str]) -> Survival:
    """What is left of the adapter in these layers, estimated from some of them where there are many weights."""
    return together(each for _, each in survivals(method, outputs, merged, _spread(merged, names)))


def _spread(merged: Merged, names: list[str]) -> list[str]:
    specs = merged.checkpoint.weights.specs()
    return spread({name: specs[name].shape[0] * specs[name].shape[1] for name in names}, SAMPLED)


@dataclass(frozen=True)
class Protected:
    """A method, perhaps without the layers that it would take the adapter from.

    Attributes:
        method: what quantizes.
        outputs: what it yields.
        notes: which layers stay unquantized, and why.
    """

    method: Method
    outputs: Outputs
    notes: tuple[str, ...] = ()


def protect(method: Method, merged: Merged, outputs: Outputs) -> Protected:
    """The method; with `protect_adapter`, without the layers that would lose much of the adapter.

    A layer is one of them if quantizing leaves less than `LEAST_SURVIVAL` of what the merge has left. Layers that
    servers join stay unquantized together, as do the experts of a block.

    Raises:
        RecipeError: there is no adapter to protect.
        CompatibilityError: no layer is left to quantize.
    """
    if not isinstance(method, ProtectingMethod) or not method.protect_adapter:
        return Protected(method, outputs)
    if merged.adapter is None:
        raise RecipeError("there is no adapter to protect", where="quantize.protect_adapter", mend="remove it")
    found = dict(survivals(method, outputs, merged, changed_layers(merged, outputs)))
    weak = {module for module, each in found.items() if each.kept < LEAST_SURVIVAL * each.merged}
    if not weak:
        return Protected(method, outputs)
    kept = [module for module in outputs.quantized if _together(module, outputs) & weak]
    chosen = method.without(kept)
    worst = min(weak, key=lambda module: found[module].share)
    note = (
        f"protect_adapter: {counted(len(kept), 'layer')} stay unquantized, since {counted(len(weak), 'layer')} of them "
        f"would keep less than {LEAST_SURVIVAL:.0%} of the adapter, the least {found[worst].share:.1%} in {worst}"
    )
    return Protected(chosen, chosen.plan(merged.checkpoint), (note,))


def _together(module: str, outputs: Outputs) -> set[str]:
    """The module and those that servers treat as one with it."""
    block, expert, _ = module.partition(".experts.")
    if expert:
        return {other for other in outputs.quantized if other.startswith(f"{block}{expert}")}
    return next((set(group) for group in joined_modules(dict.fromkeys(outputs.quantized)) if module in group), {module})
