"""What may be released: an artifact as it was written, whose gates passed, made of inputs that can be found again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qexport.artifact.agreement import report_of
from qexport.artifact.integrity import Artifact, find_artifact
from qexport.artifact.manifest import SourceRecord
from qexport.artifact.report import Report
from qexport.errors import GateFailed, GateUndecided, InputError, RecipeError, listed
from qexport.release.record import RECORD_NAME

_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ALLOW: Final = 'or give --allow-unproven "reason", which the model card will say'


@dataclass(frozen=True)
class Proven:
    """An artifact that may be released.

    Attributes:
        artifact: the folder, whose files have their digests.
        root: its root digest.
        report: what verification found; None if it was not verified.
        unproven: why it is released all the same; None if all of its gates passed.
    """

    artifact: Artifact
    root: str
    report: Report | None
    unproven: str | None


def prove(folder: Path, *, allow_unproven: str | None) -> Proven:
    """Checks that a folder may be released. Reads every byte of it.

    Args:
        folder: of one layout.
        allow_unproven: the reason to release it although its gates did not pass, or were not measured.

    Raises:
        InputError: the folder is not an artifact of qexport, or is not as it was written; its report is of other bytes;
            or base or adapter is a name of the hub that may move.
        GateFailed: a gate failed.
        GateUndecided: a gate is undecided, or nothing was measured.
        RecipeError: the reason is empty.
    """
    if allow_unproven is not None and not allow_unproven.strip():
        raise RecipeError(
            "the reason is empty", where="--allow-unproven", mend="say why it is released without a proof"
        )
    artifact = _opened(folder)
    for source in artifact.manifest.sources:
        _refuse_moving(source)
    report = report_of(artifact)
    doubt = _doubt(report, folder)
    if doubt is not None and allow_unproven is None:
        raise doubt
    assert artifact.root is not None
    return Proven(artifact, artifact.root, report, None if doubt is None or allow_unproven is None else allow_unproven)


def _opened(folder: Path) -> Artifact:
    if (folder / RECORD_NAME).is_file():
        raise InputError(
            "the folder is a release already", where=str(folder), mend="release the artifact that it was made from"
        )
    artifact = find_artifact(folder)
    if artifact is None:
        raise InputError(
            "the folder is not an artifact of qexport: nothing says what it was made from",
            where=str(folder),
            mend="give the folder that `qexport run` wrote; of several layouts, one layout's",
        )
    if artifact.root is None or artifact.manifest.card is None:
        raise InputError(
            "qexport 0.2 or older made the artifact, and did not record what a release needs",
            where=str(folder),
            mend="make it again from its recipe",
        )
    return artifact


def _refuse_moving(source: SourceRecord) -> None:
    if source.kind == "hub" and not _COMMIT.fullmatch(source.revision or ""):
        raise InputError(
            f"{source.name} was loaded by a name that may move: its commit is not on record ({source.revision})",
            where="qexport-manifest.json",
            mend="make the artifact again; qexport records the commit that a hub id resolves to",
        )


def _doubt(report: Report | None, folder: Path) -> GateFailed | GateUndecided | None:
    """Why the artifact is not proven; None if it is."""
    if report is None or not report.gates:
        what = "there is no proof: " + ("the artifact has no report" if report is None else "no gate was set")
        return GateUndecided(what, where=str(folder), mend=f"verify it in its recipe, {_ALLOW}")
    for verdict, kind in (("fail", GateFailed), ("undecided", GateUndecided)):
        if names := [gate.name for gate in report.gates if gate.verdict == verdict]:
            words = "failed" if verdict == "fail" else "undecided"
            return kind(
                f"the artifact is not proven: gates are {words}", where=listed(names), mend=f"mend it, {_ALLOW}"
            )
    return None
