"""The comparison with an earlier release, as texts for the page, a comment and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qexport.amounts import counted
from qexport.artifact.baseline import COMPARED
from qexport.artifact.figures import GateResult, Verdict, find_figure
from qexport.artifact.report import Report
from qexport.reporting.values import UNMEASURED, format_value, gate_limit, label_of
from qexport.reporting.view import figure_row

BASELINE_HEAD: Final = ("figure", "release", "artifact", "difference", "interval", "tolerance")
"""The columns of `BaselineRow.cells`; a verdict follows."""


@dataclass(frozen=True)
class BaselineRow:
    """One figure of both.

    Attributes:
        cells: what `BASELINE_HEAD` names.
        verdict: of the gate on the difference; None without one.
    """

    cells: list[str]
    verdict: Verdict | None


@dataclass(frozen=True)
class BaselineView:
    """What the section on the release shows.

    Attributes:
        sentence: which release, how much was paired, and how much worse the artifact may be.
        rows: one for each figure.
    """

    sentence: str
    rows: list[BaselineRow]


def baseline_view(report: Report) -> BaselineView | None:
    """The section's content; None if no release was compared."""
    if report.baseline is None:
        return None
    gates = {gate.name: gate for gate in report.gates}
    rows = [_row(report, name, of_both, gates.get(name)) for name, of_both in COMPARED.items()]
    return BaselineView(_sentence(report), rows)


def _sentence(report: Report) -> str:
    assert report.baseline is not None
    paired = find_figure(report.figures, "baseline_mean_kl")
    measured = "nothing" if paired is None else f"{paired.tokens or 0:,} tokens of {counted(paired.n, paired.unit)}"
    return (
        f"Compared with the release {report.baseline.name} ({report.baseline.method}), paired on {measured}. "
        f"The artifact may drift at most {report.baseline.margin:.0%} further."
    )


def _row(report: Report, name: str, of_both: str, gate: GateResult | None) -> BaselineRow:
    own, difference = find_figure(report.figures, of_both), find_figure(report.figures, name)
    shown = None if difference is None else figure_row(difference)
    cells = [
        label_of(of_both),
        format_value(of_both, getattr(report.baseline, of_both)),
        UNMEASURED if own is None else figure_row(own).value,
        UNMEASURED if shown is None else shown.value,
        UNMEASURED if shown is None else shown.interval,
        UNMEASURED if gate is None else gate_limit(gate),
    ]
    return BaselineRow(cells, None if gate is None else gate.verdict)
