"""The model card, README.md: of an artifact when it is made, and of a release of it, from one template.

The metadata at its head is the hub's (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from qexport.artifact.manifest import CardText, Manifest, SourceRecord
from qexport.artifact.names import title
from qexport.artifact.report import Report
from qexport.artifact.served import confirmation
from qexport.reporting.baseline import BASELINE_HEAD, baseline_view
from qexport.reporting.markdown import escaped, markdown_table
from qexport.reporting.selection import KEY_FIGURES
from qexport.reporting.values import label_of
from qexport.reporting.view import FigureRow, GateRow, figure_row, gate_row, size_view, summarize

LIBRARIES: Final[Mapping[str, str]] = {"onnx": "onnx", "vllm": "vllm"}
"""The hub's library for a layout; transformers for the others."""

OTHER_LICENSE: Final = "other"
"""The hub's license that needs a name and a link."""

_NO_DERIVATIVES: Final = ("-nd-",)
_NO_COMMERCE: Final = ("-nc-", "noncommercial", "non-commercial", "research")


@dataclass(frozen=True)
class ReleaseWords:
    """What a release adds to the card.

    Attributes:
        name: of the release, with version and method.
        label: what servers call it that allow few characters.
        unproven: why it was released without a proof; None with one.
        signed: whether a signature lies beside it.
    """

    name: str
    label: str
    unproven: str | None
    signed: bool


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card is rendered from.

    Attributes:
        layout: the layout's name.
        base: where the base came from.
        adapter: where the adapter came from; None without one.
        text: what the layout says of itself.
        quantized: whether anything is quantized.
        notes: what a user should know; those of `text.serving` are not said twice.
        launch: the name that its servers call it; None if it has no launch files.
        report: what verification found; None without one.
        release: what a release adds; None when the artifact is made.
    """

    layout: str
    base: SourceRecord
    adapter: SourceRecord | None
    text: CardText
    quantized: bool
    notes: Sequence[str]
    launch: str | None = None
    report: Report | None = None
    release: ReleaseWords | None = None

    @classmethod
    def of_release(
        cls, manifest: Manifest, launch: str | None, report: Report | None, release: ReleaseWords
    ) -> CardFacts:
        """Those of a release, which the manifest has all but for its name and its report."""
        assert manifest.card is not None
        return cls(
            layout=manifest.layout,
            base=manifest.base,
            adapter=manifest.adapter,
            text=manifest.card,
            quantized=manifest.quantization is not None,
            notes=manifest.notes,
            launch=launch,
            report=report,
            release=release,
        )

    @property
    def sources(self) -> list[SourceRecord]:
        """Base and adapters."""
        return [self.base, *(self.adapter.each if self.adapter else [])]

    @property
    def model(self) -> str:
        """Base and adapter, for people."""
        return title(self.base.name, self.adapter.name if self.adapter else None)


def model_card(facts: CardFacts) -> str:
    """The content of README.md. It has the same bytes each time: no figure in it depends on the machine's speed."""
    page = _environment().get_template("card.md.jinja").render(facts=facts, **_parts(facts))
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{page}"


def license_problems(sources: Sequence[SourceRecord]) -> list[str]:
    """What the licenses of base and adapter forbid, and which are missing or unknown; one sentence each."""
    return [problem for source in sources for problem in _license_problems(source)]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qexport.reporting"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"escaped": escaped}
    return environment


def _metadata(facts: CardFacts) -> ModelCardData:
    hub = [source.name for source in facts.sources if source.kind == "hub"]
    relation = "quantized" if facts.quantized else "finetune"
    return ModelCardData(
        base_model=hub or None,
        base_model_relation=relation if hub else None,
        library_name=LIBRARIES.get(facts.layout, "transformers"),
        pipeline_tag="text-generation",
        quantized_by="qexport" if facts.quantized else None,
        language=_languages(facts.sources) or None,
        tags=[facts.text.tag, "qexport"],
        model_name=facts.release.name if facts.release else facts.model,
        eval_results=_results(facts.report) if facts.report else None,
        **_license(facts.sources),
    )


def _languages(sources: Sequence[SourceRecord]) -> list[str]:
    return list(dict.fromkeys(each for source in sources if source.terms for each in source.terms.languages))


def _license(sources: Sequence[SourceRecord]) -> dict[str, Any]:
    """One license if all have the same; else both, under a name of their own; none where the base's is unknown."""
    named = [source.terms for source in sources if source.terms is not None and source.terms.license is not None]
    if not named or sources[0].terms is None or sources[0].terms.license is None:
        return {}
    kinds = list(dict.fromkeys(str(terms.license) for terms in named))
    if len(kinds) > 1:
        return {"license": OTHER_LICENSE, "license_name": " and ".join(kinds)}
    first = named[0]
    return {"license": first.license, "license_name": first.license_name, "license_link": first.license_link}


