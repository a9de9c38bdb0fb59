"""A base model from a folder: config.json, safetensors, tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qexport.architectures.naming import name_parameters
from qexport.artifact.digest import sha256_bytes, sha256_files
from qexport.loading.base_prefix import with_prefix
from qexport.loading.config_file import CONFIG_NAME, read_config
from qexport.loading.model_weights import build_model, fit_to_model, refuse_untied_copies
from qexport.loading.sidecars import read_sidecars
from qexport.progress import Progress, Reporter
from qexport.tensors.checkpoint import Checkpoint, Origin
from qexport.tensors.safetensors_folder import SafetensorsFolder


def read_folder(
    folder: Path,
    *,
    kind: Literal["folder", "hub"],
    name: str,
    revision: str | None = None,
    trusted_root: Path | None = None,
    report: Reporter,
) -> Checkpoint:
    """The model in a folder. Headers are held against config.json; of the weights only the digests are taken.

    Args:
        folder: where the files are.
        kind: where the folder came from.
        name: the origin's name.
        revision: the commit, for a hub's model.
        trusted_root: where symbolic links may lead; the folder itself where None.
        report: the progress of the digests.

    Raises:
        InputError: something is missing, malformed, unsafe or contradicts config.json.
        CompatibilityError: qexport cannot handle the family.
    """
    config = read_config(folder, trusted_root=trusted_root, report=report)
    files = read_sidecars(folder, trusted_root=trusted_root)
    source = SafetensorsFolder(folder, trusted_root=trusted_root)
    try:
        model = build_model(config, tensors=len(source.specs()))
        named = with_prefix(source, model)
        weights = fit_to_model(named, model)
        refuse_untied_copies(named, name_parameters(model).tied)
        digests = {file: sha256_bytes(content) for file, content in files.items()}
        digests |= _digests(folder, (CONFIG_NAME, *source.files()), report)
    except BaseException:
        source.close()
        raise
    origin = Origin(kind, name, revision, dict(sorted(digests.items())))
    return Checkpoint(config, weights, files, origin)


def _digests(folder: Path, names: tuple[str, ...], report: Reporter) -> Mapping[str, str]:
    digests = {}
    found = sha256_files(folder / name for name in names)
    for done, (name, digest) in enumerate(zip(names, found, strict=True), start=1):
        digests[name] = digest
        report(Progress("load", done, len(names), "file", detail=name))
    return digests
