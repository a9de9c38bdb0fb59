"""The safetensors layout: a folder that transformers, vLLM and gptqmodel load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError
from qexport.export.model_files import write_model_files
from qexport.export.quantization_config import GptqMethod, Plan, gptq_config
from qexport.export.settings import SafetensorsSettings
from qexport.export.shards import ShardWriter
from qexport.export.size import parse_size
from qexport.packing import gptq
from qexport.tensors import Checkpoint, GroupQuantized, GroupQuantizedSpec, TensorRecord, TensorSpec


@dataclass(frozen=True)
class Written:
    """What lies in a folder after `SafetensorsWriter.finish`.

    Attributes:
        quantization: the `quantization_config`.
        digests: the hex SHA-256 of each tensor's bytes.
        total_bytes: bytes of all tensors.
        parameters: parameters of the model, each quantized weight counted once.
    """

    quantization: Mapping[str, Any]
    digests: Mapping[str, str]
    total_bytes: int
    parameters: int


class SafetensorsLayout:
    """What will be written, known before anything is loaded.

    Args:
        settings: the recipe's.
        plan: every parameter that will come, in the order of the files.
        structure: the model's.

    Attributes:
        specs: every tensor of the artifact.

    Raises:
        CompatibilityError: a layer cannot be packed.
    """

    def __init__(self, settings: SafetensorsSettings, plan: Plan, structure: Structure) -> None:
        _check_shapes(plan)
        self.plan = plan
        self.structure = structure
        self.max_shard_size = parse_size(settings.max_shard_size)
        self.specs: Mapping[str, TensorSpec] = {
            tensor: packed for name, spec in plan.items() for tensor, packed in _tensor_specs(name, spec).items()
        }

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def parameters(self) -> int:
        """Parameters of the model, each quantized weight counted once."""
        return sum(_numel(spec) for spec in self.plan.values())

    @property
    def notes(self) -> list[str]:
        """What stock loaders get wrong with this artifact, silently (docs/artifact.md has what was tried)."""
        notes = []
        if self.structure.model_type == "falcon":
            notes.append("transformers fills a Falcon's quantized layers at random: load it with GPTQModel.load(path)")
        if isinstance(self.plan.get(f"{self.structure.head}.weight"), GroupQuantizedSpec):
            notes.append("transformers fills a quantized lm_head at random: load it with GPTQModel.load(path)")
        return notes

    def writer(self, folder: Path) -> SafetensorsWriter:
        """Starts an artifact in an existing, empty folder."""
        return SafetensorsWriter(self, folder)


class SafetensorsWriter:
    """Takes the pass's records one by one, in any order."""

    def __init__(self, layout: SafetensorsLayout, folder: Path) -> None:
        self._layout = layout
        self._folder = folder
        self._shards = ShardWriter(folder, layout.specs, layout.max_shard_size)

    def write(self, record: TensorRecord) -> None:
        """Packs and writes one parameter.

        Raises:
            QexportError: it was not planned so, or was written before.
            OSError: the disk is full or failed.
        """
        for name, tensor in _tensors(record).items():
            self._shards.write(name, tensor)

    def finish(self, checkpoint: Checkpoint, method: GptqMethod) -> Written:
        """Writes everything but the manifest.

        Args:
            checkpoint: the merged model, for its config and the files that travel with it.
            method: the recipe's settings of GPTQ.

        Raises:
            QexportError: a planned parameter never came, or a file of the checkpoint cannot be written.
            OSError: the disk is full or failed.
        """
        layout = self._layout
        self._shards.finish()
        quantization = gptq_config(method, layout.plan, layout.structure)
        write_model_files(self._folder, checkpoint, quantization, _dense_dtype(layout))
        return Written(quantization, self._shards.digests, layout.total_bytes, layout.parameters)


def _check_shapes(plan: Plan) -> None:
    faults = [
        f"{name}: {reason}"
        for name, spec in plan.items()
        if isinstance(spec, GroupQuantizedSpec)
        and (reason := gptq.check_shape(spec.out_features, spec.in_features, spec.bits, spec.group_size))
    ]
    if faults:
        raise CompatibilityError(
            f"{len(faults)} layers do not fit the AutoGPTQ layout of int32 words",
            where="\n       ".join(faults),
            mend="choose other bits for these layers, or leave them dense, with quantize.overrides",
        )


def _tensor_specs(name: str, spec: TensorSpec | GroupQuantizedSpec) -> dict[str, TensorSpec]:
    if isinstance(spec, TensorSpec):
        return {name: spec}
    return {f"{_module(name)}.{part}": packed for part, packed in gptq.packed_specs(spec).items()}


def _tensors(record: TensorRecord) -> dict[str, torch.Tensor]:
    if isinstance(record.value, GroupQuantized):
        return {f"{_module(record.name)}.{part}": tensor for part, tensor in gptq.pack(record.value).items()}
    return {record.name: record.value}


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _numel(spec: TensorSpec | GroupQuantizedSpec) -> int:
    if isinstance(spec, GroupQuantizedSpec):
        return spec.out_features * spec.in_features
    return spec.nbytes // spec.dtype.itemsize


def _dense_dtype(layout: SafetensorsLayout) -> torch.dtype:
    return layout.specs[f"{layout.structure.embedding}.weight"].dtype
