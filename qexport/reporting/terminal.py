"""The report as tables on a terminal, or as plain text if the console is not one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qexport.artifact.figures import GateResult, Verdict
from qexport.artifact.report import Report
from qexport.reporting.baseline import BASELINE_HEAD, BaselineView, baseline_view
from qexport.reporting.values import Piece, cut, gate_limit, visible
from qexport.reporting.view import FEW_EQUAL, VERDICT_WORDS, FigureRow, GateRow, PromptView, Summary, summarize

VERDICT_STYLES: Final[dict[Verdict, str]] = {"pass": "green", "fail": "bold red", "undecided": "bold yellow"}
_LONGEST_PROMPT: Final = 240


def report_summary(report: Report) -> RenderableType:
    """Verdict, gates, the comparison with a release, figures, and the prompt whose continuations differ most."""
    return Group(*_parts(summarize(report), baseline_view(report)))


def _parts(summary: Summary, baseline: BaselineView | None) -> Iterator[RenderableType]:
    yield Text.assemble((visible(summary.name), "bold"), f"  {visible(summary.how)}")
    yield from verdict_lines(summary)
    yield Text(visible(summary.confirmation))
    if summary.gates:
        yield Padding(gate_table(summary.gates), (1, 0, 0, 0))
    if baseline is not None:
        yield Padding(baseline_table(baseline), (1, 0, 0, 0))
    yield Padding(figures_table(summary.figures), (1, 0, 0, 0))
    if summary.few_equal:
        yield Padding(few_equal_line(), (1, 0, 0, 0))
    if summary.prompts:
        yield Padding(prompt_table(summary.prompts), (1, 0, 0, 0))


def verdict_lines(summary: Summary) -> Iterator[Text]:
    """The verdict and its reason, and the distance to the nearest limit."""
    yield Text.assemble((summary.word, VERDICT_STYLES[summary.verdict]), f"  {visible(summary.sentence)}")
    if summary.distance:
        yield Text(visible(summary.distance))


def few_equal_line() -> Text:
    """What few equal continuations mean."""
    return Text(FEW_EQUAL, style="dim")


def gate_table(gates: Sequence[GateRow]) -> Table:
    """One row per gate; below the table, the reason of each gate that did not pass."""
    table = new_table()
    table.add_column("gate", style="bold", overflow="fold", min_width=16)
    table.add_column("verdict", no_wrap=True)
    for name in ("value", "interval", "tolerance"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for gate in gates:
        result = gate.result
        verdict = Text(gate.word, VERDICT_STYLES[result.verdict])
        narrow = (gate_limit(result, unit=False), f"{result.n:,}" if result.unit else "")
        table.add_row(Text(visible(result.name)), verdict, *map(Text, (gate.value, gate.interval, *narrow)))
    if not all(gate.result.passed for gate in gates):
        table.caption = _reasons([gate.result for gate in gates])
        table.caption_style, table.caption_justify = "", "left"
    return table


def _reasons(gates: Sequence[GateResult]) -> Text:
    lines = [
        Text.assemble((f"{visible(gate.name)}: ", VERDICT_STYLES[gate.verdict]), visible(gate.reason))
        for gate in gates
        if not gate.passed
    ]
    return Text("\n").join(lines)


def baseline_table(baseline: BaselineView) -> Table:
    """One row per figure that the artifact and the release have; above the table, which release that is."""
    table = new_table()
    table.title, table.title_style, table.title_justify = Text(visible(baseline.sentence)), "", "left"
    for name in BASELINE_HEAD:
        table.add_column(name, justify="left" if name == "figure" else "right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for row in baseline.rows:
        verdict = row.verdict and Text(VERDICT_WORDS[row.verdict].lower(), VERDICT_STYLES[row.verdict])
        table.add_row(*map(Text, row.cells), verdict or "")
    return table


def figures_table(figures: Sequence[FigureRow]) -> Table:
    """One row per figure."""
    table = new_table()
    table.add_column("figure", style="bold")
    for name in ("value", "95% interval", "n"):
        table.add_column(name, justify="right")
    for figure in figures:
        table.add_row(figure.label, figure.value, Text(figure.interval), figure.units)
    return table


def prompt_table(prompts: Sequence[PromptView]) -> Table:
    """Both continuations side by side; words that only one of them has are struck through or underlined."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_lines=True, expand=True)
    table.add_column("prompt", ratio=1, style="bold", overflow="fold")
    table.add_column("reference continuation", ratio=2, overflow="fold")
    table.add_column("artifact continuation", ratio=2, overflow="fold")
    for each in prompts:
        marked = (_marked(each.reference, "strike red"), _marked(each.artifact, "underline green"))
        prompt = " ".join(visible(each.comparison.prompt).split())
        table.add_row(Text(cut(prompt, _LONGEST_PROMPT)), *marked)
    return table


def new_table() -> Table:
    """An empty table in the style of all tables."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _marked(pieces: Sequence[Piece], style: str) -> Text:
    return Text.assemble(*((visible(piece.text), "" if piece.shared else style) for piece in pieces))
