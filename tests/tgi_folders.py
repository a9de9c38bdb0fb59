"""Folders of the tgi layout, written from tiny models by the real passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import FalconConfig, PretrainedConfig

import factories
from qexport.architectures.architecture import Checkpoint
from qexport.export import TgiSettings
from qexport.export.layouts import make_layout
from qexport.export.served import Check
from qexport.export.tgi.layout import TgiLayout
from qexport.export.tgi.rules import TGI
from qexport.formats import GptqFormat, Outputs
from qexport.quantizing.method import PassInputs, RoundingMethod
from qexport.quantizing.none import NoQuantization
from qexport.tensors import TensorRecord
from quantized_models import QuantizedModel, gptq_method


def llama() -> PretrainedConfig:
    """Shapes that Marlin takes, joined and alone, whole and in two shards."""
    return factories.llama_config(hidden_size=128, intermediate_size=256, rope_theta=5e5)


def falcon() -> FalconConfig:
    """Shapes that Marlin refuses and ExLlama takes, as those of Falcon-7B."""
    return factories.falcon_config(hidden_size=192, num_attention_heads=4, ffn_hidden_size=320)


def falcon_40b() -> FalconConfig:
    return factories.falcon_40b_config(hidden_size=128)


@dataclass(frozen=True)
class TgiModel:
    """A tiny model on its way to a folder; `method` is GPTQ by plain rounding, or the settings of a rounding method."""

    config: PretrainedConfig
    method: GptqFormat | RoundingMethod | NoQuantization = field(default_factory=gptq_method)
    special: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    @cached_property
    def model(self) -> QuantizedModel:
        method = self.method if isinstance(self.method, GptqFormat) else gptq_method()
        return QuantizedModel(factories.build(self.config), method, special=self.special)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return replace(self.model.checkpoint, files=tokenizer_files())

    @cached_property
    def outputs(self) -> Outputs:
        if isinstance(self.method, GptqFormat):
            return self.model.outputs
        return self.method.plan(self.checkpoint)

    @cached_property
    def layout(self) -> TgiLayout:
        settings = TgiSettings(layout="tgi", max_shard_size="200KB")
        made = make_layout(settings, self.outputs, self.model.structure, self.checkpoint)
        assert isinstance(made, TgiLayout)
        return made

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        writer = self.layout.weights.writer(folder)
        for record in self.records():
            writer.write(record)
        writer.finish()
        self.layout.write_files(folder, self.checkpoint)
        return folder

    def records(self) -> Iterable[TensorRecord]:
        if isinstance(self.method, GptqFormat):
            return self.model.records()
        cpu, dtype = torch.device("cpu"), torch.bfloat16
        return self.method.quantize(PassInputs(self.checkpoint, self.outputs, None, dtype, cpu, scratch=Path()))


def failed(folder: Path) -> dict[str, Check]:
    """The rules that a folder breaks, by name."""
    return {check.name: check for check in TGI.check(folder) if not check.passed}


def tokenizer_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        factories.tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
