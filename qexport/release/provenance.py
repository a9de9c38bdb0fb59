"""What a release was made from and how, as an in-toto statement with SLSA provenance.

The statement follows from the manifest and from digests alone, so a check makes it again and compares.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from qexport.artifact.manifest import REPORT_FOLDER, Manifest, SourceRecord
from qexport.artifact.report import REPORT_NAME
from qexport.release.record import Proof

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "https://github.com/qexport/qexport/blob/main/docs/release.md#provenance"
_BUILDER: Final = "https://github.com/qexport/qexport"


def statement(
    manifest: Manifest, proof: Proof | None, subjects: Mapping[str, str], report: str | None
) -> dict[str, Any]:
    """The statement on a release.

    Args:
        manifest: of the release.
        proof: what its report says; None without one.
        subjects: the digests of the release's files besides evidence and report, by path.
        report: the digest of report.json's bytes; None without one.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subjects.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": manifest.recipe, "recipe_sha256": manifest.recipe_sha256},
                "internalParameters": {"environment": manifest.environment.model_dump(mode="json")},
                "resolvedDependencies": list(_materials(manifest, proof)),
            },
            "runDetails": {
                "builder": {
                    "id": _BUILDER,
                    "version": {"qexport": manifest.qexport_version, "torch": manifest.environment.torch},
                },
                "byproducts": [] if report is None else [_report(report)],
            },
        },
    }


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What a statement names otherwise than the release that it lies in, for people."""
    build, own = (_part(each, "buildDefinition") for each in (found, expected))
    run, own_run = (_part(each, "runDetails") for each in (found, expected))
    parts = {
        "files": (found.get("subject"), expected["subject"]),
        "recipe": (build.get("externalParameters"), own["externalParameters"]),
        "inputs": (build.get("resolvedDependencies"), own["resolvedDependencies"]),
        "environment": (build.get("internalParameters"), own["internalParameters"]),
        "report": (run.get("byproducts"), own_run["byproducts"]),
    }
    named = [name for name, (one, other) in parts.items() if one != other]
    return named or ([] if found == expected else ["form"])


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of the predicate; empty if it has another form."""
    predicate = content.get("predicate")
    found = predicate.get(name) if isinstance(predicate, dict) else None
    return found if isinstance(found, dict) else {}


def _materials(manifest: Manifest, proof: Proof | None) -> Iterator[dict[str, Any]]:
    for role, source in manifest.roles:
        for file, digest in sorted(source.sha256.items()):
            uri = source_uri(source)
            yield _material(f"{role}/{file}", digest, **({"uri": uri} if uri else {}))
    if manifest.calibration is not None:
        yield _material("calibration text", manifest.calibration.sha256)
    if proof is not None:
        yield _material("held-out text", proof.held_out_sha256)
        if proof.prompts_sha256 is not None:
            yield _material("prompts", proof.prompts_sha256)
        if proof.last_release is not None:
            yield _material("report of the last release", proof.last_release)
    for name, version in manifest.packages.items():
        yield {"uri": f"pkg:pypi/{quote(name)}@{quote(version)}", "name": name}


def source_uri(source: SourceRecord) -> str | None:
    """Where a base or an adapter can be found again, as a package URL; None for a folder of somebody's machine."""
    if source.kind == "hub":
        return f"pkg:huggingface/{quote(source.name)}@{source.revision}"
    if source.kind == "package":
        package = source.name.partition("/")[0].replace("_", "-")
        return f"pkg:pypi/{quote(package)}" + (f"@{quote(source.revision)}" if source.revision else "")
    return None


def _material(name: str, digest: str, **fields: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}, **fields}


def _report(digest: str) -> dict[str, Any]:
    return _material(f"{REPORT_FOLDER}/{REPORT_NAME}", digest, mediaType="application/json")
