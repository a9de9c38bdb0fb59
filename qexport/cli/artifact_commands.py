"""The commands `run`, `verify` and `validate`. Each checks its arguments, calls one function of the pipeline, and
prints the result.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qexport.cli.app import (
    AsJson,
    Debug,
    Device,
    Failure,
    Overrides,
    RecipePath,
    Workers,
    app,
    reporting_errors,
    showing_progress,
)
from qexport.cli.terminal import stdout, write, write_json
from qexport.cli.tracking import MlflowExperiment, MlflowRun, MlflowUri, track_run, track_verification, tracker_of
from qexport.errors import CompatibilityError, GateFailed, GateUndecided, RecipeError, listed
from qexport.progress import Notice

if TYPE_CHECKING:
    from qexport.artifact.report import Report
    from qexport.cli.verifying import References
    from qexport.pipeline import Plan, Result
    from qexport.release import ReleaseSettings


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="The artifact's folder, instead of the recipe's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, without what an interrupted run has finished.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    device: Device = "auto",
    workers: Workers = None,
    mlflow: MlflowUri = None,
    mlflow_experiment: MlflowExperiment = None,
    mlflow_run: MlflowRun = None,
) -> None:
    """Merge, quantize, export and verify, as the recipe says. Run again after an interruption, it goes on."""
    with reporting_errors(as_json=as_json, debug=debug, interrupted="interrupted; nothing was published"):
        from qexport.recipe import checked_output, load_recipe
        from qexport.recipe.places import refuse_missing

        chosen = load_recipe(recipe, overrides or ())
        if output is not None:
            chosen = chosen.model_copy(update={"output": str(output.absolute())})
        if workers is not None:
            chosen = chosen.on_workers(workers)
        place = checked_output(chosen, force=force)
        if chosen.release is not None and chosen.release.version is not None:
            from qexport.cli.release_commands import load_releasing

            load_releasing().refuse_unusable(chosen.release)  # before hours of work
        tracker = tracker_of(mlflow, mlflow_experiment, mlflow_run)
        refuse_missing(chosen)
        from qexport import pipeline  # takes seconds; errors of the recipe and the output should come first
        from qexport.cli.verifying import verify_command

        with showing_progress() as progress:
            command = verify_command(".", str(recipe), overrides or (), {})
            result = pipeline.run(
                chosen,
                force=force,
                restart=restart,
                device=device,
                command=command,
                accept=partial(_refuse_taken, output=place),
                progress=progress,
            )
    unproven = result.unproven_merge is not None
    complete = f"interrupted; {'nothing was published' if unproven else f'{result.artifact_path} is complete'}"
    with reporting_errors(as_json=as_json, debug=debug, interrupted=complete):
        if not unproven:
            _show(result, as_json=as_json)
    with reporting_errors(debug=debug, interrupted=complete):
        if tracker is not None:
            with showing_progress() as progress:
                track_run(tracker, result, chosen.portable(), mlflow_run, progress)
    with reporting_errors(as_json=as_json and unproven, debug=debug):
        result.raise_for_verdict()
        if chosen.release is not None and chosen.release.version is not None:
            _release(chosen.release, result.artifact_path)


@app.command()
def verify(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A finished artifact of any tool: a folder, or a GGUF file.")
    ],
    reference: Annotated[
        str, typer.Option(metavar="RECIPE|MODEL", help="A recipe, whose load, merge and verify are used; or a model.")
    ],
    overrides: Overrides = None,
    adapter: Annotated[str | None, typer.Option(help="The adapter, if the reference is a model.")] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Held-out text. May be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="Prompts that both models continue.")] = None,
    gates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The limits: a YAML file with profile and gates.")
    ] = None,
    through: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUNTIME",
            help="A runtime to measure through as well: NAME, NAME@PYTHON or a URL. May be repeated.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="REPORT|ARTIFACT", help="The release in production: the artifact may not be worse."),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most main memory to take, for example 8GB.")
    ] = None,
    report_folder: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write report.html, .json, .md and junit.xml to this folder."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    device: Device = "auto",
    workers: Workers = None,
    mlflow: MlflowUri = None,
    mlflow_experiment: MlflowExperiment = None,
    mlflow_run: MlflowRun = None,
) -> None:
    """Compare a finished artifact with its base and adapter, and decide its gates."""
    with reporting_errors(as_json=as_json, debug=debug, interrupted="interrupted; nothing was written"):
        from qexport.cli.verifying import References

        options = References(
            reference,
            overrides or (),
            adapter,
            text or (),
            prompts,
            gates,
            max_memory,
            through or (),
            baseline,
            workers,
        )
        tracker = tracker_of(mlflow, mlflow_experiment, mlflow_run)
        found, unmet = _measured(artifact, options, report_folder, device)
    written = "" if report_folder is None else f"; the report in {report_folder} is complete"
    with reporting_errors(as_json=as_json, debug=debug, interrupted=f"interrupted{written}"):
        if as_json:
            write_json(found.model_dump(mode="json"))
        else:
            from qexport.reporting.terminal import report_summary

            stdout().print(report_summary(found))
    with reporting_errors(debug=debug, interrupted=f"interrupted{written}"):
        if tracker is not None:
            with showing_progress() as progress:
                track_verification(tracker, found, artifact, mlflow_run, progress)
    with reporting_errors(debug=debug):
        if unmet:
            raise unmet


def _measured(
    artifact: Path, options: References, report_folder: Path | None, device: str
) -> tuple[Report, GateFailed | GateUndecided | None]:
    """The report, which is written to its folder too, and what its gates raise."""
    from qexport.cli.verifying import reference_of
    from qexport.loading.places import refuse_missing
    from qexport.reading.folders import artifact_place
    from qexport.reporting.writing import check_report_folder, write_report

    if report_folder is not None:
        check_report_folder(report_folder)
    chosen = reference_of(options)
    artifact_place(artifact)
    refuse_missing(chosen.load)
    from qexport import pipeline  # takes seconds; errors in the arguments should come first
    from qexport.gates.failures import gates_error

    with showing_progress() as progress:
        found = pipeline.verify(
            artifact,
            chosen.load,
            chosen.settings,
            merging=chosen.merging,
            max_memory=chosen.max_memory,
            execution=chosen.execution,
            command=options.command(artifact),
            device=device,
            progress=progress,
        )
    unmet = gates_error(found.gates, str(artifact))
    if report_folder is not None:
        write_report(found, report_folder)
    return found, unmet


_Server = Literal["tgi", "vllm", "sglang", "tensorrt-llm"]


@app.command()
def validate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The folder of a finished artifact.")],
    server: Annotated[_Server | None, typer.Option(help="Check an artifact against what this server demands.")] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256", help="The root digest that an artifact should have, as `qexport run` printed it."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """After a run or a download: check a finished artifact's digests and headers, and what a server demands."""
    with reporting_errors(as_json=as_json, debug=debug):
        if artifact.is_file():
            mend = f"for a file: qexport inspect {artifact}; for a recipe: qexport plan {artifact}"
            raise RecipeError("validate checks a finished folder", where=str(artifact), mend=mend)
        failed = _inspect(artifact, server, root, as_json=as_json)
    if failed:
        failed.show(as_json=False)
        raise typer.Exit(failed.exit_code)


