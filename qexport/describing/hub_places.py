"""Models of the hub as local folders: whole, or with weights of which only the headers were fetched."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined] # documented

from qexport.artifact.names import GGUF_NAME, gguf_of
from qexport.describing.heads import write_head
from qexport.errors import InputError, RecipeError
from qexport.loading.hub import Snapshot, fetch
from qexport.loading.small_files import CONFIG_NAME
from qexport.progress import ProgressCallback
from qexport.references import HubReference, gguf_part, is_hub_id, parsed_gguf_part
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME, read_index
from qexport.tensors.strict_files import contained_path

_SMALL: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "SHA256SUMS", "LICENSE*", "NOTICE*")
_GRAPH: Final = "*.onnx*"
_GGUF: Final = ".gguf"
_PREFIX: Final = "hub:"
_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors")
_MOST_SHARDS: Final = 512
_MOST_SHOWN: Final = 30


def fetch_into(folder: Path, text: str, *, weights: bool, progress: ProgressCallback) -> Path:
    """Puts a model's files into an empty folder.

    Args:
        folder: the folder.
        text: `org/name` or `org/name/FILE.gguf`, with `@REVISION` or without.
        weights: fetch them too; else only their headers, unless the client is offline: then they come from the cache.
        progress: is called with what is fetched.

    Returns:
        The folder, or the GGUF file in it that is the model.

    Raises:
        RecipeError: the text is no name of a model.
        InputError: the model cannot be fetched, holds several GGUF files and no other weights, or a file leads out of
            the cache.
    """
    repository, file, revision = _parsed(text)
    found = fetch(HubReference(repository, revision), _SMALL, progress=progress)
    reference = HubReference(repository, found.commit)
    there = _listing(found, reference)
    if file is not None and file not in there:
        raise InputError("the repository has no such file", where=f"{repository}: {file}", mend="check its name")
    names = _weight_files(found, there, repository) if file is None else _all_parts(file, there)
    if weights or constants.HF_HUB_OFFLINE:
        fetch(reference, tuple(map(glob.escape, names)), progress=progress)
    _link_files(found, folder)
    for name in names:
        if not (path := contained_path(folder, name)).exists() and not constants.HF_HUB_OFFLINE:
            _fetch_head(path, name, reference)
    whole = bool(names) and gguf_of(folder) == names[0] and (folder / CONFIG_NAME).is_file()
    return folder / names[0] if names and names[0].endswith(_GGUF) and not whole else folder


def _parsed(text: str) -> tuple[str, str | None, str | None]:
    """The repository, the file in it and the revision that a text names."""
    named, _, revision = text.partition("@")
    repository, file = "/".join(named.split("/")[:2]), "/".join(named.split("/")[2:])
    if not is_hub_id(repository) or (named != repository and not file.endswith(_GGUF)):
        raise RecipeError(
            f"{text!r} does not name a model of the hub", mend="write hub:org/name[/FILE.gguf][@REVISION]"
        )
    return repository, file or None, revision or None


def _listing(found: Snapshot, reference: HubReference) -> list[str]:
    """The names of the repository's files; offline of those in the cache."""
    if constants.HF_HUB_OFFLINE:
        return sorted(path.relative_to(found.path).as_posix() for path in found.path.rglob("*"))
    with _told("the list of its files", reference):
        return sorted(HfApi(endpoint=constants.ENDPOINT).list_repo_files(reference.repo_id, revision=found.commit))


def _weight_files(found: Snapshot, there: Sequence[str], repository: str) -> list[str]:
    """The files of a model's weights: safetensors, else a graph, else the one GGUF file with its further parts."""
    index = contained_path(found.path, INDEX_NAME, root=found.trusted_root)
    if index.is_file():
        return sorted(set(read_index(index).values()))[:_MOST_SHARDS]
    config, adapter = _ADAPTER
    if own := [name for name in ([adapter] if config in there else [SINGLE_NAME]) if name in there]:
        return own
    if graphs := [name for name in there if fnmatch(name, _GRAPH) and "/" not in name]:
        return graphs[:_MOST_SHARDS]
    files = [name for name in there if name.endswith(_GGUF) and not _is_later_part(name)]
    if len(files) > 1 and GGUF_NAME not in files:
        shown = ", ".join(f"{_PREFIX}{repository}/{name}" for name in files[:_MOST_SHOWN])
        raise InputError("the repository holds several GGUF files", where=repository, mend=f"name one of: {shown}")
    chosen = [GGUF_NAME] if GGUF_NAME in files else files
    return [name for each in chosen for name in _all_parts(each, there)]


def _is_later_part(name: str) -> bool:
    found = parsed_gguf_part(name)
    return found is not None and found[1] > 1


def _all_parts(file: str, there: Sequence[str]) -> list[str]:
    """A file, and the others of the model where it is the first of several."""
    found = parsed_gguf_part(file)
    if found is None or found[1] != 1:
        return [file]
    prefix, _, count = found
    others = [gguf_part(prefix, number, count) for number in range(2, min(count, _MOST_SHARDS) + 1)]
    return [file, *sorted(set(others) & set(there))]


def _link_files(found: Snapshot, folder: Path) -> None:
    """The links of a snapshot as files, so that none leads out of the folder."""
    for path in sorted(found.path.rglob("*")):
        name = path.relative_to(found.path).as_posix()
        source = contained_path(found.path, name, root=found.trusted_root)
        target = folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), target)
            except OSError:  # another file system
                shutil.copyfile(source, target)


def _fetch_head(path: Path, name: str, reference: HubReference) -> None:
    """A file with the header of one on the hub, and as long as it."""
    url = hf_hub_url(reference.repo_id, name, revision=reference.revision, endpoint=constants.ENDPOINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _told(f"the header of {name}", reference):
        size = get_hf_file_metadata(url).size or 0
        write_head(path, size, partial(_read, url))


def _read(url: str, start: int, stop: int) -> bytes:
    if start == stop:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    with get_session().stream("GET", url, headers=headers) as response:
        if response.is_error:
            response.read()  # the error's text
        hf_raise_for_status(response)
        first = start if response.status_code == 206 else 0  # else the server sends the whole file
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if first < start:
                past = min(len(content), start - first)
                del content[:past]
                first += past
            if len(content) >= stop - start:
                break
    return bytes(content[: stop - start])


@contextmanager
def _told(what: str, reference: HubReference) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises its own errors, the network's and the operating system's
        raise InputError(
            f"{what} cannot be fetched: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            where=reference.repo_id,
            mend="check the network and the model's files",
        ) from error
