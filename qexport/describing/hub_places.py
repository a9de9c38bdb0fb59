"""Models of the hub as local folders: whole, or with weights of which only the headers were fetched."""

from __future__ import annotations

import glob
import json
import os
import shutil
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants

from qexport.errors import InputError, RecipeError
from qexport.loading.hub import Snapshot, fetch
from qexport.progress import ProgressCallback
from qexport.references import HubReference, is_hub_id
from qexport.tensors.safetensors_index import INDEX_NAME, SINGLE_NAME, read_index
from qexport.tensors.strict_files import contained_path

_SMALL: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "SHA256SUMS", "LICENSE*", "NOTICE*")
_GRAPH: Final = ("*.onnx", "*.onnx.data")
_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors")
_MOST_SHARDS: Final = 512


def fetch_into(folder: Path, text: str, *, weights: bool, progress: ProgressCallback) -> None:
    """Puts a model's files into an empty folder.

    Args:
        folder: the folder.
        text: `org/name` or `org/name@REVISION`.
        weights: fetch them too; else only their headers, unless the client is offline: then they come from the cache.
        progress: is called with what is fetched.

    Raises:
        RecipeError: the text is no name of a model.
        InputError: the model cannot be fetched, or a file of it leads out of the cache.
    """
    repository, _, revision = text.partition("@")
    if not is_hub_id(repository):
        raise RecipeError(f"{text!r} does not name a model of the hub", mend="write hub:org/name[@REVISION]")
    found = fetch(HubReference(repository, revision or None), _SMALL, progress=progress)
    reference, names = HubReference(repository, found.commit), _weight_files(found)
    if weights or constants.HF_HUB_OFFLINE:
        fetch(reference, (*map(glob.escape, names), *_GRAPH), progress=progress)
        _link_files(found, folder)
        return
    _link_files(found, folder)
    for name in names:
        if not (path := contained_path(folder, name)).exists():
            _write_header(path, reference)


def _weight_files(found: Snapshot) -> list[str]:
    index = contained_path(found.path, INDEX_NAME, root=found.trusted_root)
    if index.is_file():
        return sorted(set(read_index(index).values()))[:_MOST_SHARDS]
    config, weights = _ADAPTER
    return [weights if contained_path(found.path, config, root=found.trusted_root).is_file() else SINGLE_NAME]


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


def _write_header(path: Path, reference: HubReference) -> None:
    """A file with the header of one on the hub, and as long as it: a hole stands for the tensors."""
    try:
        found = HfApi(endpoint=constants.ENDPOINT).parse_safetensors_file_metadata(
            reference.repo_id, path.name, revision=reference.revision
        )
    except Exception as error:  # the client raises its own errors, the network's and the operating system's
        raise InputError(
            f"the header of {path.name} cannot be fetched: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            where=reference.repo_id,
            mend="check the network and the model's files",
        ) from error
    content = {
        name: {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": list(each.data_offsets)}
        for name, each in found.tensors.items()
    }
    header = json.dumps(content).encode()
    end = max((each.data_offsets[1] for each in found.tensors.values()), default=0)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)
