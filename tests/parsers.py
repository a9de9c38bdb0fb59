"""Every parser of files that strangers write, as a function of bytes, with valid files to begin from.

`tests/test_parsers.py` feeds them with hypothesis, `tests/fuzz/run.py` with atheris.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import onnx_folders
import reports
from qexport.architectures.architecture import Architecture
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.errors import QexportError
from qexport.gates import read_gates
from qexport.loading.small_files import read_config
from qexport.merge.adapter import read_adapter
from qexport.merge.lora import LoraOptions
from qexport.progress import silent
from qexport.reading.onnx.graph import Graph
from qexport.recipe import load_recipe
from qexport.references import parse_reference
from qexport.registries.tar_extraction import extract
from qexport.registries.tar_stream import TarStream
from qexport.tensors.gguf_file import GgufFile
from qexport.tensors.safetensors_file import SafetensorsFile
from qexport.tensors.safetensors_index import read_index
from qexport.text.documents import read_documents
from qexport.text.formats import read_format_prompts
from qexport.text.prompts import read_prompts
from qexport.text.refusals import read_requests


@dataclass(frozen=True)
class Parser:
    """One parser.

    Attributes:
        parse: reads a file of any content, whose folder is its own.
        name: the file's.
        seeds: valid contents.
    """

    parse: Callable[[Path], object]
    name: str
    seeds: tuple[bytes, ...]

    def __call__(self, content: bytes, folder: Path) -> None:
        """Parses the bytes. What is wrong with them must be an error of qexport's, and no defect."""
        path = folder / self.name
        path.write_bytes(content)
        try:
            self.parse(path)
        except QexportError as error:
            if type(error) is QexportError:
                raise


CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": [1, 2], "dtype": "bfloat16", "limits": [0.0, 1e300],
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"q": 4},
    "bias": "none",
}
RECIPE = b"""\
load: {base: org/model, adapter: ./a}
quantize: &q {method: gptq, bits: 4, calibration: {source: [a.txt], samples: 0x10}}
export: [{layout: safetensors}]
verify: {text: b.txt, gates: {mean_kl: {at_most: 1e-3}}}
output: 'out'
"""


def _tensors(path: Path) -> None:
    with SafetensorsFile(path) as file:
        for name in file.specs():
            file.read(name)


def _gguf(path: Path) -> None:
    file = GgufFile(path)
    for name, found in file.tensors.items():
        file.read_rows(name, 0, found.rows)
    file.close()


def _config(path: Path) -> None:
    Architecture(read_config(path.parent, trusted_root=None, progress=silent)).structure  # noqa: B018


def _adapter(path: Path) -> None:
    (path.parent / "adapter_model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    LoraOptions.parse(read_adapter(path.parent).config)


def _graph(path: Path) -> None:
    graph = Graph(path.parent)
    for name in graph.initializers:
        graph.read(name)


def _reference(path: Path) -> None:
    try:
        parse_reference(path.read_text(encoding="utf-8"))
    except ValueError:  # its callers say where, UnicodeDecodeError included
        return


def _gguf_seed() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    values = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    values += text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    table = text(b"t") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + values + table
    return head + bytes(-len(head) % 32 + 64)


def graph_seed(folder: Path) -> bytes:
    """A graph with a weight inside it and a constant."""
    builder = onnx_folders.Builder()
    builder.add("Identity", builder.constant([1, 2]))
    return (builder.write(folder, {}) / "model.onnx").read_bytes()


def _archive(path: Path) -> None:
    content = path.read_bytes()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        extract(io.BytesIO(content), Path(folder), "models", len(content), str(path))


def _archive_seed(folder: Path) -> bytes:
    """Two files, one with a pax header."""
    files = {"a": b"x", f"{'é' * 60}/b": b""}
    (folder / f"{'é' * 60}").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return b"".join(TarStream(folder, {name: len(content) for name, content in files.items()}, "models").pieces())


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def parsers(folder: Path) -> dict[str, Parser]:
    """All of them by name. The folder is for making seeds."""
    return {
        "safetensors": Parser(_tensors, "a.safetensors", (save({"a": torch.zeros(3), "b": torch.ones(2, 2).byte()}, {"k": "v"}),)),
        "index": Parser(read_index, "model.safetensors.index.json", (_json({"weight_map": {"a": "b.safetensors"}}),)),
        "gguf": Parser(_gguf, "a.gguf", (_gguf_seed(),)),
        "recipe": Parser(lambda path: load_recipe(path, ()), "r.yaml", (RECIPE,)),
        "gates": Parser(read_gates, "gates.yaml", (b"profile: off\ngates: {mean_kl: {at_most: 1}}\n",)),
        "config": Parser(_config, "config.json", (_json(CONFIG),)),
        "adapter config": Parser(_adapter, "adapter_config.json", (_json(ADAPTER),)),
        "manifest": Parser(Manifest.read, "manifest.json", (b'{"schema_version": 2, "files": {}}',)),
        "report": Parser(Report.read, "report.json", (reports.report([reports.gate_result()]).model_dump_json().encode(),)),
        "graph": Parser(_graph, "model.onnx", (graph_seed(folder),)),
        "documents": Parser(lambda path: read_documents([str(path)]), "a.jsonl", (b'{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n',)),
        "format prompts": Parser(
            read_format_prompts, "f.jsonl", (b'{"id": "a", "prompt": "b", "format": {"json_schema": {"pattern": "c"}}}\n',
                                             b'{"id": "a", "prompt": "b", "format": {"tools": [{"function": {"name": "c"}}]}}\n'),
        ),
        "requests": Parser(read_requests, "r.jsonl", (b'{"id": "a", "prompt": "b", "kind": "harmful"}\n',)),
        "prompts": Parser(read_prompts, "p.jsonl", (b'{"id": "a", "prompt": "b", "domain": "d", "style": "messy"}\n',)),
        "archive": Parser(_archive, "r.tar", (_archive_seed(folder),)),
        "reference": Parser(_reference, "r.txt", (b"org/model", b"pkg:a/b.gguf", b"./a/../b", b"~x")),
    }  # fmt: skip
