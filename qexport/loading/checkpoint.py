"""The base model and the adapter that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import torch

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.artifact.digests import FileDigests, sha256_bytes, sha256_file
from qexport.artifact.names import last_component
from qexport.errors import InputError, RecipeError
from qexport.loading import LoadSettings
from qexport.loading.gguf_checkpoint import read_gguf
from qexport.loading.hub import Snapshot, fetch, fetch_base
from qexport.loading.model_weights import ChunkedSource, find_architecture, fit_to_model, refuse_untied_copies
from qexport.loading.packaged import find_package_file
from qexport.loading.quantized_base import DequantizedSource, take_quantization
from qexport.loading.small_files import CONFIG_NAME, SIDECAR_PATTERNS, read_config, read_sidecars
from qexport.loading.terms import CARD_NAME, FILE_PATTERNS, read_terms
from qexport.progress import Notice, ProgressCallback, silent
from qexport.references import GGUF_SUFFIX, HubReference, LocalReference, PackageReference, names_gguf, parse_reference
from qexport.tensors.safetensors_folder import SafetensorsFolder
from qexport.tensors.source import Origin, TensorSpec
from qexport.tensors.strict_files import contained_path


def read_folder(
    folder: Path,
    *,
    kind: Literal["folder", "hub"],
    name: str,
    revision: str | None = None,
    trusted_root: Path | None = None,
    progress: ProgressCallback,
) -> Checkpoint:
    """The model in a folder. Headers are checked against config.json; the weights are hashed later.

    Args:
        folder: where the files are.
        kind: where the folder came from.
        name: the origin's name.
        revision: the commit, for a hub's model.
        trusted_root: where symbolic links may lead; the folder itself if None.
        progress: is called with keys of config.json that are dropped, and if the weights are quantized.
    """
    config = read_config(folder, trusted_root=trusted_root, progress=progress)
    quantization = take_quantization(config, str(folder / CONFIG_NAME))
    files = read_sidecars(folder, trusted_root=trusted_root)
    source = SafetensorsFolder(folder, trusted_root=trusted_root)
    try:
        architecture = find_architecture(config, tensors=len(source.specs()))
        read_as, plain = _dequantized(source, quantization, architecture, progress)
        named = with_prefix(plain, architecture)
        weights = fit_to_model(named, architecture)
        refuse_untied_copies(named, architecture.naming.tied)
        known = {file: sha256_bytes(content) for file, content in files.items()}
        digests = FileDigests(folder, (CONFIG_NAME, *source.files()), known)
    except BaseException:
        source.close()
        raise
    origin = Origin(kind, name, revision, digests, read_terms(folder, trusted_root=trusted_root), read_as=read_as)
    return Checkpoint(architecture, weights, files, origin)


def _dequantized(
    source: SafetensorsFolder,
    quantization: dict[str, Any] | None,
    architecture: Architecture,
    progress: ProgressCallback,
) -> tuple[str | None, ChunkedSource]:
    """The words for what the weights are read as, and their source."""
    if quantization is None:
        return None, source
    plain = DequantizedSource(source, quantization, architecture)
    progress(
        Notice(
            f"the base is quantized ({plain.description}) and used as what it dequantizes to; the 16-bit model that it "
            "was made from is the better base, unless the adapter was trained on this one"
        )
    )
    return f"{plain.description}, dequantized", plain


def with_prefix(source: ChunkedSource, architecture: Architecture) -> ChunkedSource:
    """The source with the base model's prefix added to its names, as transformers adds it on loading.

    It is unchanged if any name has the prefix already, or none is known with it.
    """
    known, prefix = architecture.naming.parts, f"{architecture.skeleton.base_model_prefix}."
    names = list(source.specs())
    inside = {name for name in names if name not in known and f"{prefix}{name}" in known}
    if not inside or any(name.startswith(prefix) for name in names):
        return source
    return _Prefixed(source, {f"{prefix}{name}" if name in inside else name: name for name in names})


class _Prefixed:
    """A source with other names for its tensors."""

    def __init__(self, source: ChunkedSource, stored: Mapping[str, str]) -> None:
        self._source, self._stored = source, stored

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape and dtype, in the source's order."""
        found = self._source.specs()
        return {name: found[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor in newly allocated memory."""
        return self._source.read(self._stored[name])

    def place(self, name: str) -> str:
        """The tensor's file and its name there."""
        return self._source.place(self._stored[name])

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of a fixed size."""
        return self._source.chunks(self._stored[name])


def load_checkpoint(settings: LoadSettings, *, progress: ProgressCallback = silent) -> Checkpoint:
    """The base model: configuration, lazily read weights, tokenizer files, origin with digests.

    All headers are checked against the configuration here; values are checked for NaN and Inf when they are read.

    Raises:
        InputError: the base is missing, malformed, unsafe, or its weights do not fit its configuration.
        CompatibilityError: qexport cannot handle the model's family.
        RecipeError: a revision is given for a local folder.
    """
    reference = _found(settings.base, settings.revision, field="load.base")
    if isinstance(reference, Path) and reference.suffix == GGUF_SUFFIX:
        return read_gguf(reference, kind="file", name=reference.name, progress=progress)
    if isinstance(reference, Path):
        return read_folder(reference, kind="folder", name=reference.resolve().name, progress=progress)
    if isinstance(reference, HubReference):
        snapshot = fetch_base(reference, progress=progress)
        return read_folder(
            snapshot.path,
            kind="hub",
            name=reference.repo_id,
            revision=snapshot.commit,
            trusted_root=snapshot.trusted_root,
            progress=progress,
        )
    found = find_package_file(reference)
    return read_gguf(found.path, kind="package", name=found.name, revision=found.version, progress=progress)


def _found(text: str, revision: str | None, *, field: str) -> Path | HubReference | PackageReference:
    """What a field of the recipe names. A local path must be an existing folder, or a GGUF file."""
    try:
        reference = parse_reference(text)
    except ValueError as error:
        raise InputError(str(error), where=field) from error
    if isinstance(reference, HubReference):
        return HubReference(reference.repo_id, revision)
    return _local(reference, revision, field) if isinstance(reference, LocalReference) else reference


def _local(reference: LocalReference, revision: str | None, field: str) -> Path:
    path = Path(reference.text).expanduser()
    if names_gguf(reference.text) and not path.exists():
        raise InputError(f"there is no file {reference.text!r}", where=field, mend="name an existing GGUF file")
    if not (path.is_dir() or names_gguf(reference.text)):
        raise InputError(
            f"{reference.text!r} is a file, not a folder"
            if path.exists()
            else f"there is no folder {reference.text!r}",
            where=field,
            mend="name the folder that holds config.json, or a hub id such as org/name",
        )
    if revision is not None:
        raise RecipeError(f"a revision was given for the local path {reference.text!r}", where=field, mend="remove it")
    return path


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
    return _located(settings.adapter, settings.adapter_revision, field="load.adapter", progress=progress)


def locate_adapters(
    settings: LoadSettings, *, progress: ProgressCallback = silent
) -> list[tuple[AdapterFolder, float]]:
    """The recipe's `load.adapters`, each with its weight.

    Raises:
        InputError: as for `locate_adapter`; or one is listed twice.
        RecipeError: a revision is given for a local folder.
    """
    found = [
        (_located(each.path, each.revision, field=f"load.adapters.{index}.path", progress=progress), each.weight)
        for index, each in enumerate(settings.adapters)
    ]
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
    names = "+".join(last_component(origin.name) for origin, _ in parts)
    return Origin("combination", names, sha256=digests, parts=parts)


def _located(text: str, revision: str | None, *, field: str, progress: ProgressCallback) -> AdapterFolder:
    reference = _found(text, revision, field=field)
    if isinstance(reference, PackageReference) or (isinstance(reference, Path) and not reference.is_dir()):
        raise InputError("an adapter is a folder, and this names a file", where=field, mend="name its folder")
    if isinstance(reference, Path):
        folder = _with_adapter(reference, progress)
        return _adapter_folder(folder, "folder", folder.resolve().name)
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD_NAME, *FILE_PATTERNS, *SIDECAR_PATTERNS)
    snapshot = fetch(reference, files, progress=progress)
    return _adapter_folder(snapshot.path, "hub", reference.repo_id, snapshot)


def _with_adapter(folder: Path, progress: ProgressCallback) -> Path:
    """The folder, or the one inside it in which PEFT put an adapter with a name of its own.

    Raises:
        InputError: there are several, or checkpoints of a training.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    inside = sorted(path.parent.name for path in islice(folder.glob(f"*/{ADAPTER_CONFIG}"), _MOST_FOLDERS))
    if len(inside) == 1 and not inside[0].startswith("checkpoint-"):
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


def _adapter_folder(
    path: Path, kind: Literal["folder", "hub"], name: str, snapshot: Snapshot | None = None
) -> AdapterFolder:
    root, revision = (snapshot.trusted_root, snapshot.commit) if snapshot else (None, None)
    digests = _check_files(path, root)
    origin = Origin(kind, name, revision, digests, read_terms(path, trusted_root=root))
    return AdapterFolder(path, origin, read_sidecars(path, trusted_root=root))


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
            mend="if you trust its maker, load it with PEFT once and save it with save_pretrained",
        )
    return InputError(
        f"the adapter has no {ADAPTER_WEIGHTS}", where=str(folder), mend="save it with PEFT's save_pretrained"
    )
