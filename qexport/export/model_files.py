"""The files beside the weights: config.json, tokenizer, generation config, and launch files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.architectures.architecture import Checkpoint
from qexport.artifact.manifest import CARD_NAME, CardText
from qexport.errors import QexportError
from qexport.formats import Format, config_file


def model_files(
    checkpoint: Checkpoint,
    quantization: Mapping[str, Any] | None,
    unquantized_dtype: torch.dtype,
) -> dict[str, bytes]:
    """Every file of an artifact except the weights, the model card and the manifest, by name.

    Args:
        checkpoint: the merged model; its files are copied byte for byte.
        quantization: the `quantization_config`; None if nothing is quantized.
        unquantized_dtype: the dtype of the weights that stay unquantized.

    Raises:
        QexportError: a file of the checkpoint has the name of another file.
    """
    files = {"config.json": _json(_model_config(checkpoint.config, quantization, unquantized_dtype))}
    if quantization and (second := config_file(quantization)):
        files[second] = _json(quantization)
    for name in sorted(checkpoint.files.keys() & {*files, CARD_NAME}):
        raise _same_name(name)
    return files | dict(checkpoint.files)


def card_text(stored: Format, notes: Sequence[str] = (), loading: str = "") -> CardText:
    """What the model card says of a layout.

    Args:
        stored: how the weights in the folder are quantized.
        notes: what users of a server should know.
        loading: the section on loading; see `qexport.export.loaders.loading_section`.
    """
    card = stored.card
    return CardText(tag=card.tag, title=card.title, text=card.text, loading=loading, serving=list(notes))


def sizes_of(files: Mapping[str, bytes]) -> dict[str, int]:
    """Bytes of each file, by name."""
    return {name: len(content) for name, content in files.items()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into an existing folder.

    Raises:
        QexportError: a file would be written outside the folder, or replace another one.
    """
    for name, content in files.items():
        _write_new(folder, name, content)


def _model_config(
    config: Mapping[str, Any], quantization: Mapping[str, Any] | None, unquantized_dtype: torch.dtype
) -> dict[str, Any]:
    """The base's config with quantization and dtype, without `_name_or_path`, where transformers noted a folder."""
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["dtype"]
    result |= {key: str(unquantized_dtype).removeprefix("torch.") for key in dtype_keys}
    if not result.get("architectures"):
        result["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[result["model_type"]]]
    return result | ({"quantization_config": quantization} if quantization else {})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _write_new(folder: Path, name: str, content: bytes) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise QexportError("a file of the checkpoint would be written outside the artifact", where=name)
    path = folder / parts
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        raise _same_name(name) from error


def _same_name(name: str) -> QexportError:
    return QexportError("two files of the artifact have the same name", where=name)
