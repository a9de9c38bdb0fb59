"""The base model that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.artifact.digests import FileDigests, sha256_bytes
from qexport.loading import LoadSettings
from qexport.loading.gguf_checkpoint import read_gguf
from qexport.loading.hub import fetch_base
from qexport.loading.model_weights import ChunkedSource, find_architecture, fit_to_model, refuse_untied_copies
from qexport.loading.packaged import find_package_file
from qexport.loading.places import found_place
from qexport.loading.quantized_base import DequantizedSource, take_quantization
from qexport.loading.small_files import CONFIG_NAME, read_config, read_sidecars
from qexport.loading.terms import read_terms
from qexport.progress import Notice, ProgressCallback, silent
from qexport.references import GGUF_SUFFIX, HubReference
from qexport.tensors.safetensors_folder import SafetensorsFolder
from qexport.tensors.source import Origin, TensorSpec


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
    reference = found_place(settings.base, settings.revision, field="load.base")
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
