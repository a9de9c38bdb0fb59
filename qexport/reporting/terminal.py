"""The report as tables on a terminal; plain text where the console is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qexport.artifact.figures import GateResult, Verdict
from qexport.artifact.measurements import PromptComparison
from qexport.artifact.report import Report
from qexport.reporting.selection import VERDICT_WORDS, by_urgency, key_figures, sentence, worst_prompts
from qexport.reporting.values import (
    counted,
    cut,
    figure_interval,
    figure_value,
    gate_interval,
    gate_limit,
    gate_value,
    label_of,
    size,
)
from qexport.reporting.visible_text import Piece, visible, word_diff

VERDICT_STYLES: Final[dict[Verdict, str]] = {"pass": "green", "fail": "bold red", "undecided": "bold yellow"}
_LONGEST_PROMPT: Final = 240
_LONGEST_CONTINUATION: Final = 2000


def report_summary(report: Report) -> RenderableType:
    """Verdict, gates, figures and the prompt whose continuations differ most."""
    return Group(*_parts(report))


def _parts(report: Report) -> Iterator[RenderableType]:
    sizes = report.subject.sizes
    how = f"{report.subject.method}, {size(sizes.total_bytes)}, {sizes.bits_per_weight:.2f} bits a weight"
    yield Text.assemble((visible(report.subject.name), "bold"), f"  {visible(how)}")
    yield verdict_line(report)
    if report.gates:
        yield Padding(gate_table(report.gates), (1, 0, 0, 0))
    yield Padding(figures_table(report), (1, 0, 0, 0))
    if prompts := worst_prompts(report):
        yield Padding(prompt_table(prompts[:1]), (1, 0, 0, 0))


def verdict_line(report: Report) -> Text:
    """The verdict, and what it rests on."""
    verdict = (VERDICT_WORDS[report.verdict], VERDICT_STYLES[report.verdict])
    return Text.assemble(verdict, f"  {visible(sentence(report))}")


def gate_table(gates: Sequence[GateResult]) -> Table:
    """A row a gate, failed ones first; below the table, the reason of each one that did not pass."""
    table = new_table()
    table.add_column("gate", style="bold", overflow="fold", min_width=16)
    table.add_column("verdict", no_wrap=True)
    for name in ("value", "interval", "tolerance"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for gate in by_urgency(gates):
        verdict = Text(VERDICT_WORDS[gate.verdict].lower(), VERDICT_STYLES[gate.verdict])
        units = f"{gate.n:,}" if gate.unit else ""
        measured = (gate_value(gate), gate_interval(gate), gate_limit(gate, unit=False), units)
        table.add_row(Text(visible(gate.name)), verdict, *map(Text, measured))
    if not all(gate.passed for gate in gates):
        table.caption = _reasons(by_urgency(gates))
        table.caption_style, table.caption_justify = "", "left"
    return table


def _reasons(gates: Sequence[GateResult]) -> Text:
    lines = [
        Text.assemble((f"{visible(gate.name)}: ", VERDICT_STYLES[gate.verdict]), visible(gate.reason))
        for gate in gates
        if not gate.passed
    ]
    return Text("\n").join(lines)


def figures_table(report: Report) -> Table:
    """The key figures over all text."""
    table = new_table()
    table.add_column("figure", style="bold")
    for name in ("value", "95% interval", "n"):
        table.add_column(name, justify="right")
    for figure in key_figures(report):
        table.add_row(
            label_of(figure.name), figure_value(figure), Text(figure_interval(figure)), counted(figure.n, figure.unit)
        )
    return table


def prompt_table(prompts: Sequence[PromptComparison]) -> Table:
    """Continuations side by side; what only one of them has is struck through or underlined."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_lines=True, expand=True)
    table.add_column("prompt", ratio=1, style="bold", overflow="fold")
    table.add_column("reference goes on", ratio=2, overflow="fold")
    table.add_column("artifact goes on", ratio=2, overflow="fold")
    for each in prompts:
        reference, artifact = word_diff(*(cut(text, _LONGEST_CONTINUATION) for text in (each.reference, each.artifact)))
        marked = (_marked(reference, "strike red"), _marked(artifact, "underline green"))
        table.add_row(Text(cut(" ".join(visible(each.prompt).split()), _LONGEST_PROMPT)), *marked)
    return table


def new_table() -> Table:
    """An empty table in the style that all have."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _marked(pieces: Sequence[Piece], style: str) -> Text:
    return Text.assemble(*((visible(piece.text), "" if piece.shared else style) for piece in pieces))
