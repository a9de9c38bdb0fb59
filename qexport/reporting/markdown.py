"""The report as a comment on a pull request."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import Final

from qexport.artifact.figures import Figure, GateResult, Verdict
from qexport.artifact.measurements import PromptComparison
from qexport.artifact.report import Report
from qexport.reporting.selection import VERDICT_WORDS, by_urgency, key_figures, sentence, worst_prompts
from qexport.reporting.values import (
    cut,
    figure_interval,
    figure_value,
    gate_interval,
    gate_limit,
    gate_units,
    gate_value,
    label_of,
    size,
)
from qexport.reporting.visible_text import Piece, visible, word_diff

_SIGNS: Final[dict[Verdict, str]] = {"pass": "✅", "fail": "❌", "undecided": "❔"}
_LONGEST_TEXT: Final = 2000
_SPECIAL: Final = re.compile(r"[\\`*_\[\]|~:$]")
_CALLS: Final = re.compile(r"[@#!]")


def report_markdown(report: Report) -> str:
    """Verdict, gates, key figures, and the worst prompt, folded. Text of models and prompts is escaped: it formats
    nothing, calls nobody and links nowhere.
    """
    return "\n\n".join(_parts(report)) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are escaped already.

    Args:
        head: the columns' names.
        rows: a cell for each column.
        numbers: the columns that are aligned to the right.
    """
    ruler = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def escaped(text: str) -> str:
    """Text of unknown origin as one line of Markdown, also inside a table's cell."""
    line = html.escape(" ".join(visible(text).split()), quote=False)
    line = _SPECIAL.sub(r"\\\g<0>", line)
    return _CALLS.sub(r"\g<0>&#8203;", line)


def _parts(report: Report) -> Iterator[str]:
    verdict = f"{_SIGNS[report.verdict]} {VERDICT_WORDS[report.verdict]}"
    yield f"### {verdict}: {escaped(report.subject.name)}"
    yield f"{escaped(sentence(report))} {escaped(report.subject.method)}, {_size(report)}."
    if report.gates:
        head = ("gate", "verdict", "value", "interval", "tolerance", "n", "reason")
        yield markdown_table(head, [_gate_row(gate) for gate in by_urgency(report.gates)], (2, 3, 4, 5))
    figures = key_figures(report)
    if figures:
        yield markdown_table(("figure", "value", "95% interval"), [_figure_row(figure) for figure in figures], (1, 2))
    for prompt in worst_prompts(report)[:1]:
        yield from _prompt(prompt)
    yield f"<sub>qexport {escaped(report.qexport_version)}, report `{report.digest()[:12]}`</sub>"


def _size(report: Report) -> str:
    sizes = report.subject.sizes
    return f"{size(sizes.total_bytes)}, {sizes.bits_per_weight:.2f} bits a weight"


def _gate_row(gate: GateResult) -> list[str]:
    verdict = f"{_SIGNS[gate.verdict]} {VERDICT_WORDS[gate.verdict].lower()}"
    measured = (gate_value(gate), gate_interval(gate), gate_limit(gate), gate_units(gate))
    return [escaped(gate.name), verdict, *(escaped(text) for text in measured), escaped(gate.reason)]


def _figure_row(figure: Figure) -> list[str]:
    return [escaped(label_of(figure.name)), escaped(figure_value(figure)), escaped(figure_interval(figure))]


def _prompt(prompt: PromptComparison) -> Iterator[str]:
    """Inside `pre` nothing is Markdown, so HTML's escapes are enough."""
    reference, artifact = word_diff(*(cut(text, _LONGEST_TEXT) for text in (prompt.reference, prompt.artifact)))
    yield f"<details><summary>Worst prompt: {escaped(prompt.id)}, edit distance {prompt.edit_distance:.0%}</summary>"
    for label, content in (
        ("prompt", _escaped_html(cut(prompt.prompt, _LONGEST_TEXT))),
        ("reference", _marked(reference, "del")),
        ("artifact", _marked(artifact, "ins")),
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
