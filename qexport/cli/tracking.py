"""The options for experiment tracking, and what a run and a verification log."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from qexport.errors import RecipeError
from qexport.progress import Notice, ProgressCallback

if TYPE_CHECKING:
    from qexport.artifact.report import Report
    from qexport.pipeline import Result
    from qexport.reporting.tracked import Tracked
    from qexport.reporting.tracking import Tracker

MlflowUri = Annotated[
    str | None, typer.Option("--mlflow", metavar="URI", help="Log settings, figures and report to this MLflow server.")
]
MlflowExperiment = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="By default that of MLFLOW_EXPERIMENT_NAME, else qexport."),
]
MlflowRun = Annotated[str | None, typer.Option(metavar="NAME", help="By default the artifact's name.")]

_EXPERIMENT: Final = "qexport"


def tracker_of(uri: str | None, experiment: str | None, run_name: str | None) -> Tracker | None:
    """The tracker that the options ask for, which answers; None if they ask for none.

    Raises:
        RecipeError: an option is wrong, or a package is missing.
        InputError: the server cannot be used.
    """
    if uri is None:
        if experiment is not None or run_name is not None:
            option = "--mlflow-run" if experiment is None else "--mlflow-experiment"
            raise RecipeError(f"{option} needs a tracking server", where=option, mend="give --mlflow URI")
        return None
    if "" in (uri, experiment, run_name):
        raise RecipeError("an option of MLflow is empty", where="--mlflow", mend="give a value, or leave it out")
    from qexport.reporting.tracking import connect

    return connect(uri, experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT)


def track_run(
    tracker: Tracker, result: Result, recipe: Mapping[str, Any], run_name: str | None, progress: ProgressCallback
) -> None:
    """Logs each layout of a run as an entry; one that ended with an unproven merge as one without figures.

    Args:
        tracker: the experiment.
        result: of the run.
        recipe: without a path of the machine.
        run_name: of the entry; those of several layouts end in the layout's name.
        progress: is told what was logged, and what was not.
    """
    _log(tracker, _entries(result, recipe, run_name), progress)


def _entries(result: Result, recipe: Mapping[str, Any], run_name: str | None) -> Iterator[Tracked]:
    from qexport.reporting.tracked import tracked

    if result.unproven_merge is not None:
        yield tracked(run_name or "unproven merge", result.verdict, recipe=recipe, gates=result.gates)
        return
    path = result.artifact_path
    name, several = run_name or path.name.removesuffix(".rejected"), len(result.manifests) > 1
    for layout, manifest in result.manifests.items():
        report = result.reports.get(layout)
        yield tracked(
            f"{name}.{layout}" if several else name,
            result.verdict if report is None else report.verdict,
            recipe=manifest.recipe,
            gates=() if report is None else report.gates,
            report=report,
            manifest=manifest,
            listing=_listing(path / layout if several else path),
            root=result.roots.get(layout),
        )


def track_verification(
    tracker: Tracker, report: Report, artifact: Path, run_name: str | None, progress: ProgressCallback
) -> None:
    """Logs the verification of a folder. Its settings are those that it was made with, and the protocol of the report.

    Args:
        tracker: the experiment.
        report: of the verification.
        artifact: the folder.
        run_name: of the entry, instead of the folder's name.
        progress: is told what was logged, and what was not.
    """
    from qexport.artifact.digests import sha256_bytes
    from qexport.artifact.manifest import MANIFEST_NAME, Manifest
    from qexport.reporting.tracked import tracked

    manifest = Manifest.read(artifact) if (artifact / MANIFEST_NAME).is_file() else None
    listing = _listing(artifact)
    entry = tracked(
        run_name or report.subject.name,
        report.verdict,
        recipe={} if manifest is None else {key: manifest.recipe[key] for key in manifest.recipe if key != "verify"},
        gates=report.gates,
        report=report,
        manifest=manifest,
        listing=listing,
        root=None if listing is None else sha256_bytes(listing.encode()),
    )
    _log(tracker, [entry], progress)


def _listing(folder: Path) -> str | None:
    from qexport.artifact.manifest import LISTING_NAME

    path = folder / LISTING_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _log(tracker: Tracker, entries: Iterable[Tracked], progress: ProgressCallback) -> None:
    for entry in entries:
        logged = tracker.log(entry)
        if logged.run_id is not None:
            progress(Notice(f"logged to MLflow: {logged.name} in {tracker.experiment}, run {logged.run_id}"))
        for missing in logged.missing:
            progress(Notice(f"NOT logged to MLflow, of {logged.name}: {missing}"))
