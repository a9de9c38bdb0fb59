"""What a release says, made again from manifest and report, and compared with what is in its folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from qexport.artifact.digests import sha256_bytes, sha256_file
from qexport.artifact.integrity import Artifact
from qexport.artifact.manifest import CARD_NAME, REPORT_FOLDER, Manifest
from qexport.artifact.packages import requirements_text
from qexport.artifact.report import REPORT_NAME, Report
from qexport.errors import InputError, listed
from qexport.export.launch import FOLDER as LAUNCH_FOLDER
from qexport.release.bom import bill_of_materials
from qexport.release.evaluation import EVALUATION_NAME, evaluation_results
from qexport.release.launching import read_launch, render
from qexport.release.provenance import differences, statement
from qexport.release.record import (
    BOM_NAME,
    EVIDENCE_FOLDER,
    PACKAGES_NAME,
    PROVENANCE_NAME,
    RECORD_NAME,
    ReleaseRecord,
    canonical,
    proof_of,
    read_object,
)
from qexport.reporting.card import CardFacts, ReleaseWords, model_card
from qexport.reporting.writing import report_files

MEND: Final = "do not use it; fetch the release again"


def compare_provenance(artifact: Artifact, report: Report | None) -> None:
    """Makes the provenance again. It depends on no version of qexport.

    Raises:
        InputError: the file says something else.
    """
    manifest, place = artifact.manifest, artifact.path / PROVENANCE_NAME
    digest = sha256_file(artifact.path / REPORT_FOLDER / REPORT_NAME) if report else None
    expected = statement(manifest, proof_of(report), _subjects(manifest), digest)
    wrong = differences(read_object(place), expected)
    if wrong or not _has(place, canonical(expected)):
        raise contradiction("the provenance names other inputs than the manifest", wrong or ["form"], place)


def _has(path: Path, text: str) -> bool:
    """Whether a file's content is a text. It may be a stranger's, of any size."""
    return path.is_file() and sha256_file(path) == sha256_bytes(text.encode("utf-8"))


def _subjects(manifest: Manifest) -> dict[str, str]:
    """The files besides evidence and report."""
    return {
        name: each.sha256
        for name, each in manifest.files.items()
        if name != RECORD_NAME and not name.startswith(f"{EVIDENCE_FOLDER}/")
    }


def compare_bom(artifact: Artifact, record: ReleaseRecord, report: Report | None, *, whole: bool) -> None:
    """Compares the files, texts and packages in the bill of materials with the manifest's.

    Args:
        artifact: the release.
        record: its record.
        report: what verification found.
        whole: compare figures, limits and licenses too, which another version of qexport may word otherwise.

    Raises:
        InputError: it says something else.
    """
    manifest, place = artifact.manifest, artifact.path / BOM_NAME
    config = read_object(artifact.path / "config.json")
    names = (record.name, record.version)
    expected = bill_of_materials(manifest, _subjects(manifest), config, report, proof_of(report), names)
    found, own = _components(read_object(place)), _components(expected)
    wrong = sorted(name for name in found.keys() | own.keys() if found.get(name) != own.get(name))
    if wrong:
        raise contradiction("the bill of materials names other files than the manifest", wrong, place)
    if whole and not _has(place, canonical(expected)):
        raise InputError("the bill of materials does not say what manifest and report say", where=str(place), mend=MEND)


def _components(bom: dict[str, Any]) -> dict[str, list[Any]]:
    """Kinds, versions and digests of the components of a bill of materials, by name, in two levels."""
    metadata = bom.get("metadata")
    top = [*([metadata.get("component")] if isinstance(metadata, dict) else []), *_dicts(bom.get("components"))]
    found: dict[str, list[Any]] = {}
    for each in [part for one in _dicts(top) for part in (one, *_dicts(one.get("components")))]:
        told = [each.get(key) for key in ("type", "version", "purl", "hashes")]
        found.setdefault(str(each.get("name")), []).append(told)
    return found


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def compare_pages(artifact: Artifact, report: Report) -> bool:
    """Makes the report's files again; False if another version of qexport made them, which would word them otherwise.

    Raises:
        InputError: one says something else, or there is a further one.
    """
    if report.qexport_version != version("qexport"):
        return False
    folder, expected = artifact.path / REPORT_FOLDER, report_files(report)
    if unknown := sorted(path.name for path in folder.iterdir() if path.name not in expected):
        raise contradiction("there are files that no report has", unknown, folder)
    for name, text in expected.items():
        if not _has(folder / name, text):
            raise InputError(
                "a file of the report does not say what report.json says", where=str(folder / name), mend=MEND
            )
    return True


def compare_card(artifact: Artifact, record: ReleaseRecord, report: Report | None) -> None:
    """Makes card and launch files again; another version of qexport would word them otherwise.

    Raises:
        InputError: one says something else, or there is a further one.
    """
    manifest = artifact.manifest
    launch = None if manifest.launch is None else read_launch(manifest.layout, manifest.launch)
    words = ReleaseWords(record.name, record.served_as, record.unproven, record.signed)
    facts = CardFacts.of_release(manifest, launch.name if launch else None, report, words)
    expected = {name: content.decode("utf-8") for name, content in render(launch).items()}
    expected |= {CARD_NAME: model_card(facts), PACKAGES_NAME: requirements_text(manifest.packages)}
    results = evaluation_results(report) if report is not None else None
    expected |= {EVALUATION_NAME: results} if results else {}
    own = [name for name in manifest.files if name.startswith((f"{LAUNCH_FOLDER}/", EVALUATION_NAME))]
    if unknown := [name for name in own if name not in expected]:
        raise contradiction("there are files that no release of this artifact has", unknown, artifact.path)
    for name, text in expected.items():
        path = artifact.path / name
        if not _has(path, text):
            folder = name.partition("/")[0]
            what = {CARD_NAME: "the model card", LAUNCH_FOLDER: "a launch file"}.get(folder, "a file of the evidence")
            raise InputError(f"{what} does not say what manifest and report say", where=str(path), mend=MEND)


def contradiction(what: str, wrong: list[str], place: Path) -> InputError:
    """The error that parts of a release contradict each other, with the names of what differs."""
    return InputError(f"{what}: {listed(wrong)}", where=str(place), mend=MEND)
