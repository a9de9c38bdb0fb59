"""A comparison as a page, as a table on the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from qexport.amounts import size
from qexport.artifact.figures import find_figure
from qexport.reporting.comparison import ArtifactComparison, ComparedArtifact
from qexport.reporting.html import render
from qexport.reporting.markdown import escaped, markdown_table
from qexport.reporting.selection import IDENTITY_LABELS
from qexport.reporting.svg import WIDTH, Axis, chart, line, linear_axis, tag, text, tick_text
from qexport.reporting.terminal import VERDICT_STYLES, new_table
from qexport.reporting.values import UNMEASURED, cut
from qexport.reporting.view import VERDICT_WORDS, figure_row, size_view
from qexport.reporting.visible_text import visible

_FIGURES: Final = ("perplexity_ratio", "top1_agreement", "decisive_flips")
_HEAD: Final = (
    "artifact", "verdict", "front", "size", "bits per weight", "mean KL", "95% interval", "perplexity ratio", "top-1",
    "decisive flips",
)  # fmt: skip
_TEXT_COLUMNS: Final = 3
_LEFT: Final = 60.0
_BOTTOM: Final = 250.0
_WIDE_RANGE: Final = 20.0
_LONGEST_LABEL: Final = 26


def comparison_html(comparison: ArtifactComparison) -> str:
    """One self-contained page: the Pareto plot and the table."""
    first = comparison.entries[0].report
    return render(
        "comparison.html.jinja",
        entries=[(entry, _measured(entry)) for entry in comparison.entries],
        front=comparison.front,
        head=_HEAD,
        plot=pareto_plot(comparison),
        protocol=first.protocol,
        identity=[(label, getattr(first.identity, name)) for name, label in IDENTITY_LABELS.items()],
    )


def comparison_table(comparison: ArtifactComparison) -> Table:
    """For the terminal: the columns that fit into 80 characters."""
    table = new_table()
    table.add_column("artifact", style="bold", overflow="fold")
    for name in ("verdict", "front", "size", "bits", "mean KL", "ppl ratio", "top-1"):
        table.add_column(name, justify="left" if name in _HEAD[:_TEXT_COLUMNS] else "right", no_wrap=True)
    for entry in comparison.entries:
        verdict = Text(VERDICT_WORDS[entry.report.verdict].lower(), VERDICT_STYLES[entry.report.verdict])
        total, bits, drift, _, ratio, agreement, _ = _measured(entry)
        table.add_row(Text(visible(entry.label)), verdict, _front(entry), total, bits, drift, ratio, agreement)
    return table


def comparison_markdown(comparison: ArtifactComparison) -> str:
    """As Markdown, for a comment on a pull request."""
    rows = [
        [
            escaped(entry.label),
            VERDICT_WORDS[entry.report.verdict].lower(),
            _front(entry),
            *map(escaped, _measured(entry)),
        ]
        for entry in comparison.entries
    ]
    table = markdown_table(_HEAD, rows, range(_TEXT_COLUMNS, len(_HEAD)))
    legend = "On the front: no other is at least as small and as near to the reference."
    return f"### Artifacts compared\n\n{table}\n\n{legend}\n"


def _front(entry: ComparedArtifact) -> str:
    return "on it" if entry.on_front else ""


def _measured(entry: ComparedArtifact) -> list[str]:
    sizes = size_view(entry.report.subject.sizes, entry.report.subject.reference_bytes)
    drift = figure_row(entry.mean_kl)
    others = (find_figure(entry.report.figures, name) for name in _FIGURES)
    return [
        sizes.total,
        sizes.bits,
        drift.value,
        drift.interval,
        *(figure_row(figure).value if figure else UNMEASURED for figure in others),
    ]


def pareto_plot(comparison: ArtifactComparison) -> Markup:
    """Size on the horizontal axis, mean KL divergence with its interval on the vertical one; a line joins the front."""
    across = linear_axis([entry.total_bytes for entry in comparison.entries], _LEFT, WIDTH - 20)
    up = _drift_axis(comparison.entries)
    described = "; ".join(
        f"{entry.label}: {size(entry.total_bytes)}, {figure_row(entry.mean_kl).value}" for entry in comparison.entries
    )
    return chart(
        "pareto",
        "Size against mean KL divergence",
        f"On the front: {', '.join(entry.label for entry in comparison.front)}. All: {described}.",
        _BOTTOM + 54,
        *(line(_LEFT, up.place(tick), WIDTH - 20, up.place(tick), "grid") for tick in up.ticks(5)),
        *(text(_LEFT - 8, up.place(tick) + 4, tick_text(tick), anchor="end") for tick in up.ticks(5)),
        line(_LEFT, _BOTTOM, WIDTH - 20, _BOTTOM, "axis"),
        *(text(across.place(tick), _BOTTOM + 20, size(round(tick)), anchor="middle") for tick in across.ticks(4)),
        text((_LEFT + WIDTH - 20) / 2, _BOTTOM + 46, "bytes of all tensors", anchor="middle", class_="axis-label"),
        text(_LEFT, 12, "mean KL divergence, nats", class_="axis-label"),
        _front_line(comparison.front, across, up),
        *(_point(entry, across, up) for entry in comparison.entries),
    )


def _drift_axis(entries: Sequence[ComparedArtifact]) -> Axis:
    """Logarithmic if the drifts differ by more than `_WIDE_RANGE`."""
    ends = [end for e in entries for end in (e.mean_kl.low, e.mean_kl.value, e.mean_kl.high) if end is not None]
    low, high = min(ends), max(ends)
    if low > 0 and high / low > _WIDE_RANGE:
        return Axis(low / 1.5, high * 1.5, _BOTTOM, 26, logarithmic=True)
    return linear_axis([0.0, *ends], _BOTTOM, 26)


def _front_line(front: Sequence[ComparedArtifact], across: Axis, up: Axis) -> Markup:
    """A line of steps: artifacts above it and to the right are beaten."""
    x, y = across.place(front[0].total_bytes), up.place(front[0].mean_kl.value)
    steps = "".join(f"H{across.place(e.total_bytes):.1f}V{up.place(e.mean_kl.value):.1f}" for e in front[1:])
    return tag("path", d=f"M{x:.1f} {y:.1f}{steps}", class_="front")


def _point(entry: ComparedArtifact, across: Axis, up: Axis) -> Markup:
    x, y = across.place(entry.total_bytes), up.place(entry.mean_kl.value)
    label = f"{entry.label}: {size(entry.total_bytes)}, {figure_row(entry.mean_kl).whole}"
    parts = [tag("title", label)]
    if entry.mean_kl.low is not None and entry.mean_kl.high is not None:
        parts.append(line(x, up.place(entry.mean_kl.low), x, up.place(entry.mean_kl.high), "whisker"))
    parts.append(tag("circle", cx=x, cy=y, r=5.5, class_="point" if entry.on_front else "beaten"))
    left = x > (_LEFT + WIDTH) / 2
    anchor = "end" if left else "start"
    parts.append(
        text(x - 10 if left else x + 10, y - 9, cut(entry.label, _LONGEST_LABEL), anchor=anchor, class_="mark")
    )
    return tag("g", *parts)
