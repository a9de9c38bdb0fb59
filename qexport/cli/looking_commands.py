"""The commands that look at models and artifacts: `inspect`, `diff` and `rebuild`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qexport.artifact.disk import write_together
from qexport.cli.app import AsJson, Debug, Overrides, app, reporting_errors, showing_progress
from qexport.cli.terminal import write, write_json
from qexport.errors import GateFailed, RecipeError
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


@app.command()
def rebuild(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MANIFEST", help="An artifact's folder or reference, or its manifest.")
    ],
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, instead of the one that the manifest holds.")] = None,
    inputs: Annotated[
        Path, typer.Option(metavar="DIR", help="Where local inputs of the manifest's recipe lie, by their names.")
    ] = Path(),
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep what is built in this folder.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Verify too, and compare manifest and figures.")] = False,
    attestation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result to this file, as an in-toto statement.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where to compute.")] = None,
) -> None:
    """Build an artifact again from the same inputs, checked by their digests, and compare the bytes."""
    with reporting_errors(as_json=as_json, debug=debug):
        from qexport.describing.places import local_place

        if attestation is not None and not attestation.absolute().parent.is_dir():
            raise RecipeError("the folder does not exist", where=f"--attestation {attestation}", mend="make it first")
        with showing_progress() as progress, local_place(artifact, progress=progress) as path:
            from qexport.pipeline import rebuilding

            given = rebuilding.recorded(path)
            chosen = rebuilding.recipe_of(given, recipe=recipe, inputs=inputs, overrides=overrides or (), verify=verify)
            found = rebuilding.rebuild(given, chosen, to=to, device=device, progress=progress)
        if as_json:
            write_json(found.statement())
        else:
            write("\n".join(map(visible, found.lines())))
        if attestation is not None:
            content = json.dumps(found.statement(), indent=2, sort_keys=True) + "\n"
            write_together(attestation.absolute().parent, {attestation.name: content})
    if not found.equal:
        raise typer.Exit(GateFailed.exit_code)
