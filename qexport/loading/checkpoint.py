"""The base model that a recipe names."""

from __future__ import annotations

from qexport.loading.base_reference import FolderReference, HubReference, parse_base
from qexport.loading.folder import read_folder
from qexport.loading.gguf_checkpoint import read_gguf
from qexport.loading.hub import fetch_base
from qexport.loading.package import find_package_file
from qexport.loading.settings import LoadSettings
from qexport.progress import Reporter, silent
from qexport.tensors.checkpoint import Checkpoint


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
