"""Which limits apply to an artifact: the profile's, replaced by the user's, and none tighter than can be measured."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from qexport.artifact.figures import CATALOGUE
from qexport.artifact.manifest import Sizes
from qexport.errors import RecipeError, listed
from qexport.gates import Bounds, DomainBounds, HasGates, ProfileName
from qexport.records import LayerRecord

ProfileOfLayer = Callable[[str, int, int], ProfileName | None]
"""From how a layer's codes were found, their bits, and the model's parameters to a profile, by each method's own rule
(`qexport.quantizing.profile_of_layer`)."""

TINY_PARAMETERS: Final = 500_000_000
"""In models with fewer parameters, 4 bits cost so much more quality that other limits apply."""

_WIDE_BITS: Final = 15.5
"""Bits per weight from which an artifact without quantized layers is a 16-bit one."""


def _profile(
    mean_kl: float, perplexity_ratio: float, top1_agreement: float, decisive_flips: float
) -> dict[str, Bounds]:
    return {
        "mean_kl": Bounds(at_most=mean_kl),
        "perplexity_ratio": Bounds(at_most=perplexity_ratio),
        "top1_agreement": Bounds(at_least=top1_agreement),
        "decisive_flips": Bounds(at_most=decisive_flips),
    }


PROFILES: Final[Mapping[ProfileName, Mapping[str, Bounds]]] = {
    "16bit": _profile(0.003, 1.003, 0.95, 0.001),
    "gptq-8bit": _profile(0.01, 1.01, 0.92, 0.005),
    "int8": _profile(0.02, 1.02, 0.9, 0.01),
    "w8a8": _profile(0.1, 1.05, 0.83, 0.05),
    "gptq-4bit": _profile(0.12, 1.12, 0.82, 0.05),
    "nf4": _profile(0.15, 1.15, 0.8, 0.06),
    "gptq-3bit": _profile(0.3, 1.4, 0.72, 0.12),
    "gptq-2bit": _profile(0.9, 2.5, 0.55, 0.25),
    "tiny": _profile(0.6, 1.8, 0.6, 0.2),
    "off": {},
}
"""Limits over all text by profile and figure. `auto` is one of these, chosen by the method."""


def profile_of_layers(layers: Sequence[LayerRecord], sizes: Sizes, of_layer: ProfileOfLayer) -> ProfileName:
    """The profile that `auto` selects for an artifact: that of most of its layers.

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
            where="profile: auto",
            mend="name the profile in the file of gates, for example gptq-4bit",
        )
    return found


def profile_for(
    settings: HasGates, layers: Sequence[LayerRecord], sizes: Sizes, of_layer: ProfileOfLayer
) -> ProfileName:
    """The profile that the settings name; `auto` is resolved for this artifact."""
    return profile_of_layers(layers, sizes, of_layer) if settings.profile == "auto" else settings.profile


NOISE_MARGIN: Final = 3.0
"""A limit must allow at least this many times the drift that computing in a wider dtype alone causes."""

_ROUNDING: Final = 1e-9
"""So that 0.3 is not tighter than 3 * 0.1."""

_LOOSEST: Final = PROFILES["gptq-2bit"]
"""No profile's limit is moved beyond these: a gate with such a limit would pass a broken artifact."""

Bound = Literal["at_most", "at_least"]


@dataclass(frozen=True)
class Limit:
    """One bound on one figure.

    Attributes:
        figure: its name in the catalogue.
        domain: None for all text.
        bound: which side.
        value: in the figure's own unit.
        by_user: whether a recipe or a file of gates sets it, not a profile.
        one_sided: whether it is the only bound on this figure and domain.
    """

    figure: str
    domain: str | None
    bound: Bound
    value: float
    by_user: bool
    one_sided: bool = True

    @property
    def name(self) -> str:
        """The gate's name: `mean_kl`, `mean_kl[code]`, or with its bound where the figure has both."""
        place = self.figure if self.domain is None else f"{self.figure}[{self.domain}]"
        return place if self.one_sided else f"{place} {self.bound}"


