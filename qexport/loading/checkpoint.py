"""The base model and the adapter that a recipe names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qexport.architectures.checkpoint import Checkpoint
from qexport.artifact.digests import sha256_file
from qexport.errors import InputError
from qexport.loading.base_reference import FolderReference, HubReference, parse_base, parse_folder_or_hub
from qexport.loading.folder import read_folder
from qexport.loading.gguf_checkpoint import read_gguf
from qexport.loading.hub import fetch, fetch_base
from qexport.loading.package import find_package_file
from qexport.loading.settings import LoadSettings
from qexport.progress import Reporter, silent
from qexport.tensors.checkpoint import Origin
from qexport.tensors.strict_files import contained_path


def load_checkpoint(settings: LoadSettings, *, report: Reporter = silent) -> Checkpoint:
    """The base model: configuration, lazily read weights, tokenizer files, origin with digests.

    Every header is held against the configuration here; values are checked for NaN and Inf as they are read.

    Raises:
        InputError: the base is missing, malformed, unsafe, or its weights do not fit its configuration.
        CompatibilityError: qexport cannot handle the model's family.
        RecipeError: a revision for a local folder.
    """
    reference = parse_base(settings.base, settings.revision)
    if isinstance(reference, FolderReference):
        return read_folder(reference.path, kind="folder", name=reference.path.resolve().name, report=report)
    if isinstance(reference, HubReference):
        snapshot = fetch_base(reference, report=report)
        return read_folder(
            snapshot.path,
            kind="hub",
            name=reference.repo_id,
            revision=snapshot.commit,
            trusted_root=snapshot.trusted_root,
            report=report,
        )
    return read_gguf(find_package_file(reference), report=report)


ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`, and its origin."""

    path: Path
    origin: Origin


def locate_adapter(settings: LoadSettings, *, report: Reporter = silent) -> AdapterFolder | None:
    """The recipe's adapter, fetched where it is on the hub; None where the recipe names none.

    Raises:
        InputError: neither a folder nor a model of the hub, a file is missing or leaves the folder, or the adapter
            exists as a pickle only.
        RecipeError: a revision for a local folder.
    """
    if settings.adapter is None:
        return None
    reference = parse_folder_or_hub(settings.adapter, settings.adapter_revision, field="load.adapter")
    if isinstance(reference, FolderReference):
        digests = _check_files(reference.path, None)
        return AdapterFolder(reference.path, Origin("folder", reference.path.resolve().name, sha256=digests))
    snapshot = fetch(reference, (ADAPTER_CONFIG, ADAPTER_WEIGHTS), report=report)
    digests = _check_files(snapshot.path, snapshot.trusted_root)
    return AdapterFolder(snapshot.path, Origin("hub", reference.repo_id, snapshot.commit, digests))


def _check_files(folder: Path, trusted_root: Path | None) -> dict[str, str]:
    """The digests of both files."""
    paths = {name: contained_path(folder, name, root=trusted_root) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    if not paths[ADAPTER_CONFIG].is_file():
        raise InputError(
            f"the folder holds no {ADAPTER_CONFIG}", where=str(folder), mend="name the folder that PEFT saved to"
        )
    if not paths[ADAPTER_WEIGHTS].is_file():
        raise _no_weights(folder)
    return {name: sha256_file(path) for name, path in paths.items()}


def _no_weights(folder: Path) -> InputError:
    if (folder / "adapter_model.bin").exists():
        return InputError(
            "the adapter is a pickle, which is never read",
            where=f"{folder}: adapter_model.bin",
            mend="where you trust its maker, load it with PEFT once and save it with save_pretrained",
        )
    return InputError(
        f"the adapter has no {ADAPTER_WEIGHTS}", where=str(folder), mend="save it with PEFT's save_pretrained"
    )
