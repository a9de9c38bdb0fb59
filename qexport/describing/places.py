"""What a reference on the command line names, as a local path: packaged files, models of the hub, registries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from qexport.describing.heads import write_head
from qexport.errors import InputError, RecipeError
from qexport.loading.packaged import find_package_file
from qexport.progress import ProgressCallback
from qexport.references import PackageReference, parse_reference
from qexport.registries import OciDestination, fetch, fetch_heads, parse_destination

HUB_PREFIX: Final = "hub:"
REGISTRY_PREFIX: Final = "oci:"


@contextmanager
def local_place(text: str, *, weights: bool = True, progress: ProgressCallback) -> Iterator[Path]:
    """The local path of what a text names, for the time of the context.

    Args:
        text: a path; `pkg:package/file.gguf`; `hub:org/name[/FILE.gguf][@REVISION]`, fetched into the hub's cache
            or found there; or `oci://HOST/NAME:TAG`, pulled into a temporary folder.
        weights: whether more than the headers of the weights is read.
        progress: is called with what is fetched.

    Raises:
        RecipeError: the text has one of the prefixes, but names nothing.
        InputError: nothing is there, or it cannot be fetched.
    """
    if not text.startswith((HUB_PREFIX, REGISTRY_PREFIX)):
        yield _path(text)
        return
    with TemporaryDirectory(prefix="qexport-fetched-") as temporary:
        folder = Path(temporary, "content")
        if text.startswith(REGISTRY_PREFIX):
            _pull(text, folder, weights=weights, progress=progress)
            yield folder
        else:
            from qexport.describing.hub_places import fetch_into  # imports transformers

            folder.mkdir()
            yield fetch_into(folder, text.removeprefix(HUB_PREFIX), weights=weights, progress=progress)


def _pull(text: str, folder: Path, *, weights: bool, progress: ProgressCallback) -> None:
    """Pulls a release of a registry, or all of it but its weights, into a folder that does not exist."""
    reference = parse_destination(text)
    if not isinstance(reference, OciDestination):
        raise RecipeError("this names no release of a registry", where=text, mend="write oci://HOST/NAME:TAG")
    if weights:
        fetch(reference, folder, progress=progress)
    else:
        folder.mkdir()
        fetch_heads(reference, folder, write_head, progress=progress)


def _path(text: str) -> Path:
    try:
        reference = parse_reference(text)
    except ValueError as error:
        raise RecipeError(str(error), where=text) from error
    if isinstance(reference, PackageReference):
        return find_package_file(reference).path
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise RecipeError("there is no such user", where=text, mend="write ./~... for a folder of that name") from error
    if not path.exists():
        raise InputError("there is no such file or folder", where=text, mend="for a model of the hub: hub:org/name")
    return path
