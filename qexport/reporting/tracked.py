"""What an experiment tracker is told of an artifact: settings, figures, verdicts and digests as flat names and values,
and the report's files. Nothing of it names a path or a user of the machine, since report and manifest do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from qexport.artifact.figures import Figure, GateResult, Verdict
from qexport.artifact.manifest import LISTING_NAME, Manifest
from qexport.artifact.report import Report
from qexport.reporting.selection import sentence
from qexport.reporting.writing import report_files

_LONGEST_KEY: Final = 150
_LONGEST_VALUE: Final = 500
"""Characters; older servers of MLflow refuse longer settings."""

_MOST_SETTINGS: Final = 300
_MOST_FIGURES: Final = 5000
_ILLEGAL: Final = re.compile(r"[^\w\-. ]", re.ASCII)


@dataclass(frozen=True)
class Tracked:
    """What is told of one artifact, as MLflow divides it.

    Attributes:
        name: of the entry.
        passed: whether every gate passed.
        params: the settings, at most 300, each of at most 500 characters.
        metrics: figures with the ends of their intervals (`low/`, `high/`), limits (`limit/`) and sizes.
        tags: verdicts, names and digests.
        files: contents by path: the report in all its forms, and the digests of the artifact's files. Never a weight.
    """

    name: str
    passed: bool
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def tracked(
    name: str,
    verdict: Verdict,
    *,
    recipe: Mapping[str, Any],
    gates: Sequence[GateResult] = (),
    report: Report | None = None,
    manifest: Manifest | None = None,
    listing: str | None = None,
    root: str | None = None,
) -> Tracked:
    """What is told of an artifact.

    Args:
        name: of the entry.
        verdict: over all gates.
        recipe: settings without a path of the machine, nested.
        gates: those of the report; of a run that ended before it, those that were decided.
        report: what was measured; None if nothing was.
        manifest: the artifact's; None for one that another program made, or if nothing was quantized.
        listing: the text of `SHA256SUMS`.
        root: its digest.
    """
    settings = dict(recipe) if report is None else {**recipe, "protocol": report.protocol.model_dump(mode="json")}
    files = {} if report is None else {f"report/{path}": text for path, text in report_files(report).items()}
    return Tracked(
        name=name[:_LONGEST_KEY],
        passed=verdict == "pass",
        params=_settings(settings),
        metrics=_figures(gates, report),
        tags=_keyed({"qexport.verdict": verdict, **_gate_tags(gates), **_names(report, manifest, root)}),
        files=files if listing is None else {**files, LISTING_NAME: listing},
    )


def _settings(recipe: Mapping[str, Any]) -> dict[str, str]:
    found = _keyed({key: text for key, text in _flat(recipe) if text})
    return dict(list(found.items())[:_MOST_SETTINGS])


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, each in value.items():
        if isinstance(each, Mapping):
            yield from _flat(each, f"{prefix}{key}.")
        elif each is not None:
            yield f"{prefix}{key}", each if isinstance(each, str) else json.dumps(each)


def _figures(gates: Sequence[GateResult], report: Report | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for gate in gates:
        if gate.limit is not None:
            found[f"limit/{_segment(_gate_name(gate))}"] = gate.limit
    if report is None:
        return found | {_segment(_gate_name(gate)): gate.value for gate in gates if gate.value is not None}
    sizes = report.subject.sizes
    found |= {"total_bytes": sizes.total_bytes, "bits_per_weight": sizes.bits_per_weight}
    found |= {"reference_bytes": report.subject.reference_bytes, "seconds": report.timings.seconds}
    for figure in report.all_figures:
        found |= _values(figure, "")
    for served in report.served:
        for figure in served.figures:
            found |= _values(figure, f"served.{_segment(served.label, 60)}/")
    return dict(list(found.items())[:_MOST_FIGURES])


def _values(figure: Figure, group: str) -> dict[str, float]:
    """The estimate and the ends of its interval. A name never stands for a value and for a group of others: MLflow's
    folders could not hold both.
    """
    name = _segment(figure.name if figure.domain is None else f"{figure.name}.{figure.domain}")
    low, high = figure.interval
    ends = {f"{group}low/{name}": low, f"{group}high/{name}": high}
    return {f"{group}{name}": figure.value, **{key: value for key, value in ends.items() if value is not None}}


def _gate_tags(gates: Sequence[GateResult]) -> dict[str, str]:
    return {f"qexport.gate.{_gate_name(gate)}": gate.verdict for gate in gates}


def _gate_name(gate: GateResult) -> str:
    """With its domain as in the name of the figure."""
    return gate.name if gate.domain is None else gate.name.replace(f"[{gate.domain}]", f".{gate.domain}")


def _names(report: Report | None, manifest: Manifest | None, root: str | None) -> dict[str, str]:
    found: dict[str, str | None] = {"qexport.root": root}
    if manifest is not None:
        found |= {"qexport.layout": manifest.layout, "qexport.version": manifest.qexport_version}
        found |= {"qexport.recipe_sha256": manifest.recipe_sha256}
    if report is not None:
        adapter = report.reference.adapter
        found |= {f"qexport.{name}": digest for name, digest in report.identity.model_dump().items()}
        found |= {"qexport.base": report.reference.base.name, "qexport.adapter": adapter.name if adapter else None}
        found |= {"qexport.method": report.subject.method, "qexport.report_sha256": report.digest()}
        found |= {"qexport.command": report.command, "mlflow.note.content": sentence(report)}
    return {name: text for name, text in found.items() if text}


def _keyed(texts: Mapping[str, str]) -> dict[str, str]:
    """With keys that are allowed, and values that are not too long."""
    return {_segment(key): _cut(text) for key, text in texts.items()}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _segment(text: str, longest: int = _LONGEST_KEY) -> str:
    """A part of a name without the characters that MLflow refuses, or takes for a path. One that is cut ends in a part
    of its digest: two that begin alike stay two.
    """
    plain = _ILLEGAL.sub("_", text)
    if len(plain) <= longest:
        return plain
    return f"{plain[: longest - 9]}-{sha256(text.encode()).hexdigest()[:8]}"
