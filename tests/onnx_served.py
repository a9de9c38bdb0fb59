"""Tiny folders with a graph, float32 weights, a tokenizer and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from transformers import PretrainedConfig, PreTrainedModel

import factories
from onnx_exports import copied_trace
from qexport.architectures.naming import name_parameters
from qexport.export.onnx.chat import chat_turn
from qexport.export.onnx.files import Place, put_in_place
from qexport.export.onnx.genai import FILE_NAME, Generation, genai_config, generation
from qexport.export.onnx.launch import OnnxLaunch, launch_files
from qexport.export.onnx.lowering import lower
from qexport.export.onnx.tracing import Cache
from qexport.export.onnx.triton import triton_inputs, triton_outputs
from qexport.formats import MergedFormat, Outputs
from qexport.formats.onnx import OnnxFormat
from qexport.tensors import TensorSpec
from quantized_models import QuantizedModel

Attention = Literal["plain", "fused"]
DATA = "model.onnx.data"
PROMPT = 'The miller "opened" the sluice; $HOME'


@dataclass(frozen=True)
class OnnxFolder:
    """A written folder and what it was written from."""

    path: Path
    model: PreTrainedModel
    cache: Cache
    config: Mapping[str, Any]
    generation: Generation

    def session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(str(self.path / "model.onnx"), options, providers=["CPUExecutionProvider"])


def write(
    folder: Path,
    config: PretrainedConfig,
    attention: Attention = "plain",
    name: str = "tiny",
    activations: torch.dtype = torch.float32,
) -> OnnxFolder:
    """The model of the config, whose random weights are the same each time, and float32 in every graph."""
    model = max(map(partial(_build, config), range(4)), key=_variety)
    files = _save(folder, model)
    checkpoint = replace(QuantizedModel(model).checkpoint, files=files)
    places = _write_weights(folder, model)
    traced = copied_trace(checkpoint.architecture, activations)
    outputs = Outputs(MergedFormat(), {name: place.spec for name, place in places.items()})
    specs = {name: place.spec for name, place in places.items()}
    graph = lower(traced, outputs, specs, encoding=OnnxFormat(activations), attention=attention)
    put_in_place(graph.graph, places)
    ir.save(graph, folder / "model.onnx")
    made = OnnxFolder(folder, model, traced.cache, checkpoint.config, generation(checkpoint))
    figures = OnnxLaunch(
        name=name,
        triton_image="a:1",
        inputs=triton_inputs(traced.cache),
        outputs=triton_outputs(traced.cache, activations, factories.VOCABULARY),
        data_files=[DATA],
        ends=list(made.generation.ends),
        tokenizer=True,
        chat=chat_turn(files),
    )
    for file, content in launch_files(figures).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    (folder / FILE_NAME).write_text(json.dumps(genai_config(checkpoint.config, traced.cache, made.generation)))
    return made


def _build(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A small embedding, since a tied head would otherwise say the last token again and again."""
    model = factories.build(config, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.2)  # type: ignore[operator]
    return model


def _variety(model: PreTrainedModel) -> int:
    """How many tokens it says. With one token over and over, most faults would go unnoticed."""
    prompt = factories.tokenizer()(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return len(set(tokens[0, prompt["input_ids"].shape[1] :].tolist()))


def _save(folder: Path, model: PreTrainedModel) -> dict[str, bytes]:
    """Config and tokenizer; the tokenizer's files."""
    folder.mkdir(parents=True)
    factories.tokenizer().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "config.json").write_text(model.config.to_json_string())
    return files


def _write_weights(folder: Path, model: PreTrainedModel) -> dict[str, Place]:
    state, places, data = dict(model.state_dict()), dict[str, Place](), bytearray()
    for name, part in name_parameters(model).parts.items():
        tensor = part.of(state[part.parameter]).contiguous()
        data += bytes(-len(data) % 64)
        places[name] = Place(DATA, len(data), TensorSpec(tuple(tensor.shape), tensor.dtype))
        data += tensor.numpy().tobytes()
    (folder / DATA).write_bytes(data)
    return places


def greedy(folder: OnnxFolder, prompt: list[int], new: int) -> list[int]:
    """The likeliest tokens through onnxruntime, without a cache: the whole text each time. No token ends it."""
    session, tokens = folder.session(), list(prompt)
    for _ in range(new):
        feed = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens))[None],
        }
        for value in session.get_inputs()[3:]:
            feed[value.name] = np.zeros([1, *(n if isinstance(n, int) else 0 for n in value.shape[1:])], np.float32)
        logits = session.run(["logits"], feed)[0]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]
