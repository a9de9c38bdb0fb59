"""Every type of adapter that the installed PEFT has: merged as PEFT merges it, or refused for a reason that is true."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BeftConfig,
    BOFTConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    RandLoraConfig,
    RoadConfig,
    TinyLoraConfig,
    VBLoRAConfig,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import PreTrainedModel

import adapters
import factories
import test_merge_oracle
from live_bytes import LiveBytes
from qexport.architectures.architecture import Checkpoint
from qexport.errors import CompatibilityError, InputError
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge
from qexport.merge.types import GONE, LEFT_TO_PEFT, PLANNERS, UNMERGEABLE

TARGETS = ["q_proj", "down_proj"]
OPTIONS: Mapping[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {"boft_block_size": 8, "bias": "boft_only"},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "GRALORA": {"r": 8, "alpha": 8},
    "HIRA": {"r": 4, "rank_pattern": {"down_proj": 2}},
    "PEANUT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4, "randlora_alpha": 40},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"r": 2, "u": 8, "weight_tying": 0.5},
    "VBLORA": {"r": 4, "num_vectors": 16, "vector_length": 16},
    "WAVEFT": {"n_frequency": 50},
}
"""Those that `test_merge_oracle` does not try in every variant."""

MERGED_WITH_PEFT: Mapping[str, dict[str, Any]] = {
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "GLORA": {"r": 4},
    "OSF": {"effective_rank": 8},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "UNILORA": {"r": 4},
}
"""Those that are refused with the advice to merge with PEFT. (AdaMSS needs scikit-learn.)"""

UNMERGED: Mapping[str, dict[str, Any]] = {"LILY": {"r": 4, "stride_A": 1, "num_B": 2}}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = factories.llama_config(attention_bias=True, mlp_bias=True)
    return factories.build(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def base(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return adapters.save_base(model, tmp_path_factory.mktemp("base"))


def config_of(kind: str) -> PeftConfig:
    make: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    found: PeftConfig = make(target_modules=TARGETS, **{**OPTIONS, **MERGED_WITH_PEFT, **UNMERGED}[kind])
    return found


def merged(base: Checkpoint, adapter: Path, dtype: str = "float32") -> Merged:
    return merge(base, adapter, MergeSettings.model_validate({"dtype": dtype}), adapter_origin=adapters.ORIGIN)


def tensors_of(result: Merged) -> dict[str, torch.Tensor]:
    weights = result.checkpoint.weights
    return {name: weights.read(name) for name in weights.specs()}


def refusal(base: Checkpoint, adapter: Path) -> str:
    with pytest.raises(CompatibilityError) as caught:
        merged(base, adapter)
    return str(caught.value)


def test_every_type_of_peft_is_merged_or_refused() -> None:
    here = {str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert here == {*PLANNERS, *UNMERGEABLE, *LEFT_TO_PEFT}
    assert len(here) == len(PLANNERS) + len(UNMERGEABLE) + len(LEFT_TO_PEFT)
    assert not here & set(GONE)
    tried = {PeftType(config.peft_type).value for _, _, config in test_merge_oracle.CASES if config.peft_type}
    assert tried | set(OPTIONS) == set(PLANNERS)
    assert {*MERGED_WITH_PEFT, "ADAMSS"} == set(LEFT_TO_PEFT)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_type_that_is_merged_equals_pefts(
    model: PreTrainedModel, base: Checkpoint, kind: str, tmp_path: Path
) -> None:
    adapter = adapters.save_adapter(model, config_of(kind), tmp_path / "adapter")
    exact = adapters.merge_with_peft(model, adapter)
    result = merged(base, adapter)
    found, plain = tensors_of(result), model.state_dict()
    assert [name for name in found if not torch.equal(found[name], exact[name])] == [], "bit for bit"
    rounded = tensors_of(merged(base, adapter, "bfloat16"))
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in rounded.items())
    assert result.adapter is not None
    assert {name for name in found if not torch.equal(found[name], plain[name])} == set(result.adapter.changed)
    adapters.assert_live_as_in_peft(model, base, adapter)


@pytest.mark.parametrize("kind", MERGED_WITH_PEFT)
def test_a_type_that_is_left_to_peft_is_merged_by_it(
    model: PreTrainedModel, base: Checkpoint, kind: str, tmp_path: Path
) -> None:
    """The way out of the refusal, taken: PEFT's merge, saved, computes what the adapter computes live."""
    adapter = adapters.save_adapter(model, config_of(kind), tmp_path / "adapter")
    text = refusal(base, adapter)
    assert f"qexport does not merge {kind}: {LEFT_TO_PEFT[kind]}" in text
    assert "merge_and_unload" in text
    ids = torch.arange(1, 25).view(1, 24)
    with torch.no_grad():
        live = adapters.load_adapter(model, adapter)(ids).logits
        out: Any = adapters.load_adapter(model, adapter).merge_and_unload()
        out.save_pretrained(tmp_path / "merged")
        found = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert (found - live).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [*UNMERGEABLE, *GONE, "ADAMSS"])
