"""The tgi layout: a folder that Text Generation Inference 3.3 serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.amounts import parse_size
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import CardText
from qexport.export import TgiSettings
from qexport.export.model_files import card_text, model_files, sizes_of, write_files
from qexport.export.tgi.families import (
    OWN_MODELS,
    Backend,
    OwnModel,
    ServedLinear,
    Shape,
    backend,
    num_kv_heads,
    served_linears,
    tgi_config,
    tgi_tokenizer_files,
)
from qexport.export.tgi.kernels import Codes, choose_sym, degrees, kernel
from qexport.export.tgi.launch import UNKNOWN_CONTEXT, TgiLaunch, launch_files
from qexport.export.tgi.rules import TGI
from qexport.export.tgi.served import ServedByTgi
from qexport.export.weight_files import WeightFiles
from qexport.formats import (
    AwqFormat,
    BlockFp8Format,
    Float4Format,
    FloatQuantizedFormat,
    Format,
    FourBitFormat,
    GptqFormat,
    LlmInt8Format,
    MergedFormat,
    Outputs,
    W8A8Format,
)
from qexport.formats.format import Encoding
from qexport.tensors import QuantizedSpec

_KV_BYTES = 2
_SERVER_THRESHOLD = 6.0
_SERVER_BLOCK_SIZE = 64
_FOUR_BIT_BYTES = 0.5 + 1 / _SERVER_BLOCK_SIZE


class TgiLayout:
    """The weights that TGI reads, configs with the keys that it reads, and `launch/`.

    Args:
        settings: from the recipe.
        outputs: what the pass will yield.
        structure: of the model.
        checkpoint: the merged model, of which only config and tokenizer are read.

    Raises:
        CompatibilityError: the artifact would break a rule of TGI, or a layer cannot be stored.
        InputError: tokenizer_config.json is malformed.
    """

    name = "tgi"
    graph = None
    readers = ("TGI 3.3",)

    def __init__(self, settings: TgiSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._outputs, self._structure, self._config = outputs, structure, tgi_config(checkpoint.config)
        self._codes, self._reason = _codes(outputs.format, self._linears)
        self._name, self._image = checkpoint.name, settings.image
        self.weights = WeightFiles(_stored_as(outputs.format), outputs, parse_size(settings.max_shard_size))
        TGI.refuse_plan(ServedByTgi.planned(self._files(checkpoint), self.weights.specs))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config`; None if the server quantizes 16-bit weights by itself."""
        if isinstance(_stored_as(self._outputs.format), MergedFormat):
            return None
        config = self._outputs.format.quantization_config(self._outputs.specs, self._structure) or {}
        return config | {"sym": self._codes.sym} if self._codes else config

    @property
    def notes(self) -> list[str]:
        """What the server does with the folder, and the reason for `sym` in its config."""
        notes = [*self._kernel_notes(), *_server_notes(self._outputs.format)]
        runs = backend(self._config)
        if runs is not None and runs is not Backend.OWN:
            notes.append(f"TGI 3.3 has no model of its own for {self._config['model_type']}: it is run by {runs.value}")
        working = ", ".join(map(str, self.launch.degrees))
        notes.append(f"shards that work (NUM_SHARD): {working}")
        return notes

    @property
    def degrees(self) -> Mapping[str, Sequence[int]]:
        """See `Layout.degrees`."""
        return {self.readers[0]: self.launch.degrees}

    def files(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """See `Layout.files`."""
        return {**self.weights.files, **sizes_of(self._files(checkpoint))}

    def prepare(self) -> None:
        """Does nothing: the constructor has checked everything that needs no weights."""

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes configs, tokenizer and launch files."""
        write_files(folder, self._files(checkpoint))

    def check(self, folder: Path) -> None:
        """Checks the finished folder against every rule of TGI's launcher, router and loader."""
        TGI.refuse_folder(folder)

    def _files(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """All files except the weights, the manifest and the model card."""
        beside = tgi_tokenizer_files(checkpoint.files) | launch_files(self.launch)
        served = replace(checkpoint, architecture=Architecture(self._config), files=beside)
        return model_files(served, self.quantization, self._unquantized_dtype)

    @cached_property
    def _linears(self) -> list[ServedLinear]:
        model = OWN_MODELS.get(self._config["model_type"], OwnModel())
        return served_linears(_block_matrices(self._outputs, self._structure), model)

    @property
    def card(self) -> CardText:
        """The format, and what the server does with the folder."""
        return card_text(self._outputs.format if self.quantization else MergedFormat(), self.notes)

    @cached_property
    def launch(self) -> TgiLaunch:
        """What the launch files say."""
        dtype = str(self._unquantized_dtype).removeprefix("torch.")
        return TgiLaunch(
            name=self._name,
            image=self._image,
            context=_count(self._config, "max_position_embeddings", "n_positions", "max_seq_len") or UNKNOWN_CONTEXT,
            kv_bytes=_kv_bytes(self._config),
            weight_bytes=_served_bytes(self.weights),
            degrees=degrees(self._config, self._linears, self._codes),
            quantize=_flag(self._outputs.format),
            dtype=None if self.quantization else dtype,
        )

    @property
    def _unquantized_dtype(self) -> torch.dtype:
        return self._outputs.unquantized_dtype(f"{self._structure.embedding}.weight")

    def _kernel_notes(self) -> list[str]:
        if self._codes is None:
            return []
        kernels = sorted({kernel(self._codes, linear) for linear in self._linears})
        sym = str(self._codes.sym).lower()
        return [f"TGI computes with {' and '.join(kernels)} (sym: {sym}): {self._reason}"]


def _kv_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values for one token, in 16 bits, by the result of `tgi_config`."""
    layers = _count(config, "num_hidden_layers", "n_layer", "n_layers")
    heads = _count(config, "num_attention_heads", "n_head", "n_heads")
    head_dim = _count(config, "head_dim") or _count(config, "hidden_size", "n_embd", "d_model") // max(1, heads)
    return 2 * layers * num_kv_heads(config) * head_dim * _KV_BYTES


def _count(config: Mapping[str, Any], *keys: str) -> int:
    return next((int(config[key]) for key in keys if config.get(key)), 0)


def _codes(method: Format, linears: list[ServedLinear]) -> tuple[Codes | None, str]:
    if not isinstance(method, GptqFormat):
        return None, ""
    return choose_sym(Codes(method.bits, method.group_size, method.sym, method.desc_act), linears)


def _stored_as(method: Format) -> Encoding:
    """The same format as in the safetensors layout if TGI reads it, else the merged weights."""
    return MergedFormat() if isinstance(method, FourBitFormat | LlmInt8Format) else method


def _flag(method: Format) -> str | None:
    """The value of `--quantize` in the launch files; None for 16-bit weights."""
    match method:
        case MergedFormat():
            return None
        case GptqFormat():
            return "gptq"
        case FourBitFormat(quant_type=name):
            return f"bitsandbytes-{name}"
        case LlmInt8Format():
            return "bitsandbytes"
        case W8A8Format() | FloatQuantizedFormat() | Float4Format():
            return "compressed-tensors"
        case BlockFp8Format():
            return "fp8"
        case AwqFormat():
            return "awq"


def _server_notes(method: Format) -> list[str]:
    """What the server does with the weights, and how that differs from the recipe."""
    match method:
        case FourBitFormat():
            block = f" and blocks of {_SERVER_BLOCK_SIZE}"
            same = method.double_quant and method.block_size == _SERVER_BLOCK_SIZE
            differs = "" if same else ", which is not what the recipe asks for; no flag changes it"
            return [
                "the folder holds the merged 16-bit weights; TGI quantizes every linear by itself when it starts, with "
                f"--quantize bitsandbytes-{method.quant_type}: always with double quantization{block}{differs}",
            ]
        case LlmInt8Format():
            same = method.threshold == _SERVER_THRESHOLD
            differs = "" if same else f", not the recipe's {method.threshold}"
            return [
                "the folder holds the merged 16-bit weights; TGI quantizes every linear by itself when it starts, with "
                f"--quantize bitsandbytes and a threshold of {_SERVER_THRESHOLD}{differs}",
            ]
        case FloatQuantizedFormat():
            return [
                "on NVIDIA GPUs of compute capability 8.x TGI multiplies FP8 weights with 16-bit activations (Marlin, "
                "which wants outputs in multiples of 64 and inputs in multiples of 128); from 9.0 on it rounds them"
            ]
        case _:
            return []


def _block_matrices(outputs: Outputs, structure: Structure) -> dict[str, Shape]:
    """Outputs and inputs of the matrices in the blocks, by module path."""
    return {
        name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
        for name, spec in outputs.specs.items()
        if structure.in_blocks(name) and name.endswith(".weight") and len(spec.shape) == 2
    }


def _served_bytes(weights: WeightFiles) -> int:
    """Bytes of the weights in the server's memory, after it has quantized them if it does."""
    saved = 0.0
    for spec in weights.outputs.quantized.values():
        saved += _saved_bytes(spec, weights.outputs.format)
    return weights.total_bytes - int(saved)


def _saved_bytes(spec: QuantizedSpec, method: Format) -> float:
    count = spec.shape[0] * spec.shape[1]
    match method:
        case FourBitFormat():
            return count * (2 - _FOUR_BIT_BYTES)
        case LlmInt8Format():
            return float(count)
        case _:
            return 0.0
