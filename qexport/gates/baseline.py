"""Gates on an artifact's differences from an earlier release: how much worse it may be, and how that is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from qexport.artifact.baseline import COMPARED, BaselineRecord
from qexport.artifact.figures import CATALOGUE
from qexport.gates import HasGates
from qexport.gates.limits import NOISE_MARGIN, Bound, Limit, waiver
from qexport.gates.profiles import PROFILES

PAIRED: Final = tuple(COMPARED)
"""The figures that a release is compared in. Each has a gate."""

ONLY_FAIL: Final = frozenset({"baseline_perplexity_ratio", "baseline_decisive_flips"})
"""Their gates fail where the artifact is shown to be worse, and pass otherwise. A difference of two artifacts in these
two scatters so much that tens of thousands of tokens often leave open whether it is beyond the margin."""

_SOURCE: Final = "verify.baseline_margin"


def baseline_limits(
    baseline: BaselineRecord, floors: Mapping[str, float], settings: HasGates
) -> tuple[list[Limit], list[str]]:
    """The limits on how much worse than a release an artifact may be, and a note on each that is waived.

    Limits that the settings have on these figures take their place; null waives one.

    Args:
        baseline: the release.
        floors: the noise floors, by figure; see `qexport.gates.limits.above_floor`.
        settings: the user's.
    """
    limits, waived = list[Limit](), list[str]()
    for name, (bound, value) in _allowed(baseline, floors).items():
        own = settings.gates.get(name)
        if name in settings.gates and own is None:
            waived.append(waiver(name, name))
        elif own is None or (own.at_most is None and own.at_least is None):
            limits.append(Limit(name, None, bound, value, True, source=_SOURCE, only_fails=name in ONLY_FAIL))
    return limits, waived


def _allowed(baseline: BaselineRecord, floors: Mapping[str, float]) -> Mapping[str, tuple[Bound, float]]:
    """By figure, the side and the value of its limit.

    A release's drift counts as no less than what the profile `16bit` allows for another order of sums. Each limit is at
    least three times the noise floor, as every limit is. Over text like what the reference itself would write, the
    log-perplexity grows by the mean KL divergence, so that is what a change of it is compared with.
    """
    kl, changed, flips = (_room_of(baseline, floors, name) for name in ("mean_kl", "top1_agreement", "decisive_flips"))
    log_perplexity = max(kl, NOISE_MARGIN * abs(math.log(floors.get("perplexity_ratio", 1.0))))
    return {
        "baseline_mean_kl": ("at_most", kl),
        "baseline_perplexity_ratio": ("at_most", math.exp(log_perplexity)),
        "baseline_top1_agreement": ("at_least", -changed),
        "baseline_decisive_flips": ("at_most", flips),
    }


def _room_of(baseline: BaselineRecord, floors: Mapping[str, float], name: str) -> float:
    ideal = CATALOGUE[name].ideal
    assert ideal is not None
    measured: float = getattr(baseline, name)
    bounds = PROFILES["16bit"].limits[name]
    least = bounds.at_most if bounds.at_least is None else bounds.at_least
    assert least is not None
    drift = max(abs(measured - ideal), abs(least - ideal))
    return max(baseline.margin * drift, NOISE_MARGIN * abs(floors.get(name, ideal) - ideal))
