"""Every family on the whole way: loading, block by block, merging, quantizing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import factories
from adapters import ORIGIN, assert_live_as_in_peft, load_adapter, save_adapter, write_tensors
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import Structure
from qexport.errors import CompatibilityError
from qexport.formats import Outputs
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.merge.stored import PREFIX
from qexport.pipeline.planning import plan as make_plan
from qexport.quantizing import AnyMethod
from qexport.quantizing.method import Method, PassInputs
from qexport.recipe import Recipe
from qexport.tensors import BlockQuantized, CalibrationSet, GroupQuantized, RowQuantized, TensorRecord
from test_block_runner import run, token_windows

CPU = torch.device("cpu")
FAMILIES = factories.FAMILIES
LINEARS = {
    "falcon 7b": 8, "falcon 40b": 8, "falcon rw": 8, "falcon h1": 18, "falcon 3": 14, "llama": 14, "mistral": 14,
    "qwen2": 14, "qwen3": 14, "gemma 2": 14, "gemma 3": 14, "phi 3": 8, "gpt-neox": 8, "gpt-2": 8,
    "mixtral": 2 * (4 + 4 * 3), "qwen3 moe": 7 + 4 + 4 * 3,
}  # fmt: skip
EXPERTS = {"mixtral": 2 * 4 * 3, "qwen3 moe": 4 * 3}
KEPT = {"falcon h1": 2}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def folders() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def base(family: str, folders: Path) -> Path:
    """The family's tiny model in float32, as transformers saves it."""
    return factories.save(build(family), folders / family)


@cache
def build(family: str) -> PreTrainedModel:
    return factories.build(FAMILIES[family], dtype=torch.float32)


def load(folder: Path) -> Checkpoint:
    return load_checkpoint(LoadSettings(base=str(folder)))


def parse(method: str, **changes: Any) -> Method:
    values: dict[str, Any] = {"method": method}
    if method == "gptq":
        values |= {"group_size": 32, "calibration": {"source": "unused"}}
    return TypeAdapter(AnyMethod).validate_python(values | changes)


def plan(folder: Path, method: str, **changes: Any) -> Outputs:
    checkpoint = load(folder)
    return parse(method, **changes).plan(checkpoint)


def records(checkpoint: Checkpoint, settings: Method, windows: Tensor | None = None) -> dict[str, TensorRecord]:
    """Everything that the pass yields, each tensor once."""
    outputs = settings.plan(checkpoint)
    calibration = CalibrationSet(token_windows(12, 48) if windows is None else windows, "0" * 64, "test")
    found = list(
        settings.quantize(
            PassInputs(checkpoint, outputs, calibration, torch.float32, CPU, scratch=Path(tempfile.gettempdir()))
        )
    )
    assert sorted(record.name for record in found) == sorted(outputs.specs)
    return {record.name: record for record in found}


