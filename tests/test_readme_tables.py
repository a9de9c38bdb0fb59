"""The README's tables of what goes where, cell by cell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import Phi3Config, PretrainedConfig
from transformers.utils import logging

import factories
from onnx_exports import traced_once
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError
from qexport.export import ExportSettings
from qexport.export.layouts import make_layout
from qexport.formats import Outputs
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.quantizing import AnyMethod
from qexport.quantizing.method import Method, PassInputs
from qexport.reading.stored_model import open_stored
from qexport.tensors import CalibrationSet

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
WIDE = factories.llama_config(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)

FAMILIES = factories.FAMILIES | {
    "phi 3": Phi3Config(**(factories.FAMILIES["phi 3"].to_dict() | dict(hidden_size=128, intermediate_size=256)))
}
"""TGI's kernel for layers that hold several linears takes widths that are multiples of 128 only."""


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose head starts so."""
    table = README[README.index(f"| {first} |") :].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def settings(named: str) -> dict[str, Any]:
    """Settings of a method from its cell: the method, then `key: value`."""
    method, *values = re.findall(r"`([^`]+)`", named)
    chosen: dict[str, Any] = {"method": method}
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


@cache
def loaded(folder: Path) -> tuple[Checkpoint, Structure]:
    checkpoint = load_checkpoint(LoadSettings(base=str(folder)))
    return checkpoint, checkpoint.architecture.structure


@pytest.fixture(autouse=True)
def each_model_is_traced_once() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    logging.disable_progress_bar()
    return {}


def base(bases: dict[str, Path], name: str, config: PretrainedConfig, factory: pytest.TempPathFactory) -> Path:
    if name not in bases:
        bases[name] = factories.save(factories.build(config), factory.mktemp("base"))
    return bases[name]


def planned(folder: Path, method: dict[str, Any]) -> tuple[Outputs, Method]:
    checkpoint, _ = loaded(folder)
    chosen: Method = TypeAdapter(AnyMethod).validate_python(method)
    return chosen.plan(checkpoint), chosen


def layout_of(folder: Path, outputs: Outputs, layout: str) -> Any:
    checkpoint, structure = loaded(folder)
    return make_layout(TypeAdapter(ExportSettings).validate_python({"layout": layout}), outputs, structure, checkpoint)


def write(folder: Path, method: dict[str, Any], layout: str, target: Path) -> None:
    """The pass into one layout, and everything that a run holds against the folder."""
    checkpoint, structure = loaded(folder)
    outputs, chosen = planned(folder, method)
    made = layout_of(folder, outputs, layout)
    windows = torch.randint(factories.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))
    writer = made.weights.writer(target)
    calibration = CalibrationSet(windows, sha256="", origin="random")
    inputs = PassInputs(checkpoint, outputs, calibration, torch.bfloat16, torch.device("cpu"), scratch=target)
    for record in chosen.quantize(inputs):
        writer.write(record)
    written = writer.finish()
    made.write_files(target, checkpoint)
    made.weights.read_back(target, written)
    made.check(target)
    with open_stored(target, dtype=torch.bfloat16) as source:
        source.check_complete(structure)
        assert set(source.layers) == (set(outputs.quantized) if made.quantization else set())


@pytest.mark.parametrize(("named", "layout", "verdict"), list(cells()), ids=lambda value: str(value).replace("`", ""))
def test_a_method_and_a_layout(
    named: str,
    layout: str,
    verdict: str,
    bases: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = base(bases, "wide", WIDE, tmp_path_factory)
    if verdict == "yes":
        write(folder, settings(named), layout, tmp_path)
    else:
        assert verdict == "no"
        outputs, _ = planned(folder, settings(named))
        with pytest.raises(CompatibilityError):
            layout_of(folder, outputs, layout)


@pytest.mark.parametrize(("family", "layout", "method", "verdict"), list(family_cells()))
def test_a_family_a_method_and_a_layout(
    family: str,
    layout: str,
    method: str,
    verdict: str,
    bases: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = base(bases, family, FAMILIES[family], tmp_path_factory)
    if verdict == "yes":
        write(folder, settings(f"`{method}`"), layout, tmp_path)
    else:
        assert verdict == "no"
        with pytest.raises(CompatibilityError):
            layout_of(folder, planned(folder, settings(f"`{method}`"))[0], layout)


def test_every_family_has_its_row() -> None:
    assert [family for family, *_ in rows("family")[1:]] == list(factories.FAMILIES)
