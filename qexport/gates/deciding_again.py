"""Gates decided again on the figures of a report, with other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qexport.artifact.figures import CATALOGUE, Figure, GateResult
from qexport.artifact.report import Report
from qexport.gates import HasGates
from qexport.gates.baseline import baseline_limits
from qexport.gates.deciding import FIGURE_OF, decide, expected_gates
from qexport.gates.limits import above_floor, decided_here, limits_of, margin_limits, margin_of
from qexport.gates.profiles import ProfileOfLayer, profile_for


def decide_again(report: Report, settings: HasGates, of_layer: ProfileOfLayer) -> tuple[list[GateResult], list[str]]:
    """Decides gates with other settings, on a report's figures.

    Of the built-in gates, `config` and `tokenizer` are always decided, `merge` and `adapter` if there is an adapter,
    `files`, `weights` (with an adapter `adapter_strength` too), `graph` and `better_than_rtn` if the report has them or
    what they are decided on; none that the settings waive. The gates of `verify.tasks.margin` and of `verify.baseline`
    are decided again too, with the report's margins. Limits on what only runtimes tell are undecided unless a runtime
    has computed the artifact, or another layout with the same weights.

    Args:
        report: what was measured.
        settings: the limits.
        of_layer: resolves the profile `auto`; see `qexport.gates.limits`.

    Returns:
        The results, and a note for each limit of the profile that the noise floor has moved and each waived gate.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor, or `auto` cannot choose a profile.
    """
    profile = profile_for(settings, report.layers, report.subject.sizes, of_layer)
    limits, notes = above_floor(limits_of(settings, profile), noise_floors(report.figures))
    decided = {result.name for result in report.gates}
    rounded = FIGURE_OF["better_than_rtn"] in {figure.name for figure in report.figures}
    expected, waived = expected_gates(
        settings,
        adapter=report.reference.adapter is not None,
        nearest=rounded or "better_than_rtn" in decided,
        graph="graph" in decided or any(check.gate == "graph" for check in report.checks),
        files="files" in decided or any(check.gate == "files" for check in report.checks),
        weights=report.weights is not None,
    )
    elsewhere = bool(report.served or report.served_in)
    own = [limit for limit in limits if not (CATALOGUE[limit.figure].served and elsewhere)]
    own = decided_here(own, report.all_figures, [figure for each in report.served for figure in each.figures])
    margin = margin_of(report.gates)
    margins = [] if margin is None else margin_limits(margin, report.figures, own)
    if report.baseline is not None:
        paired, given_up = baseline_limits(report.baseline, noise_floors(report.figures), settings)
        margins, waived = [*margins, *paired], [*waived, *given_up]
    return decide([*own, *margins], report.all_figures, report.checks, expected), [*notes, *waived]


def noise_floors(figures: Sequence[Figure]) -> Mapping[str, float]:
    """The noise floors of the figures over all text, by figure; figures without one are not in it."""
    return {
        figure.name: figure.noise_floor
        for figure in figures
        if figure.domain is None and figure.noise_floor is not None
    }
