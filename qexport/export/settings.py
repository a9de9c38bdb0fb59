"""The recipe's `export`, one class a layout. The union at the end is the registry of layouts."""

from __future__ import annotations

from typing import Literal

from qexport.settings import Settings


class SafetensorsSettings(Settings):
    """The folder that transformers, vLLM and gptqmodel load: AutoGPTQ v1 tensors in safetensors shards."""

    layout: Literal["safetensors"]

    max_shard_size: str = "5GB"
    """The largest size of one file, for example `5GB` or `500MB` (powers of ten)."""


ExportSettings = SafetensorsSettings
