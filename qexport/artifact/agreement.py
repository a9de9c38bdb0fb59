"""What manifest and report both say must agree: the report of an artifact, compared with its digests and manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qexport.artifact.digests import sha256_json
from qexport.artifact.integrity import Artifact, find_artifact
from qexport.artifact.manifest import REPORT_FOLDER, Manifest, Verification
from qexport.artifact.report import REPORT_NAME, Report, report_path
from qexport.errors import InputError, listed


def verification_of(report: Report) -> Verification:
    """The report's main points, for the manifest."""
    return Verification(
        verdict=report.verdict,
        figures=[figure for figure in report.figures if figure.domain is None],
        gates=report.gates,
        identity=report.identity,
        protocol=report.protocol,
        readers=report.readers,
        unconfirmed=report.unconfirmed,
        report_sha256=report.digest(),
    )


def disagreements(manifest: Manifest, report: Report) -> list[str]:
    """What the manifest of an artifact and its report say differently, by the manifest's fields."""
    return [*_in_verification(manifest.verification, verification_of(report)), *_elsewhere(manifest, report)]


def _in_verification(told: Verification | None, found: Verification) -> Iterator[str]:
    if told is None:
        yield "verification"
        return
    for name in Verification.model_fields:
        if getattr(told, name) != getattr(found, name):
            yield f"verification.{name}"


def _elsewhere(manifest: Manifest, report: Report) -> Iterator[str]:
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    adapter = manifest.adapter
    pairs: dict[str, tuple[object, object]] = {
        "qexport_version": (manifest.qexport_version, report.qexport_version),
        "environment": (manifest.environment, report.environment),
        "layout": ([manifest.layout], report.subject.layouts),
        "base": (manifest.base, report.reference.base),
        "base.sha256": (sha256_json(manifest.base.sha256), report.identity.base_sha256),
        "adapter": (adapter, report.reference.adapter),
        "adapter.sha256": (sha256_json(adapter.sha256) if adapter else None, report.identity.adapter_sha256),
        "layers": (manifest.layers, report.layers),
        "sizes": (manifest.sizes, report.subject.sizes),
        "files": (digests | report.subject.weights_sha256, digests),
    }
    yield from (name for name, (one, other) in pairs.items() if one != other)


def report_of(artifact: Artifact) -> Report | None:
    """The report of an artifact that was opened; None if the artifact was not verified, or its report was removed.

    Raises:
        InputError: the report is malformed, or it and the manifest contradict each other.
    """
    if artifact.manifest.verification is None or artifact.report_removed:
        return None
    place = artifact.path / REPORT_FOLDER / REPORT_NAME
    report = Report.read(place)
    if found := disagreements(artifact.manifest, report):
        raise InputError(
            f"manifest and report contradict each other: {listed(found)}",
            where=str(place),
            mend="fetch the artifact again",
        )
    return report


def read_report(path: Path, *, check: bool = True) -> Report:
    """Reads a report; one inside an artifact is compared with the artifact's digests and manifest first.

    Args:
        path: a report.json, an artifact's folder, or its report's folder.
        check: whether to compare.

    Raises:
        InputError: as `Report.read`; or manifest, listing and report contradict each other.
    """
    place = report_path(path)
    if check and place.parent.name == REPORT_FOLDER:
        artifact = find_artifact(place.parent.parent, reads=lambda name: name.startswith(f"{REPORT_FOLDER}/"))
        if artifact is not None and (report := report_of(artifact)) is not None:
            return report
    return Report.read(place)