def _inspect(
    artifact: Path,
    server: _Server | None,
    root: str | None,
    *,
    as_json: bool,
) -> Failure | None:
    """Prints what an artifact contains, and returns a failure if it does not meet a server's demands."""
    from qexport.reading.folders import model_folder

    model_folder(artifact)
    from qexport.pipeline.inspection import inspect_artifact  # takes seconds

    with redirect_stdout(sys.stderr):
        found = inspect_artifact(artifact, server=server, root=root)
    if as_json:
        write_json(found.as_dict())
    else:
        write("\n".join(found.lines()))
    if not found.failed:
        return None
    what = f"{len(found.failed)} of {len(found.checks)} demands of {server} are not met"
    names = listed([check.name for check in found.failed])
    mend = f"export the layout {server}" if server in ("tgi", "vllm") else "the rules are in docs/read-servers.md"
    return Failure(what, CompatibilityError.exit_code, where=names, mend=mend)


def _refuse_taken(planned: Plan, output: Path) -> None:
    """Refuses the places of a run's releases that are taken, before hours of work."""
    recipe = planned.recipe
    if recipe.release is None or recipe.release.version is None:
        return
    from qexport.cli.release_commands import load_releasing
    from qexport.release.naming import Source

    base, adapter = planned.merged.checkpoint.origin.name, planned.merged.adapter
    name = adapter.origin.name if adapter else None
    sources = [Source(recipe.portable(), base, name, layout.name) for layout in planned.layouts]
    load_releasing().refuse_taken_by_run(recipe.release, sources, output)


def _release(settings: ReleaseSettings, artifact: Path) -> None:
    """Releases what a run has published, and says where it is on stderr: stdout has the run's document."""
    from qexport.cli.release_commands import load_releasing

    with showing_progress() as progress:
        for made in load_releasing().release_of_run(settings, artifact, progress):
            for line in made.lines():
                progress(Notice(line))


def _show(result: Result, *, as_json: bool) -> None:
    if as_json:
        manifests = {layout: manifest.model_dump(mode="json") for layout, manifest in result.manifests.items()}
        write_json(
            {
                "artifact": str(result.artifact_path),
                "passed": result.passed,
                "verdict": result.verdict,
                "manifests": manifests,
                "roots": dict(result.roots),
            }
        )
    else:
        from qexport.cli.summary import summary

        path, here = result.artifact_path, Path.cwd()
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        stdout().print(summary(result, shown), crop=False)
