"""Names in files and in memory: the translation, and that a fault in it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

import factories
from qexport.architectures import architecture, naming
from qexport.architectures.architecture import Architecture
from qexport.architectures.naming import Naming, name_parameters
from qexport.architectures.structure import build_on_meta
from qexport.errors import CompatibilityError, InputError
from test_block_runner import token_windows
from test_families import block_by_block, load, logits

MIXTURES = ["mixtral", "qwen3 moe"]


def save(family: str, folder: Path) -> Path:
    return factories.save(factories.build(factories.FAMILIES[family], dtype=torch.float32), folder)


def translated(family: str) -> Naming:
    return name_parameters(build_on_meta(factories.FAMILIES[family]))


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_the_parts_fill_every_parameter_exactly_once(family: str) -> None:
    model = build_on_meta(factories.FAMILIES[family])
    copies = set(model.all_tied_weights_keys)
    filled = {
        path: torch.zeros(tensor.shape, dtype=torch.int32)
        for path, tensor in model.state_dict().items()
        if path not in copies
    }
    for part in name_parameters(model).parts.values():
        assert part.of(filled[part.parameter]).shape == part.shape
        part.of(filled[part.parameter]).add_(1)
    assert all(bool((count == 1).all()) for count in filled.values())


def test_a_tied_head_of_another_name_is_known_by_its_name_in_the_files() -> None:
    config = factories.FAMILIES["gpt-neox"]
    tied = type(config)(**{**config.to_dict(), "tie_word_embeddings": True})
    assert name_parameters(build_on_meta(tied)).tied == {"embed_out.weight": "gpt_neox.embed_in.weight"}
    assert Architecture(tied.to_dict()).structure.head == "embed_out"


def swapped_experts(found: Naming) -> dict[str, naming.Part]:
    """The matrices of two experts, in each other's place."""
    swap = {0: 1, 1: 0}
    return {
        name: part if part.expert is None else replace(part, expert=swap.get(part.expert, part.expert))
        for name, part in found.parts.items()
    }


def swapped_kinds(found: Naming) -> dict[str, naming.Part]:
    """The gate and the projection up, in each other's place."""
    return {
        name: replace(part, start=part.shape[0] - part.start) if part.parameter.endswith("gate_up_proj") else part
        for name, part in found.parts.items()
    }


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("fault", [swapped_experts, swapped_kinds])
def test_the_comparison_with_transformers_notices(
    family: str, fault: Callable[[Naming], dict[str, naming.Part]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = save(family, tmp_path / "model"), token_windows(2, 24)
    expected = logits(folder, ids)
    assert torch.equal(block_by_block(folder, ids), expected)
    right = name_parameters
    monkeypatch.setattr(architecture, "name_parameters", lambda model: replace(right(model), parts=fault(right(model))))
    assert not torch.allclose(block_by_block(folder, ids), expected, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt-neox", "mixtral"])
def test_a_renaming_that_is_forgotten_is_noticed_before_any_weight_is_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(family, tmp_path / "model")
    monkeypatch.setattr(
        naming,
        "get_model_conversion_mapping",
        lambda model, **options: [
            entry for entry in get_model_conversion_mapping(model, **options) if not isinstance(entry, WeightRenaming)
        ],
    )
    with pytest.raises(InputError, match="do not fit"):
        load(folder)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_missing_and_a_misshapen_expert_are_named_as_in_the_files(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    missing, misshapen = [name for name in tensors if ".experts.2." in name][:2]
    del tensors[missing]
    tensors[misshapen] = tensors[misshapen][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(folder)
    assert f"{missing}: missing" in str(caught.value)
    assert f"{misshapen}: shape" in str(caught.value)


def test_a_table_that_does_not_lead_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    crooked = [
        WeightRenaming("embed_out", "lm_head"),
        WeightRenaming("gpt_neox.layers", "gpt_neox.blocks"),
    ]
    monkeypatch.setattr(naming, "get_model_conversion_mapping", lambda *_, **__: crooked)
    with pytest.raises(CompatibilityError, match="would not load"):
        translated("gpt-neox")


def test_two_parameters_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming._Translation, "_checked", lambda _, name, part, __: ("one name", part))
    with pytest.raises(CompatibilityError, match="one name in the files"):
        translated("llama")


@pytest.mark.parametrize(
    "config", [factories.mixtral_config(num_local_experts=12), factories.qwen3_moe_config(num_experts=12)], ids=MIXTURES
)
def test_more_than_ten_experts_stay_in_their_order(config: PretrainedConfig, tmp_path: Path) -> None:
    """transformers sorts the names by number, and not by letter."""
    folder, ids = factories.save(factories.build(config, dtype=torch.float32), tmp_path), token_windows(2, 24)
    assert torch.equal(block_by_block(folder, ids), logits(folder, ids))
