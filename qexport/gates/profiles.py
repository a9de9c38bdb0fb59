"""The limits that hold where a user gives none, by method and size.

docs/gates.md has the same table with the measurements, published and our own, that each limit was drawn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from qexport.artifact.manifest import Sizes
from qexport.errors import RecipeError
from qexport.gates.settings import Bounds, HasGates, ProfileName
from qexport.records import LayerRecord

ProfileOfLayer = Callable[[str, int, int], ProfileName | None]
"""From how a layer's codes were found, their bits, and the model's parameters to a profile; each method knows its own
(`qexport.quantizing.methods.profile_of_layer`)."""

TINY_PARAMETERS: Final = 500_000_000
"""Below it, 4 bits cost so much more than they cost larger models that other limits hold."""

_WIDE_BITS: Final = 15.5
"""Bits a weight from which an artifact without quantized layers is a 16-bit one."""


def _limits(mean_kl: float, perplexity_ratio: float, top1_agreement: float, decisive_flips: float) -> dict[str, Bounds]:
    return {
        "mean_kl": Bounds(at_most=mean_kl),
        "perplexity_ratio": Bounds(at_most=perplexity_ratio),
        "top1_agreement": Bounds(at_least=top1_agreement),
        "decisive_flips": Bounds(at_most=decisive_flips),
    }


PROFILES: Final[Mapping[ProfileName, Mapping[str, Bounds]]] = {
    "16bit": _limits(0.003, 1.003, 0.95, 0.001),
    "gptq-8bit": _limits(0.01, 1.01, 0.92, 0.005),
    "int8": _limits(0.02, 1.02, 0.9, 0.01),
    "w8a8": _limits(0.02, 1.02, 0.9, 0.01),
    "gptq-4bit": _limits(0.12, 1.12, 0.82, 0.05),
    "nf4": _limits(0.15, 1.15, 0.8, 0.06),
    "gptq-3bit": _limits(0.3, 1.4, 0.72, 0.12),
    "gptq-2bit": _limits(0.9, 2.5, 0.55, 0.25),
    "tiny": _limits(0.6, 1.8, 0.6, 0.2),
    "off": {},
}
"""Limits over all text by profile and figure. `auto` is one of these, chosen by the method."""


def profile_of_layers(layers: Sequence[LayerRecord], sizes: Sizes, of_layer: ProfileOfLayer) -> ProfileName:
    """The profile that `auto` means for an artifact: that of most of its layers.

    Args:
        layers: as the report holds them; none where nothing is quantized, or where another tool made the artifact.
        sizes: the artifact's.
        of_layer: each method's own choice.

    Raises:
        RecipeError: nothing is known of the layers' method, and the artifact has fewer bits than one that is not
            quantized.
    """
    if layers:
        (method, bits), _ = Counter((layer.method, layer.bits) for layer in layers).most_common(1)[0]
        found = of_layer(method, bits, sizes.parameters)
    else:
        found = "16bit" if sizes.bits_per_weight >= _WIDE_BITS else None
    if found is None:
        raise RecipeError(
            "nothing is known of the layers' method, so no profile can be chosen for them",
            where="profile: auto",
            mend="name the profile in the file of gates, for example gptq-4bit",
        )
    return found


def profile_for(
    settings: HasGates, layers: Sequence[LayerRecord], sizes: Sizes, of_layer: ProfileOfLayer
) -> ProfileName:
    """The profile that the settings name, with what `auto` means for an artifact.

    Raises:
        RecipeError: see `profile_of_layers`.
    """
    return profile_of_layers(layers, sizes, of_layer) if settings.profile == "auto" else settings.profile
