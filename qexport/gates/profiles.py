"""Profiles: limits by method, bits and size, from published and own measurements, and which one an artifact gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qexport.artifact.figures import CATALOGUE
from qexport.artifact.manifest import Sizes
from qexport.artifact.report import ProfileRecord
from qexport.errors import RecipeError
from qexport.gates import Bounds, HasGates, ProfileName
from qexport.records import LayerRecord

ProfileOfLayer = Callable[[str, int, int], ProfileName | None]
"""From how a layer's codes were found, their bits, and the model's parameters to a profile, by each method's own rule
(`qexport.quantizing.profile_of_layer`)."""

TINY_PARAMETERS: Final = 500_000_000
"""In models with fewer parameters, 4 bits cost so much more quality that other limits apply."""

LARGE_PARAMETERS: Final = 3_000_000_000
"""From here on, 4 bits cost half of what they cost a model of 1B."""

LARGEST_PARAMETERS: Final = 30_000_000_000
"""From here on, half of that again."""

_WIDE_BITS: Final = 15.5
"""Bits per weight from which an artifact without quantized layers is a 16-bit one."""


@dataclass(frozen=True)
class Profile:
    """Limits over all text.

    Attributes:
        limits: by figure.
        reason: what they are derived from, for people; docs/gates.md has the sources.
    """

    limits: Mapping[str, Bounds]
    reason: str


def _profile(
    mean_kl: float, perplexity_ratio: float, top1_agreement: float, decisive_flips: float, reason: str
) -> Profile:
    limits = {
        "mean_kl": Bounds(at_most=mean_kl),
        "perplexity_ratio": Bounds(at_most=perplexity_ratio),
        "top1_agreement": Bounds(at_least=top1_agreement),
        "decisive_flips": Bounds(at_most=decisive_flips),
    }
    return Profile(limits, reason)


PROFILES: Final[Mapping[ProfileName, Profile]] = {
    "16bit": _profile(0.003, 1.003, 0.95, 0.001, "the same weights; only another order of sums"),
    "gptq-8bit": _profile(0.01, 1.01, 0.92, 0.005, "four times 8-bit GPTQ of a model of 135M"),
    "int8": _profile(0.02, 1.02, 0.9, 0.01, "four times LLM.int8 of a model of 135M"),
    "w8a8": _profile(0.1, 1.05, 0.83, 0.05, "three times W8A8 of a model of 135M, activations rounded"),
    "fp8": _profile(0.1, 1.1, 0.83, 0.05, "three times FP8 of a model of 135M, activations rounded"),
    "gptq-4bit": _profile(0.12, 1.12, 0.82, 0.05, "below 3B: GPTQ's perplexity ratios of 125M to 1.3B"),
    "gptq-4bit-3b": _profile(0.06, 1.06, 0.88, 0.025, "3B and more: twice q4_K_M of Llama 3 8B"),
    "gptq-4bit-30b": _profile(0.03, 1.04, 0.91, 0.015, "30B and more: half of what models of 3B may drift"),
    "nf4": _profile(0.15, 1.15, 0.8, 0.06, "below 3B: a quarter more than GPTQ, since nothing is calibrated"),
    "nf4-3b": _profile(0.08, 1.08, 0.86, 0.035, "3B and more: a little above q4_0 of Llama 3 8B"),
    "nf4-30b": _profile(0.04, 1.05, 0.89, 0.02, "30B and more: half of what models of 3B may drift"),
    "gptq-3bit": _profile(0.3, 1.4, 0.72, 0.12, "a little above q3_K_S of Llama 3 8B"),
    "gptq-2bit": _profile(0.9, 2.5, 0.55, 0.25, "twice q2_K of Llama 3 8B"),
    "tiny": _profile(0.25, 1.25, 0.72, 0.1, "below 500M: 1.6 times 4-bit GPTQ of a model of 135M"),
    "tiny-nf4": _profile(0.55, 1.65, 0.63, 0.17, "below 500M: 1.6 times NF4 of a model of 135M"),
    "tiny-mxfp4": _profile(0.72, 1.75, 0.57, 0.23, "below 500M: 1.6 times MXFP4 of a model of 135M"),
    "tiny-3bit": _profile(0.6, 1.8, 0.6, 0.2, "below 500M, 3 bits and fewer: twice gptq-3bit"),
    "off": Profile({}, "no limits"),
}
"""By name. `auto` is one of these, chosen by method, bits and size; `strict` is the same one with tighter limits."""

LOOSEST: Final = PROFILES["gptq-2bit"].limits
"""No profile's limit is moved beyond these: a gate with such a limit would pass a broken artifact."""

