"""The comparison with a release, as the page, a comment and the terminal show it."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

import reports
from qexport.artifact.report import Report
from qexport.reporting.baseline import baseline_view
from qexport.reporting.html import report_html
from qexport.reporting.markdown import report_markdown
from qexport.reporting.terminal import report_summary


@pytest.fixture(scope="module")
def compared() -> Report:
    gates = [
        reports.gate_result("baseline_mean_kl", figure="baseline_mean_kl", limit=0.0155, value=0.006, low=0.002,
                            high=0.01),
        reports.gate_result("baseline_top1_agreement", figure="baseline_top1_agreement", bound="at_least",
                            limit=-0.0203, value=-0.03, low=-0.032, high=-0.028, verdict="fail"),
    ]  # fmt: skip
    figures = [*reports.figures(), *reports.baseline_figures(top1_agreement=-0.03)]
    return reports.report(gates, figures=figures, baseline=reports.baseline_record())


def shown(report: Report) -> str:
    stream = StringIO()
    Console(file=stream, width=160).print(report_summary(report))
    return stream.getvalue()


def test_a_row_has_both_figures_their_difference_and_the_verdict(compared: Report) -> None:
    view = baseline_view(compared)
    assert view is not None
    assert "the release of March (GPTQ 4-bit, group 64), paired on 19,418 tokens of 38 windows" in view.sentence
    assert "at most 10% further" in view.sentence
    rows = {row.cells[0]: row for row in view.rows}
    kl = rows["mean KL divergence"]
    assert kl.cells[1:] == ["0.155 nats", "0.161 nats", "0.006 nats", "[0.002, 0.010]", "≤ 0.0155 nats"]
    assert kl.verdict == "pass"
    top = rows["same likeliest token"]
    assert top.cells[3] == "−3.0 pp"
    assert top.verdict == "fail"
    flips = rows["decisive flips"]
    assert flips.cells[-1] == "–"
    assert flips.verdict is None


def test_page_comment_and_terminal_show_every_row(compared: Report) -> None:
    view = baseline_view(compared)
    assert view is not None
    page, comment, terminal = report_html(compared), report_markdown(compared), shown(compared)
    assert '<a href="#baseline">Against the release</a>' in page
    assert "the release of March" in page
    assert "the release of March" in comment
    assert "the release of March" in terminal
    for row in view.rows:
        assert f'<th class="wide">{row.cells[0]}</th>' in page
        assert any(line.startswith(f"| {row.cells[0]} | {row.cells[1]} |") for line in comment.splitlines())
        assert any(row.cells[0] in line and row.cells[1] in line for line in terminal.splitlines())
    assert "❌ failed" in next(line for line in comment.splitlines() if line.startswith("| same likeliest token"))


def test_without_a_release_nothing_is_said_of_one() -> None:
    report = reports.report(document_sums=reports.document_sums())
    assert baseline_view(report) is None
    assert "Against the release" not in report_html(report)
    assert "release" not in report_markdown(report)


def test_what_was_not_measured_is_a_dash() -> None:
    view = baseline_view(reports.report(baseline=reports.baseline_record()))
    assert view is not None
    assert "paired on nothing" in view.sentence
    assert view.rows[0].cells[3:] == ["–", "–", "–"]
