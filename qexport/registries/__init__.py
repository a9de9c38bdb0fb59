"""Places that releases go to and come from: folders, tar files, OCI registries and model hubs.

This room moves a finished folder and knows nothing of artifacts: what may be released, and whether what came back is
sound, its callers decide. What arrives is compared with the folder's own listing, `SHA256SUMS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.artifact.integrity import compare_with_listing
from qexport.errors import InputError, RecipeError
from qexport.progress import ProgressCallback, silent
from qexport.registries import arrival, tar_file
from qexport.registries import folder as folders
from qexport.registries.arrival import arriving
from qexport.registries.destinations import (
    Destination,
    FolderDestination,
    HubDestination,
    LocalDestination,
    OciDestination,
    TarDestination,
    is_tag,
    parse_destination,
)
from qexport.registries.package import Attachment, Package, Published, Tag, files_of

if TYPE_CHECKING:
    from qexport.registries.oci.heads import WriteHead

__all__ = [
    "Attachment",
    "Destination",
    "FolderDestination",
    "HubDestination",
    "LocalDestination",
    "OciDestination",
    "Package",
    "Published",
    "Tag",
    "TarDestination",
    "exactly",
    "fetch",
    "fetch_heads",
    "parse_destination",
    "promote",
    "publish",
    "refuse_taken",
    "tags",
]


def refuse_taken(destination: Destination, version: str) -> None:
    """Refuses a place where something is, before anything is made for it. Publishing asks again.

    Args:
        destination: where a release is to go.
        version: of the release; the tag on a model hub.

    Raises:
        RecipeError: the folder, file or tag exists; the destination names what only fetching can use; an extra is
            missing.
        InputError: the place cannot be reached or refuses.
    """
    match destination:
        case LocalDestination():
            arrival.refuse_taken(destination.path)
        case OciDestination():
            with _needs_the_extra():
                from qexport.registries import oci
            oci.refuse_taken(destination)
        case HubDestination():
            from qexport.registries import hub

            hub.refuse_taken(destination, version)


def publish(package: Package, destination: Destination, *, progress: ProgressCallback = silent) -> Published:
    """Puts a release where nothing of its name is yet; it is there as a whole or not at all.

    Args:
        package: the release.
        destination: where it goes.
        progress: is called with the bytes that are through.

    Raises:
        RecipeError: the folder, file or tag exists; the destination names what only fetching can use; an extra is
            missing.
        InputError: the release cannot be read; the place cannot be reached or refuses.
        ResourceError: the disk is full or failed.
    """
    match destination:
        case FolderDestination():
            with arriving(destination.path) as content:
                content.mkdir()
                folders.link_or_copy(package.folder, package.files(), content, "publish", progress)
            return Published(str(destination), None)
        case TarDestination():
            tar_file.write(package, destination.path, progress)
            return Published(str(destination), None)
        case OciDestination():
            with _needs_the_extra():
                from qexport.registries import oci
            return oci.publish(package, destination, progress)
        case HubDestination():
            from qexport.registries import hub

            return hub.publish(package, destination, progress)


def fetch(reference: Destination, folder: Path, *, progress: ProgressCallback = silent) -> None:
    """Fetches a release into a new folder, byte for byte as it was published.

    Args:
        reference: where it is.
        folder: must not exist; it is complete at the end, or absent.
        progress: is called with the bytes that are through.

    Raises:
        RecipeError: the folder exists, or an extra is missing.
        InputError: there is no such release; it is malformed, incomplete or changed; or the place cannot be reached.
        ResourceError: the disk is full or failed.
    """
    with arriving(folder) as content:
        content.mkdir()
        _fetch_into(content, reference, progress)
        try:
            compare_with_listing(content)
        except InputError as error:
            where = (error.where or "").replace(str(content), str(reference))
            raise InputError(error.what, where=where, mend=error.mend) from error


def fetch_heads(
    reference: OciDestination, folder: Path, write_head: WriteHead, *, progress: ProgressCallback = silent
) -> None:
    """Fetches a release, but of its weights only the heads. What comes is not compared with the release's listing.

    Args:
        reference: where it is.
        folder: an empty folder.
        write_head: writes the head of a file to a path, from its size and a function that gives bytes of it.
        progress: is called with what is fetched.

    Raises:
        RecipeError: the extra is missing.
        InputError: there is no such release, it is malformed, or the registry cannot be reached.
    """
    with _needs_the_extra():
        from qexport.registries import oci
    oci.fetch_heads(reference, folder, write_head, progress)


def tags(reference: OciDestination) -> list[Tag]:
    """The releases of a repository and the names that were moved to them, sorted.

    A few tags that the registry lists but cannot answer for are left out.

    Raises:
        RecipeError: the extra is missing.
        InputError: the registry cannot be reached or refuses, or has no such repository.
    """
    with _needs_the_extra():
        from qexport.registries import oci
    return oci.tags(reference)


def exactly(reference: OciDestination) -> OciDestination:
    """The release that a tag stands for now, by its digest, so that the next step has the same one.

    Raises:
        RecipeError: neither a tag nor a digest is named; the extra is missing.
        InputError: the registry cannot be reached or refuses, or there is no such release.
    """
    with _needs_the_extra():
        from qexport.registries import oci
    return oci.exactly(reference)


def promote(reference: OciDestination, to: str) -> None:
    """Moves a tag to a release; whether the release deserves it, the caller has checked.

    Args:
        reference: the release. With a digest, exactly that one.
        to: a tag, which may exist, for example `stable`.

    Raises:
        RecipeError: it is no valid tag, one that helps clients, or the tag under which a release was published; the
            extra is missing.
        InputError: the registry cannot be reached or refuses, or there is no such release, but for example only its
            ModelPack artifact.
    """
    if not is_tag(to):
        raise RecipeError("the tag to move is not valid", where=to, mend="use letters, digits, . _ -")
    with _needs_the_extra():
        from qexport.registries import oci
    oci.promote(reference, to)


def _fetch_into(content: Path, reference: Destination, progress: ProgressCallback) -> None:
    match reference:
        case FolderDestination():
            compare_with_listing(reference.path)
            folders.link_or_copy(reference.path, files_of(reference.path), content, "fetch", progress)
        case TarDestination():
            tar_file.read(reference.path, content, progress)
        case OciDestination():
            with _needs_the_extra():
                from qexport.registries import oci
            oci.fetch(reference, content, progress)
        case HubDestination():
            from qexport.registries import hub

            hub.fetch(reference, content, progress)


@contextmanager
def _needs_the_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        what = f"an OCI registry needs the package {error.name}"
        raise RecipeError(what, mend="pip install 'qexport[release]'") from error
