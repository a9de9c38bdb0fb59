"""Merged weights held against PEFT's own merge, for every supported type."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from transformers import GPT2Config, PreTrainedModel

import adapters
import factories
from qexport.architectures.architecture import Checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge


@dataclass(frozen=True)
class Base:
    """A base in bfloat16 and as float32 copy of it, on disk and in memory."""

    model: PreTrainedModel
    wide: PreTrainedModel
    checkpoint: Checkpoint
    wide_checkpoint: Checkpoint


def lora(*modules: str, **options: Any) -> LoraConfig:
    """Target names, or one pattern that starts with a dot."""
    target: Any = modules[0] if modules[0].startswith(".") else list(modules)
    return LoraConfig(target_modules=target, **(dict(r=4, lora_alpha=7, init_lora_weights=False) | options))


LLAMA: Mapping[str, PeftConfig] = {
    "lora": lora("q_proj", "down_proj"),
    "lora by a pattern": lora(r".*layers\.1\..*(q|v)_proj"),
    "lora on one layer": lora("q_proj", layers_to_transform=[1], layers_pattern="layers"),
    "lora without a layer": lora("q_proj", "v_proj", exclude_modules=["layers.0.self_attn.v_proj"]),
    "rslora": lora("q_proj", use_rslora=True),
    "rank and alpha patterns": lora(
        "q_proj", "v_proj", rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"^model.layers.1.*v_proj": 3}
    ),
    "patterns of which two match": lora(  # PEFT saves the keys sorted, and takes the first that matches
        "q_proj",
        "v_proj",
        rank_pattern={"layers.1.self_attn.v_proj": 5, "v_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 11, "q_proj": 3},
    ),
    "rslora with patterns": lora("q_proj", "v_proj", use_rslora=True, rank_pattern={"v_proj": 9}),
    "dora": lora("q_proj", "down_proj", use_dora=True),
    "all biases": lora("q_proj", bias="all"),
    "biases of the targets": lora("q_proj", "o_proj", bias="lora_only"),
    "lora bias": lora("q_proj", "up_proj", lora_bias=True),
    "lora bias on trained biases": lora("q_proj", lora_bias=True, bias="all"),
    "modules to save": lora("q_proj", modules_to_save=["lm_head", "input_layernorm"]),
    "a block to save": lora("q_proj", modules_to_save=["layers.1"]),
    "lora on the head": lora("lm_head", "q_proj"),
    "lora on embeddings": lora("embed_tokens", "q_proj"),
    "dora on embeddings": lora("embed_tokens", use_dora=True),
    "lora with trained tokens": lora("q_proj", trainable_token_indices=[3, 7, 300]),
    "lora with trained tokens at both ends": lora(
        "q_proj", trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}
    ),
    "mica": lora("q_proj", init_lora_weights="mica"),
    "trainable tokens": TrainableTokensConfig(token_indices=[9, 1]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 with a saved head": IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
    "adalora": AdaLoraConfig(target_modules=["q_proj", "down_proj"], init_r=6, total_step=10, lora_alpha=5),
    "adalora with an alpha of 0": AdaLoraConfig(target_modules=["q_proj"], init_r=6, total_step=10, lora_alpha=0),
    "loha": LoHaConfig(target_modules=["q_proj", "down_proj"], r=4, alpha=3, alpha_pattern={"down_proj": 5}),
    "lokr": LoKrConfig(target_modules=["q_proj", "down_proj"], r=2, alpha=3, decompose_both=True, decompose_factor=4),
    "oft": OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=8),
    "oft with a bias": OFTConfig(target_modules=["q_proj"], oft_block_size=8, bias="all"),
    "fourierft": FourierFTConfig(target_modules=["q_proj", "down_proj"], n_frequency=50),
    "ln tuning": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "vera": VeraConfig(target_modules=["q_proj", "down_proj", "v_proj"], r=8),
    "hra": HRAConfig(target_modules=["q_proj", "down_proj"], r=4),
    "miss": MissConfig(target_modules=["q_proj", "down_proj"], r=8),
    "c3a": C3AConfig(target_modules=["q_proj", "down_proj"], block_size=16),
}

FALCON: Mapping[str, PeftConfig] = {
    "lora": lora("query_key_value", "dense"),
    "lora on all linears": lora("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "dora": lora("query_key_value", "dense_4h_to_h", use_dora=True),
    "trained tokens on tied embeddings": lora("dense", trainable_token_indices=[1, 2, 5]),
    "trained tokens at both tied ends": lora(
        "dense", trainable_token_indices={"word_embeddings": [1, 2], "lm_head": [1, 2]}
    ),
    "trainable tokens on tied embeddings": TrainableTokensConfig(token_indices=[1, 9]),
    "ia3": IA3Config(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"]),
    "adalora": AdaLoraConfig(target_modules=["query_key_value"], init_r=6, total_step=10),
    "ln tuning": LNTuningConfig(target_modules=["input_layernorm", "ln_f"]),
    "vera": VeraConfig(target_modules=["query_key_value", "dense"], r=8),
    "oft": OFTConfig(target_modules=["query_key_value"], oft_block_size=8),
    "loha": LoHaConfig(target_modules=["query_key_value"], r=4, alpha=3),
    "lokr": LoKrConfig(target_modules=["query_key_value"], r=4, alpha=3),
    "fourierft": FourierFTConfig(target_modules=["query_key_value"], n_frequency=50),
    "hra": HRAConfig(target_modules=["query_key_value"], r=4),
    "miss": MissConfig(target_modules=["query_key_value"], r=8),
    "c3a": C3AConfig(target_modules=["query_key_value"], block_size=16),
}

# GPT-2 stores its linear layers as [in, out].
GPT2: Mapping[str, PeftConfig] = {
    "lora": lora("c_attn", "c_proj", fan_in_fan_out=True),
    "lora that says nothing of the layout": lora("c_attn"),
    "dora": lora("c_attn", "c_proj", use_dora=True),
    "dora on both embeddings": lora("wte", "wpe", use_dora=True),
    "biases of the targets": lora("c_attn", bias="lora_only"),
    "lora bias": lora("c_attn", lora_bias=True),
    "ia3": IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    "adalora": AdaLoraConfig(target_modules=["c_attn"], init_r=6, total_step=10),
    "vera": VeraConfig(target_modules=["c_attn", "mlp.c_fc"], r=8),
}

CASES = [
    (family, name, config)
    for family, cases in (("llama", LLAMA), ("falcon", FALCON), ("gpt2", GPT2))
    for name, config in cases.items()
]
IDS = [f"{family}: {name}" for family, name, _ in CASES]

ROUNDED_TWICE = {"lora on embeddings", "mica", "c3a"}
"""Where PEFT rounds the delta to the base's dtype before it adds it."""


