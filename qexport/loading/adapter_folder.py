"""The adapters that a recipe names: folders, or places in a repository of the hub."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from qexport.artifact.digests import sha256_file
from qexport.artifact.names import last_component
from qexport.errors import InputError, RecipeError
from qexport.loading import LoadSettings
from qexport.loading.hub import fetch, folders_with
from qexport.loading.places import found_place
from qexport.loading.small_files import SIDECAR_PATTERNS, read_sidecars
from qexport.loading.terms import CARD_NAME, FILE_PATTERNS, read_terms
from qexport.progress import Notice, ProgressCallback, silent
from qexport.references import HubReference, PackageReference
from qexport.tensors.source import Origin
from qexport.tensors.strict_files import contained_path

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        path: where it is on this machine.
        origin: where it came from.
        files: the small files beside it: those of a tokenizer, by name.
    """

    path: Path
    origin: Origin
    files: Mapping[str, bytes] = field(default_factory=dict)


def locate_adapter(settings: LoadSettings, *, progress: ProgressCallback = silent) -> AdapterFolder | None:
    """The recipe's adapter, fetched if it is on the hub; None if the recipe names none.

    Raises:
        InputError: it is neither a folder nor a model of the hub, a file is missing or outside the folder, or the
            adapter is a pickle.
        RecipeError: a revision is given for a local folder.
    """
    if settings.adapter is None:
        return None
    return _located(
        *(settings.adapter, settings.adapter_revision, settings.adapter_subfolder),
        fields=("load.adapter", "load.adapter_subfolder"),
        progress=progress,
    )


def locate_adapters(
    settings: LoadSettings, *, progress: ProgressCallback = silent
) -> list[tuple[AdapterFolder, float]]:
    """The recipe's `load.adapters`, each with its weight.

    Raises:
        InputError: as for `locate_adapter`; or one is listed twice.
        RecipeError: a revision is given for a local folder.
    """
    found = list[tuple[AdapterFolder, float]]()
    for index, each in enumerate(settings.adapters):
        fields = (f"load.adapters.{index}.path", f"load.adapters.{index}.subfolder")
        adapter = _located(each.path, each.revision, each.subfolder, fields=fields, progress=progress)
        found.append((adapter, each.weight))
    digests = [tuple(adapter.origin.sha256.values()) for adapter, _ in found]
    if len(set(digests)) < len(digests):
        raise InputError(
            "two of the adapters are the same",
            where="load.adapters",
            mend="list each once, with the sum of its weights",
        )
    return found


def combined_origin(adapters: Sequence[tuple[AdapterFolder, float]]) -> Origin:
    """Where a combination of adapters came from."""
    parts = tuple((adapter.origin, weight) for adapter, weight in adapters)
    digests = {f"{i}/{file}": value for i, (origin, _) in enumerate(parts, 1) for file, value in origin.sha256.items()}
    names = "+".join(_called(adapter) for adapter, _ in adapters)
    return Origin("combination", names, sha256=digests, parts=parts)


def _called(adapter: AdapterFolder) -> str:
    """What people call an adapter: its subfolder in a repository, else the repository or the folder."""
    folder = next(iter(adapter.origin.sha256), "").rpartition("/")[0]
    return last_component(folder or adapter.origin.name)


def _located(
    text: str, revision: str | None, subfolder: str | None, *, fields: tuple[str, str], progress: ProgressCallback
) -> AdapterFolder:
    """An adapter, of which `fields` are the recipe's fields for its place and its subfolder."""
    reference = found_place(text, revision, field=fields[0])
    if isinstance(reference, HubReference):
        return _on_hub(reference, subfolder, fields[1], progress)
    if isinstance(reference, PackageReference) or not reference.is_dir():
        raise InputError("an adapter is a folder, and this names a file", where=fields[0], mend="name its folder")
    if subfolder is not None:
        raise RecipeError(
            f"a subfolder was given for the local path {text!r}", where=fields[1], mend="write it at the path's end"
        )
    folder = _with_adapter(reference, progress)
    origin = Origin("folder", folder.resolve().name, None, _check_files(folder, None, str(folder)), read_terms(folder))
    return AdapterFolder(folder, origin, read_sidecars(folder))


