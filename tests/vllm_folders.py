"""Tiny folders in the layout vllm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

import factories
from qexport.export import VllmSettings
from qexport.export.vllm.layout import VllmLayout
from qexport.formats import AwqFormat, Outputs
from qexport.quantizing.fp8 import Fp8
from qexport.quantizing.method import PassInputs
from qexport.quantizing.mxfp4 import Mxfp4
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.nvfp4 import Nvfp4
from qexport.quantizing.w8a8 import W8a8
from quantized_models import QuantizedModel, gptq_method

Form = Literal["gptq", "compressed-tensors"]
Rounded = W8a8 | Fp8 | Nvfp4 | Mxfp4 | NoQuantization
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": factories.gpt2_config,
    "blocks": lambda: factories.llama_config(hidden_size=256, num_key_value_heads=2),
}
ROUNDED: dict[str, Rounded] = {
    "w8a8": W8a8(method="w8a8"),
    "fp8": Fp8(),
    "blocks": Fp8(strategy="block"),
    "nvfp4": Nvfp4(),
    "mxfp4": Mxfp4(),
    "none": NoQuantization(method="none"),
    "gpt2": NoQuantization(method="none"),
}


def llama(**changes: Any) -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config()), **changes)


def layout(model: QuantizedModel, form: Form = "gptq", outputs: Outputs | None = None) -> VllmLayout:
    settings = VllmSettings(layout="vllm", format=form)
    return VllmLayout(settings, outputs or model.outputs, model.structure, model.checkpoint)


def write(folder: Path, kind: str) -> Path:
    """`gptq`, `awq`, `w4a16`, `asymmetric`, `w8a8`, `fp8`, `blocks` of FP8, `nvfp4`, `mxfp4`, `none`, `falcon`, or
    `gpt2` with nothing quantized.
    """
    folder.mkdir()
    if kind in ROUNDED:
        config = CONFIGS[kind]() if kind in CONFIGS else factories.llama_config()
        return _write_rounded(folder, QuantizedModel(factories.build(config)), ROUNDED[kind])
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


def _write_rounded(folder: Path, model: QuantizedModel, settings: Rounded) -> Path:
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
