"""The report as one self-contained page: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qexport.amounts import counted, duration, moment, size
from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.measurements import Pace
from qexport.artifact.report import Report
from qexport.reporting.baseline import BASELINE_HEAD, baseline_view
from qexport.reporting.charts import block_drift, flips_by_margin, forest, kl_histogram
from qexport.reporting.layer_chart import layer_chart
from qexport.reporting.selection import (
    IDENTITY_LABELS,
    by_result,
    domain_figures,
    fallen_back,
    loss_ratio,
    worst_layers,
    worst_prompts,
    worst_tokens,
)
from qexport.reporting.suites import HEAD, LENGTH_HEAD, length_rows, suite_views
from qexport.reporting.svg import gauge
from qexport.reporting.values import UNMEASURED, format_value, kind_of, visible, visible_token
from qexport.reporting.view import VERDICT_WORDS, equal_texts, figure_row, prompt_view, share, size_view, summarize
from qexport.reporting.weights_view import COLUMNS, cells, weights_view


def render(template: str, **content: Any) -> str:
    """A page from one of the files in `templates/`."""
    return _environment().get_template(template).render(**content)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qexport.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (format_value, visible, visible_token, gauge, size, duration, moment, counted)
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals["verdict_words"] = VERDICT_WORDS
    return environment


_SECTIONS: Final = (
    ("gates", "Gates"),
    ("baseline", "Against the release"),
    ("figures", "Key figures"),
    ("divergence", "Divergence"),
    ("layers", "Blocks and layers"),
    ("weights", "Weights"),
    ("tokens", "Worst tokens"),
    ("prompts", "Worst prompts"),
    ("suites", "Suites"),
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
class _Forest:
    title: str
    chart: Markup


def report_html(report: Report) -> str:
    """The page. The same report gives the same text."""
    weights, baseline = weights_view(report), baseline_view(report)
    suites, lengths = suite_views(report), length_rows(report)
    optional = (
        ("tasks", report.tasks),
        ("suites", suites or lengths),
        ("weights", weights),
        ("baseline", baseline),
    )
    absent = {name for name, found in optional if not found}
    return render(
        "report.html.jinja",
        report=report,
        summary=summarize(report),
        sections=[(name, label) for name, label in _SECTIONS if name not in absent],
        suites=suites,
        suite_head=HEAD,
        length_rows=lengths,
        length_head=LENGTH_HEAD,
        checks=by_result(report.checks),
        tiles=list(_tiles(report)),
        figures=[
            (figure, figure_row(figure))
            for figure in sorted(report.all_figures, key=lambda figure: figure.domain is not None)
        ],
        kl_histogram=kl_histogram(report.kl_histogram, report.figures),
        flips_by_margin=flips_by_margin(report.flips_by_margin) if report.flips_by_margin else None,
        block_drift=block_drift(report.block_drift) if report.block_drift else None,
        forests=list(_forests(report)),
        layer_chart=layer_chart(report.layers) if any(map(loss_ratio, report.layers)) else None,
        worst_layers=worst_layers(report.layers),
        baseline=baseline,
        baseline_head=BASELINE_HEAD,
        weights=weights,
        weight_columns=COLUMNS,
        weight_cells=[cells(row) for row in weights.rows] if weights else [],
        fallen_back=fallen_back(report.layers),
        worst_tokens=worst_tokens(report),
        prompts=[prompt_view(each) for each in worst_prompts(report)],
        equal_texts=equal_texts(report.generations) if report.generations else "",
        sizes=size_view(report.subject.sizes, report.subject.reference_bytes),
        cost=list(_costs(report)),
        paces=list(_paces(report)),
        identity=[(label, getattr(report.identity, name)) for name, label in IDENTITY_LABELS.items()],
        environment=report.environment.model_dump().items(),
    )


def _tiles(report: Report) -> Iterator[_Tile]:
    rows = {figure.name: figure_row(figure) for figure in report.all_figures if figure.domain is None}
    if artifact := rows.get("artifact_perplexity"):
        reference, ratio = rows.get("reference_perplexity"), rows.get("perplexity_ratio")
        yield _tile(
            "perplexity",
            artifact.value,
            f"reference {reference.value}" if reference else None,
            f"ratio {ratio.whole}" if ratio else None,
        )
    for name in ("mean_kl", "top1_agreement", "decisive_flips"):
        if row := rows.get(name):
            tail = rows.get("kl_p99") if name == "mean_kl" else None
            measured = None if row.interval == UNMEASURED else f"95% interval {row.interval}"
            yield _tile(row.label, row.value, measured, f"99% quantile {tail.value}" if tail else None)
    if report.generations:
        distance, equal = rows.get("edit_distance"), report.generations
        note = f"edit distance {distance.whole}" if distance else None
        yield _tile("equal continuations", f"{equal.identical} of {equal.prompts}", note)
    yield from _cost_tiles(report)


def _tile(label: str, value: str, *notes: str | None) -> _Tile:
    return _Tile(label, value, tuple(note for note in notes if note))


def _cost_tiles(report: Report) -> Iterator[_Tile]:
    sizes = size_view(report.subject.sizes, report.subject.reference_bytes)
    yield _tile("size", sizes.total, f"{sizes.share} of {sizes.reference}", sizes.bits_per_weight)
    if speed := report.timings.speed:
        loaded = f"{share(speed.artifact_bytes, speed.reference_bytes)} of {size(speed.reference_bytes)}"
        yield _tile("memory when loaded", size(speed.artifact_bytes), loaded)
    paces = list(_paces(report))
    for pace in paces:
        found = pace.measured
        ours, theirs = median(found.artifact_tokens_per_second), median(found.reference_tokens_per_second)
        ratio = _ratio(pace.figures, "speed_ratio", ours / theirs)
        reference = f"reference in transformers {theirs:.3g} tokens/s"
        yield _tile(f"speed {pace.through}", f"{ours:.3g} tokens/s", reference, f"ratio {ratio}")
    if not paces:
        yield _tile("speed", UNMEASURED, "not measured")


@dataclass(frozen=True)
class _Pace:
    """What computed the artifact, and how fast it was beside the reference."""

    through: str
    measured: Pace
    figures: Sequence[Figure]


def _paces(report: Report) -> Iterator[_Pace]:
    """In the process that verified, of an ONNX graph or of what has no codes; and through runtimes.

    Earlier versions timed our reader of codes, which says nothing of any program that serves them.
    """
    graph = next((each for each in report.readers if each.startswith("onnxruntime ")), None)
    if report.timings.speed and (graph or not report.layers):
        yield _Pace(f"in {graph or 'transformers'}", report.timings.speed, report.timings.figures)
    for each in report.served:
        if each.speed is not None:
            yield _Pace(f"through {each.label}", each.speed, each.figures)


def _ratio(figures: Sequence[Figure], name: str, of_medians: float) -> str:
    """The figure, which is the median of the repeats' ratios; if there is none, the ratio of the medians."""
    figure = find_figure(figures, name)
    return figure_row(figure).whole if figure else f"{of_medians:.2f}"


