"""The files beside the weights: config.json, tokenizer, generation config, README, and launch files."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.architectures.architecture import Checkpoint
from qexport.errors import QexportError
from qexport.formats import Format, config_file
from qexport.tensors import Origin

FOLDER: Final = "launch"

_NAME_LIMIT: Final = 63 - len("-predictor")  # which KServe adds


def served_name(origin: str) -> str:
    """A name that requests, Triton and KServe all accept: lower-case letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", origin.rpartition("/")[2].lower().removesuffix(".gguf")).strip("-")
    name = words if words[:1].isalpha() else f"model-{words}"
    return name[:_NAME_LIMIT].strip("-")


def render_launch_files(layout: str, templates: Mapping[str, str], figures: object) -> dict[str, bytes]:
    """The files of the folder `launch`, by their name inside the artifact.

    Args:
        layout: the name of the layout's package, which has a folder `templates`.
        templates: the template of each launch file, by the file's name inside `launch`.
        figures: the variable `figures` of the templates.

    Raises:
        jinja2.UndefinedError: a template uses a figure that does not exist.
    """
    environment = _environment(layout)
    return {
        f"{FOLDER}/{name}": environment.get_template(template).render(figures=figures).encode("utf-8")
        for name, template in templates.items()
    }


@cache
def _environment(layout: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(layout),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shell": shlex.quote, "yaml": _yaml_scalar}
    return environment


def _yaml_scalar(value: Any) -> str:
    """A value as YAML in block style: strings that would be read as another type are quoted."""
    yaml, stream = YAML(), StringIO()
    yaml.width = 1 << 20
    yaml.dump([value], stream)
    return stream.getvalue().removeprefix("- ").rstrip("\n")


def model_card(origin: Origin, stored: Format, notes: Sequence[str] = (), loading: str = "") -> str:
    """A short model card. Only a hub id can be named as the base model in the front matter.

    Args:
        origin: the base.
        stored: how the weights are quantized.
        notes: what users of a server should know.
        loading: the section on loading; see `qexport.export.loaders.loading_section`.
    """
    listed = "".join(f"- {note}\n" for note in notes)
    card = stored.card
    relation = "finetune" if stored.quant_method is None else "quantized"
    base = f"base_model: {origin.name}\nbase_model_relation: {relation}\n" if origin.kind == "hub" else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags:\n- {card.tag}\n- qexport\n---\n\n"
        f"# {origin.name}, {card.title}\n\n"
        f"Made with qexport from {origin.name}: {card.text}.\n\n"
        "`qexport-manifest.json` says what this artifact was made from, how, and how far it is from the 16-bit model.\n"
        + (f"\n{loading}" if loading else "")
        + (f"\n## Serving\n\n{listed}" if notes else "")
    )


def model_files(
    checkpoint: Checkpoint,
    stored: Format,
    quantization: Mapping[str, Any] | None,
    unquantized_dtype: torch.dtype,
    notes: Sequence[str] = (),
    loading: str = "",
) -> dict[str, bytes]:
    """Every file of an artifact except the weights and the manifest, by name.

    Args:
        checkpoint: the merged model; its files are copied byte for byte.
        stored: how the weights in the folder are quantized.
        quantization: the `quantization_config`; None if nothing is quantized.
        unquantized_dtype: the dtype of the weights that stay unquantized.
        notes: what users of the folder should know, for the model card.
        loading: the model card's section on loading.

    Raises:
        QexportError: a file of the checkpoint has the name of another file.
    """
    files = {"config.json": _json(_model_config(checkpoint.config, quantization, unquantized_dtype))}
    if quantization and (second := config_file(quantization)):
        files[second] = _json(quantization)
    files["README.md"] = model_card(checkpoint.origin, stored, notes, loading).encode("utf-8")
    for name in sorted(checkpoint.files.keys() & files.keys()):
        raise _same_name(name)
    return files | dict(checkpoint.files)


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
