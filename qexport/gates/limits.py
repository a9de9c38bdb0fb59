"""Which limits apply to an artifact: the profile's, replaced by the user's, and none tighter than can be measured."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from qexport.artifact.figures import CATALOGUE, Figure, GateResult
from qexport.errors import RecipeError, listed
from qexport.gates import Bounds, DomainBounds, HasGates, ProfileName
from qexport.gates.profiles import LOOSEST, PROFILES, stricter

NOISE_MARGIN: Final = 3.0
"""A limit must allow at least this many times the drift that computing in a wider dtype alone causes."""

_ROUNDING: Final = 1e-9
"""So that 0.3 is not tighter than 3 * 0.1."""

Bound = Literal["at_most", "at_least"]

_OF_USER: Final = "the user's gates"
_OF_MARGIN: Final = "verify.tasks.margin"


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
        source: who sets it, for people.
        only_fails: whether its gate passes unless the limit is shown to be broken.
    """

    figure: str
    domain: str | None
    bound: Bound
    value: float
    by_user: bool
    one_sided: bool = True
    source: str = ""
    only_fails: bool = False

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
        profile: the settings' profile, with `auto` and `strict` resolved.
    """
    strict = settings.profile == "strict"
    ours = stricter(PROFILES[profile].limits) if strict else PROFILES[profile].limits
    names = [name for name in CATALOGUE if name in ours or name in settings.gates]
    source = f"the profile {profile}, strict" if strict else f"the profile {profile}"
    found = [limit for name in names for limit in _limits(name, ours.get(name), settings)]
    return [replace(limit, source=_OF_USER if limit.by_user else source) for limit in found]


def waiver(gate: str, figure: str) -> str:
    """The note on a gate whose figure the user has set to null."""
    return f"the gate {gate} is waived: verify.gates sets {figure} to null"


def margin_limits(margin: float, figures: Sequence[Figure], limits: Sequence[Limit]) -> list[Limit]:
    """The limit on every task's change of accuracy: at most so much may be lost.

    Args:
        margin: the largest loss that passes.
        figures: what was measured; without any task there is one limit, which stays undecided.
        limits: the others, which come first where they limit a task from below too.
    """
    tasks = [figure.domain for figure in figures if figure.name == "accuracy_change"]
    sides = {(limit.domain, limit.bound) for limit in limits if limit.figure == "accuracy_change"}
    return [
        Limit("accuracy_change", task, "at_least", -margin, True, (task, "at_most") not in sides, _OF_MARGIN)
        for task in tasks or [None]
        if (task, "at_least") not in sides
    ]


def margin_of(gates: Sequence[GateResult]) -> float | None:
    """The margin of tasks that a report's gates were decided with; None if there was none."""
    return next((-gate.limit for gate in gates if gate.source == _OF_MARGIN and gate.limit is not None), None)


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
    return [_moved(limit, tighter[limit]) if limit in tighter else limit for limit in limits], notes


def _moved(limit: Limit, value: float) -> Limit:
    return replace(limit, value=value, source=f"{limit.source}, moved to three times the noise floor".lstrip(", "))


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
    loosest = LOOSEST[limit.figure]
    if loosest.at_most is not None:
        return moved > loosest.at_most
    return loosest.at_least is not None and moved < loosest.at_least


def _at_best(limit: Limit, value: float) -> str:
    words = "at most" if limit.bound == "at_most" else "at least"
    return f"{words} {limit.value:g}, where {words} {value:.10g} is the tightest that can be distinguished from noise"


SPEED: Final = frozenset({"speed_ratio", "first_token_ratio"})
"""Figures of an artifact's speed: a runtime's, where one has measured them and this process has not."""


def decided_here(limits: Sequence[Limit], own: Iterable[Figure], through: Iterable[Figure]) -> list[Limit]:
    """The limits without those on the speed of codes, if runtimes have measured it: theirs are decided on theirs.

    Args:
        limits: the recipe's and the profile's.
        own: the figures of this process.
        through: the figures of all runtimes.
    """
    here, there = {figure.name for figure in own}, {figure.name for figure in through}
    return [each for each in limits if each.figure not in (SPEED & there) - here]
