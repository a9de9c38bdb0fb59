"""The README's tables of what goes where, cell by cell."""

from __future__ import annotations

import re
import tempfile
from atexit import register
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from transformers import Phi3Config, PretrainedConfig
from transformers.utils import logging

import factories
import gguf_folders
from onnx_exports import CONFIGS as GRAPHS
from onnx_exports import traced_once
from qexport.architectures.architecture import Checkpoint
from qexport.errors import CompatibilityError
from qexport.export import ExportSettings
from qexport.export.layouts import Layout, make_layout
from qexport.formats import Outputs
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.quantizing import AnyMethod
from qexport.quantizing.method import Method, PassInputs
from qexport.reading.stored_model import open_stored
from qexport.tensors import CalibrationSet, TensorRecord

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

WIDE = {
    "llama": factories.llama_config(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4
    ),
    "phi 3": Phi3Config(**(factories.FAMILIES["phi 3"].to_dict() | dict(hidden_size=128, intermediate_size=256))),
}
"""TGI's kernel for layers that hold several linears takes widths that are multiples of 128 only."""

PUBLISHED = {"qwen3 moe": gguf_folders.CONFIGS["qwen3 moe"]}
"""Experts in every block, as published models have them and llama.cpp computes; the others' has a block without."""

Kind = Literal["plain", "wide", "graph", "published"]
MODELS: Mapping[Kind, Mapping[str, PretrainedConfig]] = {
    "plain": factories.FAMILIES,
    "wide": WIDE,
    "graph": GRAPHS,
    "published": PUBLISHED,
}


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose head starts so."""
    table = README[README.index(f"| {first} |") :].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def settings(named: str) -> dict[str, Any]:
    """Settings of a method from its cell: the method, then `key: value`."""
    method, *values = re.findall(r"`([^`]+)`", named)
    chosen: dict[str, Any] = {"method": method}
    if method == "awq":
        chosen |= {"group_size": 32, "calibration": {"source": "-"}}
    if method == "gptq":
        chosen |= {"group_size": 32, "mse": False, "calibration": {"source": "-"}}
    for value in values:
        key, _, text = value.partition(": ")
        chosen[key] = {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)
    return chosen


def cells() -> Iterator[tuple[str, str, str]]:
    head, *body = rows("method")
    for named, *verdicts in body:
        for title, verdict in zip(head[1:], verdicts, strict=True):
            yield named, re.findall(r"`(\w+)`", title)[0], verdict.split(",")[0].split(":")[0].split(" ")[0]


def family_cells() -> Iterator[tuple[str, str, str, str]]:
    head, *body = rows("family")
    for family, *verdicts in body:
        for title, verdict in zip(head[1:], verdicts, strict=True):
            layout, method = re.findall(r"`(\w+)`", title)
            yield family, layout, method, verdict


@pytest.fixture(autouse=True)
def each_model_is_traced_once() -> Iterator[None]:
    with traced_once():
        yield


@dataclass(frozen=True)
class Quantized:
    """A model's cell without the layout: a family, the kind of its model, and the method's cell."""

    family: str
    kind: Kind
    named: str

    @property
    def checkpoint(self) -> Checkpoint:
        return loaded(self.family, self.kind)

    @property
    def method(self) -> Method:
        chosen: Method = TypeAdapter(AnyMethod).validate_python(settings(self.named))
        return chosen

    @cached_property
    def outputs(self) -> Outputs:
        return self.method.plan(self.checkpoint)

    @cached_property
    def records(self) -> Sequence[TensorRecord]:
        """What the pass yields, which does not depend on the layouts that are fed with it."""
        windows = torch.randint(factories.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))
        calibration, scratch = CalibrationSet(windows, sha256="", origin="random"), Path(tempfile.gettempdir())
        inputs = PassInputs(self.checkpoint, self.outputs, calibration, torch.bfloat16, torch.device("cpu"), scratch)
        return list(self.method.quantize(inputs))

    def layout(self, name: str) -> Layout:
        chosen: ExportSettings = TypeAdapter(ExportSettings).validate_python({"layout": name})
        return make_layout(chosen, self.outputs, self.checkpoint.architecture.structure, self.checkpoint)

    def write(self, layout: str, target: Path) -> None:
        """The pass into one layout, and everything that a run holds against the folder."""
        chosen = self.layout(layout)
        writer = chosen.weights.writer(target)
        for record in self.records:
            writer.write(record)
        written = writer.finish()
        chosen.write_files(target, self.checkpoint)
        chosen.weights.read_back(target, written)
        chosen.check(target)
        with open_stored(target, dtype=torch.bfloat16) as source:
            source.check_complete(self.checkpoint.architecture.structure)
            assert set(source.layers) == (set(self.outputs.quantized) if chosen.quantization else set())


@cache
def loaded(family: str, kind: Kind) -> Checkpoint:
    """As the loader finds it in a folder."""
    logging.disable_progress_bar()
    folder = tempfile.TemporaryDirectory()
    register(folder.cleanup)
    config = MODELS[kind][family]
    return load_checkpoint(LoadSettings(base=str(factories.save(factories.build(config), Path(folder.name)))))


def quantized(family: str, layout: str, named: str) -> Quantized:
    """Once for all layouts that take the same model. For a graph the width does not matter, and its model is one that
    other tests trace too.
    """
    if layout == "onnx" and family in GRAPHS:
        return made(family, "graph", named)
    if layout == "gguf" and family in PUBLISHED:
        return made(family, "published", named)
    return made(family, "wide" if family in WIDE else "plain", named)


made = cache(Quantized)


@pytest.mark.parametrize(("named", "layout", "verdict"), list(cells()), ids=lambda value: str(value).replace("`", ""))
def test_a_method_and_a_layout(named: str, layout: str, verdict: str, tmp_path: Path) -> None:
    cell = quantized("llama", layout, named)
    assert cell.outputs, "what refuses is the layout"
    check(cell, layout, verdict, tmp_path)


@pytest.mark.parametrize(("family", "layout", "method", "verdict"), list(family_cells()))
def test_a_family_a_method_and_a_layout(family: str, layout: str, method: str, verdict: str, tmp_path: Path) -> None:
    check(quantized(family, layout, f"`{method}`"), layout, verdict, tmp_path)


def check(cell: Quantized, layout: str, verdict: str, target: Path) -> None:
    if verdict == "yes":
        cell.write(layout, target)
    else:
        assert verdict == "no"
        with pytest.raises(CompatibilityError):
            cell.layout(layout)


def test_every_family_has_its_row() -> None:
    assert [family for family, *_ in rows("family")[1:]] == list(factories.FAMILIES)
