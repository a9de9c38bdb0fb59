"""`qexport plan`: what it says of a run, against what the run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import factories
import onnx_exports
from qexport.artifact.manifest import CARD_NAME, LISTING_NAME, MANIFEST_NAME
from qexport.cli import main
from qexport.errors import CompatibilityError
from qexport.export.onnx import layout as onnx_layout
from qexport.pipeline import plan, run
from qexport.progress import Notice, Progress
from qexport.recipe import load_recipe
from qexport.tensors.safetensors_file import SafetensorsFile

GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 32}
ASYM = {**GPTQ, "sym": False, "bits": 8}
EVERY = ["safetensors", "tgi", "vllm", "onnx"]


def made(folder: Path, method: dict[str, Any], layouts: list[str], *, shard: str = "5GB", config: Any = None) -> Path:
    """A recipe for a tiny model."""
    factories.save(factories.build(config or factories.llama_config()), folder / "base")
    factories.write_text(folder / "calibration.jsonl", seed=1)
    calibration = {"source": "calibration.jsonl", "samples": 4, "sequence_length": 32}
    recipe = {
        "load": {"base": "./base"},
        "quantize": method | ({"calibration": calibration} if method["method"] == "gptq" else {}),
        "export": [{"layout": name, "max_shard_size": shard} for name in layouts],
        "output": "./out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("method", "layouts", "shard"),
    [
        (GPTQ, ["safetensors", "tgi", "vllm"], "5GB"),
        (GPTQ, ["safetensors", "vllm"], "100KB"),
        ({"method": "nf4"}, ["safetensors", "tgi"], "5GB"),
        ({"method": "int8"}, ["safetensors", "onnx"], "100KB"),
        ({"method": "w8a8"}, ["safetensors", "tgi", "vllm"], "5GB"),
        ({"method": "none"}, ["tgi"], "5GB"),
    ],
    ids=["gptq", "gptq in shards", "nf4", "int8 with a graph", "w8a8", "none"],
)
def test_files_and_their_sizes_are_those_that_a_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], layouts: list[str], shard: str
) -> None:
    monkeypatch.setattr(onnx_layout, "trace", onnx_exports.copied_trace)
    recipe = load_recipe(made(tmp_path, method, layouts, shard=shard))
    planned = plan(recipe)
    said = json.loads(json.dumps(planned.as_dict()))["files"]
    run(recipe, device="cpu")
    for layout in layouts:
        folder = planned.folder(tmp_path / "out", next(each for each in planned.layouts if each.name == layout))
        found = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        assert said[layout].keys() == found.keys() - {MANIFEST_NAME, LISTING_NAME, CARD_NAME}
        for name, size in said[layout].items():
            assert size == pytest.approx(found[name], rel=0.01 if name != "model.onnx" else 0.2), (layout, name)


def test_layers_are_counted_by_type_with_the_bytes_that_they_take(tmp_path: Path) -> None:
    recipe = load_recipe(made(tmp_path, GPTQ, ["safetensors"], config=factories.mixtral_config()))
    types = plan(recipe).as_dict()["types"]
    run(recipe, device="cpu")
    expected: dict[str, int] = {}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stem = name.rpartition(".")[0].removeprefix("model.layers.0.").removeprefix("model.layers.1.")
            for expert in "0123":
                stem = stem.replace(f"experts.{expert}.", "experts.*.")
            expected[stem] = expected.get(stem, 0) + file.get_tensor(name).nbytes
    assert {each["type"]: each["bytes"] for each in types} == expected
    counts = {each["type"]: (each["count"], each["bits"], each["stored"]) for each in types}
    experts = next(each for each in types if ".experts." in each["type"] and each["bits"])
    assert experts["count"] == 2 * 4
    assert counts["self_attn.q_proj"] == (2, 4, "4 bits, groups of 32")
    assert counts["model.embed_tokens"] == (1, None, "bfloat16")


def test_every_layouts_problems_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = made(tmp_path, {**GPTQ, "bits": 3}, ["safetensors", "tgi", "vllm"])
    assert main(["plan", str(recipe)]) == CompatibilityError.exit_code
    error = capsys.readouterr().err
    assert "2 layouts cannot be written" in error
    assert "tgi: TGI" in error
    assert "vllm: vLLM" in error
    assert main(["plan", str(recipe), "export=[{layout: vllm}]"]) == CompatibilityError.exit_code
    assert "error: vLLM" in capsys.readouterr().err


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = made(tmp_path, GPTQ, EVERY)

    def refuse(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(SafetensorsFile, "_read_into", refuse)
    assert main(["plan", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "readers   vllm: vLLM 0.32 (tensor-parallel 1, 2), qexport.load" in lines
    assert any(line.startswith("files     onnx: model.onnx.data ") for line in lines)
    assert any(
        line.split()[:9] == ["2", "self_attn.q_proj", "64", "x", "64,", "4", "bits,", "groups", "of"] for line in lines
    )


def test_a_run_begins_with_the_plan_in_short(tmp_path: Path) -> None:
    events: list[Progress | Notice] = []
    recipe = load_recipe(made(tmp_path, {"method": "none"}, ["safetensors"]))
    run(recipe, device="cpu", progress=events.append)
    notices = [event.text.split()[0] for event in events if isinstance(event, Notice)]
    assert notices[:5] == ["base", "adapter", "quantize", "export", "expected"]
    quantizing = next(place for place, event in enumerate(events) if getattr(event, "stage", "") == "quantize")
    assert all(isinstance(event, Notice) or event.stage == "load" for event in events[: min(5, quantizing)])