def test_a_type_that_no_weights_express_is_refused(base: Checkpoint, kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    adapters.write_tensors(tmp_path, {})
    text = refusal(base, tmp_path)
    assert {**UNMERGEABLE, **LEFT_TO_PEFT, **GONE}[kind] in text
    assert ("merge_and_unload" in text) is (kind not in UNMERGEABLE)


def test_lily_cannot_be_merged_by_peft_either(model: PreTrainedModel, tmp_path: Path) -> None:
    adapter = adapters.save_adapter(model, config_of("LILY"), tmp_path / "adapter")
    with pytest.raises(NotImplementedError):
        adapters.merge_with_peft(model, adapter)


def test_beft_without_biases_is_refused_as_in_peft(tmp_path: Path) -> None:
    plain = factories.build(factories.llama_config(num_hidden_layers=1), dtype=torch.float32)
    adapter = adapters.save_adapter(plain, BeftConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    text = refusal(adapters.headers_of(plain), adapter)
    assert "q_proj: BEFT adds to the layer's bias, and this base has none there" in text
    assert "merge_and_unload" not in text
    with pytest.raises(ValueError, match="Base layer has no bias"):
        adapters.merge_with_peft(plain, adapter)


def test_road_without_biases_changes_weights_alone(tmp_path: Path) -> None:
    plain = factories.build(factories.llama_config(num_hidden_layers=1), dtype=torch.float32)
    config = RoadConfig(target_modules=["q_proj"], group_size=8)
    adapter = adapters.save_adapter(plain, config, tmp_path / "adapter")
    exact = adapters.merge_with_peft(plain, adapter)
    found = tensors_of(merged(adapters.save_base(plain, tmp_path / "base"), adapter))
    assert all(torch.equal(tensor, exact[name]) for name, tensor in found.items())


def test_boft_of_several_factors_is_refused(model: PreTrainedModel, base: Checkpoint, tmp_path: Path) -> None:
    adapter = adapters.save_adapter(model, BOFTConfig(target_modules=["q_proj"], boft_block_size=8), tmp_path / "a")
    tensors = adapters.read_tensors(adapter)
    adapters.write_tensors(adapter, {k: t.repeat(2, 1, 1, 1) if k.endswith("R") else t for k, t in tensors.items()})
    assert "only with a CUDA kernel" in refusal(base, adapter)


@pytest.mark.parametrize("config", [TinyLoraConfig, VBLoRAConfig, RandLoraConfig], ids=lambda each: each.__name__)
def test_layers_that_share_tensors_are_merged_one_at_a_time(
    model: PreTrainedModel, base: Checkpoint, config: Any, tmp_path: Path
) -> None:
    kind = {"TinyLoraConfig": "TINYLORA", "VBLoRAConfig": "VBLORA", "RandLoraConfig": "RANDLORA"}[config.__name__]
    adapter = adapters.save_adapter(model, config_of(kind), tmp_path / "adapter")
    result = merged(base, adapter)
    assert result.adapter is not None
    source, changed = result.checkpoint.weights, result.adapter.changed
    stored = sum(tensor.numel() * 4 for tensor in adapters.read_tensors(adapter).values())
    largest = max(base.weights.specs()[name].nbytes for name in changed)
    first = {name: source.read(name) for name in changed}
    with LiveBytes() as live:
        for name in reversed(changed):
            assert torch.equal(source.read(name), first[name]), "in any order, and again"
    assert live.peak < 6 * largest + 2 * stored
    assert live.now == 0


def test_projections_that_were_not_saved_are_refused(model: PreTrainedModel, base: Checkpoint, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TinyLoraConfig(target_modules=["q_proj"], save_projection=False)
    assert "random seed" in refusal(base, adapters.save_adapter(model, config, tmp_path / "adapter"))


def test_places_outside_the_weight_are_refused(model: PreTrainedModel, base: Checkpoint, tmp_path: Path) -> None:
    adapter = adapters.save_adapter(model, config_of("SHIRA"), tmp_path / "adapter")
    tensors = adapters.read_tensors(adapter)
    key = "base_model.model.model.layers.0.self_attn.q_proj.shira_indices"
    tensors[key][0, 3] = 64
    adapters.write_tensors(adapter, tensors)
    with pytest.raises(InputError, match="places are outside the layer's weight"):
        merged(base, adapter).checkpoint.weights.read("model.layers.0.self_attn.q_proj.weight")


# Layers that are repeated


def test_repeated_layers_are_merged_as_the_live_adapter_computes(tmp_path: Path) -> None:
    """PEFT's own merge writes the changes of all repetitions of a layer into the one weight that they share."""
    model = factories.build(factories.llama_config(num_hidden_layers=3), dtype=torch.float32)
    base = adapters.save_base(model, tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False, layer_replication=[(0, 2), (1, 3)])
    adapter = adapters.save_adapter(model, config, tmp_path / "adapter")
    result = merged(base, adapter)
    found, ids = tensors_of(result), torch.arange(1, 25).view(1, 24)
    assert result.checkpoint.config["num_hidden_layers"] == 4
    with torch.no_grad():
        live = adapters.load_adapter(model, adapter)(ids).logits
        assert (filled(result.checkpoint, found)(ids).logits - live).abs().max() < 1e-5
    adapters.assert_live_as_in_peft(model, result.base, adapter)

    shared = adapters.merge_with_peft(model, adapter)
    wrong = {name.split(".")[2] for name, tensor in found.items() if not torch.equal(tensor, shared[name])}
    assert wrong == {"1", "2"}
    copies = filled(result.base, {name: result.base.weights.read(name) for name in found})
    adapters.edit_config(adapter, layer_replication=None)
    exact = adapters.merge_with_peft(copies, adapter)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in found.items()), "with layers of their own"
    assert result.adapter is not None
    assert "trained on 4 layers, repeated from the base's 3" in result.adapter.notes[-1]


def filled(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    kind = type(checkpoint.architecture.skeleton)
    found = kind(copy.deepcopy(checkpoint.architecture.parsed))
    found.load_state_dict(tensors)
    found.eval()
    return found


@pytest.mark.parametrize("ranges", [[[0, 4]], [[2, 1]], [[-1, 2]], [["0", 2]], 3, [[0, 3]] * 400], ids=str)
def test_ranges_that_the_base_does_not_have_are_refused(base: Checkpoint, ranges: Any, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layer_replication": ranges}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapters.write_tensors(tmp_path, {})
    with pytest.raises(InputError, match=r"is no range of|more than 1024 layers"):
        merged(base, tmp_path)


# Experts in one parameter

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
        ("qwen3 moe", {"target_modules": [], "target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 2}}),
        ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True}),
    ],
    ids=["both beside a layer", "two ranks", "one alone"],
)
def test_lora_on_all_experts_in_one_parameter_is_merged_expert_by_expert(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = factories.build(factories.FAMILIES[family], dtype=torch.float32)
    base = adapters.save_base(model, tmp_path / "base")
    config = LoraConfig(r=4, init_lora_weights=False, **options)
    adapter = adapters.save_adapter(model, config, tmp_path / "adapter")
    result, exact = merged(base, adapter), adapters.merge_with_peft(model, adapter)
    parts, found = base.architecture.naming.parts, tensors_of(result)
    for name, tensor in found.items():
        wanted = parts[name].of(exact[parts[name].parameter])
        assert torch.allclose(tensor, wanted, rtol=0, atol=1e-6), name
    plain = {name: base.weights.read(name) for name in found}
    assert result.adapter is not None
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    assert changed == set(result.adapter.changed)
    assert any("experts.3" in name for name in changed)
    adapters.assert_live_as_in_peft(model, base, adapter)


# Files that are not quite as PEFT writes them


@pytest.fixture
def lora(model: PreTrainedModel, tmp_path: Path) -> Path:
    config = LoraConfig(
        target_modules=["q_proj"], r=4, use_dora=True, init_lora_weights=False, modules_to_save=["norm"]
    )
    return adapters.save_adapter(model, config, tmp_path / "adapter")


def named(key: str) -> str:
    """The key in the state_dict of a live model."""
    if "norm." in key:
        return key.replace("norm.", "norm.modules_to_save.default.")
    return f"{key}.default" if key.endswith("vector") else key.replace(".weight", ".default.weight")


def test_keys_with_the_adapters_name_are_those_that_peft_writes(
    model: PreTrainedModel, base: Checkpoint, lora: Path
) -> None:
    exact = adapters.merge_with_peft(model, lora)
    tensors = adapters.read_tensors(lora)
    original = {"base_model.model.model.norm.original_module.weight": torch.ones(64)}
    adapters.write_tensors(lora, {named(key): tensor for key, tensor in tensors.items()} | original)
    result = merged(base, lora)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in tensors_of(result).items())
    assert result.adapter is not None
    assert set(result.adapter.tensors.specs()) == {*tensors, *original}


def test_modules_that_were_named_and_never_trained_stay_as_they_are(
    model: PreTrainedModel, base: Checkpoint, tmp_path: Path
) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    adapter = adapters.save_adapter(model, config, tmp_path / "adapter")
    adapters.edit_config(adapter, target_modules=["q_proj", "v_proj", "down_proj", "absent"])
    result, exact = merged(base, adapter), adapters.merge_with_peft(model, adapter)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in tensors_of(result).items())
    described = result.adapter
    assert described is not None
    assert [note for note in described.notes if "target_modules" in note] == [
        "the adapter has no tensors for down_proj, which its target_modules names: it stays as in the base"
    ]
    adapters.assert_live_as_in_peft(model, base, adapter, tensors=described.tensors, config=described.config)