def models() -> Mapping[str, Callable[[], PreTrainedModel]]:
    gpt2 = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=factories.VOCABULARY, n_positions=128, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return {
        "llama": lambda: factories.build(factories.llama_config(attention_bias=True, mlp_bias=True)),
        "falcon": lambda: factories.build(factories.falcon_config()),
        "gpt2": lambda: factories.build(gpt2),
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Base]:
    found = {}
    for family, build in models().items():
        folder = tmp_path_factory.mktemp(family)
        model = build()
        narrow = adapters.save_base(model, folder / "narrow")
        wide_checkpoint = adapters.save_base(copy.deepcopy(model).float(), folder / "wide")
        wide = type(model).from_pretrained(folder / "wide", dtype=torch.float32)  # with buffers that were never rounded
        found[family] = Base(model, wide, narrow, wide_checkpoint)
    return found


def merged(checkpoint: Checkpoint, folder: Path, dtype: str) -> Merged:
    return merge(checkpoint, folder, MergeSettings.model_validate({"dtype": dtype}), adapter_origin=adapters.ORIGIN)


def tensors_of(result: Merged) -> dict[str, torch.Tensor]:
    weights = result.checkpoint.weights
    return {name: weights.read(name) for name in weights.specs()}


def differing(found: Mapping[str, torch.Tensor], oracle: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in found.items() if not torch.equal(tensor, oracle[name].to(tensor.dtype))]


@pytest.mark.parametrize(("family", "name", "config"), CASES, ids=IDS)
def test_a_merge_equals_pefts(
    bases: Mapping[str, Base], family: str, name: str, config: PeftConfig, tmp_path: Path
) -> None:
    base = bases[family]
    adapter = adapters.save_adapter(base.model, config, tmp_path / "adapter")

    exact = adapters.merge_with_peft(base.wide, adapter)
    wide = tensors_of(merged(base.wide_checkpoint, adapter, "float32"))
    assert all(torch.allclose(wide[key], exact[key], rtol=0, atol=1e-6) for key in wide)

    result = merged(base.checkpoint, adapter, "bfloat16")
    narrow = tensors_of(result)
    assert differing(narrow, exact) == [], "rounded once"
    assert set(differing(narrow, base.model.state_dict())) == set(result.adapter.changed if result.adapter else ())

    peft = adapters.merge_with_peft(base.model, adapter)
    if name in ROUNDED_TWICE:
        worst = max((narrow[key].float() - peft[key].float()).abs().max() / exact[key].abs().max() for key in narrow)
        assert differing(narrow, peft)
        assert worst < 2**-7
    else:
        assert differing(narrow, peft) == [], "bit for bit"


@pytest.mark.parametrize(("family", "name", "config"), CASES, ids=IDS)
def test_an_adapter_live_block_by_block_computes_what_pefts_whole_model_computes(
    bases: Mapping[str, Base], family: str, name: str, config: PeftConfig, tmp_path: Path
) -> None:
    base = bases[family]
    adapter = adapters.save_adapter(base.wide, config, tmp_path / "adapter")
    adapters.assert_live_as_in_peft(base.wide, base.wide_checkpoint, adapter, changes="trainable tokens" not in name)


