"""The layouts that artifacts are written in.

The recipe's `export` is here, one class per layout; the union at the end is the registry of layouts.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field

from qexport.amounts import checked_size
from qexport.records import added
from qexport.settings import Settings, required_in_recipes

_PART: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE: Final = re.compile(
    rf"(?:{_PART}(?::[0-9]+)?/)?{_PART}(?:/{_PART})*(?P<tag>:[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(?P<digest>@sha256:[0-9a-f]{{64}})?"
)


def checked_image(text: str) -> str:
    """The text, if it names a container image that stays the same: by a tag, or by a digest.

    Raises:
        ValueError: it has another form, or neither a tag nor a digest.
    """
    found = _IMAGE.fullmatch(text)
    if found is None:
        raise ValueError("expected a container image in lower case: HOST/NAME:TAG or HOST/NAME@sha256:DIGEST")
    if not (found["tag"] or found["digest"]):
        raise ValueError(f"{text} has neither a tag nor a digest, so it means another image tomorrow")
    return text


_Image = Annotated[str, AfterValidator(checked_image)]


class _Shards(Settings):
    """What all layouts share."""

    model_config = ConfigDict(json_schema_extra=required_in_recipes("layout"))

    max_shard_size: Annotated[str, AfterValidator(checked_size)] = "5GB"
    """The largest size of one file, for example `5GB` or `500MB` (powers of ten). A larger tensor gets its own file."""


class SafetensorsSettings(_Shards):
    """The folder that transformers loads, in the format of the method: AutoGPTQ v1 tensors, bitsandbytes tensors,
    compressed-tensors, or 16-bit weights.
    """

    layout: Literal["safetensors"] = "safetensors"
    """One folder of safetensors shards with config and tokenizer."""


class TgiSettings(_Shards):
    """The folder that Text Generation Inference 3.3 serves, with launch files."""

    layout: Literal["tgi"] = "tgi"
    """Shards, configs with the keys that TGI reads, `launch/`."""

    image: _Image = "ghcr.io/huggingface/text-generation-inference:3.3.7"
    """The container image in the launch files: another version, a mirror, or a digest (`NAME@sha256:...`), which
    nobody can move as a tag can be moved."""


class VllmSettings(_Shards):
    """The folder that vLLM serves, with launch files."""

    layout: Literal["vllm"] = "vllm"
    """Shards, configs with the keys that vLLM reads, `launch/`."""

    format: Literal["gptq", "compressed-tensors"] = "gptq"
    """How GPTQ codes are stored: AutoGPTQ v1 tensors, or compressed-tensors `pack-quantized`. W8A8 is always
    compressed-tensors."""

    image: _Image = "vllm/vllm-openai:v0.32.0"
    """The container image in the launch files: another version, a mirror, or a digest."""

    triton_image: _Image = "nvcr.io/nvidia/tritonserver:26.05-vllm-python-py3"
    """The same for Triton with its vLLM backend."""


class OnnxSettings(_Shards):
    """The folder that ONNX Runtime runs: one graph for prefill and decoding, with a cache of keys and values."""

    layout: Literal["onnx"] = "onnx"
    """`model.onnx`, its weights in files beside it, `launch/`. Needs the extra: `pip install 'qexport[onnx]'`."""

    activations: Literal["float32", "float16"] = "float32"
    """What the graph computes in. Weights keep the dtype of the merge, and the graph casts them if it is another."""

    accuracy_level: Literal[0, 4] = 0
    """For products with GPTQ and LLM.int8 codes: 0 keeps the activations as they are, 4 lets ONNX Runtime round them to
    8 bits, which is faster but not exact."""

    attention: Literal["plain", "fused"] = "plain"
    """`plain` uses ONNX's operators; `fused` uses ONNX Runtime's GroupQueryAttention and RotaryEmbedding, which are
    faster, but accept several new tokens with a past only for a batch of one."""

    token_embedding_type: Literal["unquantized", "q8_0"] = added("unquantized")
    """`q8_0` rounds the embedding to 8 bits with a scale for every 32 inputs, which is lossy: the files are smaller.
    With tied weights it is the output head too, which is then faster. The values are those of the layout `gguf`."""

    output_tensor_type: Literal["unquantized", "q8_0"] = added("unquantized")
    """The same for an output head of its own."""

    share_weights: bool = False
    """Tensors that the recipe's layout `safetensors` has in the same bytes are not written again: its files are linked
    into the folder, and the graph refers to them."""

    triton_image: _Image = "nvcr.io/nvidia/tritonserver:26.06-py3"
    """The container image of Triton in the launch files: another version, a mirror, or a digest."""


class GgufSettings(Settings):
    """The folder that llama.cpp runs: one file with weights, configuration and tokenizer."""

    model_config = ConfigDict(json_schema_extra=required_in_recipes("layout"))

    layout: Literal["gguf"] = "gguf"
    """`model.gguf`, `launch/`. Codes of `gptq`, `int8` and `w8a8` become Q4_0 or Q8_0, value by value."""

    token_embedding_type: Literal["unquantized", "q8_0"] = "unquantized"
    """`q8_0` rounds the embedding to 8 bits, which is lossy: the file is smaller. With tied weights it is the output
    head too, which is then faster."""

    output_tensor_type: Literal["unquantized", "q8_0"] = "unquantized"
    """The same for an output head of its own."""

    split_max_size: Annotated[str, AfterValidator(checked_size)] | None = None
    """The most bytes of tensors in one file, for example `2GB` (powers of ten); a larger tensor gets its own. Then the
    files are `model-00001-of-00003.gguf` and so on, as llama.cpp's `llama-gguf-split` makes them; null for one file."""

    inexact: Literal["refuse", "allow"] = "refuse"
    """`allow` stores 4-bit GPTQ with `sym: false` as Q4_1, whose minima are rounded to float16: its values differ from
    those of the other layouts by at most 0.0074 steps. It also takes tokenizers of SentencePiece's kind of which
    llama.cpp makes other tokens for texts with certain spaces; the manifest's notes name them."""


ExportSettings = Annotated[
    SafetensorsSettings | TgiSettings | VllmSettings | OnnxSettings | GgufSettings, Field(discriminator="layout")
]
