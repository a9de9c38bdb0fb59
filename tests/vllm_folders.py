"""Tiny folders in the layout vllm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

import factories
from qexport.export import VllmSettings
from qexport.export.vllm.layout import VllmLayout
from qexport.formats import AwqFormat, Outputs
from qexport.quantizing.method import PassInputs
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.w8a8 import W8a8
from quantized_models import QuantizedModel, gptq_method

Form = Literal["gptq", "compressed-tensors"]
CONFIGS = {"gpt2": factories.gpt2_config}


def llama(**changes: Any) -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config()), **changes)


def layout(model: QuantizedModel, form: Form = "gptq", outputs: Outputs | None = None) -> VllmLayout:
    settings = VllmSettings(layout="vllm", format=form)
    return VllmLayout(settings, outputs or model.outputs, model.structure, model.checkpoint)


def write(folder: Path, kind: str) -> Path:
    """`gptq`, `awq`, `w4a16`, `asymmetric`, `w8a8`, `none`, `falcon`, or `gpt2` with nothing quantized."""
    folder.mkdir()
    if kind in CONFIGS or kind in ("w8a8", "none"):
        settings = W8a8(method="w8a8") if kind == "w8a8" else NoQuantization(method="none")
        config = CONFIGS[kind]() if kind in CONFIGS else factories.llama_config()
        return _write_rounded(folder, QuantizedModel(factories.build(config)), settings)
    model = llama(method=gptq_method(sym=kind not in ("asymmetric", "awq")))
    if kind == "falcon":
        model = QuantizedModel(factories.build(factories.falcon_config()))
    outputs = replace(model.outputs, format=AwqFormat(32)) if kind == "awq" else None
    made = layout(model, "gptq" if kind in ("gptq", "falcon", "awq") else "compressed-tensors", outputs)
    writer = made.weights.writer(folder)
    for record in model.records():
        writer.write(record)
    writer.finish()
    made.write_files(folder, model.checkpoint)
    return folder


def _write_rounded(folder: Path, model: QuantizedModel, settings: W8a8 | NoQuantization) -> Path:
    outputs = settings.plan(model.checkpoint)
    made = layout(model, outputs=outputs)
    writer = made.weights.writer(folder)
    stream = settings.quantize(
        PassInputs(model.checkpoint, outputs, None, torch.bfloat16, torch.device("cpu"), scratch=folder)
    )
    for record in stream:
        writer.write(record)
    writer.finish()
    made.write_files(folder, model.checkpoint)
    return folder
