"""Deciding again on what a report holds, without measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from qexport.artifact.figures import Figure, GateResult
from qexport.artifact.report import Report
from qexport.gates.deciding import BUILT_IN, FIGURE_OF, decide
from qexport.gates.limits import above_floor, limits_of
from qexport.gates.profiles import profile_of_layers
from qexport.gates.settings import HasGates

_ALWAYS: Final = ("config", "tokenizer")


def decide_again(report: Report, settings: HasGates) -> tuple[list[GateResult], list[str]]:
    """Decides the gates of other settings on a report's figures.

    Of the built-in gates, those of the artifact's checks are decided always, the others where the report has them or
    the figure that they limit.

    Returns:
        The results, and a note for each limit of the profile that the noise floor has moved.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor, or `auto` cannot choose a profile.
    """
    profile = settings.profile
    if profile == "auto":
        profile = profile_of_layers(report.layers, report.subject.sizes)
    limits, notes = above_floor(limits_of(settings, profile), noise_floors(report.figures))
    decided_before = {result.name for result in report.gates}
    measured = {figure.name for figure in report.figures}
    expected = [
        name for name in BUILT_IN if name in _ALWAYS or name in decided_before or FIGURE_OF.get(name) in measured
    ]
    return decide(limits, report.all_figures, report.checks, expected), notes


def noise_floors(figures: Sequence[Figure]) -> Mapping[str, float]:
    """The noise floor of each figure over all text that has one, by its name."""
    return {
        figure.name: figure.noise_floor
        for figure in figures
        if figure.domain is None and figure.noise_floor is not None
    }
