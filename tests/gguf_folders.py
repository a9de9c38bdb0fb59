"""GGUF folders of tiny models, written by the layout in one pass with the safetensors layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from pydantic import TypeAdapter
from transformers import Gemma3TextConfig, PretrainedConfig

import factories
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.names import GGUF_NAME
from qexport.export import ExportSettings
from qexport.export.layouts import Layout, make_layout
from qexport.formats.gguf import Entry
from qexport.formats.gguf.header import header_bytes
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.quantizing import AnyMethod
from qexport.quantizing.method import Method, PassInputs
from qexport.tensors import CalibrationSet, TensorRecord
from qexport.tensors.gguf_file import GgufFile

GPTQ: Mapping[str, Any] = {"method": "gptq", "group_size": 32, "mse": False, "calibration": {"source": "-"}}
NONE: Mapping[str, Any] = {"method": "none"}

LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR: Mapping[str, Any] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
CONFIGS: Mapping[str, PretrainedConfig] = {
    **{
        name: factories.FAMILIES[name]
        for name in (
            "llama", "mistral", "qwen2", "qwen3", "falcon 7b", "falcon 40b", "falcon 3", "gemma 2", "gemma 3", "phi 3",
            "gpt-neox", "gpt-2", "mixtral",
        )
    },
    "gemma 3 linear": Gemma3TextConfig(
        **(factories.GROUPED | {"num_hidden_layers": 7}), sliding_window=16, query_pre_attn_scalar=16,
        final_logit_softcapping=20.0, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
        },
    ),
    "qwen3 moe": factories.qwen3_moe_config(decoder_sparse_step=1, norm_topk_prob=True),
    "llama 3": factories.llama_config(rope_parameters=dict(LLAMA3)),
    "llama linear": factories.llama_config(rope_parameters=dict(LINEAR)),
}  # fmt: skip
"""Tiny models of what the layout supports."""


@dataclass(frozen=True)
class Made:
    """What one pass gave.

    Attributes:
        gguf: the folder of the layout gguf.
        safetensors: the folder of the layout safetensors.
        base: the model that both were made from.
        records: what the pass has yielded, by parameter.
    """

    gguf: Path
    safetensors: Path
    base: Path
    records: Mapping[str, TensorRecord]


def as_others_quantize(folder: Path, target: Path, kinds: Mapping[str, gguf.GGMLQuantizationType]) -> Path:
    """A file like those that llama.cpp's quantizer makes of one with 16-bit weights.

    Args:
        folder: the artifact with them.
        target: the file, which does not exist.
        kinds: how a matrix is stored, by a part of its name; the first one counts, and the rest stays as it is.
    """
    with closing(GgufFile(folder / GGUF_NAME)) as file:
        arrays = {key: file.array(key) for key in file.array_lengths}
        values: dict[str, Any] = {**file.metadata, **arrays}
        table, content = dict[str, Entry](), dict[str, bytes]()
        for name, tensor in file.tensors.items():
            rows = file.read_rows(name, 0, tensor.rows)
            chosen = [kind for part, kind in kinds.items() if part in name and len(tensor.shape) == 2]
            kind = chosen[0] if chosen else tensor.kind
            if chosen:
                rows = gguf.quantize(gguf.dequantize(rows, tensor.kind), kind)
            table[name], content[name] = Entry(tensor.shape, kind), rows.tobytes()
    header, offsets = header_bytes(values, table)
    whole = bytearray(header)
    for name, offset in offsets.items():
        whole[offset : offset + len(content[name])] = content[name]
    target.write_bytes(whole)
    return target


def checkpoint(config: PretrainedConfig, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    """A tiny model, as the loader finds it in a folder."""
    return load(factories.save(factories.build(config, dtype=dtype), folder))


def load(folder: Path) -> Checkpoint:
    """A model in a folder."""
    return load_checkpoint(LoadSettings(base=str(folder)))


def layout(name: str, base: Checkpoint, quantize: Mapping[str, Any] = GPTQ, **settings: Any) -> Layout:
    """A layout for what a method yields."""
    chosen: ExportSettings = TypeAdapter(ExportSettings).validate_python({"layout": name, **settings})
    return make_layout(chosen, method(quantize).plan(base), base.architecture.structure, base)


def method(quantize: Mapping[str, Any]) -> Method:
    """A method by its settings."""
    chosen: Method = TypeAdapter(AnyMethod).validate_python(dict(quantize))
    return chosen


def make(config: PretrainedConfig, folder: Path, quantize: Mapping[str, Any] = GPTQ) -> Made:
    """One pass into both layouts, with everything that a run holds against them."""
    base = checkpoint(config, folder / "base")
    yielded = list(records(base, quantize, folder))
    for name in ("gguf", "safetensors"):
        write(layout(name, base, quantize), folder / name, yielded, base)
    return Made(folder / "gguf", folder / "safetensors", folder / "base", {record.name: record for record in yielded})


def records(base: Checkpoint, quantize: Mapping[str, Any], scratch: Path) -> Iterator[TensorRecord]:
    """What a method yields, with random tokens as calibration."""
    outputs = method(quantize).plan(base)
    windows = torch.randint(factories.VOCABULARY, (16, 64), generator=torch.Generator().manual_seed(1))
    calibration = CalibrationSet(windows, sha256="", origin="random")
    inputs = PassInputs(base, outputs, calibration, torch.bfloat16, torch.device("cpu"), scratch)
    yield from method(quantize).quantize(inputs)


def write(chosen: Layout, folder: Path, records: list[TensorRecord], base: Checkpoint) -> None:
    """Writes a folder and reads it back."""
    folder.mkdir()
    with chosen.weights.writer(folder) as writer:
        for record in records:
            writer.write(record)
        written = writer.finish()
    chosen.write_files(folder, base)
    chosen.weights.read_back(folder, written)
    chosen.check(folder)
