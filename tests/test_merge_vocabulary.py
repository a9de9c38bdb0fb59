"""Adapters that were trained with other tokens than the base has, or that part tied ends, as PEFT saves them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig
from transformers import PreTrainedModel

import adapters
import factories
from qexport.architectures.architecture import Checkpoint
from qexport.errors import CompatibilityError, InputError
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge

N = factories.VOCABULARY
ADDED = 4
NEW = list(range(N, N + ADDED))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Trained:
    """A base on disk, and the model with another number of tokens that adapters are trained on."""

    checkpoint: Checkpoint
    resized: PreTrainedModel
    folder: Path

    def adapter(self, config: PeftConfig, folder: Path, *, base_known: bool = True) -> Path:
        """An adapter. PEFT saves resized embeddings where it finds the base by its name."""
        model = copy.copy(self.resized)
        model.config._name_or_path = model.name_or_path = str(self.folder) if base_known else ""
        return adapters.save_adapter(model, config, folder)


def trained(folder: Path, *, tied: bool, tokens: int) -> Trained:
    base = factories.build(factories.llama_config(tie_word_embeddings=tied, num_hidden_layers=1), dtype=torch.float32)
    checkpoint = adapters.save_base(base, folder)
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(tokens)
    return Trained(checkpoint, resized, folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Trained]:
    sizes = {"grown": N + ADDED, "cut": N - 8}
    return {
        f"{name}, {kind}": trained(tmp_path_factory.mktemp("base"), tied=name == "tied", tokens=tokens)
        for kind, tokens in sizes.items()
        for name in ("untied", "tied")
    }


def lora(*further: str, **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", *further], r=4, **({"init_lora_weights": False} | options))


SAVED: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES: Mapping[str, tuple[PeftConfig, bool]] = {
    "lora beside resized ends": (lora(), True),
    "both ends saved": (lora(**SAVED), True),
    "both ends saved, without the old ones": (lora(**SAVED), False),
    "both ends saved as one": (lora(**SAVED, ensure_weight_tying=True), True),
    "embedding saved": (lora(modules_to_save=["embed_tokens"]), True),
    "new tokens trained": (lora(trainable_token_indices=NEW), True),
    "new tokens trained at both ends": (
        lora(trainable_token_indices={"embed_tokens": NEW, "lm_head": NEW}),
        False,
    ),
    "some tokens trained at each end": (
        lora(trainable_token_indices={"embed_tokens": [1, *NEW], "lm_head": NEW[1:]}),
        True,
    ),
    "lora on both ends": (lora("embed_tokens", "lm_head"), True),
}
"""Each with whether PEFT knew the base, and so stored the resized ends as they were."""

PEFT_MERGES_TIED_ENDS_TWICE = {"lora on both ends", "some tokens trained at each end"}


def merged(base: Trained, adapter: Path, dtype: str = "float32") -> Merged:
    settings = MergeSettings.model_validate({"dtype": dtype})
    return merge(base.checkpoint, adapter, settings, adapter_origin=adapters.ORIGIN)


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.weights.read(name) for name in checkpoint.weights.specs()}


def loaded(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model as a loader makes it of config.json and the tensors."""
    kind = type(checkpoint.architecture.skeleton)
    found = kind(copy.deepcopy(checkpoint.architecture.parsed))
    tensors = tensors_of(checkpoint)
    assert set(tensors) == set(checkpoint.architecture.structure.parameters)
    missing = found.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ([HEAD] if checkpoint.architecture.structure.tied else [])
    found.eval()
    return found


