"""The commands that look at models and artifacts: `inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from qexport.cli.app import AsJson, Debug, app, reporting_errors, showing_progress
from qexport.cli.terminal import write, write_json
from qexport.reporting.values import visible

PLACE = "PATH|hub:ORG/NAME|oci://..."


@app.command()
def inspect(
    place: Annotated[
        str, typer.Argument(metavar=PLACE, help="A folder, a .gguf or .safetensors file, or a reference.")
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a base, an adapter, a GGUF file or an artifact is, from headers alone."""
    with reporting_errors(as_json=as_json, debug=debug):
        from qexport.describing.description import describe
        from qexport.describing.places import local_place

        with showing_progress() as progress, local_place(place, weights=False, progress=progress) as path:
            found = describe(path, place=place)
        if as_json:
            write_json(found.as_dict())
        else:
            write("\n".join(map(visible, found.lines())))