_STRICT: Final[Mapping[str, float]] = {
    "mean_kl": 0.5,
    "perplexity_ratio": 0.5,
    "top1_agreement": 0.7,
    "decisive_flips": 0.5,
}
"""What is left of the distance between a limit and the ideal value. The share of changed tokens grows with the square
root of the KL divergence, of which half is left: 4.0 % at 0.0055 nats, 8.1 % at 0.031, 28.9 % at 0.445 (llama.cpp)."""


def stricter(limits: Mapping[str, Bounds]) -> dict[str, Bounds]:
    """The limits of the variant `strict`."""
    return {name: _tightened(name, bounds) for name, bounds in limits.items()}


def _tightened(name: str, bounds: Bounds) -> Bounds:
    ideal = CATALOGUE[name].ideal
    assert ideal is not None

    def tightened(limit: float | None) -> float | None:
        return None if limit is None else round(ideal + _STRICT[name] * (limit - ideal), 6)

    return Bounds(at_most=tightened(bounds.at_most), at_least=tightened(bounds.at_least))


def by_size(
    parameters: int, *, tiny: ProfileName, small: ProfileName, large: ProfileName, largest: ProfileName
) -> ProfileName:
    """The profile of a model with so many parameters."""
    if parameters < TINY_PARAMETERS:
        return tiny
    if parameters < LARGE_PARAMETERS:
        return small
    return large if parameters < LARGEST_PARAMETERS else largest


def profile_of_layers(layers: Sequence[LayerRecord], sizes: Sizes, of_layer: ProfileOfLayer) -> ProfileName:
    """The profile that `auto` and `strict` select for an artifact: that of most of its layers.

    Args:
        layers: from the report; empty if nothing is quantized, or if another tool made the artifact.
        sizes: the artifact's.
        of_layer: each method's own rule.

    Raises:
        RecipeError: the layers' method is unknown, and the artifact has fewer bits per weight than an unquantized
            one.
    """
    if layers:
        (method, bits), _ = Counter((layer.method, layer.bits) for layer in layers).most_common(1)[0]
        found = of_layer(method, bits, sizes.parameters)
    else:
        found = "16bit" if sizes.bits_per_weight >= _WIDE_BITS else None
    if found is None:
        raise RecipeError(
            "the method of the layers is unknown, so no profile can be chosen",
            where="profile: auto or strict",
            mend="name the profile in the file of gates, for example gptq-4bit",
        )
    return found


def profile_for(
    settings: HasGates, layers: Sequence[LayerRecord], sizes: Sizes, of_layer: ProfileOfLayer
) -> ProfileName:
    """The profile that the settings name; `auto` and `strict` are resolved for this artifact."""
    return profile_of_layers(layers, sizes, of_layer) if settings.profile in {"auto", "strict"} else settings.profile


def profile_record(settings: HasGates, profile: ProfileName) -> ProfileRecord:
    """The profile for the report.

    Args:
        settings: the user's.
        profile: the profile that they resolve to.
    """
    by_name = settings.profile == profile
    return ProfileRecord(
        name=profile,
        strict=settings.profile == "strict",
        chosen="by name" if by_name else "by method and size",
        reason=PROFILES[profile].reason,
    )