def _license_problems(source: SourceRecord) -> Iterator[str]:
    terms = source.terms
    name = None if terms is None else terms.license
    if terms is None or (name is None and not terms.files):
        yield f"{source.name} names no license: who may use or pass on this model is not known"
    elif name is None or name in (OTHER_LICENSE, "unknown"):
        files = ", ".join(terms.files) or terms.license_link or "nothing that lies here"
        yield f"{source.name} has a license of its own ({terms.license_name or 'without a name'}): read {files} first"
    else:
        text = f"-{name.lower()}-"
        if any(part in text for part in _NO_DERIVATIVES):
            yield f"{source.name} is licensed under {name}, which forbids to pass on what is derived from it: keep it"
        if any(part in text for part in _NO_COMMERCE):
            yield f"{source.name} is licensed under {name}, which forbids commercial use"


def _results(report: Report) -> list[EvalResult]:
    """The key figures on text as the hub's evaluation results; tasks are results of their own."""
    text = f"held-out text, sha256 {report.identity.text_sha256}"
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-text",
            dataset_name=text,
            metric_type=figure.name,
            metric_name=label_of(figure.name),
            metric_value=figure.value,
            metric_args={"low": figure.low, "high": figure.high, "n": figure.n, "unit": figure.unit},
        )
        for figure in report.figures
        if figure.name in KEY_FIGURES and figure.domain is None
    ]
    return found + [
        EvalResult(
            task_type="text-generation",
            dataset_type=each.task,
            dataset_name=f"{each.task}, sha256 {each.sha256}",
            metric_type=each.metric,
            metric_value=each.artifact_accuracy,
            metric_args={"reference": each.reference_accuracy, "items": each.items, "num_fewshot": each.num_fewshot},
        )
        for each in report.tasks
    ]


def _parts(facts: CardFacts) -> dict[str, Any]:
    report = facts.report
    return {
        "notes": [note for note in facts.notes if note not in facts.text.serving],
        "made_from": " and ".join(_named(source) for source in facts.sources),
        "licenses": [(source.name, _license_words(source)) for source in facts.sources],
        "license_problems": license_problems(facts.sources),
        **({"summary": None} if report is None else _proof(report)),
    }


def _named(source: SourceRecord) -> str:
    revision = f"{'commit' if source.kind == 'hub' else 'version'} {source.revision}" if source.revision else None
    more = "; ".join(words for words in (revision, source.read_as) if words)
    return f"{source.name} ({more})" if more else source.name


def _license_words(source: SourceRecord) -> str:
    terms = source.terms
    if terms is None:
        return "no license named"
    name = terms.license_name if terms.license in (None, OTHER_LICENSE) and terms.license_name else terms.license
    return f"{name or 'no name'}{''.join(f', [{file}]({file})' for file in terms.files)}"


def _proof(report: Report) -> dict[str, Any]:
    """The words of the sections on verification, limits and the last release."""
    summary = summarize(report)
    figures = {figure.name: figure for figure in report.figures if figure.domain is None}
    rows = [figure_row(figures[name]) for name in KEY_FIGURES if name in figures]
    baseline = baseline_view(report)
    sizes = size_view(report.subject.sizes, report.subject.reference_bytes)
    return {
        "summary": summary,
        "sizes": f"{sizes.total}, {sizes.share} of the 16-bit model, {sizes.bits_per_weight}",
        "drift": markdown_table(("figure", "value", "95% interval", "measured on"), [*map(_drift, rows)], (1, 2)),
        "gates": markdown_table(_GATES, [_gate(gate_row(gate)) for gate in report.gates], (2, 3, 4)),
        "profile": report.profile,
        "served": [(each.label, each.runtime, confirmation(each, report.gates)) for each in report.served],
        "readers": report.readers,
        "unconfirmed": report.unconfirmed,
        "baseline": baseline,
        "baseline_table": "" if baseline is None else _baseline(baseline.rows),
    }


_GATES: Final = ("gate", "verdict", "value", "interval", "limit")


def _drift(row: FigureRow) -> list[str]:
    return [escaped(text) for text in (row.label, row.value, row.interval, row.units)]


def _gate(row: GateRow) -> list[str]:
    return [escaped(text) for text in (row.result.name, row.word, row.value, row.interval, row.tolerance)]


def _baseline(rows: Sequence[Any]) -> str:
    return markdown_table(BASELINE_HEAD, [[escaped(cell) for cell in row.cells] for row in rows], range(1, 6))