def _on_hub(reference: HubReference, subfolder: str | None, field: str, progress: ProgressCallback) -> AdapterFolder:
    snapshot = fetch(reference, _adapter_files(subfolder), progress=progress)
    if subfolder is None and not (snapshot.path / ADAPTER_CONFIG).is_file():
        subfolder = _only_folder(folders_with(ADAPTER_CONFIG, snapshot, reference.repo_id), reference.repo_id, field)
        if subfolder is not None:
            progress(Notice(f"the adapter is in the subfolder {subfolder}"))
            at_commit = HubReference(reference.repo_id, snapshot.commit)
            snapshot = fetch(at_commit, _adapter_files(subfolder), progress=progress)
    root, folder = snapshot.trusted_root, snapshot.path / (subfolder or "")
    where = "/".join(filter(None, [reference.repo_id, subfolder]))
    digests = {_inside(subfolder, name): digest for name, digest in _check_files(folder, root, where).items()}
    origin = Origin("hub", reference.repo_id, snapshot.commit, digests, read_terms(folder, trusted_root=root))
    return AdapterFolder(folder, origin, read_sidecars(folder, trusted_root=root))


def _adapter_files(subfolder: str | None) -> tuple[str, ...]:
    """Patterns of the files of an adapter, by their names in the repository."""
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD_NAME, *FILE_PATTERNS, *SIDECAR_PATTERNS)
    return tuple(_inside(subfolder and glob.escape(subfolder), name) for name in names)


def _inside(folder: str | None, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _only_folder(found: Sequence[str], repo_id: str, field: str) -> str | None:
    """The one folder in which PEFT put an adapter with a name of its own; None if there is none.

    Raises:
        InputError: there are several, or checkpoints of a training.
    """
    if not found or (len(found) == 1 and not _is_checkpoint(found[0])):
        return found[0] if found else None
    raise InputError(
        f"the repository holds no {ADAPTER_CONFIG} at its top, but its folders do: {', '.join(found[:_SHOWN])}",
        where=repo_id,
        mend=f"name one of them: {field}: {found[-1]}",
    )


def _is_checkpoint(folder: str) -> bool:
    return any(part.startswith("checkpoint-") for part in folder.split("/"))


def _with_adapter(folder: Path, progress: ProgressCallback) -> Path:
    """The folder, or the one inside it in which PEFT put an adapter with a name of its own.

    Raises:
        InputError: there are several, or checkpoints of a training.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    inside = sorted(path.parent.name for path in islice(folder.glob(f"*/{ADAPTER_CONFIG}"), _MOST_FOLDERS))
    if len(inside) == 1 and not _is_checkpoint(inside[0]):
        progress(Notice(f"the adapter is in the subfolder {inside[0]}"))
        return folder / inside[0]
    if inside:
        raise InputError(
            f"the folder holds no {ADAPTER_CONFIG}, but its subfolders do: {', '.join(inside[:_SHOWN])}",
            where=str(folder),
            mend=f"name one of them: load.adapter: {folder.name}/{inside[-1]}",
        )
    return folder


_MOST_FOLDERS: Final = 1000
_SHOWN: Final = 8


def _check_files(folder: Path, trusted_root: Path | None, where: str) -> dict[str, str]:
    """The digests of both files; `where` is what messages call the folder."""
    paths = {name: contained_path(folder, name, root=trusted_root) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    if not paths[ADAPTER_CONFIG].is_file():
        raise InputError(
            f"the folder holds no {ADAPTER_CONFIG}", where=where, mend="name the folder that PEFT saved to"
        )
    if not paths[ADAPTER_WEIGHTS].is_file():
        raise _no_weights(folder, where)
    return {name: sha256_file(path) for name, path in paths.items()}


def _no_weights(folder: Path, where: str) -> InputError:
    if (folder / "adapter_model.bin").exists():
        return InputError(
            "the adapter is a pickle, which is never read",
            where=f"{where}: adapter_model.bin",
            mend="if you trust its maker, load it with PEFT once and save it with save_pretrained",
        )
    return InputError(f"the adapter has no {ADAPTER_WEIGHTS}", where=where, mend="save it with PEFT's save_pretrained")
