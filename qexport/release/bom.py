"""The bill of materials of a release: a CycloneDX 1.6 ML-BOM.

It follows from manifest, config and report alone, so a check makes it again and compares, without an extra; the
standard's own schema validates it when the release is made.

https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID, uuid5

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from qexport.artifact.figures import CATALOGUE, Figure
from qexport.artifact.manifest import Manifest, SourceRecord
from qexport.artifact.report import Report
from qexport.release.provenance import source_uri
from qexport.release.record import Proof

_NAMESPACE: Final = UUID("6f9619ff-8b86-d011-b42d-00c04fc964ff")
_SPDX_ID: Final = re.compile(r"(?!LicenseRef-)[A-Za-z0-9.-]+")


def bill_of_materials(
    manifest: Manifest,
    subjects: Mapping[str, str],
    config: Mapping[str, Any],
    report: Report | None,
    proof: Proof | None,
    release: tuple[str, str],
) -> dict[str, Any]:
    """The bill of materials as JSON values.

    Args:
        manifest: of the release.
        subjects: the digests of the release's files besides evidence and report, by path.
        config: the content of config.json.
        report: what verification found.
        proof: its digests.
        release: its name and version.
    """
    parts = [*_sources(manifest), *_datasets(manifest, proof)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(_NAMESPACE, f'{release[0]} {manifest.recipe_sha256}')}",
        "version": 1,
        "metadata": {
            "component": _model(manifest, subjects, release) | {"modelCard": _card(manifest, config, report)},
            "tools": {"components": [_library("qexport", manifest.qexport_version)]},
        },
        "components": [
            *parts,
            *(_library(name, version) for name, version in manifest.packages.items() if name != "qexport"),
        ],
        "dependencies": [{"ref": "model", "dependsOn": [each["bom-ref"] for each in parts]}],
    }


def spdx_licenses(sources: Iterable[SourceRecord | None]) -> tuple[str, ...]:
    """The licenses of base and adapter that SPDX has a name for."""
    named = (each.terms.license for each in sources if each is not None and each.terms is not None)
    return tuple(dict.fromkeys(found for text in named if text and (found := _spdx(text))))


def _spdx(text: str) -> str | None:
    """SPDX's spelling of one license; None if it has none, or the text is an expression of several."""
    try:
        found = canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        return None
    return found if _SPDX_ID.fullmatch(found) else None


def _model(manifest: Manifest, subjects: Mapping[str, str], release: tuple[str, str]) -> dict[str, Any]:
    properties = {"qexport:layout": manifest.layout, "qexport:recipe_sha256": manifest.recipe_sha256}
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": release[0],
        "version": release[1],
        "properties": [{"name": name, "value": value} for name, value in properties.items()],
        "components": [_digested("file", file, digest) for file, digest in sorted(subjects.items())],
        **_licenses(manifest.base),
    }


def _sources(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for role, source in manifest.roles:
        known = {"version": source.revision, "purl": source_uri(source)}
        yield {
            "type": "machine-learning-model",
            "bom-ref": role,
            "name": source.name,
            "components": [
                _digested("file", f"{role}/{file}", digest) for file, digest in sorted(source.sha256.items())
            ],
            **{key: value for key, value in known.items() if value},
            **_licenses(source),
        }


def _licenses(source: SourceRecord) -> dict[str, Any]:
    found = spdx_licenses([source])
    return {"licenses": [{"license": {"id": each}} for each in found]} if found else {}


def _datasets(manifest: Manifest, proof: Proof | None) -> Iterator[dict[str, Any]]:
    if manifest.calibration is not None:
        yield _digested("data", "calibration text", manifest.calibration.sha256)
    if proof is not None:
        yield _digested("data", "held-out text", proof.held_out_sha256)
        if proof.prompts_sha256 is not None:
            yield _digested("data", "prompts", proof.prompts_sha256)


def _library(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{quote(name)}@{quote(version)}"
    return {"type": "library", "bom-ref": f"{name}=={version}", "name": name, "version": version, "purl": purl}


def _digested(kind: str, name: str, digest: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": _ref(name), "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _ref(name: str) -> str:
    return f"sha256:{quote(name)}"


def _card(manifest: Manifest, config: Mapping[str, Any], report: Report | None) -> dict[str, Any]:
    """The part of the standard on a model: https://cyclonedx.org/docs/1.6/json/#metadata_component_modelCard."""
    figures = [] if report is None else [figure for figure in report.figures if figure.domain is None]
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": str(config.get("model_type", "")),
            "modelArchitecture": _architecture(config),
            "datasets": [{"ref": _ref("calibration text")}] if manifest.calibration is not None else [],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [_metric(figure) for figure in figures]},
        "considerations": {
            "technicalLimitations": [*manifest.notes, *([] if report is None else report.unconfirmed)],
        },
    }


def _architecture(config: Mapping[str, Any]) -> str:
    """The first that config.json names, which may be a stranger's."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _metric(figure: Figure) -> dict[str, Any]:
    known = figure.low is not None and figure.high is not None
    bounds = {"confidenceInterval": {"lowerBound": str(figure.low), "upperBound": str(figure.high)}} if known else {}
    return {"type": figure.name, "value": str(figure.value), "slice": CATALOGUE[figure.name].label, **bounds}