def linears(structure: Structure) -> dict[str, Any]:
    return {linear.name: linear for block in structure.linears.values() for linear in block}


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    """What the whole model computes when transformers loads the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(2)])


def block_by_block(folder: Path, ids: Tensor) -> Tensor:
    checkpoint = load(folder)
    return run(BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=torch.float32, device=CPU), ids)


def test_logits_equal_those_of_transformers_bit_for_bit(base: Path) -> None:
    ids = token_windows()
    assert torch.equal(block_by_block(base, ids), logits(base, ids))


def test_the_structure_names_every_tensor_as_the_files_do(base: Path, family: str) -> None:
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
    structure = Architecture(json.loads((base / "config.json").read_text())).structure
    assert structure.parameters == stored
    assert f"{structure.embedding}.weight" in stored
    assert structure.tied or f"{structure.head}.weight" in stored
    assert len(linears(structure)) == LINEARS[family]
    assert sum(linear.expert for linear in linears(structure).values()) == EXPERTS.get(family, 0)
    for linear in linears(structure).values():
        shape = (linear.out_features, linear.in_features)
        assert stored[f"{linear.name}.weight"] == (shape[::-1] if linear.transposed else shape)


def test_a_lora_merge_equals_pefts_bit_for_bit(base: Path, family: str, tmp_path: Path) -> None:
    model = build(family)
    targets = [
        name for name in linears(Architecture(model.config.to_dict()).structure) if not name.endswith(".mamba.out_proj")
    ]
    if family in EXPERTS:  # PEFT lays an adapter on an expert's matrices over the parameter that holds all of them
        targets = [name for name in targets if ".self_attn." in name]
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    head = [] if model.config.tie_word_embeddings else ["lm_head"]
    adapter = save_adapter(model, LoraConfig(target_modules=[*leaves, *head], r=4), tmp_path / "adapter")
    load_adapter(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = merge(load(base), adapter, MergeSettings(dtype="float32"), adapter_origin=ORIGIN)
    expected, source = load_file(tmp_path / "merged" / "model.safetensors"), merged.checkpoint.weights
    assert expected.keys() == source.specs().keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
    assert merged.adapter is not None
    assert len(merged.adapter.changed) == len(targets) + len(head)


def test_gptq_quantizes_every_planned_layer(base: Path, family: str) -> None:
    checkpoint, structure = load(base), Architecture(FAMILIES[family].to_dict()).structure
    found = records(checkpoint, parse("gptq"))
    quantized = {name: record for name, record in found.items() if isinstance(record.value, GroupQuantized)}
    assert len(quantized) == LINEARS[family] - KEPT.get(family, 0)
    for name, linear in linears(structure).items():
        record = found[f"{name}.weight"]
        if isinstance(record.value, GroupQuantized):
            assert record.value.codes.shape == (linear.out_features, linear.in_features)
            assert record.layer is not None
            assert record.layer.loss is not None
            assert record.layer.rtn_loss is not None
            assert record.layer.loss < record.layer.rtn_loss < 0.1
    for name, record in found.items():
        if isinstance(record.value, Tensor):
            assert torch.equal(record.value, checkpoint.weights.read(name)), name


@pytest.mark.parametrize("method", ["nf4", "int8", "w8a8"])
def test_rounding_counts_every_layer(base: Path, family: str, method: str) -> None:
    if (family, method) == ("gpt-2", "w8a8"):
        with pytest.raises(CompatibilityError, match="Conv1D"):
            plan(base, method)
        return
    experts = EXPERTS.get(family, 0) if method != "w8a8" else 0
    outputs = plan(base, method)
    assert len(outputs.quantized) == LINEARS[family] - KEPT.get(family, 0) - experts
    note = f"{experts} tensors of experts stay at 16 bits: bitsandbytes quantizes no experts"
    assert outputs.notes == ((note,) if experts else ())


@pytest.mark.parametrize("method", ["gptq", "nf4", "int8", "w8a8"])
def test_falcon_h1s_mamba_output_is_quantized_only_where_the_recipe_insists(method: str, folders: Path) -> None:
    folder = folders / "falcon h1"
    if not folder.exists():
        factories.save(build("falcon h1"), folder)
    out, pattern = ("model.layers.0.mamba.out_proj", "model.layers.1.mamba.out_proj"), "*.mamba.out_proj"
    insisting: Mapping[str, Any] = (
        {"overrides": [{"modules": pattern, "bits": 4}]} if method == "gptq" else {"force_modules": [pattern]}
    )
    assert not set(out) & plan(folder, method).quantized.keys()
    assert set(out) <= plan(folder, method, **insisting).quantized.keys()
    found = records(load(folder), parse(method, **insisting))
    assert all(not isinstance(found[f"{name}.weight"].value, Tensor) for name in out)
    for quantized in (plan(folder, method), plan(folder, method, **insisting)):
        assert not any(fnmatchcase(name, "*conv1d*") for name in quantized.quantized)
    conv = {key: json.loads(json.dumps(value).replace("out_proj", "conv1d")) for key, value in insisting.items()}
    with pytest.raises(CompatibilityError, match="matches no linear layer"):
        plan(folder, method, **conv)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_gpt2s_codes_are_those_that_transformers_saves(method: str, tmp_path: Path) -> None:
    """transformers transposes Conv1D before bitsandbytes sees it, and saves it so."""
    base = factories.save(factories.build(FAMILIES["gpt-2"]), tmp_path / "base")
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if method == "nf4" else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**config), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / method)
    saved = load_file(tmp_path / method / "model.safetensors")
    found = {name: record for name, record in records(load(base), parse(method)).items() if record.layer}
    assert len(found) == LINEARS["gpt-2"]
    for name, record in found.items():
        assert isinstance(record.value, BlockQuantized | RowQuantized)
        scales = "weight.absmax" if isinstance(record.value, BlockQuantized) else "SCB"
        absmax = saved[f"{name.removesuffix('weight')}{scales}"]
        assert torch.equal(record.value.codes.reshape(-1), saved[name].reshape(-1)), name
        assert torch.equal(record.value.absmax, absmax), name
        assert record.merged is not None
        assert torch.equal(record.merged, load(base).weights.read(name)), "servers quantize the weight as it is stored"


@pytest.mark.parametrize("family", EXPERTS, indirect=True)
def test_an_adapter_with_factors_for_each_expert_is_merged_as_peft_merges_it(base: Path, tmp_path: Path) -> None:
    """Such adapters were trained with transformers 4, where each matrix was a module; PEFT converts them."""
    experts = {name: linear for name, linear in linears(load(base).architecture.structure).items() if linear.expert}
    generator = torch.Generator().manual_seed(3)
    factors: dict[str, Tensor] = {}
    for name, linear in experts.items():
        factors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=generator) * 0.1
        factors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=generator) * 0.1
    adapter = tmp_path / "adapter"
    layers = {int(name.split(".")[2]) for name in experts}
    LoraConfig(
        target_modules=sorted({name.rpartition(".")[2] for name in experts}), r=4, lora_alpha=8,
        layers_to_transform=sorted(layers), task_type="CAUSAL_LM",
    ).save_pretrained(str(adapter))  # fmt: skip
    write_tensors(adapter, factors)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_live_as_in_peft(model, load(base), adapter)
    merged = merge(load(base), adapter, MergeSettings(dtype="float32"), adapter_origin=ORIGIN)
    assert merged.adapter is not None
    assert set(merged.adapter.changed) == {f"{name}.weight" for name in experts}
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(merged.checkpoint.weights.read(name), tensor, rtol=1e-6, atol=1e-6)
        if name.removesuffix(".weight") in experts:
            assert not torch.allclose(load(base).weights.read(name), tensor, atol=1e-3)


@pytest.mark.parametrize("positions", [32, 64])
def test_windows_longer_than_learned_positions_are_refused_before_any_work(positions: int, tmp_path: Path) -> None:
    factories.save(factories.build(factories.gpt2_config(n_positions=positions)), tmp_path / "base")
    recipe = Recipe.model_validate(
        {
            "load": {"base": str(tmp_path / "base")},
            "quantize": {"method": "gptq", "group_size": 32, "calibration": {"source": "c", "sequence_length": 48}},
            "export": [{"layout": "safetensors"}],
            "verify": {"text": "v", "sequence_length": 65},
            "output": str(tmp_path / "out"),
        }
    )
    with pytest.raises(CompatibilityError, match=f"learned {positions} positions") as caught:
        make_plan(recipe)
    assert ("calibration.sequence_length: 48" in str(caught.value)) == (positions == 32)
    assert "verify.sequence_length: 65" in str(caught.value)


def test_computed_positions_have_no_end() -> None:
    found = {name: Architecture(config.to_dict()).structure.positions for name, config in FAMILIES.items()}
    assert {name for name, positions in found.items() if positions} == {"gpt-2"}
    assert found["gpt-2"] == 256
