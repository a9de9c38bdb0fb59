"""Models on the hub, through its cache."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qexport.errors import InputError
from qexport.loading.small_files import CONFIG_NAME, SIDECAR_PATTERNS
from qexport.loading.terms import CARD_NAME, FILE_PATTERNS
from qexport.progress import Notice, ProgressCallback
from qexport.references import HubReference
from qexport.registries.authorities import OF_HUBS, named_authorities
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME, read_index
from qexport.tensors.strict_files import contained_path

_BASE_FILES: Final = (
    *(CONFIG_NAME, INDEX_NAME, SINGLE_NAME, *SIDECAR_PATTERNS),
    *(CARD_NAME, *FILE_PATTERNS),
)


@dataclass(frozen=True)
class Snapshot:
    """A model's files in the hub's cache.

    Attributes:
        path: the folder of links.
        commit: what the revision resolved to.
        trusted_root: the cache, which contains the targets of the links.
    """

    path: Path
    commit: str
    trusted_root: Path


def fetch_base(reference: HubReference, *, progress: ProgressCallback) -> Snapshot:
    """Fetches a base model's files, or finds them in the cache."""
    snapshot = fetch(reference, _BASE_FILES, progress=progress)
    index = contained_path(snapshot.path, INDEX_NAME, root=snapshot.trusted_root)
    if index.is_file():
        shards = sorted(set(read_index(index).values()))
        at_commit = HubReference(reference.repo_id, snapshot.commit)
        fetch(at_commit, tuple(glob.escape(shard) for shard in shards), progress=progress)
    return snapshot


def fetch(reference: HubReference, patterns: tuple[str, ...], *, progress: ProgressCallback) -> Snapshot:
    """Fetches the files that match any of the patterns, or finds them in the cache.

    Raises:
        InputError: the model or revision does not exist, is gated, or cannot be reached and is not in the cache.
    """
    progress(Notice(f"fetching {reference.repo_id} ({reference.revision or 'main'})"))
    try:
        path = snapshot_download(reference.repo_id, revision=reference.revision, allow_patterns=list(patterns))
    except Exception as error:  # the client raises its own errors, the network's and the operating system's
        raise _refusal(reference, error) from error
    return Snapshot(Path(path), Path(path).name, Path(constants.HF_HUB_CACHE))


def folders_with(name: str, snapshot: Snapshot, repo_id: str) -> list[str]:
    """The folders of a repository that hold a file of this name, from its list of files; offline, those in the cache.

    Raises:
        InputError: the hub cannot be reached.
    """
    try:
        files = (
            [path.relative_to(snapshot.path).as_posix() for path in snapshot.path.rglob(name)]
            if constants.HF_HUB_OFFLINE
            else HfApi(endpoint=constants.ENDPOINT).list_repo_files(repo_id, revision=snapshot.commit)
        )
    except Exception as error:  # as for `fetch`
        raise _refusal(HubReference(repo_id, snapshot.commit), error) from error
    return sorted(folder for folder, _, last in (file.rpartition("/") for file in files) if last == name)


def _refusal(reference: HubReference, error: Exception) -> InputError:
    model, revision = reference.repo_id, reference.revision or "main"
    if isinstance(error, GatedRepoError):
        return InputError(
            "the model is gated",
            where=model,
            mend="accept its terms on the hub, then set HF_TOKEN or run hf auth login",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            "there is neither a local folder nor a public model on the hub with this name",
            where=model,
            mend="check the name; for a private model set HF_TOKEN or run hf auth login",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"the model has no revision {revision!r}", where=model, mend="name a branch, tag or commit")
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return InputError(
            f"HF_HUB_OFFLINE is set, and the cache does not hold the files of revision {revision!r}",
            where=model,
            mend=f"run once with a network: hf download {model} --revision {revision}",
        )
    named_authorities(OF_HUBS)
    return InputError(
        f"the hub could not be reached: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        where=model,
        mend="check the network and try again, or name a local folder",
    )
