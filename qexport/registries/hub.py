"""Releases on a model hub, through huggingface_hub: one commit for all files, private at first, a tag for the version.

`upload_folder` is not used: with hf_xet installed it makes several commits, so that a reader could see half a release.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import GitRefs, ModelInfo

from qexport.artifact.disk import disk_failure, ensure_space
from qexport.artifact.integrity import LISTING_BYTES
from qexport.artifact.manifest import LISTING_NAME
from qexport.errors import InputError, QexportError, RecipeError
from qexport.progress import Notice, ProgressCallback
from qexport.registries.authorities import OF_HUBS, named_authorities
from qexport.registries.destinations import HubDestination
from qexport.registries.names import is_portable
from qexport.registries.package import Package, Published
from qexport.tensors.strict_files import read_bounded

_ATTRIBUTES: Final = ".gitattributes"
"""The hub adds it to every repository."""

_CACHE: Final = ".cache"
"""huggingface_hub keeps notes on a download in it."""

_MOST_FILES: Final = 100_000
_LOG_IN: Final = "check the name; set HF_TOKEN, or run hf auth login"


def publish(package: Package, destination: HubDestination, progress: ProgressCallback) -> Published:
    """Commits a release as the only content of the main branch, and tags it. See `qexport.registries.publish`."""
    _refuse_other_tag(destination, package.version)
    files = package.files()
    progress(Notice(f"uploading to {destination}"))
    with _told(destination):
        api = HfApi()
        api.create_repo(destination.repo_id, private=True, exist_ok=True)
        refs = api.list_repo_refs(destination.repo_id)
        _refuse_tagged(refs, destination, package.version)
        parent = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
        before = api.list_repo_files(destination.repo_id, revision=parent)
        removed = [name for name in before if name not in files and name != _ATTRIBUTES]
        commit = api.create_commit(
            destination.repo_id,
            [
                *(CommitOperationDelete(name) for name in removed),
                *(CommitOperationAdd(name, package.folder / name) for name in files),
            ],
            commit_message=f"{package.name} {package.version}",
            parent_commit=parent,
        )
        there = set(api.list_repo_files(destination.repo_id, revision=commit.oid))
        if there - {_ATTRIBUTES} != files.keys() - {_ATTRIBUTES}:
            missing = sorted(files.keys() - there)
            raise InputError(f"the hub has not taken all files: {missing[:3]}", where=str(destination))
        api.create_tag(destination.repo_id, tag=package.version, revision=commit.oid)
    return Published(f"hub:{destination.repo_id}@{package.version}", commit.oid)


def refuse_taken(destination: HubDestination, version: str) -> None:
    """Refuses a version that exists as a tag. See `qexport.registries.refuse_taken`."""
    _refuse_other_tag(destination, version)
    with _told(destination), suppress(RepositoryNotFoundError):
        _refuse_tagged(HfApi().list_repo_refs(destination.repo_id), destination, version)


def fetch(reference: HubDestination, folder: Path, progress: ProgressCallback) -> None:
    """Downloads a release into an empty folder. See `qexport.registries.fetch`."""
    progress(Notice(f"fetching {reference}"))
    with _told(reference):
        api = HfApi()
        info = api.model_info(reference.repo_id, revision=reference.revision, files_metadata=True)
        ensure_space(folder, _size(info, reference))
        api.snapshot_download(reference.repo_id, revision=info.sha, local_dir=folder)
        _remove_additions(folder)


def _refuse_other_tag(destination: HubDestination, version: str) -> None:
    if destination.revision not in (None, version):
        what = f"on a hub the tag is the version, {version}"
        raise RecipeError(what, where=str(destination), mend=f"write hub:{destination.repo_id}")


def _refuse_tagged(refs: GitRefs, destination: HubDestination, version: str) -> None:
    if version in {tag.name for tag in refs.tags}:
        what = f"the tag {version} exists already; a release keeps its tag"
        raise RecipeError(what, where=str(destination), mend="choose another version")


def _size(info: ModelInfo, reference: HubDestination) -> int:
    """The bytes of all files, whose names are checked before any is written."""
    files = info.siblings or []
    unsafe = next((file.rfilename for file in files if not is_portable(file.rfilename)), None)
    if unsafe is not None or len(files) > _MOST_FILES:
        what = f"a name leads out of the folder: {unsafe!r}" if unsafe else f"there are more than {_MOST_FILES} files"
        raise InputError(what, where=str(reference), mend="do not use this repository")
    if LISTING_NAME not in {file.rfilename for file in files}:
        raise InputError(f"this is no release: it has no {LISTING_NAME}", where=str(reference))
    return sum(file.size or 0 for file in files)


def _remove_additions(folder: Path) -> None:
    """Removes what the hub and its library have added, unless the release lists it."""
    listed = read_bounded(folder / LISTING_NAME, LISTING_BYTES).decode("utf-8", errors="replace")
    if f"  {_ATTRIBUTES}\n" not in listed:
        (folder / _ATTRIBUTES).unlink(missing_ok=True)
    shutil.rmtree(folder / _CACHE / "huggingface", ignore_errors=True)
    if (folder / _CACHE).is_dir() and not any((folder / _CACHE).iterdir()):
        (folder / _CACHE).rmdir()


@contextmanager
def _told(place: HubDestination) -> Iterator[None]:
    try:
        yield
    except QexportError:
        raise
    except Exception as error:  # the library raises its own errors, the network's and the operating system's
        raise disk_failure(error, where=str(place)) or _refusal(place, error) from error


def _refusal(place: HubDestination, error: Exception) -> InputError:
    where = str(place)
    if isinstance(error, GatedRepoError):
        return InputError("the model is gated", where=where, mend="accept its terms on the hub, then set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return InputError("there is no such repository, or you may not read it", where=where, mend=_LOG_IN)
    if isinstance(error, RevisionNotFoundError):
        return InputError("there is no such revision", where=where, mend="name a branch, tag or commit")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        mend = _LOG_IN if status in (401, 403) else "try again later"
        told = f": {error.server_message}" if error.server_message else ""
        return InputError(f"the hub refuses: HTTP status {status}{told}", where=where, mend=mend)
    named_authorities(OF_HUBS)
    what = f"the hub could not be reached: {type(error).__name__}"
    return InputError(what, where=where, mend="check the network, and try again")
