"""What the places of a base and an adapter name, and whether local ones are there. Without torch, for quick errors."""

from __future__ import annotations

from pathlib import Path

from qexport.errors import InputError, RecipeError
from qexport.loading import LoadSettings
from qexport.references import HubReference, LocalReference, PackageReference, names_gguf, parse_reference


def refuse_missing(settings: LoadSettings) -> None:
    """Looks for what is on this machine. Reading says more of it.

    Raises:
        InputError: there is no such folder or file.
        RecipeError: a revision is given for a local folder.
    """
    found_place(settings.base, settings.revision, field="load.base")
    if settings.adapter is not None:
        found_place(settings.adapter, settings.adapter_revision, field="load.adapter")
    for number, adapter in enumerate(settings.adapters):
        found_place(adapter.path, adapter.revision, field=f"load.adapters.{number}.path")


def found_place(text: str, revision: str | None, *, field: str) -> Path | HubReference | PackageReference:
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
            mend="name the folder that holds config.json, or a hub id such as org/name"
            if field == "load.base"
            else "name the folder that PEFT saved to, or a hub id such as org/name; a folder inside a hub's repository "
            f"is given beside it ({'subfolder' if field.endswith('path') else 'load.adapter_subfolder'})",
        )
    if revision is not None:
        raise RecipeError(f"a revision was given for the local path {reference.text!r}", where=field, mend="remove it")
    return path
