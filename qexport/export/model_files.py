"""The files beside the weights: config.json, quantize_config.json, tokenizer, generation config, README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.architectures.checkpoint import Checkpoint
from qexport.errors import QexportError
from qexport.tensors import W8A8, Dense, FourBit, Gptq, LlmInt8, Method, Origin


def model_card(origin: Origin, method: Method, notes: Sequence[str] = (), loading: str = "") -> str:
    """A short model card. Only a hub id can be named as the base model in the front matter.

    Args:
        origin: the base.
        method: how the weights are quantized.
        notes: what a server's user should know.
        loading: a section of its own, see `qexport.export.loaders`.
    """
    listed = "".join(f"- {note}\n" for note in notes)
    relation = "finetune" if isinstance(method, Dense) else "quantized"
    base = f"base_model: {origin.name}\nbase_model_relation: {relation}\n" if origin.kind == "hub" else ""
    tag, title, text = _described(method)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags:\n- {tag}\n- qexport\n---\n\n"
        f"# {origin.name}, {title}\n\n"
        f"Made with qexport from {origin.name}: {text}.\n\n"
        "`qexport-manifest.json` says what this artifact was made from, how, and how far it is from the 16-bit model.\n"
        + (f"\n{loading}" if loading else "")
        + (f"\n## Serving\n\n{listed}" if notes else "")
    )


def _described(method: Method) -> tuple[str, str, str]:
    """A tag, a title, and what was done."""
    match method:
        case Gptq():
            groups = "one group per row" if method.group_size == -1 else f"groups of {method.group_size}"
            kind = "symmetric" if method.sym else "asymmetric"
            return "gptq", f"GPTQ {method.bits}-bit", f"{method.bits}-bit GPTQ codes in {groups}, {kind}"
        case FourBit():
            name = method.quant_type.upper()
            double = ", double quantization" if method.double_quant else ""
            return "bitsandbytes", name, f"{name} codes in blocks of {method.block_size}{double}"
        case LlmInt8():
            return "bitsandbytes", "LLM.int8", "int8 codes with one scale an output, for LLM.int8"
        case W8A8():
            return "compressed-tensors", "W8A8", "int8 weights with one scale an output, int8 activations when served"
        case Dense():
            return "merged", "16-bit", "the merged weights, not quantized"


def write_model_files(
    folder: Path,
    checkpoint: Checkpoint,
    method: Method,
    quantization: Mapping[str, Any] | None,
    dense_dtype: torch.dtype,
    notes: Sequence[str] = (),
    loading: str = "",
) -> None:
    """Writes every file of an artifact but the weights and the manifest.

    Args:
        folder: an existing folder.
        checkpoint: the merged model; its files are copied byte for byte.
        method: how the weights in the folder are quantized.
        quantization: the `quantization_config`, None where nothing is quantized.
        dense_dtype: the dtype of the weights that stay dense.
        notes: what a user of the folder should know, for the model card.
        loading: the model card's section on loading.

    Raises:
        QexportError: a file of the checkpoint would leave the folder or replace another file.
    """
    config = _model_config(checkpoint.config, quantization, dense_dtype)
    _write_new(folder, "config.json", _json(config))
    if quantization and quantization["quant_method"] == "gptq":
        _write_new(folder, "quantize_config.json", _json(quantization))
    _write_new(folder, "README.md", model_card(checkpoint.origin, method, notes, loading).encode("utf-8"))
    for name, content in checkpoint.files.items():
        _write_new(folder, name, content)


def _model_config(
    config: Mapping[str, Any], quantization: Mapping[str, Any] | None, dense_dtype: torch.dtype
) -> dict[str, Any]:
    """The base's config with the quantization and the dtype, without the folder that transformers once noted in it."""
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["dtype"]
    result |= {key: str(dense_dtype).removeprefix("torch.") for key in dtype_keys}
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
        raise QexportError("two files of the artifact have the same name", where=name) from error
