"""The commands `release` and `check`: proven artifacts become something that others can pull, and check offline."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.cli.app import AsJson, Debug, app, reporting_errors, showing_progress
from qexport.cli.terminal import write, write_json
from qexport.errors import InputError, RecipeError
from qexport.registries import FolderDestination, OciDestination, exactly, fetch, parse_destination, tags
from qexport.registries import promote as move
from qexport.registries.arrival import arriving
from qexport.release import checked_name, checked_version, named_or_refused

if TYPE_CHECKING:
    from types import ModuleType


@app.command()
def release(
    artifacts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ARTIFACT...", help="Finished artifacts, or a folder of several layouts."),
    ] = None,
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
    listed: Annotated[
        str | None,
        typer.Option("--list", metavar="REFERENCE", help="List the releases of a registry's repository instead."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Lock proven artifacts together with all that they came from, under one name and version, with their evidence."""
    if listed is not None:
        _list(listed, artifacts or [], as_json=as_json, debug=debug)
        return
    with reporting_errors(as_json=as_json, debug=debug, interrupted="interrupted; nothing unfinished was left"):
        if not artifacts:
            raise RecipeError("no artifact is named", where="release", mend="name finished artifacts, or --list")
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
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the release that a REFERENCE names there, if it checks.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a release offline: every byte, the signature, provenance against manifest, report against gates."""
    with reporting_errors(as_json=as_json, debug=debug, interrupted="interrupted; nothing unfinished was left"):
        from qexport.release.checking import check as check_folder

        with _at_hand(folder, to) as path:
            found = check_folder(path, key=signature, root=root)
        if as_json:
            write_json(found.as_dict() | {"folder": str(to or folder)})
        else:
            write("\n".join([*found.lines(), *([] if to is None else [f"kept in    {to}"])]))


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="A release: oci://HOST/NAME:TAG.")],
    to: Annotated[str, typer.Option("--as", metavar="TAG", help="The tag to move, for example stable.")],
    signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBKEY", help="The public key, or the certificate that the signer's chain ends at."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Move a registry's tag to a release that checks."""
    with reporting_errors(as_json=as_json, debug=debug), tempfile.TemporaryDirectory(prefix="qexport-") as scratch:
        from qexport.release.checking import check as check_folder

        place = _repository(reference)
        exact = exactly(place)
        with showing_progress() as progress:
            fetch(exact, Path(scratch, "release"), progress=progress)
        found = check_folder(Path(scratch, "release"), key=signature)
        if found.record is None:
            raise InputError("this is no release", where=reference, mend="release the artifact first: qexport release")
        move(exact, to)
        if as_json:
            write_json({"tag": to, "release": found.record.name, "digest": exact.digest, "root": found.artifact.root})
        else:
            write(f"{to}  {found.record.name}\n{exact}")


def _list(text: str, artifacts: Sequence[Path], *, as_json: bool, debug: bool) -> None:
    with reporting_errors(as_json=as_json, debug=debug):
        if artifacts:
            raise RecipeError("--list names a repository and releases nothing", mend="leave the artifacts out")
        found = tags(_repository(text))
        if as_json:
            write_json({"tags": {each.name: each.digest for each in found}})
        else:
            write("\n".join(f"{each.name}  {each.digest}" for each in found) or "no releases")


def _repository(text: str) -> OciDestination:
    place = parse_destination(text)
    if not isinstance(place, OciDestination):
        raise RecipeError("only registries have tags", where=text, mend="write oci://HOST/NAME:TAG")
    return place


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


@contextmanager
def _at_hand(text: str, to: Path | None) -> Iterator[Path]:
    """A folder; or what a reference names, fetched for a while, or to a place where it stays unless the block fails."""
    reference = parse_destination(text)
    if isinstance(reference, FolderDestination):
        if to is not None:
            raise RecipeError("a folder is at hand already", where=text, mend="leave --to out, or give a reference")
        if not reference.path.is_dir():
            raise RecipeError("there is no such folder", where=text, mend="give the folder of a release")
        yield reference.path
        return
    with ExitStack() as stack, showing_progress() as progress:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qexport-")), "release")
        path = temporary if to is None else stack.enter_context(arriving(to))
        fetch(reference, path, progress=progress)
        try:
            yield path
        except InputError as error:
            where = (error.where or "").replace(str(path), str(reference))
            raise InputError(error.what, where=where, mend=error.mend) from error
