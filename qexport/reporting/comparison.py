"""Several artifacts of one model compared: as a page, as a table, as Markdown.

The comparison says which of them no other beats in both size and drift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from qexport.amounts import size
from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.report import Report
from qexport.errors import InputError, listed
from qexport.reporting.html import render
from qexport.reporting.labels import LabelPlace, label_places
from qexport.reporting.markdown import escaped, markdown_table
from qexport.reporting.selection import IDENTITY_LABELS, key_figures
from qexport.reporting.suites import SUITES
from qexport.reporting.svg import WIDTH, Axis, chart, line, linear_axis, tag, text, tick_text
from qexport.reporting.terminal import VERDICT_STYLES, new_table
from qexport.reporting.values import UNMEASURED, cut, visible
from qexport.reporting.view import VERDICT_WORDS, figure_row, size_view

_PROTOCOL: Final = ("sequence_length", "dtype", "perplexity")


@dataclass(frozen=True)
class ComparedArtifact:
    """One artifact of a comparison.

    Attributes:
        label: unique in the comparison.
        report: its report.
        mean_kl: its mean KL divergence over all text.
        on_front: no other artifact is at least as small and as near to the reference, and better in one of the two.
    """

    label: str
    report: Report
    mean_kl: Figure
    on_front: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.report.subject.sizes.total_bytes


@dataclass(frozen=True)
class ArtifactComparison:
    """Artifacts whose figures were measured in the same way, smallest first."""

    entries: tuple[ComparedArtifact, ...]

    @property
    def front(self) -> list[ComparedArtifact]:
        """The Pareto front of size and mean KL divergence."""
        return [entry for entry in self.entries if entry.on_front]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        first = self.entries[0].report
        return {
            "identity": first.identity.model_dump(mode="json"),
            "protocol": {name: getattr(first.protocol, name) for name in _PROTOCOL},
            "artifacts": [_as_dict(entry) for entry in self.entries],
        }


def compare(reports: Sequence[Report], labels: Sequence[str] | None = None) -> ArtifactComparison:
    """Compares reports.

    Args:
        reports: at least one.
        labels: what each is called, all different; by default names and methods.

    Raises:
        InputError: they were measured on different text, models, tokenizers or prompts, or with different settings, so
            that their figures cannot be compared; or one of them has no mean KL divergence.
    """
    _check_comparable(reports)
    points = [(report.subject.sizes.total_bytes, _mean_kl(report)) for report in reports]
    costs = [(size, figure.value) for size, figure in points]
    entries = [
        ComparedArtifact(label, report, figure, on_front=not any(_beats(other, cost) for other in costs))
        for label, report, (_, figure), cost in zip(labels or _labels(reports), reports, points, costs, strict=True)
    ]
    return ArtifactComparison(
        tuple(sorted(entries, key=lambda entry: (entry.total_bytes, entry.mean_kl.value, entry.label)))
    )


def _check_comparable(reports: Sequence[Report]) -> None:
    first = reports[0]
    names = _numbered_names(reports)
    problems = [
        f"{field}: {names[0]} has {_short(ours)}, {name} has {_short(theirs)}"
        for name, report in zip(names[1:], reports[1:], strict=True)
        for field, ours, theirs in _differences(first, report)
    ]
    if problems:
        raise InputError(
            "these reports cannot be compared: they were measured on different inputs or with different settings",
            where=listed(problems),
            mend="verify the artifacts with the same base, adapter, text, prompts and verify settings",
        )


def _differences(first: Report, second: Report) -> Iterator[tuple[str, object, object]]:
    for field in type(first.identity).model_fields:
        yield from _difference(field, first.identity, second.identity)
    for field in _PROTOCOL:
        yield from _difference(field, first.protocol, second.protocol)
    if first.generations and second.generations:
        yield from _difference("max_new_tokens", first.generations, second.generations)
    for suite in SUITES:
        ours, theirs = getattr(first, suite), getattr(second, suite)
        for field in ("sha256", "max_new_tokens") if ours and theirs else ():
            yield from ((f"{suite}.{name}", own, other) for name, own, other in _difference(field, ours, theirs))


def _difference(field: str, first: object, second: object) -> Iterator[tuple[str, object, object]]:
    ours, theirs = getattr(first, field), getattr(second, field)
    if ours != theirs:
        yield field, ours, theirs


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _numbered_names(reports: Sequence[Report]) -> list[str]:
    return [f"report {index} ({report.subject.name})" for index, report in enumerate(reports, 1)]


def _mean_kl(report: Report) -> Figure:
    figure = find_figure(report.figures, "mean_kl")
    if figure is None:
        raise InputError("the report has no mean KL divergence to compare", where=report.subject.name)
    return figure


def _beats(other: tuple[int, float], cost: tuple[int, float]) -> bool:
    return other != cost and other[0] <= cost[0] and other[1] <= cost[1]


def _labels(reports: Sequence[Report]) -> list[str]:
    """The names; the methods if all names are equal, both if some are, and with numbers if that is still ambiguous."""
    names = [report.subject.name for report in reports]
    methods = [report.subject.method for report in reports]
    if len(reports) > 1 and len(set(names)) == 1:
        names = methods
    elif len(set(names)) < len(names):
        names = [f"{name}, {method}" for name, method in zip(names, methods, strict=True)]
    counts, seen = Counter(names), Counter[str]()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return labels


def _as_dict(entry: ComparedArtifact) -> dict[str, Any]:
    subject = entry.report.subject
    figures = {
        figure.name: {"value": figure.value, "low": figure.interval[0], "high": figure.interval[1]}
        for figure in key_figures(entry.report)
    }
    return {
        "label": entry.label,
        "method": subject.method,
        "layouts": subject.layouts,
        "verdict": entry.report.verdict,
        "total_bytes": entry.total_bytes,
        "bits_per_weight": subject.sizes.bits_per_weight,
        "pareto_front": entry.on_front,
        "figures": figures,
        "report_sha256": entry.report.digest(),
    }


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
_RADIUS: Final = 5.5


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
    places = _label_places(comparison.entries, across, up)
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
        *(_point(entry, across, up, place) for entry, place in zip(comparison.entries, places, strict=True)),
    )


def _drift_axis(entries: Sequence[ComparedArtifact]) -> Axis:
    """Logarithmic if the drifts differ by more than `_WIDE_RANGE`."""
    ends = [end for e in entries for end in (e.mean_kl.value, *e.mean_kl.interval) if end is not None]
    low, high = min(ends), max(ends)
    if low > 0 and high / low > _WIDE_RANGE:
        return Axis(low / 1.5, high * 1.5, _BOTTOM, 26, logarithmic=True)
    return linear_axis([0.0, *ends], _BOTTOM, 26)


def _front_line(front: Sequence[ComparedArtifact], across: Axis, up: Axis) -> Markup:
    """A line of steps: artifacts above it and to the right are beaten."""
    x, y = across.place(front[0].total_bytes), up.place(front[0].mean_kl.value)
    steps = "".join(f"H{across.place(e.total_bytes):.1f}V{up.place(e.mean_kl.value):.1f}" for e in front[1:])
    return tag("path", d=f"M{x:.1f} {y:.1f}{steps}", class_="front")


def _point(entry: ComparedArtifact, across: Axis, up: Axis, place: LabelPlace) -> Markup:
    x, y = across.place(entry.total_bytes), up.place(entry.mean_kl.value)
    label = f"{entry.label}: {size(entry.total_bytes)}, {figure_row(entry.mean_kl).whole}"
    parts = [tag("title", label)]
    low, high = entry.mean_kl.interval
    if low is not None and high is not None:
        parts.append(line(x, up.place(low), x, up.place(high), "whisker"))
    if place.leads:
        parts.append(line(x, y, place.x, place.y - 4, "leader"))
    parts.append(tag("circle", cx=x, cy=y, r=_RADIUS, class_="point" if entry.on_front else "beaten"))
    parts.append(text(place.x, place.y, cut(entry.label, _LONGEST_LABEL), anchor=place.anchor, class_="mark"))
    return tag("g", *parts)


def _label_places(entries: Sequence[ComparedArtifact], across: Axis, up: Axis) -> list[LabelPlace]:
    points = [(across.place(each.total_bytes), up.place(each.mean_kl.value)) for each in entries]
    lengths = [min(len(each.label), _LONGEST_LABEL) for each in entries]
    return label_places(points, lengths, left=_LEFT, right=WIDTH, top=20, bottom=_BOTTOM, radius=_RADIUS)
