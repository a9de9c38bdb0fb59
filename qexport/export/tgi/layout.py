"""The tgi layout: a folder that Text Generation Inference 3.3 serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.architectures.architecture import Architecture
from qexport.architectures.checkpoint import Checkpoint
from qexport.architectures.structure import Structure
from qexport.export.contract import refuse_failed
from qexport.export.encodings import AutoGptq, CompressedTensors, Encoding, Merged16
from qexport.export.model_files import write_model_files
from qexport.export.quantization_config import quantization_config
from qexport.export.settings import TgiSettings, parse_size
from qexport.export.tgi.config import tgi_config
from qexport.export.tgi.contract import SERVER, check_folder
from qexport.export.tgi.families import OWN_MODELS, Backend, OwnModel, backend
from qexport.export.tgi.kernels import Codes, choose_sym, kernel
from qexport.export.tgi.launch import Figures, launch_files
from qexport.export.tgi.linears import ServedLinear, Shape, served_linears
from qexport.export.tgi.parallel import degrees
from qexport.export.tgi.refusals import flag, gptq_faults, refuse_dtype, refuse_family, refuse_quantized, w8a8_faults
from qexport.export.tgi.tokenizer import tgi_tokenizer_files
from qexport.export.weight_files import WeightFiles
from qexport.tensors import W8A8, Dense, FourBit, Gptq, LlmInt8, Method, Outputs, QuantizedSpec

_SERVER_THRESHOLD = 6.0
_SERVER_BLOCK_SIZE = 64
_FOUR_BIT_BYTES = 0.5 + 1 / _SERVER_BLOCK_SIZE


class TgiLayout:
    """The weights that TGI reads, configs in its words, and `launch/`.

    Args:
        settings: the recipe's.
        outputs: what the pass will yield.
        structure: the model's.
        checkpoint: the merged model, of which only config and tokenizer are looked at.

    Raises:
        CompatibilityError: TGI has no model for the family, no kernel for the layers, or no tokenizer.json to read.
        InputError: tokenizer_config.json is malformed.
    """

    name = "tgi"
    graph = None
    readers = ("TGI 3.3",)

    def __init__(self, settings: TgiSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._outputs, self._structure, self._config = outputs, structure, tgi_config(checkpoint.config)
        self._files = tgi_tokenizer_files(checkpoint.files)
        refuse_family(self._config, outputs.method)
        refuse_dtype(self._dense_dtype)
        self._codes, self._reason = _codes(outputs.method, self._linears)
        refuse_quantized(self._faults())
        self.weights = WeightFiles(_encoding(outputs.method), outputs, parse_size(settings.max_shard_size))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What config.json says of the codes; None where the server quantizes 16-bit weights by itself."""
        if not isinstance(self._outputs.method, Gptq | W8A8):
            return None
        config = quantization_config(self._outputs, self._structure) or {}
        return config | {"sym": self._codes.sym} if self._codes else config

    @property
    def notes(self) -> list[str]:
        """What the server does with the folder, and why the config says what it says."""
        notes = [*self._kernel_notes(), *_server_notes(self._outputs.method)]
        runs = backend(self._config)
        if runs is not None and runs is not Backend.OWN:
            notes.append(f"TGI 3.3 has no model of its own for {self._config['model_type']}: it is run by {runs.value}")
        working = ", ".join(map(str, self._figures.degrees))
        notes.append(f"TGI can split it into this many shards (NUM_SHARD): {working}")
        return notes

    def prepare(self) -> None:
        """There is nothing that could fail late."""

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes configs, tokenizer, model card and launch files.

        Raises:
            QexportError: a file of the checkpoint would leave the folder or replace another file.
        """
        served = replace(
            checkpoint, architecture=Architecture(self._config), files=self._files | launch_files(self._figures)
        )
        method = self._outputs.method if self.quantization else Dense()
        write_model_files(folder, served, method, self.quantization, self._dense_dtype, self.notes)

    def check(self, folder: Path) -> None:
        """Holds the finished folder against every rule of TGI's launcher, router and loader.

        Raises:
            QexportError: a rule is broken; all that are broken are listed.
        """
        refuse_failed(check_folder(folder), SERVER)

    @cached_property
    def _linears(self) -> list[ServedLinear]:
        model = OWN_MODELS.get(self._config["model_type"], OwnModel())
        return served_linears(_block_matrices(self._outputs, self._structure), model)

    @cached_property
    def _figures(self) -> Figures:
        dtype = "float16" if self._dense_dtype == torch.float16 else "bfloat16"
        return Figures(
            self._config,
            _served_bytes(self.weights),
            degrees(self._config, self._linears, self._codes),
            flag(self._outputs.method),
            None if self.quantization else dtype,
        )

    @property
    def _dense_dtype(self) -> torch.dtype:
        return self._outputs.dense_dtype(f"{self._structure.embedding}.weight")

    def _faults(self) -> list[str]:
        """Everything about quantized layers that TGI does not serve."""
        method = self._outputs.method
        if not isinstance(method, Gptq | W8A8):
            return []
        quantized = self._outputs.quantized
        inside = {module for linear in self._linears for module in linear.modules}
        faults = [f"{module}: TGI reads it as 16-bit weights" for module in quantized if module not in inside]
        dense = sorted(inside - set(quantized))
        if isinstance(method, W8A8):
            return faults + w8a8_faults(self._linears, dense)
        assert self._codes is not None
        rules = (self.quantization or {}).get("dynamic", {})
        faults += [f"{module}: TGI reads every linear of the blocks as quantized" for module in dense]
        faults += [f"{rule}: TGI reads the same bits and groups everywhere" for rule in rules if rule[0] != "-"]
        return faults + gptq_faults(self._linears, self._codes)

    def _kernel_notes(self) -> list[str]:
        if self._codes is None:
            return []
        kernels = sorted({kernel(self._codes, linear) for linear in self._linears})
        sym = str(self._codes.sym).lower()
        return [f"config.json says sym: {sym}, so TGI computes with {' and '.join(kernels)}; {self._reason}"]


def _codes(method: Method, linears: list[ServedLinear]) -> tuple[Codes | None, str]:
    if not isinstance(method, Gptq):
        return None, ""
    return choose_sym(Codes(method.bits, method.group_size, method.sym, method.desc_act), linears)


def _encoding(method: Method) -> Encoding:
    """The same formats as in the safetensors layout where TGI reads them, else the merged weights."""
    match method:
        case Gptq():
            return AutoGptq()
        case W8A8():
            return CompressedTensors()
        case Dense() | FourBit() | LlmInt8():
            return Merged16()


def _server_notes(method: Method) -> list[str]:
    """How far what the server makes of 16-bit weights is from what the recipe asks for."""
    match method:
        case FourBit():
            block = f" and blocks of {_SERVER_BLOCK_SIZE}"
            asked = method.double_quant and method.block_size == _SERVER_BLOCK_SIZE
            differs = "" if asked else ", which is not what the recipe asks for; no flag changes it"
            return [
                "the folder holds the merged 16-bit weights; TGI quantizes every linear by itself when it starts, with "
                f"--quantize bitsandbytes-{method.quant_type}: always with double quantization{block}{differs}",
            ]
        case LlmInt8():
            asked = method.threshold == _SERVER_THRESHOLD
            differs = "" if asked else f", not the recipe's {method.threshold}"
            return [
                "the folder holds the merged 16-bit weights; TGI quantizes every linear by itself when it starts, with "
                f"--quantize bitsandbytes and a threshold of {_SERVER_THRESHOLD}{differs}",
            ]
        case _:
            return []


def _block_matrices(outputs: Outputs, structure: Structure) -> dict[str, Shape]:
    """Outputs and inputs of the matrices in the blocks, by module path."""
    prefixes = tuple(f"{block}." for block in structure.blocks)
    return {
        name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
        for name, spec in outputs.specs.items()
        if name.startswith(prefixes) and name.endswith(".weight") and len(spec.shape) == 2
    }


def _served_bytes(weights: WeightFiles) -> int:
    """Bytes of the weights in the server's memory, after it has quantized what it quantizes."""
    saved = 0.0
    for spec in weights.outputs.quantized.values():
        saved += _saved_bytes(spec, weights.outputs.method)
    return weights.total_bytes - int(saved)


def _saved_bytes(spec: QuantizedSpec, method: Method) -> float:
    count = spec.shape[0] * spec.shape[1]
    match method:
        case FourBit():
            return count * (2 - _FOUR_BIT_BYTES)
        case LlmInt8():
            return float(count)
        case _:
            return 0.0
