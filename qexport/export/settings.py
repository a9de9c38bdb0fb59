"""The recipe's `export`, one class a layout. The union at the end is the registry of layouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from qexport.export.size import parse_size
from qexport.settings import Settings


def _check_size(text: str) -> str:
    parse_size(text)
    return text


class SafetensorsSettings(Settings):
    """The folder that transformers, vLLM and gptqmodel load: AutoGPTQ v1 tensors in safetensors shards."""

    layout: Literal["safetensors"]
    """One folder of safetensors shards with config and tokenizer."""

    max_shard_size: Annotated[str, AfterValidator(_check_size)] = "5GB"
    """The largest size of one file, for example `5GB` or `500MB` (powers of ten). A larger tensor has its own file."""


ExportSettings = SafetensorsSettings
