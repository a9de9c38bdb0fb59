"""The report as one page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Final

from markupsafe import Markup

from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.measurements import PromptComparison
from qexport.artifact.report import Report
from qexport.reporting.charts import block_drift, flips_by_margin, forest, kl_histogram
from qexport.reporting.layer_chart import layer_chart
from qexport.reporting.page import render
from qexport.reporting.selection import (
    IDENTITY_LABELS,
    by_result,
    by_urgency,
    domain_figures,
    fallen_back,
    loss_ratio,
    sentence,
    worst_layers,
    worst_prompts,
    worst_tokens,
)
from qexport.reporting.values import UNMEASURED, figure_interval, figure_value, kind_of, label_of, size
from qexport.reporting.visible_text import Piece, word_diff

_SECTIONS: Final = (
    ("gates", "Gates"),
    ("figures", "Key figures"),
    ("divergence", "Divergence"),
    ("layers", "Blocks and layers"),
    ("tokens", "Worst tokens"),
    ("prompts", "Worst prompts"),
    ("checks", "Checks"),
    ("tasks", "Tasks"),
    ("cost", "Size and speed"),
    ("origin", "Origin"),
    ("trust", "Confirmed"),
)
_FORESTS: Final = ("mean_kl", "perplexity_ratio")


@dataclass(frozen=True)
class _Tile:
    label: str
    value: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Cost:
    label: str
    reference: str
    artifact: str
    ratio: str


@dataclass(frozen=True)
class _Prompt:
    comparison: PromptComparison
    reference: list[Piece]
    artifact: list[Piece]


@dataclass(frozen=True)
class _Forest:
    title: str
    chart: Markup


def report_html(report: Report) -> str:
    """The page. The same report gives the same text."""
    return render(
        "report.html.jinja",
        report=report,
        sentence=sentence(report),
        sections=[(name, label) for name, label in _SECTIONS if name != "tasks" or report.tasks],
        gates=by_urgency(report.gates),
        checks=by_result(report.checks),
        tiles=list(_tiles(report)),
        figures=sorted(report.all_figures, key=lambda figure: figure.domain is not None),
        kl_histogram=kl_histogram(report.kl_histogram, report.figures),
        flips_by_margin=flips_by_margin(report.flips_by_margin) if report.flips_by_margin else None,
        block_drift=block_drift(report.block_drift) if report.block_drift else None,
        forests=list(_forests(report)),
        layer_chart=layer_chart(report.layers) if any(map(loss_ratio, report.layers)) else None,
        worst_layers=worst_layers(report.layers),
        fallen_back=fallen_back(report.layers),
        worst_tokens=worst_tokens(report),
        prompts=[_Prompt(each, *word_diff(each.reference, each.artifact)) for each in worst_prompts(report)],
        cost=list(_costs(report)),
        identity=[(label, getattr(report.identity, name)) for name, label in IDENTITY_LABELS.items()],
        environment=report.environment.model_dump().items(),
    )


def _tiles(report: Report) -> Iterator[_Tile]:
    figures = report.all_figures
    ratio, reference = find_figure(figures, "perplexity_ratio"), find_figure(figures, "reference_perplexity")
    if artifact := find_figure(figures, "artifact_perplexity"):
        notes = [f"reference {figure_value(reference)}" if reference else "", f"ratio {_whole(ratio)}" if ratio else ""]
        yield _Tile("perplexity", figure_value(artifact), tuple(filter(None, notes)))
    if mean := find_figure(figures, "mean_kl"):
        tail = find_figure(figures, "kl_p99")
        yield _tile(mean, f"99% quantile {figure_value(tail)}" if tail else "")
    for name in ("top1_agreement", "decisive_flips"):
        if figure := find_figure(figures, name):
            yield _tile(figure)
    if report.generations:
        equal, distance = report.generations, find_figure(figures, "edit_distance")
        share = f"{equal.identical} of {equal.prompts}"
        yield _Tile("equal continuations", share, (f"edit distance {_whole(distance)}",) if distance else ())
    yield from _cost_tiles(report)


def _tile(figure: Figure, note: str = "") -> _Tile:
    shown = figure_interval(figure)
    notes = ("" if shown == UNMEASURED else f"95% interval {shown}", note)
    return _Tile(label_of(figure.name), figure_value(figure), tuple(filter(None, notes)))


def _cost_tiles(report: Report) -> Iterator[_Tile]:
    sizes, reference = report.subject.sizes, report.subject.reference_bytes
    share = f"{_share(sizes.total_bytes, reference)} of {size(reference)}"
    yield _Tile("size", size(sizes.total_bytes), (share, f"{sizes.bits_per_weight:.2f} bits a weight"))
    if speed := report.timings.speed:
        share = f"{_share(speed.artifact_bytes, speed.reference_bytes)} of {size(speed.reference_bytes)}"
        yield _Tile("memory when loaded", size(speed.artifact_bytes), (share,))
        ours, theirs = median(speed.artifact_tokens_per_second), median(speed.reference_tokens_per_second)
        ratio = _speed_ratio(report, "speed_ratio", ours / theirs)
        yield _Tile(
            "speed with qexport.load", f"{ours:.3g} tokens/s", (f"reference {theirs:.3g} tokens/s", f"ratio {ratio}")
        )
    else:
        yield _Tile("speed", UNMEASURED, ("not measured",))


def _whole(figure: Figure) -> str:
    shown = figure_interval(figure)
    return figure_value(figure) if shown == UNMEASURED else f"{figure_value(figure)} {shown}"


def _speed_ratio(report: Report, name: str, of_medians: float) -> str:
    """The figure, the median of the repeats' ratios; where the report has none, the ratio of the medians."""
    figure = find_figure(report.all_figures, name)
    return _whole(figure) if figure else f"{of_medians:.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else UNMEASURED


def _forests(report: Report) -> Iterator[_Forest]:
    for name in _FORESTS:
        if figures := domain_figures(report.figures, name):
            kind = kind_of(name)
            unit = ", nats" if kind.form == "nats" else ""
            title = f"{kind.label[0].upper()}{kind.label[1:]}{unit}, by domain"
            yield _Forest(title, forest(figures, report.gates, kind.ideal))


def _costs(report: Report) -> Iterator[_Cost]:
    reference, artifact = report.subject.reference_bytes, report.subject.sizes.total_bytes
    yield _Cost("tensors on disk", size(reference), size(artifact), _share(artifact, reference))
    speed = report.timings.speed
    if speed is None:
        return
    memory = _share(speed.artifact_bytes, speed.reference_bytes)
    yield _Cost("parameters and buffers in memory", size(speed.reference_bytes), size(speed.artifact_bytes), memory)
    rows = (
        ("tokens per second", speed.reference_tokens_per_second, speed.artifact_tokens_per_second, "speed_ratio"),
        (
            "seconds to the first token",
            speed.reference_first_token_seconds,
            speed.artifact_first_token_seconds,
            "first_token_ratio",
        ),
    )
    for label, theirs, ours, name in rows:
        ratio = _speed_ratio(report, name, median(ours) / median(theirs))
        yield _Cost(label, f"{median(theirs):.3g}", f"{median(ours):.3g}", ratio)
