"""release.json: everything that was locked together under one name and one version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ValidationError

from qexport.artifact import Environment
from qexport.artifact.agreement import verification_of
from qexport.artifact.digests import sha256_file
from qexport.artifact.figures import Verdict
from qexport.artifact.manifest import CARD_NAME, CalibrationRecord, Manifest, SourceRecord
from qexport.artifact.report import Report
from qexport.errors import InputError, listed
from qexport.records import Record
from qexport.release import checked_name, checked_version

RECORD_NAME: Final = "release.json"
EVIDENCE_FOLDER: Final = "evidence"
PROVENANCE_NAME: Final = f"{EVIDENCE_FOLDER}/provenance.json"
BOM_NAME: Final = f"{EVIDENCE_FOLDER}/bom.cdx.json"
PACKAGES_NAME: Final = f"{EVIDENCE_FOLDER}/requirements.txt"

EVIDENCE: Final = (CARD_NAME, PROVENANCE_NAME, BOM_NAME, PACKAGES_NAME)
"""The files whose digests stand in the record."""

_LARGEST: Final = 1 << 26


class ReleasedArtifact(Record):
    """The artifact that was released, as it was before."""

    root: str
    """Its root digest."""

    manifest_sha256: str


class Proof(Record):
    """The report that the release rests on."""

    verdict: Verdict
    report_sha256: str
    """The digest of the report without its timings, as in the manifest."""

    held_out_sha256: str
    """Of the held-out text."""

    prompts_sha256: str | None
    tokenizer_sha256: str
    template_sha256: str | None
    """Of the chat template."""

    last_release: str | None
    """The digest of the last release's report, if there was a comparison."""


class ReleaseRecord(Record):
    """The content of `release.json`."""

    schema_version: Literal[1]
    qexport_version: str
    name: str
    """With version and method."""

    model: Annotated[str, AfterValidator(checked_name)]
    version: Annotated[str, AfterValidator(checked_version)]
    method: str
    layout: str

    served_as: str
    """What servers call it that allow few characters."""

    artifact: ReleasedArtifact
    base: SourceRecord
    adapter: SourceRecord | None
    calibration: CalibrationRecord | None
    tokenizer: dict[str, str]
    """The digest of each tokenizer file, by its name; a chat template may be one."""

    recipe: dict[str, Any]
    recipe_sha256: str
    environment: Environment
    packages: dict[str, str]
    """The versions that made it."""

    proof: Proof | None
    unproven: str | None
    """Why it was released although its gates did not all pass, or were not measured."""

    signed: bool

    evidence: dict[str, str]
    """The digests of model card, provenance, bill of materials and list of versions, by path."""

    def to_json(self) -> str:
        """The canonical text: sorted keys, two spaces, ASCII, a newline at the end."""
        return canonical(self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> ReleaseRecord:
        """Reads the record of a release.

        Raises:
            InputError: it is missing, malformed, or not in its canonical form.
        """
        path = folder / RECORD_NAME
        content = read_object(path)
        try:
            found = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise InputError(f"{RECORD_NAME} is malformed: {listed(problems)}", where=str(path)) from error
        if path.read_text(encoding="utf-8") != found.to_json():
            raise InputError(f"{RECORD_NAME} is not in the form that it was written in", where=str(path))
        return found


def canonical(content: Any) -> str:
    """JSON with sorted keys, two spaces, ASCII, a newline at the end."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of the evidence.

    Raises:
        InputError: the file is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"the file has more than {_LARGEST} bytes", where=str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"a file of the release's evidence cannot be read: {error.strerror}", where=str(path)
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"a file of the release's evidence is not JSON: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise InputError("a file of the release's evidence is not a JSON object", where=str(path))
    return content


def proof_of(report: Report | None) -> Proof | None:
    """What a report says of the release that rests on it."""
    if report is None:
        return None
    told, identity = verification_of(report), report.identity
    return Proof(
        verdict=report.verdict,
        report_sha256=told.report_sha256,
        held_out_sha256=identity.text_sha256,
        prompts_sha256=identity.prompts_sha256,
        tokenizer_sha256=identity.tokenizer_sha256,
        template_sha256=identity.template_sha256,
        last_release=report.baseline.report_sha256 if report.baseline else None,
    )


def locked(manifest: Manifest) -> dict[str, Any]:
    """The fields of the record that are the manifest's."""
    return {
        "layout": manifest.layout,
        "base": manifest.base,
        "adapter": manifest.adapter,
        "calibration": manifest.calibration,
        "tokenizer": manifest.tokenizer,
        "recipe": manifest.recipe,
        "recipe_sha256": manifest.recipe_sha256,
        "environment": manifest.environment,
        "packages": manifest.packages,
    }


def digests_of(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The digests of files in a release."""
    return {name: sha256_file(folder / name) for name in names}
