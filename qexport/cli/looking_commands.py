"""The commands that look at models and artifacts: `inspect` and `diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from qexport.cli.app import AsJson, Debug, app, reporting_errors, showing_progress
from qexport.cli.terminal import write, write_json
from qexport.errors import GateFailed
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


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A folder, a .gguf or .safetensors file, or a reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    weights: Annotated[bool, typer.Option("--weights", help="Compare the weights alone.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 6 if anything differs.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """In what two models, adapters or artifacts of any maker differ: tensors, configs, tokenizers, recipes, figures."""
    with reporting_errors(as_json=as_json, debug=debug):
        from qexport.comparing.difference import compare
        from qexport.describing.places import local_place

        with (
            showing_progress() as progress,
            local_place(a, progress=progress) as ours,
            local_place(b, progress=progress) as theirs,
        ):
            found = compare((ours, theirs), names=(a, b), weights_only=weights, progress=progress)
        if as_json:
            write_json(found.as_dict())
        else:
            write("\n".join(map(visible, found.lines())))
    if exit_code and not (found.same_weights if weights else found.equal):
        raise typer.Exit(GateFailed.exit_code)
