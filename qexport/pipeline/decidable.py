"""Refuses gates that the held-out text cannot decide, whatever is measured: too few documents, or no such domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from qexport.amounts import counted
from qexport.artifact.figures import CATALOGUE
from qexport.errors import RecipeError
from qexport.gates import ProfileName
from qexport.gates.baseline import PAIRED, baseline_limits
from qexport.gates.limits import Limit, limits_of
from qexport.statistics.means import PLANNED_UNITS, most_degrees, sequence_is_bounded
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.document_sums import Baseline, held_out_windows
from qexport.verifying.units import Units, document_units


def refuse_undecidable(settings: VerifySettings, held_out: HeldOut, baseline: Baseline | None = None) -> None:
    """Refuses limits on figures of the held-out text that stay undecided with every window that may be measured.

    A confidence sequence has ends only from a number of documents on, which depends on their lengths and domains alone.

    Args:
        settings: the limits. Every profile limits the same figures, so it need not be known which one applies.
        held_out: all windows that may be measured.
        baseline: the release that the artifact is compared with, on the windows that it was measured on too.

    Raises:
        RecipeError: with the number of windows or documents that would do.
    """
    profile: ProfileName = "off" if settings.profile == "off" else "16bit"
    limits = [limit for limit in limits_of(settings, profile) if CATALOGUE[limit.figure].teacher_forced]
    _refuse_missing_domains(limits, held_out)
    units = document_units(held_out, len(held_out.domains), PLANNED_UNITS)
    if baseline is not None:
        paired, _ = baseline_limits(baseline.record, {}, settings)
        limits = [*limits, *paired]
        _refuse_short_baseline(settings, held_out, units, baseline, [each for each in limits if each.figure in PAIRED])
    problems = {limit.name: problem for limit in limits if (problem := _too_few(limit.domain, units, held_out))}
    if problems:
        raise RecipeError(
            f"{counted(len(problems), 'gate')} can never be decided: a confidence sequence needs more documents",
            where=f"{held_out.origin}: {', '.join(dict.fromkeys(problems.values()))}; gates: {', '.join(problems)}",
            mend=_mend(settings, held_out, units, [limit for limit in limits if limit.name in problems]),
        )


def _refuse_short_baseline(
    settings: VerifySettings, held_out: HeldOut, units: Units, baseline: Baseline, limits: Sequence[Limit]
) -> None:
    """Refuses limits on differences that all windows of the text could decide, and those of the baseline cannot."""
    rows = baseline.shared_rows(held_out_windows(held_out))
    open_ones = [limit.name for limit in limits if _short_in(rows, limit.domain, units, held_out)]
    if open_ones:
        raise RecipeError(
            f"{counted(len(open_ones), 'gate')} can never be decided: the baseline was measured on too few documents",
            where=f"{settings.baseline}: it has {len(rows)} of the {counted(len(units.row_domains), 'window')} of "
            f"{held_out.origin}; gates: {', '.join(open_ones)}",
            mend="verify the artifact in production again with verify.windows and verify.max_windows as here",
        )


def _short_in(rows: Sequence[int], domain: str | None, units: Units, held_out: HeldOut) -> bool:
    """Whether all windows, in this domain, have enough documents, and these rows have not."""
    own = [row for row in rows if domain in {None, held_out.domains[row]}]
    return _bounded(_chosen(domain, units, held_out), 1.0) and not (own and _bounded(units.chosen(own), 1.0))


def _refuse_missing_domains(limits: Sequence[Limit], held_out: HeldOut) -> None:
    named = [domain for domain in dict.fromkeys(held_out.domains) if domain is not None]
    missing = [limit.name for limit in limits if limit.domain is not None and limit.domain not in named]
    if missing:
        raise RecipeError(
            f"{counted(len(missing), 'gate')} can never be decided: the held-out text has no such domain",
            where=f"{held_out.origin}: {', '.join(missing)}",
            mend=f"limit domains that it has: {', '.join(named)}" if named else "give its lines a domain",
        )


def _too_few(domain: str | None, units: Units, held_out: HeldOut) -> str | None:
    """How much the text holds, if that is too little."""
    chosen = _chosen(domain, units, held_out)
    if _bounded(chosen, 1.0):
        return None
    place = "" if domain is None else f" of the domain {domain}"
    return f"{counted(len(chosen.row_domains), 'window')}{place} with {counted(len(chosen.domains), 'document')}"


def _chosen(domain: str | None, units: Units, held_out: HeldOut) -> Units:
    return units.chosen([row for row, own in enumerate(held_out.domains) if domain in {None, own}])


def _bounded(units: Units, growth: float) -> bool:
    """Whether a sequence over so many times these units has ends."""
    degrees, n = _degrees(units), math.floor(len(units.domains) * growth)
    return sequence_is_bounded(n, degrees + n - len(units.domains), PLANNED_UNITS)


def _degrees(units: Units) -> float:
    sizes = np.ones(len(units.domains)) if units.sizes is None else units.sizes
    return most_degrees(units.strata, sizes)


def _mend(settings: VerifySettings, held_out: HeldOut, units: Units, limits: Sequence[Limit]) -> str:
    """The number of windows that would do, if the text's documents go on as they are; where there is no more text, the
    number of documents.
    """
    otherwise = "or remove these limits (verify.profile=off sets none)"
    measured = len(held_out.domains)
    parts = [_chosen(domain, units, held_out) for domain in dict.fromkeys(limit.domain for limit in limits)]
    needed = _least(lambda windows: all(_bounded(part, windows / measured) for part in parts), measured)
    if measured < settings.max_windows:
        fewest = _least(lambda number: sequence_is_bounded(number, number - 1, PLANNED_UNITS), 1)
        return f"give more text, as lines of a .jsonl file: at least {fewest} documents of like length, {otherwise}"
    others = ", if other documents follow in the text," if len(units.domains) == 1 < measured else ","
    return f"set verify.max_windows to {needed} or more{others} {otherwise}"


def _least(holds: Callable[[int], bool], first: int) -> int:
    """The least number from the first one on that will do."""
    number = first
    while not holds(number):
        number += 1
    return number
