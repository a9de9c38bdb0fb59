"""The command `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qexport.cli.app import AsJson, Debug, Device, Overrides, Workers, app, reporting_errors, showing_progress
from qexport.cli.terminal import stdout, write_json

if TYPE_CHECKING:
    from qexport.pipeline import SweepResult
    from qexport.recipe.sweep import LoadedSweep, Variant


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep, a YAML file.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="The sweep's folder, instead of the file's.")] = None,
    keep: Annotated[
        Literal["all", "best"] | None,
        typer.Option(help="best: keep the recommended artifact alone, and make none that is larger than it."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Make all variants again, without what an earlier sweep has finished.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Make variants of a recipe, compare them, and recommend the smallest that passes. Run again, it goes on."""
    with reporting_errors(as_json=as_json, debug=debug, interrupted="interrupted; finished variants are kept"):
        from qexport.recipe.sweep import load_sweep

        loaded = load_sweep(file, overrides or (), output=output, keep=keep)
        if workers is not None:
            loaded = loaded.on_workers(workers)
        from qexport import pipeline  # takes seconds; errors of the file should come first

        with showing_progress() as progress:
            result = pipeline.sweep(
                loaded,
                restart=restart,
                device=device,
                command=lambda variant: _verify_command(loaded, variant),
                progress=progress,
            )
    complete = f"interrupted; the sweep in {result.folder} is complete"
    with reporting_errors(as_json=as_json, debug=debug, interrupted=complete):
        _show(result, as_json=as_json)
    with reporting_errors(debug=debug):
        result.raise_for_verdict()


def _verify_command(loaded: LoadedSweep, variant: Variant) -> str:
    from qexport.cli.verifying import verify_command

    return verify_command(".", str(loaded.recipe), variant.overrides, {})


def _show(result: SweepResult, *, as_json: bool) -> None:
    best = result.recommended
    if as_json:
        document = {
            "output": str(result.folder),
            "page": str(result.page),
            "artifact": None if best is None else str(best),
        }
        write_json({**document, **result.record.model_dump(mode="json")})
        return
    from qexport.reporting.sweep import sweep_summary

    stdout().print(sweep_summary(result.record, result.reports), crop=False)
    stdout().print(f"Comparison   {result.page}", soft_wrap=True)
    if best is not None:
        stdout().print(f"Artifact     {best}", soft_wrap=True)
