"""Checks a release offline: every byte, the signature, the record and the provenance against the manifest, the report
against its gates, the card against all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qexport.artifact.agreement import report_of
from qexport.artifact.integrity import Artifact, FileProblem, find_artifact
from qexport.artifact.manifest import CARD_NAME, REPORT_FOLDER, SIGNATURE_NAME, Manifest
from qexport.artifact.names import label, release_name
from qexport.artifact.report import Report
from qexport.errors import GateFailed, InputError, RecipeError, listed
from qexport.gates.deciding_again import decide_again
from qexport.gates.serving import decide_served_again
from qexport.quantizing import profile_of_layer
from qexport.release.made_again import (
    MEND,
    compare_bom,
    compare_card,
    compare_pages,
    compare_provenance,
    contradiction,
)
from qexport.release.naming import method_name
from qexport.release.record import (
    EVIDENCE,
    EVIDENCE_FOLDER,
    RECORD_NAME,
    ReleaseRecord,
    locked,
    proof_of,
)
from qexport.reporting.values import visible
from qexport.verifying import VerifySettings


@dataclass(frozen=True)
class Checked:
    """A release, or an artifact that was not released, that is what it says it is.

    Attributes:
        artifact: the folder, whose files have their digests.
        record: its `release.json`; None for an artifact that was not released.
        report: what verification found; None without one.
        signature: whether a signature was checked; None if there is one and no key was given.
        compared_card: whether card, launch files and bill of materials were made again and compared, which needs the
            version of qexport that made the release.
        compared_pages: whether the report's page, comment and test results were, which needs the version that made the
            report; None without a report.
    """

    artifact: Artifact
    record: ReleaseRecord | None
    report: Report | None
    signature: bool | None
    compared_card: bool
    compared_pages: bool | None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "folder": str(self.artifact.path),
            "release": self.record.model_dump(mode="json") if self.record else None,
            "root": self.artifact.root,
            "confirmed_by": self.artifact.confirmed_by,
            "verdict": self.report.verdict if self.report else None,
            "signature_checked": bool(self.signature),
            "card_compared": self.compared_card,
            "pages_compared": self.compared_pages,
        }

    def lines(self) -> Iterator[str]:
        """The same as lines for the terminal."""
        name = self.record.name if self.record else "not a release: it has no release.json"
        yield f"release    {name}"
        known = f", and the root digest is {self.artifact.confirmed_by}" if self.artifact.confirmed_by else ""
        yield f"bytes      every file is listed and has its digest{known}"
        yield f"root       {self.artifact.root}"
        others = dict.fromkeys(name.partition("/")[0] for name in self.artifact.unlisted if name != SIGNATURE_NAME)
        if others:
            yield f"beside     {', '.join(others)}: huggingface_hub's own, not part of the release"
        yield f"signature  {self._signature()}"
        yield from self._evidence()
        if self.report is not None:
            other = f"not compared: made by qexport {self.report.qexport_version}"
            yield f"pages      {'made again from report.json, and equal' if self.compared_pages else other}"
        yield f"gates      {self._gates()}"

    def _signature(self) -> str:
        if self.signature:
            return "of the given key, over every file"
        found = "there is one, and it was not checked: give --signature PUBKEY" if self.signature is None else "none"
        return found if self.signature is None else f"{found}: whoever changed a file may have changed its digests too"

    def _evidence(self) -> Iterator[str]:
        if self.record is None:
            return
        yield "evidence   release.json, provenance and bill of materials name the manifest's inputs"
        again = "made again, and equal; so are launch files and bill of materials"
        other = f"not compared: made by qexport {self.record.qexport_version}"
        yield f"card       {again if self.compared_card else other}"

    def _gates(self) -> str:
        if self.record is not None and self.record.unproven is not None:
            return f"NOT PROVEN: {' '.join(visible(self.record.unproven).split())}"
        if self.report is None:
            return "there is no report"
        return f"{self.report.verdict}: {len(self.report.gates)} gates in the report"


def check(folder: Path, *, key: Path | None = None, root: str | None = None) -> Checked:
    """Checks a folder. Needs the extra `release` only for a signature.

    Args:
        folder: a release, or an artifact.
        key: the public key, or the certificate at the end of the chain; None to check no signature.
        root: the root digest that it should have; None for the one recorded beside it, if there is one.

    Raises:
        InputError: a byte has changed, a file is missing or not listed, the signature is missing, foreign or of other
            bytes, or manifest, record, provenance, bill of materials, report and card contradict each other.
        GateFailed: a gate of the report did not pass, and the record does not say why it was released.
        RecipeError: the key cannot be used, or the extra is missing.
    """
    artifact = _opened(folder, root)
    if key is not None:
        _check_signature(folder, key)
    report = _report(artifact)
    pages = None if report is None else compare_pages(artifact, report)
    record = ReleaseRecord.read(folder) if RECORD_NAME in artifact.manifest.files else None
    compared = False
    if record is not None:
        _compare_record(artifact, record, report)
        compared = record.qexport_version == version("qexport") and artifact.manifest.card is not None
        if compared:
            _compare_gates(artifact, report)
            compare_card(artifact, record, report)
        compare_provenance(artifact, report)
        compare_bom(artifact, record, report, whole=compared)
    _refuse_unproven(record, report, folder)
    if record is not None and record.signed and not (folder / SIGNATURE_NAME).is_file():
        raise InputError(
            "the release was signed, and its signature is missing", where=str(folder / SIGNATURE_NAME), mend=MEND
        )
    signature = True if key is not None else (None if (folder / SIGNATURE_NAME).is_file() else False)
    return Checked(artifact, record, report, signature, compared, pages)


def _opened(folder: Path, root: str | None) -> Artifact:
    try:
        artifact = find_artifact(folder, root=root)
    except FileProblem as error:
        raise _named_problem(error) from error
    if artifact is None:
        raise InputError(
            "the folder is neither a release nor an artifact of qexport", where=str(folder), mend="check the path"
        )
    return artifact


def _named_problem(error: FileProblem) -> InputError:
    """The same in the words of a release."""
    evidence = error.name == RECORD_NAME or error.name.startswith(f"{EVIDENCE_FOLDER}/")
    match error.fault:
        case "missing" if evidence:
            what = "a file of the release's evidence is missing"
        case "changed" if evidence:
            what = "a file of the release's evidence has been changed"
        case "changed" if error.name == CARD_NAME:
            what = "the model card has been edited since the release"
        case "changed" if error.name.startswith(f"{REPORT_FOLDER}/"):
            what = "the report is not the one that was released"
        case "unlisted":
            what = "there is a file that the release does not have"
        case _:
            what = error.what
    return InputError(what, where=error.where, mend=error.mend)


def _check_signature(folder: Path, key: Path) -> None:
    try:
        from qexport.release.signing import verify
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"checking a signature needs the package {error.name}",
            where="--signature",
            mend="pip install 'qexport[release]'",
        ) from error
    verify(folder, key)


def _report(artifact: Artifact) -> Report | None:
    try:
        return report_of(artifact)
    except InputError as error:
        if "contradict" not in error.what:
            raise
        raise InputError(
            f"the report is not the one of this artifact: {error.what}", where=error.where, mend=MEND
        ) from error


def _compare_record(artifact: Artifact, record: ReleaseRecord, report: Report | None) -> None:
    told = locked(artifact.manifest)
    told |= _names(artifact.manifest, record)
    wrong = [name for name, value in told.items() if getattr(record, name) != value]
    wrong += [name for name in record.evidence if name not in EVIDENCE]
    if (artifact.manifest.launch or {"name": record.name}).get("name") != record.name:
        wrong.append("launch")
    if wrong:
        raise contradiction(f"{RECORD_NAME} names other inputs than the manifest", wrong, artifact.path / RECORD_NAME)
    if report is None and record.proof is not None:
        raise InputError("the report that was released is missing", where=str(artifact.path / REPORT_FOLDER), mend=MEND)
    if record.proof != proof_of(report):
        raise InputError(
            "the report is not the one that was released", where=str(artifact.path / RECORD_NAME), mend=MEND
        )
    for name in EVIDENCE:
        listed_as = artifact.manifest.files.get(name)
        if listed_as is None or record.evidence.get(name) != listed_as.sha256:
            what = "the model card has been edited since the release" if name == CARD_NAME else None
            raise InputError(
                what or "a file of the release's evidence is not the one that was released",
                where=str(artifact.path / name),
                mend=MEND,
            )


def _names(manifest: Manifest, record: ReleaseRecord) -> dict[str, Any]:
    """The fields of the record that follow from its model and version."""
    method = method_name(manifest.recipe)
    name = release_name(record.model, record.version, method, manifest.layout)
    return {"method": method, "name": name, "served_as": label(name)}


def _compare_gates(artifact: Artifact, report: Report | None) -> None:
    """Decides the gates again, on the report's figures with the recipe's limits: what passed must pass, none may be
    missing.
    """
    told = artifact.manifest.recipe.get("verify")
    if told is None or report is None:
        return
    try:
        settings = VerifySettings.model_validate(told)
    except ValidationError as error:
        raise InputError("the recipe in the manifest is malformed", where=str(artifact.path), mend=MEND) from error
    own, _ = decide_again(report, settings, profile_of_layer)
    served, _ = decide_served_again(report, settings, profile_of_layer)
    again = {gate.name: gate.verdict for gate in [*own, *served]}
    found = {gate.name: gate.verdict for gate in report.gates}
    wrong = sorted(again.keys() - found.keys())
    wrong += [name for name, verdict in found.items() if verdict == "pass" and again.get(name) != "pass"]
    if wrong:
        raise contradiction("the report's gates are not what its figures give", wrong, artifact.path / REPORT_FOLDER)


def _refuse_unproven(record: ReleaseRecord | None, report: Report | None, folder: Path) -> None:
    """A release says so if its gates did not pass. An artifact that was not released says it in its report."""
    if record is None or record.unproven is not None:
        return
    failed = ["there is no report"] if report is None else [g.name for g in report.gates if g.verdict != "pass"]
    if failed or (report is not None and not report.gates):
        raise GateFailed(
            "the release does not say so, but its gates did not all pass",
            where=listed(failed) or str(folder),
            mend=MEND,
        )
