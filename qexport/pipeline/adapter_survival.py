"""Refuses methods that would erase what the adapter changes."""

from __future__ import annotations

from typing import Final

from qexport.errors import CompatibilityError
from qexport.formats import Outputs
from qexport.merge import MergeSettings, TrainedOn
from qexport.merge.merging import Merged
from qexport.merge.trained_base import quantized_layers
from qexport.quantizing.adapter_survival import SAMPLED, Survival, spread, survivals, together
from qexport.quantizing.method import Method
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


def share_of(method: Method, merged: Merged, outputs: Outputs, names: list[str]) -> Survival:
    """What is left of the adapter in these layers, estimated from some of them where there are many weights."""
    specs = merged.checkpoint.weights.specs()
    sizes = {name: specs[name].shape[0] * specs[name].shape[1] for name in names}
    chosen = spread(sizes, SAMPLED)
    return together([each for _, each in survivals(method, outputs, merged.checkpoint, merged.base, chosen)])
