"""Makes a release: a new folder with the artifact's weights, a card and launch files under the release's name, and its
evidence. The artifact is not changed. Needs the extra `release`.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from qexport.artifact.digests import sha256_file
from qexport.artifact.disk import ensure_space
from qexport.artifact.integrity import digest_files, write_listing
from qexport.artifact.manifest import CARD_NAME, MANIFEST_NAME, REPORT_FOLDER, FileRecord, Manifest
from qexport.artifact.names import label
from qexport.artifact.packages import requirements_text
from qexport.artifact.report import REPORT_NAME
from qexport.artifact.roots import check_roots_path, recording_roots
from qexport.errors import QexportError
from qexport.export.launch import FOLDER as LAUNCH_FOLDER
from qexport.registries.arrival import arriving
from qexport.release.bom import bill_of_materials
from qexport.release.evaluation import EVALUATION_NAME, evaluation_results
from qexport.release.launching import released_launch, render
from qexport.release.naming import Named
from qexport.release.proof import Proven
from qexport.release.provenance import statement
from qexport.release.record import (
    BOM_NAME,
    EVIDENCE,
    EVIDENCE_FOLDER,
    PACKAGES_NAME,
    PROVENANCE_NAME,
    RECORD_NAME,
    ReleasedArtifact,
    ReleaseRecord,
    canonical,
    digests_of,
    locked,
    proof_of,
)
from qexport.release.signing import Signer
from qexport.reporting.card import CardFacts, ReleaseWords, model_card

_LINKED_BYTES: Final = 1 << 20
"""Smaller files are copied: somebody may edit them in place."""


@dataclass(frozen=True)
class Released:
    """A finished release.

    Attributes:
        folder: where it is.
        record: its `release.json`.
        manifest: its manifest.
        root: its root digest.
    """

    folder: Path
    record: ReleaseRecord
    manifest: Manifest
    root: str


def make_release(proven: Proven, name: Named, target: Path, *, signer: Signer | None) -> Released:
    """Makes a release's folder, complete or not at all. Apart from the signature it has the same bytes each time.

    Args:
        proven: the artifact.
        name: the release's name.
        target: the folder, of the release's name, which must not exist; parents are created.
        signer: signs it; None to leave it unsigned.

    Raises:
        RecipeError: something is at the target.
        ResourceError: the disk is full or failed.
        QexportError: a file of the evidence is not valid.
    """
    check_roots_path(target)
    with ExitStack() as ending, arriving(target) as folder:  # the folder has the release's name: a signature says it
        folder.mkdir()
        _copy(proven, folder)
        manifest, record = _write(proven, name, folder, signed=signer is not None)
        root = write_listing(folder, manifest)
        if signer is not None:
            signer.sign(folder)
        ending.enter_context(recording_roots(target, {".": root}))
    return Released(target, record, manifest, root)


def _copy(proven: Proven, folder: Path) -> None:
    """Everything but what is rendered again. Weights are linked, but not a graph's, which onnx refuses then."""
    source, manifest = proven.artifact.path, proven.artifact.manifest
    names = [name for name in manifest.files if not (name == CARD_NAME or name.startswith(f"{LAUNCH_FOLDER}/"))]
    report = source / REPORT_FOLDER
    names += [f"{REPORT_FOLDER}/{path.name}" for path in sorted(report.iterdir())] if proven.report else []
    ensure_space(folder, sum((source / name).stat().st_size for name in names) if manifest.graph else 0)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        large = (source / name).stat().st_size >= _LINKED_BYTES
        if not (large and manifest.graph is None and _linked(source / name, target)):
            shutil.copyfile(source / name, target)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _write(proven: Proven, name: Named, folder: Path, *, signed: bool) -> tuple[Manifest, ReleaseRecord]:
    """Launch files, card, evidence, record and manifest, in this order: each names what was written before."""
    told, report = proven.artifact.manifest, proven.report
    launch = released_launch(told, name.name, report)
    for path, content in render(launch).items():
        _put(folder / path, content.decode("utf-8"))
    words = ReleaseWords(name.name, label(name.name), proven.unproven, signed)
    facts = CardFacts.of_release(told, launch.name if launch else None, report, words)
    _put(folder / CARD_NAME, model_card(facts))
    if report is not None and (results := evaluation_results(report)):
        _put(folder / EVALUATION_NAME, results)
    known = {path: each.sha256 for path, each in told.files.items() if (folder / path).exists() and path != CARD_NAME}
    known = {path: digest for path, digest in known.items() if not path.startswith(f"{LAUNCH_FOLDER}/")}
    manifest = told.model_copy(
        update={
            "files": digest_files(folder, known),
            "launch": launch.model_dump(mode="json") if launch else None,
            "verification": told.verification if report else None,
        }
    )
    record = _evidence(proven, name, folder, manifest, signed=signed)
    _put(folder / RECORD_NAME, record.to_json())
    manifest = manifest.model_copy(update={"files": manifest.files | _evidence_files(folder)})
    manifest.write(folder)
    return manifest, record


def _evidence(proven: Proven, name: Named, folder: Path, manifest: Manifest, *, signed: bool) -> ReleaseRecord:
    report, proof = proven.report, proof_of(proven.report)
    subjects = {path: each.sha256 for path, each in manifest.files.items()}
    report_digest = sha256_file(folder / REPORT_FOLDER / REPORT_NAME) if report else None
    config = json.loads((folder / "config.json").read_bytes())
    _put(folder / PROVENANCE_NAME, canonical(statement(manifest, proof, subjects, report_digest)))
    bom = bill_of_materials(manifest, subjects, config, report, proof, (name.name, name.version))
    _put(folder / BOM_NAME, _validated(canonical(bom)))
    _put(folder / PACKAGES_NAME, requirements_text(manifest.packages))
    return ReleaseRecord(
        schema_version=1,
        qexport_version=version("qexport"),
        name=name.name,
        model=name.model,
        version=name.version,
        method=name.method,
        served_as=label(name.name),
        artifact=ReleasedArtifact(root=proven.root, manifest_sha256=sha256_file(proven.artifact.path / MANIFEST_NAME)),
        proof=proof,
        unproven=proven.unproven,
        signed=signed,
        evidence=digests_of(folder, EVIDENCE),
        **locked(manifest),
    )


def _validated(bom: str) -> str:
    """A bill of materials that fits the standard's schema."""
    if (fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom)) is not None:
        raise QexportError(f"the bill of materials is not valid: {fault}", where="CycloneDX 1.6")
    return bom


def _evidence_files(folder: Path) -> dict[str, FileRecord]:
    names = [RECORD_NAME, *(f"{EVIDENCE_FOLDER}/{path.name}" for path in sorted((folder / EVIDENCE_FOLDER).iterdir()))]
    return {name: FileRecord(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name)) for name in names}


def _put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
