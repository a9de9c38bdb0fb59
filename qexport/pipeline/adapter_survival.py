"""Refuses methods that would erase what the adapter changes."""

from __future__ import annotations

from qexport.errors import CompatibilityError
from qexport.formats import Outputs
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged
from qexport.merge.trained_base import quantized_layers
from qexport.quantizing.adapter_survival import SAMPLED, Survival, spread, survivals, together
from qexport.quantizing.method import Method
from qexport.quantizing.nf4 import Nf4


def refuse_same_code_book(settings: MergeSettings, method: Method, merged: Merged, outputs: Outputs) -> None:
    """Refuses to round the base of a training to the code book that training rounded it to.

    Its values lie on that grid already, so that most of what the adapter adds is rounded away again.

    Raises:
        CompatibilityError: with the share of the adapter that would be left.
    """
    how = settings.trained_on
    if how is None or not isinstance(method, Nf4):
        return
    if (method.quant_type, method.block_size) != (how.quant_type, how.block_size):
        return
    trained = quantized_layers(merged.base.architecture, how)
    names = [name for name in changed_layers(merged, outputs) if name in trained]
    if not names:
        return
    left = share_of(method, merged, outputs, names)
    raise CompatibilityError(
        f"the adapter would not survive this: the base was rounded to {method.quant_type.upper()} in blocks of "
        f"{how.block_size} in training, and rounded to it again, only {left.share:.1%} of the adapter's change is left",
        where="merge.base: as_trained, with quantize.method: nf4",
        mend="set merge.base: stored, or choose another method, for example gptq or int8",
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
