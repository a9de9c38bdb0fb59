"""The recipe's `export`, one class a layout. The union at the end is the registry of layouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from qexport.export.size import parse_size
from qexport.settings import Settings


def _check_size(text: str) -> str:
    parse_size(text)
    return text


class _Shards(Settings):
    """What the layouts in safetensors shards have in common."""

    max_shard_size: Annotated[str, AfterValidator(_check_size)] = "5GB"
    """The largest size of one file, for example `5GB` or `500MB` (powers of ten). A larger tensor has its own file."""


class SafetensorsSettings(_Shards):
    """The folder that transformers loads, in the format of the method: AutoGPTQ v1 tensors, bitsandbytes tensors,
    compressed-tensors, or 16-bit weights.
    """

    layout: Literal["safetensors"]
    """One folder of safetensors shards with config and tokenizer."""


class TgiSettings(_Shards):
    """The folder that Text Generation Inference 3.3 serves, with launch files."""

    layout: Literal["tgi"]
    """Shards, configs in the words that TGI reads, `launch/`."""


class VllmSettings(_Shards):
    """The folder that vLLM serves, with launch files."""

    layout: Literal["vllm"]
    """Shards, configs in the words that vLLM reads, `launch/`."""

    format: Literal["gptq", "compressed-tensors"] = "gptq"
    """How GPTQ codes are stored: AutoGPTQ v1 tensors, or compressed-tensors `pack-quantized`. W8A8 is always
    compressed-tensors."""


ExportSettings = Annotated[SafetensorsSettings | TgiSettings | VllmSettings, Field(discriminator="layout")]
