"""A base model from a folder: config.json, safetensors, tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qexport.architectures.naming import name_parameters
from qexport.artifact.digest import sha256_bytes
from qexport.artifact.file_digests import FileDigests
from qexport.loading.base_prefix import with_prefix
from qexport.loading.config_file import CONFIG_NAME, read_config
from qexport.loading.model_weights import build_model, fit_to_model, refuse_untied_copies
from qexport.loading.sidecars import read_sidecars
from qexport.progress import Reporter
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
    """The model in a folder. Headers are held against config.json; the digests of the weights are taken later.

    Args:
        folder: where the files are.
        kind: where the folder came from.
        name: the origin's name.
        revision: the commit, for a hub's model.
        trusted_root: where symbolic links may lead; the folder itself where None.
        report: is told of keys of config.json that are dropped.

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
        known = {file: sha256_bytes(content) for file, content in files.items()}
        digests = FileDigests(folder, (CONFIG_NAME, *source.files()), known)
    except BaseException:
        source.close()
        raise
    origin = Origin(kind, name, revision, digests)
    return Checkpoint(config, weights, files, origin)
