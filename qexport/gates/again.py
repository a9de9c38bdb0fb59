"""Deciding again on what a report holds, without measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qexport.artifact.figures import Figure, GateResult
from qexport.artifact.report import Report
from qexport.gates.deciding import FIGURE_OF, decide, expected_gates
from qexport.gates.limits import above_floor, limits_of
from qexport.gates.profiles import profile_for
from qexport.gates.settings import HasGates


def decide_again(report: Report, settings: HasGates) -> tuple[list[GateResult], list[str]]:
    """Decides the gates of other settings on a report's figures.

    Of the built-in gates, those of the artifact's checks are decided always, those of the adapter where there is one,
    `graph` and `better_than_rtn` where the report has them or what they are decided on; none that the settings waive.

    Returns:
        The results, and a note for each limit of the profile that the noise floor has moved and each waived gate.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor, or `auto` cannot choose a profile.
    """
    profile = profile_for(settings, report.layers, report.subject.sizes)
    limits, notes = above_floor(limits_of(settings, profile), noise_floors(report.figures))
    decided = {result.name for result in report.gates}
    rounded = FIGURE_OF["better_than_rtn"] in {figure.name for figure in report.figures}
    expected, waived = expected_gates(
        settings,
        adapter=report.reference.adapter is not None,
        nearest=rounded or "better_than_rtn" in decided,
        graph="graph" in decided or any(check.gate == "graph" for check in report.checks),
    )
    return decide(limits, report.all_figures, report.checks, expected), [*notes, *waived]


def noise_floors(figures: Sequence[Figure]) -> Mapping[str, float]:
    """The noise floor of each figure over all text that has one, by its name."""
    return {
        figure.name: figure.noise_floor
        for figure in figures
        if figure.domain is None and figure.noise_floor is not None
    }
