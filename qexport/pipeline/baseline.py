"""The earlier release of `verify.baseline`: read from its report, and refused where nothing can be paired with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qexport.amounts import counted
from qexport.artifact import Identity
from qexport.artifact.agreement import read_report
from qexport.artifact.baseline import COMPARED, BaselineRecord
from qexport.artifact.figures import find_figure
from qexport.artifact.manifest import REPORT_FOLDER
from qexport.artifact.report import REPORT_NAME, Report
from qexport.errors import InputError, RecipeError, listed
from qexport.gates.baseline import PAIRED
from qexport.text.tokenizers import tokenizer_digest
from qexport.verifying import VerifySettings
from qexport.verifying.document_sums import Baseline

_AGAIN: Final = (
    "verify the artifact in production again with this recipe: qexport verify ARTIFACT --reference RECIPE.yaml "
    "--report DIR; then name DIR"
)


def read_baseline(settings: VerifySettings) -> Baseline | None:
    """The release to compare with; None if the settings name none.

    Raises:
        RecipeError: the settings limit figures of this comparison, and name no release.
        InputError: the report cannot be read or is malformed, its windows are of another length, or it has no sums by
            document.
    """
    if settings.baseline is None:
        _refuse_limits_without(settings)
        return None
    place = Path(settings.baseline)
    report = _read(place)
    if report.document_sums is None:
        raise InputError(
            f"the report of the baseline was written by qexport {report.qexport_version}, which recorded no sums by "
            "document, so nothing can be paired with it",
            where=str(place),
            mend=_AGAIN,
        )
    if report.protocol.sequence_length != settings.sequence_length:
        raise _other_inputs(
            place, [f"sequence_length: {report.protocol.sequence_length} there, {settings.sequence_length} here"]
        )
    return Baseline(_record(report, settings.baseline_margin, place), report.document_sums, report.identity)


def refuse_other_text(
    baseline: Baseline, settings: VerifySettings, text_sha256: str, tokenizer_files: Mapping[str, bytes]
) -> None:
    """Refuses a baseline that was measured on other tokens.

    Args:
        baseline: the release.
        settings: name it.
        text_sha256: of the held-out text.
        tokenizer_files: the model's, by name.

    Raises:
        InputError: the held-out text or the tokenizer is another one.
    """
    found = {"held-out text": text_sha256, "tokenizer": tokenizer_digest(tokenizer_files)}
    theirs = {
        "held-out text": baseline.identity.text_sha256,
        "tokenizer": baseline.identity.tokenizer_sha256,
    }
    if differing := [f"{n}: {theirs[n][:12]} there, {found[n][:12]} here" for n in found if found[n] != theirs[n]]:
        raise _other_inputs(Path(settings.baseline or ""), differing)


def other_reference(baseline: BaselineRecord, identity: Identity, dtype: str) -> list[str]:
    """A note if the release was compared with another reference than the artifact."""
    pairs = {
        "base": (baseline.base_sha256, identity.base_sha256),
        "adapter": (baseline.adapter_sha256, identity.adapter_sha256),
        "dtype": (baseline.dtype, dtype),
    }
    differing = [name for name, (theirs, ours) in pairs.items() if theirs != ours]
    if not differing:
        return []
    return [
        f"the baseline {baseline.name} has another reference ({', '.join(differing)}): each is held against its own, "
        "and how far each has drifted from that is compared"
    ]


def _read(place: Path) -> Report:
    try:
        return read_report(place)
    except InputError as error:
        inside = sorted(path.name for path in _subfolders(place) if (path / REPORT_FOLDER / REPORT_NAME).is_file())
        mend = f"name the folder of one layout: {', '.join(inside)}" if inside else error.mend
        raise InputError(f"verify.baseline cannot be used: {error.what}", where=error.where, mend=mend) from error


def _subfolders(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:
        return []


def _record(report: Report, margin: float, place: Path) -> BaselineRecord:
    names = list(COMPARED.values())
    measured = {name: found.value for name in names if (found := find_figure(report.figures, name)) is not None}
    if missing := [name for name in names if name not in measured]:
        raise InputError(f"the report of the baseline has no {listed(missing)}", where=str(place), mend=_AGAIN)
    return BaselineRecord(
        name=report.subject.name,
        method=report.subject.method,
        report_sha256=report.digest(),
        base_sha256=report.identity.base_sha256,
        adapter_sha256=report.identity.adapter_sha256,
        dtype=report.protocol.dtype,
        margin=margin,
        **measured,
    )


def _other_inputs(place: Path, differing: list[str]) -> InputError:
    return InputError(
        f"the baseline was measured on other tokens, so nothing can be paired with it: {listed(differing)}",
        where=str(place),
        mend=_AGAIN,
    )


def _refuse_limits_without(settings: VerifySettings) -> None:
    limited = [name for name in PAIRED if settings.gates.get(name) is not None]
    if limited:
        raise RecipeError(
            f"{counted(len(limited), 'gate')} can never be decided: there is no baseline to compare with",
            where=f"verify.gates: {', '.join(limited)}",
            mend="name a release in verify.baseline, or remove these limits",
        )