def _forests(report: Report) -> Iterator[_Forest]:
    for name in _FORESTS:
        if figures := domain_figures(report.figures, name):
            kind = kind_of(name)
            unit = ", nats" if kind.form == "nats" else ""
            title = f"{kind.label[0].upper()}{kind.label[1:]}{unit}, by domain"
            yield _Forest(title, forest(figures, report.gates, kind.ideal))


def _costs(report: Report) -> Iterator[_Cost]:
    sizes = size_view(report.subject.sizes, report.subject.reference_bytes)
    yield _Cost("tensors on disk", sizes.reference, sizes.total, sizes.share)
    if speed := report.timings.speed:
        memory = share(speed.artifact_bytes, speed.reference_bytes)
        yield _Cost("parameters and buffers in memory", size(speed.reference_bytes), size(speed.artifact_bytes), memory)
    for pace in _paces(report):
        yield from _pace_rows(pace)


def _pace_rows(pace: _Pace) -> Iterator[_Cost]:
    found = pace.measured
    rows = (
        ("tokens per second", found.reference_tokens_per_second, found.artifact_tokens_per_second, "speed_ratio"),
        (
            "seconds to the first token",
            found.reference_first_token_seconds,
            found.artifact_first_token_seconds,
            "first_token_ratio",
        ),
    )
    for label, theirs, ours, name in rows:
        ratio = _ratio(pace.figures, name, median(ours) / median(theirs))
        yield _Cost(f"{label}, {pace.through}", f"{median(theirs):.3g}", f"{median(ours):.3g}", ratio)
