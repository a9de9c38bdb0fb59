"""The vllm layout: a folder that vLLM serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from qexport.architectures.checkpoint import Checkpoint
from qexport.architectures.structure import Structure
from qexport.export.compressed_tensors_config import compressed_tensors_config
from qexport.export.contract import refuse_failed
from qexport.export.encodings import AutoGptq, CompressedTensors, Encoding, Merged16
from qexport.export.model_files import write_model_files
from qexport.export.quantization_config import quantization_config
from qexport.export.settings import VllmSettings, parse_size
from qexport.export.vllm.contract import SERVER, check_folder
from qexport.export.vllm.launch import Figures, launch_files, max_model_len, served_name
from qexport.export.vllm.parallel import SplitLinear, degrees
from qexport.export.vllm.refusals import kernel_notes, refuse
from qexport.export.weight_files import WeightFiles
from qexport.tensors import W8A8, Gptq, GroupQuantizedSpec, Method, Outputs


class VllmLayout:
    """The weights that vLLM reads, configs in its words, and `launch/`.

    Args:
        settings: the recipe's.
        outputs: what the pass will yield.
        structure: the model's.
        checkpoint: the merged model, of which only config and file names are looked at.

    Raises:
        CompatibilityError: vLLM would refuse the model or its codes, with the reason and the way out.
    """

    name = "vllm"
    graph = None
    readers = ("vLLM 0.32",)

    def __init__(self, settings: VllmSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> None:
        self._outputs, self._structure, self._config = outputs, structure, checkpoint.config
        self._form = settings.format
        refuse(outputs, structure, checkpoint, self._form)
        self.weights = WeightFiles(_encoding(outputs.method, self._form), outputs, parse_size(settings.max_shard_size))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What config.json says of the codes."""
        if isinstance(self._outputs.method, Gptq) and self._form == "compressed-tensors":
            return compressed_tensors_config(self._outputs, self._structure)
        return quantization_config(self._outputs, self._structure)

    @property
    def notes(self) -> list[str]:
        """What the server does with the folder."""
        notes = kernel_notes(self._outputs)
        if isinstance(self._outputs.method, Gptq) and self._dense_dtype == torch.bfloat16:
            notes.append("vLLM rounds the scales to its dtype; only --dtype float16 reads them as they are")
        working = ", ".join(map(str, self._degrees))
        return [*notes, f"vLLM can split it among this many GPUs (--tensor-parallel-size): {working}"]

    def prepare(self) -> None:
        """There is nothing that could fail late."""

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes config, tokenizer, model card and launch files.

        Raises:
            QexportError: a file of the checkpoint would leave the folder or replace another file.
        """
        figures = Figures(
            served_name(checkpoint.origin.name),
            max_model_len(self._config),
            str(self._dense_dtype).removeprefix("torch."),
            self._degrees,
        )
        served = replace(checkpoint, files={**checkpoint.files, **launch_files(figures)})
        write_model_files(folder, served, self._outputs.method, self.quantization, self._dense_dtype, self.notes)

    def check(self, folder: Path) -> None:
        """Holds the finished folder against what vLLM's config and loaders demand.

        Raises:
            QexportError: a rule is broken; all that are broken are listed.
        """
        refuse_failed(check_folder(folder), SERVER)

    @property
    def _dense_dtype(self) -> torch.dtype:
        return self._outputs.dense_dtype(f"{self._structure.embedding}.weight")

    @property
    def _degrees(self) -> list[int]:
        quantized = self._outputs.quantized
        linears = []
        for linear in self._structure.block_linears:
            spec = quantized.get(linear.name)
            grouped = isinstance(spec, GroupQuantizedSpec)
            group_size = spec.group_size if isinstance(spec, GroupQuantizedSpec) and spec.groups > 1 else None
            linears.append(SplitLinear(linear.name, linear.out_features, linear.in_features, group_size, grouped))
        return degrees(self._config, linears)


def _encoding(method: Method, form: Literal["gptq", "compressed-tensors"]) -> Encoding:
    match method:
        case Gptq():
            return AutoGptq() if form == "gptq" else CompressedTensors()
        case W8A8():
            return CompressedTensors()
        case _:
            return Merged16()
