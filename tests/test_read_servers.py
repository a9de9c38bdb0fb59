"""The rules of SGLang and TensorRT-LLM, which were read: what passes, a planted fault for each, and their page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vllm_folders
from qexport.cli.app import main
from qexport.export.served import Server
from qexport.export.served_layers import ServedLayers
from qexport.export.sglang import SGLANG
from qexport.export.tensorrt_llm import TENSORRT_LLM

KINDS = ("gptq", "awq", "w4a16", "asymmetric", "w8a8", "fp8", "blocks", "nvfp4", "mxfp4", "none")
REFUSED = {
    "SGLang": {"asymmetric", "nvfp4", "mxfp4"},
    "TensorRT-LLM": {"gptq", "awq", "w4a16", "asymmetric", "w8a8", "nvfp4", "mxfp4"},
}
SERVERS = (SGLANG, TENSORRT_LLM)
Q0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("intact")
    return {kind: vllm_folders.write(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
@pytest.mark.parametrize("kind", KINDS)
def test_each_method_passes_or_is_refused_as_the_page_says(
    server: Server[ServedLayers], kind: str, intact: dict[str, Path]
) -> None:
    failed = [str(check) for check in server.check(intact[kind]) if not check.passed]
    assert bool(failed) == (kind in REFUSED[server.name]), failed


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return plant


def quantization(**changes: Any) -> Callable[[Path], None]:
    return config(lambda content: content["quantization_config"].update(changes))


def ignored(content: dict[str, Any]) -> None:
    content["quantization_config"]["ignore"].append(UP0)


def second_group(content: dict[str, Any]) -> None:
    groups = content["quantization_config"]["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:x"]}


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def modelopt(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')


FAULTS: list[tuple[Server[ServedLayers], str, Callable[[Path], object], str]] = [
    (SGLANG, "none", no_json, "config.json can be read"),
    (SGLANG, "fp8", modelopt, "nothing beside the weights is read"),
    (SGLANG, "gptq", quantization(quant_method="bitsandbytes"), "the quantization method was found in its sources"),
    (SGLANG, "gptq", quantization(dynamic={"-:^model": {}}), "the quantization config can be followed"),
    (SGLANG, "gptq", quantization(sym=False), "GPTQ codes that Marlin does not compute are used in float16"),
    (SGLANG, "gptq", quantization(bits=3), "GPTQ codes that Marlin does not compute are used in float16"),
    (SGLANG, "gptq", quantization(group_size=16), "GPTQ codes that Marlin does not compute are used in float16"),
    (SGLANG, "fp8", config(ignored), "layers that SGLang joins are quantized alike"),
    (
        SGLANG,
        "gptq",
        quantization(dynamic={r"-:^model\.layers\.0\.mlp\.(gate|up)_proj$": {}}),
        "GPTQ rules reach the layers that SGLang joins",
    ),
    (SGLANG, "asymmetric", lambda folder: None, "packed weights of compressed-tensors are symmetric, with 4 or 8 bits"),
    (SGLANG, "nvfp4", lambda folder: None, "4-bit floats of compressed-tensors come with rounded inputs"),
    (TENSORRT_LLM, "none", no_json, "config.json can be read"),
    (TENSORRT_LLM, "fp8", modelopt, "nothing beside the weights is read"),
    (TENSORRT_LLM, "gptq", lambda folder: None, "the quantization method is one that it takes from config.json"),
    (TENSORRT_LLM, "blocks", quantization(weight_block_size=[64, 64]), "blocks of FP8 are 128 x 128"),
    (
        TENSORRT_LLM,
        "w8a8",
        lambda folder: None,
        "compressed-tensors weights are FP8 with a scale for each output, in one group",
    ),
    (
        TENSORRT_LLM,
        "fp8",
        config(second_group),
        "compressed-tensors weights are FP8 with a scale for each output, in one group",
    ),
    (TENSORRT_LLM, "fp8", config(ignored), "layers that TensorRT-LLM joins are quantized alike"),
]


@pytest.mark.parametrize(("server", "kind", "plant", "name"), FAULTS)
def test_a_planted_fault_fails_its_rule(
    server: Server[ServedLayers],
    kind: str,
    plant: Callable[[Path], object],
    name: str,
    intact: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(intact[kind], folder)
    plant(folder)
    assert name in [check.name for check in server.check(folder) if not check.passed]


def test_codes_that_marlin_does_not_compute_pass_in_float16(intact: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(intact["gptq"], folder)
    config(lambda content: content.update(dtype="float16"))(folder)
    quantization(sym=False)(folder)
    assert not [check for check in SGLANG.check(folder) if not check.passed]


def test_every_rule_has_a_planted_fault_and_a_row_of_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs/read-servers.md").read_text().partition("## The rules")[2]
    rows = [line for line in page.splitlines() if line.startswith(("| SGLang", "| TensorRT"))]
    rules = [(server.name, rule) for server in SERVERS for rule in server.rules]
    assert rows == [f"| {server} | {rule.name} | {rule.source} |" for server, rule in rules]
    planted = {(server.name, name) for server, _, _, name in FAULTS}
    assert planted == {(server, rule.name) for server, rule in rules}


def test_validate_asks_them(intact: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(intact["fp8"]), "--server", "sglang"]) == 0
    assert main(["validate", str(intact["w8a8"]), "--server", "tensorrt-llm"]) == 4
    assert "docs/read-servers.md" in capsys.readouterr().err
