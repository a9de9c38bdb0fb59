"""Deciding again on what a report holds, without measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qexport.artifact.figures import Figure, GateResult
from qexport.artifact.report import Report
from qexport.gates.deciding import FIGURE_OF, BuiltIn, decide, waived
from qexport.gates.limits import above_floor, limits_of
from qexport.gates.profiles import profile_of_layers
from qexport.gates.settings import HasGates


def decide_again(report: Report, settings: HasGates) -> tuple[list[GateResult], list[str]]:
    """Decides the gates of other settings on a report's figures.

    Of the built-in gates, those of the artifact's checks are decided always, those of the adapter where there is one,
    and `better_than_rtn` where the report has it or its figure; none that the settings waive.

    Returns:
        The results, and a note for each limit of the profile that the noise floor has moved and each waived gate.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor, or `auto` cannot choose a profile.
    """
    profile = settings.profile
    if profile == "auto":
        profile = profile_of_layers(report.layers, report.subject.sizes)
    limits, notes = above_floor(limits_of(settings, profile), noise_floors(report.figures))
    expected, given_up = _expected(report), waived(settings)
    results = decide(limits, report.all_figures, report.checks, [name for name in expected if name not in given_up])
    return results, [*notes, *(note for name, note in given_up.items() if name in expected)]


def _expected(report: Report) -> list[BuiltIn]:
    rounded = FIGURE_OF["better_than_rtn"] in {figure.name for figure in report.figures}
    applies: dict[BuiltIn, bool] = {
        "config": True,
        "tokenizer": True,
        "merge": report.reference.adapter is not None,
        "adapter": report.reference.adapter is not None,
        "better_than_rtn": rounded or "better_than_rtn" in {result.name for result in report.gates},
    }
    return [name for name, expected in applies.items() if expected]


def noise_floors(figures: Sequence[Figure]) -> Mapping[str, float]:
    """The noise floor of each figure over all text that has one, by its name."""
    return {
        figure.name: figure.noise_floor
        for figure in figures
        if figure.domain is None and figure.noise_floor is not None
    }
