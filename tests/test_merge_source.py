"""The merged model as a source of tensors."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig

import adapters
import factories
from fresh import Fresh
from live_bytes import LiveBytes
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import NumericalError
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge
from qexport.tensors import Origin, TensorSpec
from qexport.tensors.safetensors_file import SafetensorsFile

Q0 = "model.layers.0.self_attn.q_proj"


class Fixed:
    """A source that holds its tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()


def cast(tensors: Mapping[str, torch.Tensor], **config: Any) -> Checkpoint:
    checkpoint = Checkpoint(Architecture({"model_type": "llama"}), Fixed(tensors), {}, Origin("folder", "base"))
    return merge(checkpoint, None, MergeSettings(**config)).checkpoint


def test_without_an_adapter_tensors_are_only_cast() -> None:
    values = torch.tensor([1.00390625, -2.0, 3.14159])
    found = cast({"a": values, "b": values.half(), "c": torch.tensor([1, 2])})
    assert {name: spec.dtype for name, spec in found.weights.specs().items()} == {
        "a": torch.bfloat16, "b": torch.bfloat16, "c": torch.int64,
    }  # fmt: skip
    assert torch.equal(found.weights.read("a"), values.bfloat16())
    assert torch.equal(found.weights.read("b"), values.half().bfloat16())
    assert torch.equal(found.weights.read("c"), torch.tensor([1, 2]))


def test_a_tensor_that_overflows_the_merged_dtype_is_an_error() -> None:
    source = cast({"a": torch.tensor([1e5]), "b": torch.tensor([6e4])}, dtype="float16").weights
    assert source.read("b").isfinite().all()
    with pytest.raises(NumericalError, match="not finite in float16") as caught:
        source.read("a")
    assert caught.value.where == "a"


def test_the_configuration_names_the_merged_dtype_and_no_other() -> None:
    checkpoint = Checkpoint(
        Architecture({"model_type": "llama", "torch_dtype": "float32"}), Fixed({}), {}, Origin("folder", "base")
    )
    merged = merge(checkpoint, None, MergeSettings(dtype="float16"))
    assert merged.checkpoint.config == {"model_type": "llama", "dtype": "float16"}
    assert merged.adapter is None
    assert "torch_dtype" in checkpoint.config


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return adapters.save_base(factories.build(factories.llama_config()), tmp_path / "base")


def adapted(base: Checkpoint, config: Any, folder: Path, **options: Any) -> Merged:
    adapter = adapters.save_adapter(factories.build(factories.llama_config()), config, folder)
    return merge(base, adapter, MergeSettings(**options), adapter_origin=adapters.ORIGIN)


def test_the_merged_source_keeps_the_bases_names_order_and_shapes(base: Checkpoint, tmp_path: Path) -> None:
    found = adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter", dtype="float32")
    before, after = base.weights.specs(), found.checkpoint.weights.specs()
    assert list(before) == list(after)
    assert all(after[name] == replace(before[name], dtype=torch.float32) for name in before)
    assert found.adapter is not None
    assert found.adapter.changed == tuple(name for name in before if "q_proj" in name)
    assert found.adapter.peft_type == "LORA"
    assert found.adapter.origin is adapters.ORIGIN


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_proj"]), LoHaConfig(target_modules=["q_proj"])])
def test_a_tensor_can_be_read_again_and_in_any_order(base: Checkpoint, tmp_path: Path, config: Any) -> None:
    source = adapted(base, config, tmp_path / "adapter").checkpoint.weights
    names = list(source.specs())
    first = {name: source.read(name) for name in names}
    first[names[0]].zero_()
    assert all(torch.equal(source.read(name), first[name]) for name in reversed(names[1:]))
    assert source.read(names[0]).any()


def test_merging_through_peft_leaves_the_random_state_alone(base: Checkpoint, tmp_path: Path) -> None:
    source = adapted(base, LoHaConfig(target_modules=["q_proj"]), tmp_path / "adapter").checkpoint.weights
    state = torch.random.get_rng_state()
    source.read(f"{Q0}.weight")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_scale_that_overflows_is_an_error_that_names_the_tensor(base: Checkpoint, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapter = adapters.save_adapter(factories.build(factories.llama_config()), config, tmp_path / "adapter")
    adapters.edit_config(adapter, lora_alpha=1e300)
    source = merge(base, adapter, MergeSettings(), adapter_origin=adapters.ORIGIN).checkpoint.weights
    with pytest.raises(NumericalError) as caught:
        source.read(f"{Q0}.weight")
    assert caught.value.where == f"{Q0}.weight"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_reading_a_model_never_holds_more_than_one_tensor_and_its_factors(
    base: Checkpoint, tmp_path: Path, dora: bool
) -> None:
    config = LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"], r=4, use_dora=dora)
    source = adapted(base, config, tmp_path / "adapter").checkpoint.weights
    largest = max(spec.nbytes // spec.dtype.itemsize for spec in source.specs().values())
    gc.collect()
    with LiveBytes() as live:
        for name in source.specs():
            source.read(name)
    # the tensor as stored (2), in float32 (4), and rounded (2); factors and norms are a small part of a layer
    assert 6 * largest <= live.peak <= 10 * largest
    assert live.now == 0
    with LiveBytes() as live:
        kept = [source.read(name) for name in source.specs()]
    assert live.peak > 10 * largest, "the measure sees what is kept"
    assert kept


def test_reading_a_tensor_reads_only_its_own_factors(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = adapted(base, LoraConfig(target_modules=["q_proj", "v_proj"]), tmp_path / "adapter").checkpoint.weights
    read: list[str] = []
    original = SafetensorsFile.read

    def spy(self: SafetensorsFile, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", spy)
    source.read(f"{Q0}.weight")
    factors = [f"base_model.model.{Q0}.lora_{side}.weight" for side in "BA"]
    assert read == [f"{Q0}.weight", *factors]


def test_merging_lora_does_not_import_peft(base: Checkpoint, tmp_path: Path, fresh: Fresh) -> None:
    adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    program = """
import json, sys
from pathlib import Path
from qexport.merge.merging import merge
from qexport.merge import MergeSettings
from qexport.architectures.architecture import Architecture
from qexport.architectures.architecture import Checkpoint
from qexport.tensors import Origin
from qexport.tensors.safetensors_file import SafetensorsFile
base, adapter = map(Path, sys.argv[1:])
config = json.loads((base / "config.json").read_text())
origin = Origin("folder", "x")
checkpoint = Checkpoint(Architecture(config), SafetensorsFile(base / "model.safetensors"), {}, origin)
merged = merge(checkpoint, adapter, MergeSettings(), adapter_origin=origin)
for name in merged.adapter.changed:
    merged.checkpoint.weights.read(name)
assert "peft" not in sys.modules
"""
    done = fresh.run(program, str(tmp_path / "base"), str(tmp_path / "adapter"))
    assert done.code == 0, done.err
