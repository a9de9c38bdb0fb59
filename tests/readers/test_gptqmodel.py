"""gptqmodel, in an environment of its own, loads GPTQ artifacts and computes what `qexport.load` computes.

`make test-readers` runs this; `QEXPORT_GPTQMODEL_PYTHON` names that environment's interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

import factories
import qexport
from qexport.artifact.manifest import Manifest
from qexport.reading.quantized_linear import QuantizedLinear
from qexport.runtimes import RuntimeSettings
from qexport.runtimes.child import ChildRuntime

PYTHON = os.environ.get("QEXPORT_GPTQMODEL_PYTHON", "")
MODELS: dict[str, PretrainedConfig] = {"llama": factories.llama_config(), "falcon": factories.falcon_config()}
GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 32, "sym": True}
MIXED: dict[str, Any] = {"method": "mixed", "target": {"bits_per_weight": 10.5}, "windows": 8, "window_tokens": 24}
MIXED |= {"group_sizes": [16, 32]}
METHODS: dict[str, dict[str, Any]] = {
    "4 bits": GPTQ | {"bits": 4},
    "8 bits": GPTQ | {"bits": 8},
    "desc_act": GPTQ | {"bits": 4, "desc_act": True, "static_groups": False},
    "mixed 3 and 16 bits": MIXED | {"bits": [3, 16]},
    "mixed 4 and 8 bits": MIXED | {"bits": [4, 8]},
}
CASES = {f"{model}, {method}": (model, method) for model in MODELS for method in METHODS}
TOKENS = torch.randint(5, factories.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
CLOSE = 1e-5
"""Largest difference of two logits, whose standard deviation is 0.6. Measured: 1.2e-7, sums in another order."""

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_GPTQMODEL_PYTHON names no interpreter")


@dataclass(frozen=True)
class Answer:
    """What gptqmodel's model computes, and what it holds.

    Attributes:
        logits: `[rows, length, vocabulary]`, float32.
        kernels: the class of every layer that is held as codes, by the layer's name.
        foreign: the parameters whose values are not those of the file.
    """

    version: str
    logits: Tensor
    kernels: dict[str, str]
    foreign: list[str]


def make(folder: Path, config: PretrainedConfig, method: dict[str, Any]) -> Path:
    """The artifact of one method, by a run without an adapter and without verification."""
    folder.mkdir()
    factories.save(factories.build(config), folder / "base")
    text = factories.write_text(folder / "text.jsonl")
    calibration = {"source": str(text), "samples": 16, "sequence_length": 48}
    recipe = {
        "load": {"base": "./base"},
        "quantize": method | {"calibration": calibration},
        "export": [{"layout": "safetensors"}],
        "output": "./artifact",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    qexport.run(qexport.load_recipe(folder / "recipe.yaml"))
    return folder / "artifact"


def change_one_code(artifact: Path, copy: Path) -> Path:
    """The artifact again, with the smallest change that a code can have."""
    shutil.copytree(artifact, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.qweight"][0, 0] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def ask(folders: list[Path], request: Path) -> None:
    """Has gptqmodel load every folder, in one process: importing it takes longer than the rest."""
    request.write_text(json.dumps({"tokens": TOKENS.tolist(), "folders": [str(folder) for folder in folders]}))
    run = subprocess.run(
        [PYTHON, Path(__file__).with_name("load_with_gptqmodel.py"), request],
        env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]


def answer(artifact: Path) -> Answer:
    """What gptqmodel has said of an artifact."""
    with safe_open(artifact.parent / "answer.safetensors", "pt") as file:
        told, logits = file.metadata(), file.get_tensor("logits")
    return Answer(told["version"], logits, json.loads(told["kernels"]), json.loads(told["foreign"]))


def ours(artifact: Path) -> tuple[Tensor, set[str]]:
    """Logits of `qexport.load` in float32, and the names of the quantized layers."""
    model = qexport.load(artifact, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits, {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model by every method, and one of them with a changed code."""
    root = tmp_path_factory.mktemp("artifacts")
    made = {case: make(root / case, MODELS[model], METHODS[method]) for case, (model, method) in CASES.items()}
    made["changed"] = change_one_code(made["llama, 4 bits"], root / "changed" / "artifact")
    ask(list(made.values()), root / "request.json")
    return made


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_computes_what_qexport_computes(case: str, artifacts: dict[str, Path]) -> None:
    told = answer(artifacts[case])
    logits, quantized = ours(artifacts[case])
    assert told.version == "7.6.0"
    assert told.foreign == []
    assert told.kernels == dict.fromkeys(quantized, "TorchLinear")
    assert logits.std() > 0.3
    print(f"{case}: largest difference {(told.logits - logits).abs().max():.2e}")
    torch.testing.assert_close(told.logits, logits, rtol=0.0, atol=CLOSE)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_mixed_differs_by_layer(model: str, artifacts: dict[str, Path]) -> None:
    """So that equal logits mean that gptqmodel reads each layer's own bits and groups."""
    three, four, alike = (
        Manifest.read(artifacts[f"{model}, {method}"]).layers
        for method in ("mixed 3 and 16 bits", "mixed 4 and 8 bits", "4 bits")
    )
    assert {layer.bits for layer in three} == {3}
    assert 0 < len(three) < len(alike)
    assert {layer.bits for layer in four} == {4, 8}
    assert len({layer.group_size for layer in [*three, *four]}) == 2


@pytest.mark.parametrize("case", ["llama, 4 bits", "changed"])
def test_through_gptqmodel_the_same_numbers_come(case: str, artifacts: dict[str, Path]) -> None:
    """By the path of `--through`, row by row."""
    settings = RuntimeSettings(runtime="gptqmodel", python=PYTHON)
    logits, quantized = ours(artifacts["llama, 4 bits"])
    with ChildRuntime(settings, artifacts[case], longest=TOKENS.shape[1] + 1) as runtime:
        found = [torch.cat(list(runtime.logits(row))) for row in TOKENS.tolist()]
        assert runtime.facts.kernels == {"TorchLinear": len(quantized)}
    own = logits[:, :-1].log_softmax(-1)
    largest = float((torch.stack(found) - own).abs().max())
    assert (largest <= 2 * CLOSE) == (case != "changed"), largest


def test_one_changed_code_is_seen(artifacts: dict[str, Path]) -> None:
    """So that equal logits mean equal codes."""
    logits, _ = ours(artifacts["llama, 4 bits"])
    assert (answer(artifacts["changed"]).logits - logits).abs().max() > 20 * CLOSE
