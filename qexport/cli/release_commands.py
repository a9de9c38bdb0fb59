"""The commands `release` and `check`: proven artifacts become something that others can pull, and check offline."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.cli.app import AsJson, Debug, app, reporting_errors, showing_progress
from qexport.cli.terminal import write, write_json
from qexport.errors import RecipeError
from qexport.registries import FolderDestination, fetch, parse_destination
from qexport.release import checked_name, checked_version, named_or_refused

if TYPE_CHECKING:
    from types import ModuleType


@app.command()
def release(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Finished artifacts, or a folder of several layouts.")
    ],
    to: Annotated[
        str | None, typer.Option(metavar="DEST", help="Where they go. By default the current folder.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY|CERT", help="A PEM file with the private key, and its certificates.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="For example 1.4.0, instead of the recipe's.")] = None,
    name: Annotated[str | None, typer.Option(help="The release's name, instead of the recipe's.")] = None,
    allow_unproven: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Release it although its gates did not pass. The card says why."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Lock proven artifacts together with all that they came from, under one name and version, with their evidence."""
    with reporting_errors(as_json=as_json, debug=debug, interrupted="interrupted; nothing unfinished was left"):
        number = named_or_refused(version, checked_version, "--version")
        model = named_or_refused(name, checked_name, "--name")
        releasing = load_releasing()
        options = releasing.ReleaseOptions(to, sign, number, model, allow_unproven)
        with showing_progress() as progress:
            made = releasing.release_all(artifacts, options, progress)
    with reporting_errors(as_json=as_json, debug=debug):
        if as_json:
            write_json({"releases": [each.as_dict() for each in made]})
        else:
            write("\n".join(line for each in made for line in each.lines()))


@app.command()
def check(
    folder: Annotated[str, typer.Argument(metavar="FOLDER|REFERENCE", help="A release, or an artifact.")],
    signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBKEY", help="The public key, or the certificate that the signer's chain ends at."),
    ] = None,
    root: Annotated[
        str | None, typer.Option(metavar="SHA256", help="The root digest that the folder should have.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a release offline: every byte, the signature, provenance against manifest, report against gates."""
    with reporting_errors(as_json=as_json, debug=debug), tempfile.TemporaryDirectory(prefix="qexport-") as scratch:
        from qexport.release.checking import check as check_folder

        path = Path(folder)
        if not path.is_dir():
            path = _fetched(folder, Path(scratch, "release"))
        found = check_folder(path, key=signature, root=root)
        if as_json:
            write_json(found.as_dict())
        else:
            write("\n".join(found.lines()))


def load_releasing() -> ModuleType:
    """The module that releases, whose packages are an extra.

    Raises:
        RecipeError: one of them is not installed.
    """
    try:
        from qexport.release import releasing
    except ModuleNotFoundError as error:
        what = f"releasing needs the package {error.name}"
        raise RecipeError(what, where="release", mend="pip install 'qexport[release]'") from error
    return releasing


def _fetched(text: str, folder: Path) -> Path:
    """What a reference of a registry names."""
    destination = parse_destination(text)
    if isinstance(destination, FolderDestination):
        raise RecipeError("there is no such folder", where=text, mend="give the folder of a release")
    with showing_progress() as progress:
        fetch(destination, folder, progress=progress)
    return folder