def limits_of(settings: HasGates, profile: ProfileName) -> list[Limit]:
    """The profile's limits, replaced by the user's, in the catalogue's order, each figure's domains after it.

    Args:
        settings: the user's. Bounds over all text replace both of the profile's; null removes them; bounds for domains
            alone keep them.
        profile: the settings' profile, with `auto` resolved.
    """
    ours = PROFILES[profile]
    names = [name for name in CATALOGUE if name in ours or name in settings.gates]
    return [limit for name in names for limit in _limits(name, ours.get(name), settings)]


def above_floor(limits: Sequence[Limit], floors: Mapping[str, float]) -> tuple[list[Limit], list[str]]:
    """The limits, none tighter than three times the noise floor, and a note for each that was moved.

    A profile's limit that is tighter is moved to three times the floor, since no user set it.

    Args:
        limits: the limits to check.
        floors: by figure, its value for the reference compared with itself, computed in a wider dtype.

    Raises:
        RecipeError: a user's limit is tighter, or a profile's would have to be moved beyond the loosest profile's. The
            error names all of them, each with the tightest possible limit.
    """
    tightest = {limit: _tightest(limit, floors) for limit in limits}
    tighter = {limit: value for limit, value in tightest.items() if value is not None}
    refused = [each for each, value in tighter.items() if each.by_user or _is_beyond_all(each, value)]
    if refused:
        raise RecipeError(
            "limits are tighter than three times the noise floor, the change that a wider dtype makes by itself",
            where=listed([f"{each.name}: {_at_best(each, tighter[each])}" for each in refused]),
            mend="loosen these limits in verify.gates, or merge in a wider dtype",
        )
    notes = [
        f"the limit of {limit.name} is {value:.10g}, not the profile's {limit.value:g}: three times the noise floor"
        for limit, value in tighter.items()
    ]
    return [replace(limit, value=tighter.get(limit, limit.value)) for limit in limits], notes


def _limits(name: str, from_profile: Bounds | None, settings: HasGates) -> Iterator[Limit]:
    from_user = settings.gates.get(name)
    removed = name in settings.gates and from_user is None
    replaced = from_user is not None and (from_user.at_most is not None or from_user.at_least is not None)
    if replaced or removed:
        from_profile = None
    for bounds, by_user in ((from_profile, False), (from_user if replaced else None, True)):
        yield from _sides(name, None, bounds, by_user=by_user)
    for domain, inner in (from_user.domains if from_user else {}).items():
        yield from _sides(name, domain, inner, by_user=True)


def _sides(name: str, domain: str | None, bounds: DomainBounds | None, *, by_user: bool) -> Iterator[Limit]:
    if bounds is None:
        return
    one_sided = bounds.at_most is None or bounds.at_least is None
    if bounds.at_most is not None:
        yield Limit(name, domain, "at_most", bounds.at_most, by_user, one_sided)
    if bounds.at_least is not None:
        yield Limit(name, domain, "at_least", bounds.at_least, by_user, one_sided)


def _tightest(limit: Limit, floors: Mapping[str, float]) -> float | None:
    """Three times the noise floor as a limit, rounded up to three digits; None if the limit is not tighter."""
    kind = CATALOGUE[limit.figure]
    if kind.ideal is None or limit.figure not in floors:
        return None
    room = NOISE_MARGIN * abs(floors[limit.figure] - kind.ideal)
    if abs(limit.value - kind.ideal) >= room * (1 - _ROUNDING):
        return None
    room = _rounded_up(room)
    return kind.ideal + room if limit.bound == "at_most" else kind.ideal - room


def _rounded_up(room: float) -> float:
    """To three digits; a room outside the normal range of floats is returned unchanged."""
    if not sys.float_info.min * 1e3 < room < sys.float_info.max / 1e3:
        return room
    unit = 10.0 ** (math.floor(math.log10(room)) - 2)
    return math.ceil(room / unit * (1 - _ROUNDING)) * unit


def _is_beyond_all(limit: Limit, moved: float) -> bool:
    loosest = _LOOSEST[limit.figure]
    if loosest.at_most is not None:
        return moved > loosest.at_most
    return loosest.at_least is not None and moved < loosest.at_least


def _at_best(limit: Limit, value: float) -> str:
    words = "at most" if limit.bound == "at_most" else "at least"
    return f"{words} {limit.value:g}, where {words} {value:.10g} is the tightest that can be distinguished from noise"
