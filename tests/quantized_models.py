"""Tiny models with codes made by plain rounding, as the quantize stage would hand them to a layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.structure import Structure
from qexport.export import SafetensorsSettings
from qexport.export.layouts import SafetensorsLayout
from qexport.export.tensor_writer import WrittenWeights
from qexport.export.weight_files import WeightFiles
from qexport.formats import GptqFormat, Outputs
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, Origin, OutputSpec, TensorRecord, TensorSpec

FILES = {
    "tokenizer.json": b'{"tokens": "\xc3\xa9"}\r\n',
    "tokenizer_config.json": b"{}",
    "generation_config.json": b'{"max_length":7}',
}


DEFAULT = GptqFormat(
    bits=4,
    group_size=32,
    sym=True,
    desc_act=False,
    static_groups=True,
    damp_percent=0.01,
    true_sequential=True,
)


def gptq_method(**changes: Any) -> GptqFormat:
    return replace(DEFAULT, **changes)


@dataclass(frozen=True)
class Tensors:
    """A `WeightSource` in memory."""

    tensors: Mapping[str, torch.Tensor]

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()


@dataclass(frozen=True)
class QuantizedModel:
    """A model on its way to a layout.

    `special` gives the modules, by path, that are dense (None) or have other bits and groups.
    """

    model: PreTrainedModel
    method: GptqFormat = DEFAULT
    special: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)
    origin: Origin = field(default_factory=lambda: Origin("folder", "tiny"))

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(json.loads(self.model.config.to_json_string()))

    @property
    def structure(self) -> Structure:
        return self.architecture.structure

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Experts lie together in memory; here the matrix that the files have for each is zeros."""
        stored, dtype = self.model.state_dict(), self.model.dtype
        weights = {
            name: stored[name] if name in stored else torch.zeros(shape, dtype=dtype)
            for name, shape in self.structure.parameters.items()
        }
        return Checkpoint(self.architecture, Tensors(weights), FILES, self.origin)

    @cached_property
    def outputs(self) -> Outputs:
        return Outputs(self.method, self.specs)

    @cached_property
    def specs(self) -> dict[str, OutputSpec]:
        linears = {linear.name for block in self.structure.linears.values() for linear in block}
        extra = {name for name, settings in self.special.items() if settings is not None}
        return {
            name: self._quantized_spec(name, spec) if name.removesuffix(".weight") in linears | extra else spec
            for name, spec in self.checkpoint.weights.specs().items()
        }

    def _quantized_spec(self, name: str, spec: TensorSpec) -> OutputSpec:
        if not name.endswith(".weight"):
            return spec
        settings = self.special.get(name.removesuffix(".weight"), (self.method.bits, self.method.group_size))
        if settings is None:
            return spec
        bits, group_size = settings
        out_features, in_features = spec.shape
        group_size = in_features if group_size == -1 else group_size
        return GroupQuantizedSpec(out_features, in_features, bits, group_size, self.method.sym, self.method.desc_act)

    def records(self) -> list[TensorRecord]:
        source = self.checkpoint.weights
        return [
            TensorRecord(
                name, round_off(source.read(name), spec) if isinstance(spec, GroupQuantizedSpec) else source.read(name)
            )
            for name, spec in self.specs.items()
        ]

    def files(self) -> WeightFiles:
        return SafetensorsLayout(SafetensorsSettings(layout="safetensors"), self.outputs, self.structure).weights

    def write(self, folder: Path, *, max_shard_size: str = "5GB") -> WrittenWeights:
        settings = SafetensorsSettings(layout="safetensors", max_shard_size=max_shard_size)
        layout = SafetensorsLayout(settings, self.outputs, self.structure)
        folder.mkdir(exist_ok=True)
        writer = layout.weights.writer(folder)
        for record in self.records():
            writer.write(record)
        written = writer.finish()
        layout.write_files(folder, self.checkpoint)
        return written


def round_off(weight: torch.Tensor, spec: GroupQuantizedSpec) -> GroupQuantized:
    """Plain rounding, symmetric or asymmetric; with desc_act the groups are dealt out in turn."""
    largest = 2**spec.bits - 1
    g_idx = torch.arange(spec.in_features) // spec.group_size
    if spec.desc_act:
        g_idx = torch.arange(spec.in_features) % spec.groups
    order = torch.argsort(g_idx, stable=True)
    groups = weight.float()[:, order].reshape(spec.out_features, spec.groups, spec.group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if spec.sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / largest).clamp(min=1e-5).half()
    zeros = torch.full_like(scales, 2 ** (spec.bits - 1)) if spec.sym else (-low / scales).round().clamp(1, largest)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, largest).to(torch.uint8)
    return GroupQuantized(
        codes=codes.reshape(spec.out_features, spec.in_features)[:, torch.argsort(order)].contiguous(),
        scales=scales.t().contiguous(),
        zeros=zeros.to(torch.uint8).t().contiguous(),
        g_idx=g_idx.to(torch.int32),
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        desc_act=spec.desc_act,
    )


def dequantized(record: TensorRecord, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What a record means."""
    if isinstance(record.value, torch.Tensor):
        return record.value
    assert isinstance(record.value, GroupQuantized)
    return record.value.dequantize(dtype)
