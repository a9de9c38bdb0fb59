"""Compares several artifacts of one model, and finds those that no other beats in both size and drift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.report import Report
from qexport.errors import InputError, listed
from qexport.reporting.selection import key_figures

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


def compare(reports: Sequence[Report]) -> ArtifactComparison:
    """Compares reports.

    Args:
        reports: at least one.

    Raises:
        InputError: they were measured on different text, models, tokenizers or prompts, or with different settings, so
            that their figures cannot be compared; or one of them has no mean KL divergence.
    """
    _check_comparable(reports)
    points = [(report.subject.sizes.total_bytes, _mean_kl(report)) for report in reports]
    costs = [(size, figure.value) for size, figure in points]
    entries = [
        ComparedArtifact(label, report, figure, on_front=not any(_beats(other, cost) for other in costs))
        for label, report, (_, figure), cost in zip(_labels(reports), reports, points, costs, strict=True)
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
        figure.name: {"value": figure.value, "low": figure.low, "high": figure.high}
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
