"""The report as a comment on a pull request."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import Final

from qexport.artifact.figures import Verdict
from qexport.artifact.report import Report
from qexport.reporting.baseline import BASELINE_HEAD, BaselineRow, baseline_view
from qexport.reporting.suites import HEAD, LENGTH_HEAD, NUMBERS, length_rows, suite_views
from qexport.reporting.values import Piece, cut, visible
from qexport.reporting.view import VERDICT_WORDS, GateRow, PromptView, summarize
from qexport.reporting.weights_view import COLUMNS, cells, weights_view

_SIGNS: Final[dict[Verdict, str]] = {"pass": "✅", "fail": "❌", "undecided": "❔"}
_LONGEST_PROMPT: Final = 2000
_SPECIAL: Final = re.compile(r"[\\`*_\[\]|~:$]")
_MENTIONS: Final = re.compile(r"[@#!]")


def report_markdown(report: Report) -> str:
    """Verdict, gates, key figures, and the worst prompt, folded. Text of models and prompts is escaped, so
    that it cannot add formatting, mentions or links.
    """
    return "\n\n".join(_parts(report)) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are escaped already.

    Args:
        head: the columns' names.
        rows: one cell per column.
        numbers: the columns that are aligned to the right.
    """
    ruler = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def escaped(text: str) -> str:
    """Text of unknown origin as one line of Markdown, also inside a table's cell."""
    line = html.escape(" ".join(visible(text).split()), quote=False)
    line = _SPECIAL.sub(r"\\\g<0>", line)
    return _MENTIONS.sub(r"\g<0>&#8203;", line)


def _parts(report: Report) -> Iterator[str]:
    summary = summarize(report)
    yield f"### {_SIGNS[summary.verdict]} {summary.word}: {escaped(summary.name)}"
    told = [summary.sentence, f"{summary.how}.", summary.distance, summary.confirmation]
    yield " ".join(escaped(text) for text in told if text)
    if summary.gates:
        head = ("gate", "verdict", "value", "interval", "tolerance", "n", "reason")
        yield markdown_table(head, [_gate_row(gate) for gate in summary.gates], (2, 3, 4, 5))
    if baseline := baseline_view(report):
        yield escaped(baseline.sentence)
        head = (*BASELINE_HEAD, "verdict")
        yield markdown_table(head, [_baseline_row(row) for row in baseline.rows], range(1, len(BASELINE_HEAD)))
    if summary.figures:
        rows = [[escaped(text) for text in (row.label, row.value, row.interval)] for row in summary.figures]
        yield markdown_table(("figure", "value", "95% interval"), rows, (1, 2))
    if weights := weights_view(report):
        yield f"Weights: {escaped(weights.sentence)}"
        if faulty := [row for row in weights.rows if row.fault]:
            yield markdown_table(COLUMNS, [[escaped(text) for text in cells(row)] for row in faulty], (1, 2, 3, 4))
        if weights.unequal:
            yield "\n".join(f"- {escaped(name)}: {escaped(text)}" for name, text in weights.unequal)
    if rows := [row for suite in suite_views(report) for row in suite.count_rows]:
        yield markdown_table(HEAD, [[escaped(cell) for cell in row] for row in rows], NUMBERS)
    if rows := length_rows(report):
        yield markdown_table(LENGTH_HEAD, [[escaped(cell) for cell in row] for row in rows], NUMBERS)
    for prompt in summary.prompts:
        yield from _prompt(prompt)
    yield f"<sub>qexport {escaped(report.qexport_version)}, report `{report.digest()[:12]}`</sub>"


def _gate_row(gate: GateRow) -> list[str]:
    verdict = f"{_SIGNS[gate.result.verdict]} {gate.word}"
    measured = (gate.value, gate.interval, gate.tolerance, gate.units)
    return [escaped(gate.result.name), verdict, *map(escaped, measured), escaped(gate.result.reason)]


def _baseline_row(row: BaselineRow) -> list[str]:
    verdict = "" if row.verdict is None else f"{_SIGNS[row.verdict]} {VERDICT_WORDS[row.verdict].lower()}"
    return [*map(escaped, row.cells), verdict]


def _prompt(prompt: PromptView) -> Iterator[str]:
    """Markdown is not interpreted inside `pre`, so HTML's escapes are enough."""
    found = prompt.comparison
    yield f"<details><summary>Worst prompt: {escaped(found.id)}, edit distance {found.edit_distance:.0%}</summary>"
    for label, content in (
        ("prompt", _escaped_html(cut(found.prompt, _LONGEST_PROMPT))),
        ("reference", _marked(prompt.reference, "del")),
        ("artifact", _marked(prompt.artifact, "ins")),
    ):
        yield f"{label}:\n<pre>{content}</pre>"
    yield "</details>"


def _marked(pieces: Sequence[Piece], mark: str) -> str:
    return "".join(
        _escaped_html(piece.text) if piece.shared else f"<{mark}>{_escaped_html(piece.text)}</{mark}>"
        for piece in pieces
    )


def _escaped_html(text: str) -> str:
    return html.escape(visible(text))
