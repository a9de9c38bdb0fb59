"""A sweep as a page and as a table: each variant with its size, drift, gates and cost, and which one to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from qexport.amounts import counted, duration, size
from qexport.artifact.figures import find_figure
from qexport.artifact.report import Report
from qexport.artifact.sweep import SweepRecord, VariantRecord, VariantState
from qexport.reporting.comparison import ArtifactComparison, compare, pareto_plot
from qexport.reporting.html import render
from qexport.reporting.selection import IDENTITY_LABELS
from qexport.reporting.terminal import new_table
from qexport.reporting.values import UNMEASURED, cut, visible
from qexport.reporting.view import figure_row
from qexport.reporting.writing import PAGE_NAME

STATE_WORDS: Final[dict[VariantState, str]] = {
    "waiting": "waiting",
    "pass": "passed",
    "fail": "failed",
    "undecided": "undecided",
    "refused": "refused",
    "skipped": "skipped",
}
_STYLES: Final[dict[VariantState, str]] = {
    "waiting": "dim",
    "pass": "green",
    "fail": "bold red",
    "undecided": "bold yellow",
    "refused": "bold red",
    "skipped": "dim",
}
_HEAD: Final = (
    "variant", "result", "size", "mean KL", "perplexity ratio", "top-1", "gates", "windows", "processor time", "time",
)  # fmt: skip
_FIGURES: Final = ("perplexity_ratio", "top1_agreement")
_LONGEST: Final = 200
"""Characters of a reason in the terminal; the page has all of it."""


@dataclass(frozen=True)
class _Row:
    """One variant as it is shown.

    Attributes:
        record: what has become of it.
        cells: of all columns but variant and result.
        interval: of the mean KL divergence; None if it was not measured.
        page: of its report, from the sweep's folder; None if it was not measured.
        recommended: whether it is the one to take.
    """

    record: VariantRecord
    cells: list[str]
    interval: str | None
    page: str | None
    recommended: bool


def sweep_page(record: SweepRecord, reports: Mapping[str, Report]) -> str:
    """One self-contained page: the recommendation, the plot of size against drift, and the table.

    Args:
        record: of the sweep.
        reports: of the variants that were measured, by their names.
    """
    comparison = _comparison(record, reports)
    first = next(iter(reports.values()), None)
    return render(
        "sweep.html.jinja",
        record=record,
        sentence=recommendation(record, reports),
        rows=_rows(record, reports),
        head=_HEAD,
        words=STATE_WORDS,
        plot=pareto_plot(comparison) if comparison else None,
        protocol=None if first is None else first.protocol,
        identity=[]
        if first is None
        else [(label, getattr(first.identity, name)) for name, label in IDENTITY_LABELS.items()],
    )


def sweep_summary(record: SweepRecord, reports: Mapping[str, Report]) -> RenderableType:
    """For the terminal: the table in 80 columns, why variants were not made, and the recommendation."""
    table = new_table()
    table.add_column("variant", style="bold", overflow="fold")
    table.add_column("result", no_wrap=True)
    for name in ("size", "mean KL", "top-1", "gates", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(record, reports):
        total, drift, _, agreement, gates, _, _, seconds = row.cells
        state = Text(STATE_WORDS[row.record.state], _STYLES[row.record.state])
        table.add_row(Text(visible(row.record.name)), state, total, drift, agreement, gates, seconds)
    return Group(table, *_reasons(record), Text(""), Text(visible(recommendation(record, reports)), style="bold"))


def _reasons(record: SweepRecord) -> list[Text]:
    """Why variants did not pass, one line each."""
    told = [each for each in record.variants if each.state not in {"pass", "waiting"}]
    lines = [
        Text.assemble((f"{each.name}: ", _STYLES[each.state]), cut(visible(each.reason), _LONGEST)) for each in told
    ]
    return [Text(""), *lines] if lines else []


def recommendation(record: SweepRecord, reports: Mapping[str, Report]) -> str:
    """Which variant to take, and why, in a sentence."""
    waiting = sum(each.state == "waiting" for each in record.variants)
    rest = f" {counted(waiting, 'variant')} {'is' if waiting == 1 else 'are'} still to be made." if waiting else ""
    best = record.variant(record.recommended or "")
    if best is None:
        return f"No variant passes its gates.{rest}" if not waiting else f"No variant has passed yet.{rest}"
    figure = find_figure(reports[best.name].figures, "mean_kl")
    drift = f", mean KL divergence {figure_row(figure).value}" if figure else ""
    place = f": {best.folder}" if best.folder else ""
    return f"Recommended: {best.name}, the smallest that passes ({_size(best)}{drift}){place}.{rest}"


def _comparison(record: SweepRecord, reports: Mapping[str, Report]) -> ArtifactComparison | None:
    names = [each.name for each in record.variants if each.name in reports]
    return compare([reports[name] for name in names], names) if names else None


def _rows(record: SweepRecord, reports: Mapping[str, Report]) -> list[_Row]:
    return [
        _Row(each, _cells(each, report), _interval(report), _page(each), each.name == record.recommended)
        for each in record.variants
        for report in [reports.get(each.name)]
    ]


def _page(record: VariantRecord) -> str | None:
    return None if record.report is None else str(PurePosixPath(record.report).with_name(PAGE_NAME))


def _cells(record: VariantRecord, report: Report | None) -> list[str]:
    return [
        _size(record),
        *(_measured(report) if report else [UNMEASURED] * (2 + len(_FIGURES))),
        UNMEASURED if record.windows is None else str(record.windows),
        *(_cost(record)),
    ]


def _measured(report: Report) -> list[str]:
    drift, *others = (find_figure(report.figures, name) for name in ("mean_kl", *_FIGURES))
    passed = sum(gate.passed for gate in report.gates)
    return [
        figure_row(drift).value if drift else UNMEASURED,
        *(figure_row(figure).value if figure else UNMEASURED for figure in others),
        f"{passed} of {len(report.gates)}",
    ]


def _interval(report: Report | None) -> str | None:
    figure = find_figure(report.figures, "mean_kl") if report else None
    return figure_row(figure).interval if figure else None


def _cost(record: VariantRecord) -> list[str]:
    if record.cost is None:
        return [UNMEASURED, UNMEASURED]
    return [duration(record.cost.cpu_seconds), duration(record.cost.seconds)]


def _size(record: VariantRecord) -> str:
    return UNMEASURED if record.total_bytes is None else size(record.total_bytes, decimals=1)
