"""The command `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from qexport.cli.app import AsJson, Debug, Overrides, RecipePath, app, reporting_errors, showing_progress
from qexport.cli.terminal import write, write_json


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure what the method mixed chooses from, and show its choice (minutes)."),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Before a run: what it will quantize and write, what it takes, who can load it, and everything that is wrong with
    the recipe. Reads headers alone, without --measure.
    """
    with reporting_errors(as_json=as_json, debug=debug):
        from qexport.recipe import load_recipe
        from qexport.recipe.places import refuse_missing

        chosen = load_recipe(recipe, overrides or ())
        refuse_missing(chosen)
        from qexport import pipeline  # takes seconds; errors of the recipe should come first

        with showing_progress() as progress:
            planned = pipeline.plan(chosen, texts=True, progress=progress)
            if measure:
                planned = pipeline.measured(planned, progress=progress)
        if as_json:
            write_json(planned.as_dict())
        else:
            write("\n".join(planned.lines()))