@pytest.mark.parametrize("ends", ["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_added_tokens_are_merged_as_peft_merges_them(
    bases: Mapping[str, Trained], name: str, ends: str, tmp_path: Path
) -> None:
    base, (config, base_known) = bases[f"{ends}, grown"], CASES[name]
    adapter = base.adapter(config, tmp_path / "adapter", base_known=base_known)
    result = merged(base, adapter)
    found = tensors_of(result.checkpoint)
    assert result.checkpoint.config["vocab_size"] == N + ADDED == len(found[EMBEDDING])
    assert result.checkpoint.architecture.structure.vocab_size == N + ADDED

    oracle = adapters.merge_with_peft(base.resized, adapter)
    if ends == "untied" or name not in PEFT_MERGES_TIED_ENDS_TWICE:
        assert all(torch.equal(tensor, oracle[key]) for key, tensor in found.items()), "bit for bit"
        assert found.get(HEAD, found[EMBEDDING]).equal(oracle[HEAD])
    tokens = torch.tensor([[1, 5, N, N + 1, N + ADDED - 1]])
    with torch.no_grad():
        live = adapters.load_adapter(base.resized, adapter)(tokens).logits
        assert (loaded(result.checkpoint)(tokens).logits - live).abs().max() < 1e-5
        assert (base.resized(tokens).logits - live).abs().max() > 0.01
    adapters.assert_live_as_in_peft(base.resized, result.base, adapter)


@pytest.mark.parametrize("name", ["both ends saved", "lora beside resized ends", "embedding saved"])
def test_a_vocabulary_that_was_cut_is_merged_as_peft_merges_it(
    bases: Mapping[str, Trained], name: str, tmp_path: Path
) -> None:
    base, (config, _) = bases["untied, cut"], CASES[name]
    adapter = base.adapter(config, tmp_path / "adapter")
    found = tensors_of(merged(base, adapter, "bfloat16").checkpoint)
    oracle = adapters.merge_with_peft(base.resized, adapter)
    assert len(found[EMBEDDING]) == len(found[HEAD]) == N - 8
    assert all(torch.equal(tensor, oracle[key].bfloat16()) for key, tensor in found.items())


def test_the_base_beside_it_has_the_same_vocabulary_and_the_rows_from_before_the_training(
    bases: Mapping[str, Trained], tmp_path: Path
) -> None:
    base = bases["untied, grown"]
    result = merged(base, base.adapter(CASES["both ends saved"][0], tmp_path / "adapter"))
    before, resized = tensors_of(result.base), base.resized.state_dict()
    assert all(torch.equal(tensor, resized[key]) for key, tensor in before.items())
    specs = {name: spec.shape for name, spec in result.checkpoint.weights.specs().items()}
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == specs
    assert result.adapter is not None
    assert {EMBEDDING, HEAD} < set(result.adapter.changed)


def test_what_becomes_of_the_ends_is_noted(bases: Mapping[str, Trained], tmp_path: Path) -> None:
    base = bases["tied, grown"]
    result = merged(base, base.adapter(CASES["both ends saved"][0], tmp_path / "adapter"))
    assert result.adapter is not None
    assert f"trained with {N + ADDED} tokens in the embedding, the base has {N}" in result.adapter.notes[-2]
    assert "so the merged model has both" in result.adapter.notes[-1]
    assert result.checkpoint.config["tie_word_embeddings"] is False


def test_lora_that_training_tied_is_one_change_of_the_one_weight(tmp_path: Path) -> None:
    base = factories.build(factories.llama_config(tie_word_embeddings=True, num_hidden_layers=1), dtype=torch.float32)
    checkpoint = adapters.save_base(base, tmp_path / "base")
    config = lora("embed_tokens", "lm_head", ensure_weight_tying=True)
    adapter = adapters.save_adapter(base, config, tmp_path / "adapter")
    result = merge(checkpoint, adapter, MergeSettings(dtype="float32"), adapter_origin=adapters.ORIGIN)
    assert result.checkpoint.architecture.structure.tied
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        live = adapters.load_adapter(base, adapter)(tokens).logits
        found = loaded(result.checkpoint)(tokens).logits
    assert (found - live).abs().max() < 1e-5 * live.abs().max()


@pytest.mark.parametrize("config", [lora("lm_head"), lora("embed_tokens"), lora(modules_to_save=["lm_head"])])
def test_an_adapter_that_parts_tied_ends_is_merged_into_a_model_with_both(config: PeftConfig, tmp_path: Path) -> None:
    tied = factories.build(factories.llama_config(tie_word_embeddings=True, num_hidden_layers=1), dtype=torch.float32)
    checkpoint = adapters.save_base(tied, tmp_path / "base")
    adapter = adapters.save_adapter(tied, config, tmp_path / "adapter")
    result = merge(checkpoint, adapter, MergeSettings(dtype="float32"), adapter_origin=adapters.ORIGIN)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        live, plain = adapters.load_adapter(tied, adapter)(tokens).logits, tied(tokens).logits
        assert (live - plain).abs().max() > 0.1
        assert (loaded(result.checkpoint)(tokens).logits - live).abs().max() < 2e-5
    adapters.assert_live_as_in_peft(tied, result.base, adapter)


def test_a_family_whose_servers_know_one_end_only_is_refused(tmp_path: Path) -> None:
    model = factories.build(factories.FAMILIES["gemma 3"])
    adapter = adapters.save_adapter(model, lora("lm_head"), tmp_path / "adapter")
    with pytest.raises(CompatibilityError, match="servers of gemma3_text use one weight") as caught:
        merge(adapters.headers_of(model), adapter, MergeSettings(), adapter_origin=adapters.ORIGIN)
    assert "ensure_weight_tying" in str(caught.value)


# What cannot be merged


@pytest.mark.parametrize(
    ("config", "base_known", "ends", "found", "save_again"),
    [
        (lora(trainable_token_indices=NEW), False, "untied", HEAD, True),
        (lora(modules_to_save=["embed_tokens"]), False, "untied", HEAD, True),
        (lora(modules_to_save=["embed_tokens"]), False, "tied", HEAD, True),
        (lora("embed_tokens"), True, "untied", HEAD, False),
        (lora("lm_head"), True, "untied", EMBEDDING, False),
        (TrainableTokensConfig(token_indices=NEW), True, "untied", HEAD, False),
        (lora(trainable_token_indices=NEW[1:]), False, "tied", EMBEDDING, True),
    ],
)
def test_added_tokens_without_rows_are_refused_with_a_way_out_that_works(
    bases: Mapping[str, Trained],
    config: PeftConfig,
    base_known: bool,
    ends: str,
    found: str,
    save_again: bool,
    tmp_path: Path,
) -> None:
    base = bases[f"{ends}, grown"]
    adapter = base.adapter(config, tmp_path / "adapter", base_known=base_known)
    with pytest.raises(InputError, match="does not hold all their rows") as caught:
        merged(base, adapter)
    assert f"{found}: tokens {N}" in str(caught.value)
    assert ("save_embedding_layers" in str(caught.value)) is save_again
    resized = adapters.save_base(base.resized, tmp_path / "resized")
    result = merge(resized, adapter, MergeSettings(dtype="float32"), adapter_origin=adapters.ORIGIN)
    if ends == "untied":
        oracle = adapters.merge_with_peft(base.resized, adapter)
        assert all(torch.equal(tensor, oracle[key]) for key, tensor in tensors_of(result.checkpoint).items())


def test_ends_of_different_sizes_are_refused(bases: Mapping[str, Trained], tmp_path: Path) -> None:
    base = bases["untied, grown"]
    adapter = base.adapter(CASES["both ends saved"][0], tmp_path / "adapter")
    tensors = adapters.read_tensors(adapter)
    key = f"base_model.model.{HEAD}"
    adapters.write_tensors(adapter, tensors | {key: tensors[key][:-1]})
    with pytest.raises(InputError, match="embeddings of several sizes") as caught:
        merged(base, adapter)
    assert f"{key}: {N + ADDED - 1} tokens" in str(caught.value)


def test_two_versions_of_one_saved_module_are_refused(bases: Mapping[str, Trained], tmp_path: Path) -> None:
    base = bases["untied, grown"]
    adapter = base.adapter(CASES["both ends saved"][0], tmp_path / "adapter")
    tensors = adapters.read_tensors(adapter)
    key = "base_model.model.lm_head.modules_to_save.weight"
    adapters.write_tensors(adapter, tensors | {key: tensors[key] + 1})
    with pytest.raises(InputError, match=r"two versions of lm_head\.weight"):
        merged(base, adapter)


def test_a_planted_fault_in_one_row_is_seen(bases: Mapping[str, Trained], tmp_path: Path) -> None:
    base = bases["untied, grown"]
    adapter = base.adapter(CASES["new tokens trained"][0], tmp_path / "adapter")
    oracle = adapters.merge_with_peft(base.resized, adapter)
    indices = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    adapters.edit_config(adapter, trainable_token_indices=[*indices[1:], indices[0]])
    found = tensors_of(merged(base, adapter).checkpoint)
    assert [key for key in found if not torch.equal(found[key], oracle[key])] == [EMBEDDING]