@pytest.mark.parametrize("name", ["lora", "dora", "lora on embeddings", "modules to save", "ia3", "trainable tokens"])
def test_the_merged_model_computes_what_the_live_adapter_computes(
    bases: Mapping[str, Base], name: str, tmp_path: Path
) -> None:
    base = bases["llama"]
    adapter = adapters.save_adapter(base.wide, LLAMA[name], tmp_path / "adapter")
    model = copy.deepcopy(base.wide)
    model.load_state_dict(tensors_of(merged(base.wide_checkpoint, adapter, "float32")))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        live = adapters.load_adapter(base.wide, adapter)(tokens).logits
        plain = base.wide(tokens).logits
        found = model(tokens).logits
    assert (live - plain).abs().max() > 0.01
    assert (found - live).abs().max() < 1e-5


def test_adalora_with_pruned_ranks_equals_pefts(bases: Mapping[str, Base], tmp_path: Path) -> None:
    base = bases["llama"]
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=6, total_step=10)
    adapter = adapters.save_adapter(base.model, config, tmp_path / "adapter")
    kept = {
        "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False, False, True],
        "model.layers.1.self_attn.q_proj.lora_E": [False] * 6,
    }
    tensors = adapters.read_tensors(adapter)
    for key, tensor in tensors.items():
        mask = torch.tensor(kept[key.removeprefix("base_model.model.").rpartition(".")[0] + ".lora_E"])
        tensors[key] = tensor[:, mask] if key.endswith("lora_B") else tensor[mask]
    adapters.write_tensors(adapter, tensors)
    adapters.edit_config(adapter, rank_pattern=kept)
    found = tensors_of(merged(base.checkpoint, adapter, "bfloat16"))
    # Over a bfloat16 base PEFT would round the factors that it has cut.
    assert differing(found, adapters.merge_with_peft(base.wide, adapter)) == []
    assert differing(found, base.model.state_dict()) == ["model.layers.0.self_attn.q_proj.weight"]
    adapters.assert_live_as_in_peft(base.wide, base.wide_checkpoint, adapter)


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (LoraConfig(target_modules=["q_proj"], init_lora_weights=False), {"r", "lora_alpha", "use_rslora", "bias"}),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), {"init_r", "lora_alpha", "bias"}),
        (VeraConfig(target_modules=["q_proj"]), {"r", "save_projection", "bias"}),
    ],
    ids=["lora", "adalora", "vera"],
)
def test_what_a_config_leaves_out_is_what_peft_takes_it_for(
    bases: Mapping[str, Base], config: PeftConfig, left_out: set[str], tmp_path: Path
) -> None:
    base = bases["llama"]
    adapter = adapters.save_adapter(base.model, config, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in left_out}))
    assert left_out <= content.keys()
    found = tensors_of(merged(base.checkpoint, adapter, "bfloat16"))
    assert differing(found, adapters.merge_with_peft(base.model, adapter)) == []


def test_embeddings_saved_beside_the_adapter_take_the_bases_place(bases: Mapping[str, Base], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = adapters.save_adapter(base.model, LLAMA["lora on embeddings"], tmp_path / "adapter")
    tensors = adapters.read_tensors(adapter)
    stored = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[stored] = tensors[stored] + 1
    adapters.write_tensors(adapter, tensors)
    found = tensors_of(merged(base.checkpoint, adapter, "bfloat16"))
    assert differing(found, adapters.merge_with_peft(base.wide, adapter)) == []


def test_a_16_bit_adapter_is_merged_in_32_bits(bases: Mapping[str, Base], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = adapters.save_adapter(base.model, LLAMA["dora"], tmp_path / "adapter")
    adapters.write_tensors(adapter, {key: t.half() for key, t in adapters.read_tensors(adapter).items()})
    found = tensors_of(merged(base.checkpoint, adapter, "bfloat16"))
    assert differing(found, adapters.merge_with_peft(base.model, adapter)) == []


def _double_alpha(adapter: Path) -> None:
    adapters.edit_config(adapter, lora_alpha=14)


def _forget_the_root(adapter: Path) -> None:
    adapters.edit_config(adapter, use_rslora=False)


def _transpose_the_factors(adapter: Path) -> None:
    tensors = adapters.read_tensors(adapter)
    swapped = {key: key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("?", "B") for key in tensors}
    adapters.write_tensors(adapter, {swapped[key]: tensor.t() for key, tensor in tensors.items()})


@pytest.mark.parametrize("fault", [_double_alpha, _forget_the_root, _transpose_the_factors])
def test_the_comparison_with_peft_catches(
    bases: Mapping[str, Base], fault: Callable[[Path], None], tmp_path: Path
) -> None:
    base = bases["llama"]
    adapter = adapters.save_adapter(base.model, LLAMA["rslora"], tmp_path / "adapter")
    oracle = adapters.merge_with_peft(base.model, adapter)
    fault(adapter)
    result = merged(base.checkpoint, adapter, "bfloat16")
    assert result.adapter is not None
    assert differing(tensors_of(result), oracle) == list(result.adapter.changed)
