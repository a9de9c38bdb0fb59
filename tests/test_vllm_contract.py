"""A right folder passes every check, and each check notices the fault that it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_folders
from qexport.errors import QexportError
from qexport.export.vllm.rules import VLLM

Q0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
KINDS = ("gptq", "awq", "w4a16", "asymmetric", "w8a8", "fp8", "blocks", "nvfp4", "mxfp4", "none", "falcon", "gpt2")
EXPERT = "model.layers.0.mlp.experts.0.up_proj"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("intact")
    return {kind: vllm_folders.write(root / kind, kind) for kind in KINDS}


def copied(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_layout_writes_passes_every_check(kind: str, intact: dict[str, Path]) -> None:
    assert [check for check in VLLM.check(intact[kind]) if not check.passed] == []


def test_every_rule_has_a_name_of_its_own_and_a_source() -> None:
    assert len({rule.name for rule in VLLM.rules}) == len(VLLM.rules)
    assert all(rule.source.startswith("vllm/") and rule.source.endswith(".py") for rule in VLLM.rules)


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return plant


def quantization(**changes: Any) -> Callable[[Path], None]:
    return config(lambda content: content["quantization_config"].update(changes))


def group(**changes: Any) -> Callable[[Path], None]:
    return config(
        lambda content: (
            content["quantization_config"]["config_groups"]["group_0"].update(
                {key: value for key, value in changes.items() if key == "input_activations"}
            )
            or content["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                {key: value for key, value in changes.items() if key != "input_activations"}
            )
        )
    )


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return plant


def engine(**changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        [path] = folder.glob("launch/triton/*/1/model.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def left_over(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / name).write_bytes(b"{}")

    return plant


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("none", lambda folder: (folder / "config.json").write_text("{"), "config.json can be read"),
    ("none", config(lambda content: content.update(architectures=["LlamaForGames"])), "vLLM has a class"),
    ("none", config(lambda content: content.update(auto_map={"AutoConfig": "x.Y"})), "no code is loaded"),
    ("none", config(lambda content: content.update(dtype="float8")), "the dtype"),
    ("none", config(lambda content: content.update(dtype="float16", model_type="gemma2")), "the dtype"),
    ("falcon", config(lambda content: content.update(ffn_hidden_size=100)), "a Falcon has the shape"),
    ("falcon", config(lambda content: content.update(activation="relu")), "a Falcon has the shape"),
    ("gptq", quantization(quant_method="bitsandbytes"), "in vLLM's core"),
    ("gptq", quantization(checkpoint_format="gptq_v3"), "can be followed"),
    ("gptq", quantization(dynamic={"-:^model": {}}), "can be followed"),
    ("gptq", quantization(sym=False), "4 bits and symmetric"),
    ("gptq", quantization(bits=8), "4 bits and symmetric"),
    ("gptq", quantization(dynamic={"^model": {"bits": 8}}), "4 bits and symmetric"),
    ("gptq", quantization(desc_act=True), "in the order of the inputs"),
    ("gptq", quantization(group_size=16), "GPTQ groups are of a size"),
    ("awq", quantization(version="gemv"), "can be followed"),
    ("awq", quantization(bits=3), "can be followed"),
    ("awq", quantization(zero_point=False), "can be followed"),
    ("awq", quantization(group_size=16), "AWQ groups are of a size"),
    ("awq", quantization(modules_to_not_convert=[Q0]), "are quantized alike"),
    ("awq", config(lambda content: content.update(dtype="float32")), "used with 16-bit weights"),
    ("gptq", config(lambda content: content.update(dtype="float32")), "used with 16-bit weights"),
    ("w4a16", config(lambda content: content.update(dtype="float32")), "used with 16-bit weights"),
    ("w4a16", group(actorder="group"), "W8A8, FP8, FP4 or W4A16"),
    ("w4a16", group(num_bits=8), "W8A8, FP8, FP4 or W4A16"),
    ("w8a8", group(symmetric=False), "W8A8, FP8, FP4 or W4A16"),
    ("w8a8", group(input_activations=None), "W8A8, FP8, FP4 or W4A16"),
    ("w8a8", group(strategy="tensor"), "W8A8, FP8, FP4 or W4A16"),
    ("w4a16", group(type="float"), "W8A8, FP8, FP4 or W4A16"),
    ("w4a16", group(input_activations={"num_bits": 8}), "W8A8, FP8, FP4 or W4A16"),
    ("none", lambda folder: (folder / "tokenizer.json").unlink(), "there is a tokenizer"),
    ("none", engine(max_model_len=100_000), "the model's longest sequence"),
    ("none", engine(tensor_parallel_size=3), "split the heads evenly"),
    ("none", lambda folder: (folder / "model.safetensors").unlink(), "all weights that the index names can be read"),
    ("gptq", left_over("adapter_config.json"), "nothing beside the weights"),
    ("gptq", left_over("model-00001-of-00002.safetensors"), "nothing beside the weights"),
    ("w8a8", left_over("consolidated.00.pth"), "nothing beside the weights"),
    ("gptq", tensors(lambda stored: stored.pop("model.norm.weight")), "no tensor of the model"),
    ("none", tensors(lambda stored: stored.update({"model.norm.weight": torch.ones(3)})), "no tensor of the model"),
    ("gptq", quantization(lm_head=True), "the head is 16-bit"),
    (
        "gpt2",
        config(lambda content: content.update(quantization_config={"quant_method": "gptq"})),
        "GPT-2's matrices are not quantized",
    ),
    ("gptq", tensors(lambda stored: stored.update({f"{EXPERT}.weight": torch.ones(3, 3)})), "experts are quantized"),
    ("gptq", tensors(lambda stored: stored.update({"lm_head.qweight": torch.zeros(8, 384).int()})), "the head is"),
    ("gptq", quantization(dynamic={f"-:^{Q0.replace('.', r'[.]')}$": {}}), "are quantized alike"),
    ("w8a8", config(lambda content: content["quantization_config"]["ignore"].append(UP0)), "are quantized alike"),
    (
        "gptq",
        quantization(dynamic={r"^model\.layers\.0\.mlp\.(gate|up)_proj$": {"group_size": 64}}),
        "GPTQ rules reach",
    ),
    ("none", tensors(lambda stored: stored.pop(f"{UP0}.weight")), "leaves unquantized are stored unquantized"),
    ("none", tensors(lambda stored: stored.update({f"{UP0}.weight": torch.ones(128, 3)})), "leaves unquantized"),
    ("gptq", tensors(lambda stored: stored.pop(f"{UP0}.qzeros")), "GPTQ layers have"),
    ("gptq", quantization(group_size=64), "GPTQ layers have"),
    ("awq", quantization(group_size=64), "AWQ layers have"),
    ("awq", tensors(lambda stored: stored.pop(f"{UP0}.qzeros")), "AWQ layers have"),
    ("w8a8", tensors(lambda stored: stored.pop(f"{UP0}.weight_scale")), "W8A8 layers have"),
    ("w8a8", tensors(lambda stored: stored.update({f"{UP0}.weight": torch.ones(128, 64)})), "W8A8 layers have"),
    ("w8a8", tensors(lambda stored: stored.update({f"{UP0}.weight_scale": torch.ones(128, 1).int()})), "W8A8 layers"),
    ("fp8", group(type="int"), "W8A8, FP8, FP4 or W4A16"),
    ("fp8", group(input_activations=None), "W8A8, FP8, FP4 or W4A16"),
    ("fp8", config(lambda content: content["quantization_config"]["ignore"].append(UP0)), "are quantized alike"),
    ("fp8", tensors(lambda stored: stored.pop(f"{UP0}.weight_scale")), "FP8 layers have"),
    ("fp8", tensors(lambda stored: stored.update({f"{UP0}.weight": torch.ones(128, 64)})), "FP8 layers have"),
    ("blocks", tensors(lambda stored: stored.pop(f"{UP0}.weight_scale_inv")), "FP8 layers have"),
    ("blocks", tensors(lambda stored: stored.update({f"{UP0}.weight_scale_inv": torch.ones(2, 2)})), "FP8 layers have"),
    ("blocks", quantization(weight_block_size=[64, 64]), "do not span joined layers"),
    ("blocks", quantization(activation_scheme="static"), "can be followed"),
    ("blocks", quantization(modules_to_not_convert=["lm_head", UP0]), "are quantized alike"),
    ("nvfp4", config(lambda content: content.update(dtype="float32")), "used with 16-bit weights"),
    ("nvfp4", group(group_size=32), "can be followed"),
    ("nvfp4", group(strategy="group"), "can be followed"),
    ("nvfp4", group(input_activations={"num_bits": 4, "type": "float"}), "can be followed"),
    ("nvfp4", config(lambda content: content["quantization_config"]["ignore"].append(UP0)), "are quantized alike"),
    ("nvfp4", tensors(lambda stored: stored.pop(f"{UP0}.weight_global_scale")), "FP4 layers have"),
    ("nvfp4", tensors(lambda stored: stored.update({f"{UP0}.weight_scale": torch.ones(128, 4)})), "FP4 layers have"),
    ("nvfp4", tensors(lambda stored: stored[f"{UP0}.weight_global_scale"].mul_(2)), "have one global scale"),
    ("nvfp4", tensors(lambda stored: stored[f"{Q0}.weight_global_scale"].mul_(2)), "have one global scale"),
    ("mxfp4", config(lambda content: content.update(dtype="float32")), "used with 16-bit weights"),
    ("mxfp4", group(num_bits=8), "can be followed"),
    ("mxfp4", group(type="int"), "can be followed"),
    ("mxfp4", tensors(lambda stored: stored.update({f"{UP0}.weight_packed": torch.zeros(128, 16)})), "FP4 layers have"),
    ("w4a16", tensors(lambda stored: stored.pop(f"{UP0}.weight_shape")), "W4A16 layers have"),
    ("w4a16", tensors(lambda stored: stored.update({f"{UP0}.weight_packed": torch.zeros(128, 8)})), "W4A16 layers"),
    ("asymmetric", tensors(lambda stored: stored.pop(f"{UP0}.weight_zero_point")), "W4A16 layers have"),
]


def act_order(content: dict[str, Any]) -> None:
    content["quantization_config"]["desc_act"] = True
    content["quantization_config"]["group_size"] = -1


KEPT: list[tuple[str, Callable[[Path], object], str]] = [
    ("none", config(lambda content: content.update(dtype="bfloat16", model_type="gemma2")), "the dtype"),
    ("none", config(lambda content: content.update(dtype="float16")), "the dtype"),
    ("gptq", config(act_order), "in the order of the inputs"),
    ("gptq", quantization(dynamic={"-:^model": {"bits": 8, "group_size": 16}}), "4 bits and symmetric"),
    ("gptq", quantization(dynamic={"-:^model": {"bits": 8, "group_size": 16}}), "GPTQ groups are of a size"),
    ("w8a8", tensors(lambda stored: stored.update({f"{UP0}.weight_scale": torch.ones(128, 1).half()})), "W8A8 layers"),
    ("gptq", left_over("LICENSE"), "nothing beside the weights"),
    ("gptq", left_over("training_args.bin"), "nothing beside the weights"),
    ("none", engine(max_model_len=256), "the model's longest sequence"),
    ("none", engine(tensor_parallel_size=2), "split the heads evenly"),
]


@pytest.mark.parametrize(("kind", "plant", "name"), KEPT)
def test_what_vllm_reads_as_well_passes_the_check(
    kind: str, plant: Callable[[Path], object], name: str, intact: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(intact[kind], tmp_path / "folder")
    plant(folder)
    assert [check.passed for check in VLLM.check(folder) if name in check.name] == [True]


@pytest.mark.parametrize(("kind", "plant", "name"), FAULTS)
def test_a_planted_fault_fails_its_check(
    kind: str, plant: Callable[[Path], object], name: str, intact: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(intact[kind], tmp_path / "folder")
    plant(folder)
    failed = [check for check in VLLM.check(folder) if not check.passed]
    assert [check for check in failed if name in check.name], failed
    with pytest.raises(QexportError, match="vLLM"):
        VLLM.refuse_folder(folder)


def test_every_rule_has_a_planted_fault() -> None:
    assert [rule.name for rule in VLLM.rules if not any(name in rule.name for _, _, name in FAULTS)] == []
