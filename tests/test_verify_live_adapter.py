"""The merge held against the adapter as PEFT computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoKrConfig, LoraConfig, PeftConfig
from transformers import PreTrainedModel

import adapters
import factories
import trained_models
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.figures import find_figure
from qexport.gates.deciding import decide
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.progress import Notice, Steps
from qexport.text.windows import HeldOut
from qexport.verifying.live_adapter import ComparedMerge, LiveAdapter, NotMeasured, compare_merge
from qexport.verifying.reference import Preparation, noise_floor, prepare

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(1, factories.VOCABULARY, (16, 256), generator=torch.Generator().manual_seed(5))
HELD_OUT = HeldOut(IDS, ("code",) * 16, "0" * 64, "held-out.jsonl")


def lora(*modules: str, **options: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), **options)  # type: ignore[arg-type]


MODELS: Mapping[str, PreTrainedModel] = {
    "llama": trained_models.trained(),
    "tied": factories.build(factories.qwen2_config()),
    "gpt-2": factories.build(factories.gpt2_config(tie_word_embeddings=False)),
    "mixtral": factories.build(factories.mixtral_config()),
}

CASES: Mapping[str, tuple[str, PeftConfig]] = {
    "some layers": ("llama", lora("q_proj", "v_proj")),
    "all layers": ("llama", lora(*ALL)),
    "the head": ("llama", lora("lm_head", "q_proj")),
    "embeddings": ("llama", lora("embed_tokens", "q_proj")),
    "dora": ("llama", lora("q_proj", "down_proj", use_dora=True)),
    "a saved head and norm": ("llama", lora("q_proj", modules_to_save=["lm_head", "input_layernorm"])),
    "trained tokens": ("llama", lora("q_proj", trainable_token_indices=[30, 70, 300])),
    "biases": ("tied", lora("q_proj", bias="all")),
    "tied embeddings": ("tied", lora("down_proj", trainable_token_indices=[30, 70])),
    "ia3": ("tied", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "tied embeddings at both ends": (
        "tied",
        lora("down_proj", trainable_token_indices={"embed_tokens": [30, 70], "lm_head": [30, 70]}),
    ),
    "norms": ("tied", LNTuningConfig(target_modules=["input_layernorm"])),
    "lokr": ("llama", LoKrConfig(target_modules=["q_proj", "down_proj"], r=4, alpha=8)),
    "transposed layers": ("gpt-2", lora("c_attn", "c_proj", fan_in_fan_out=True)),
    "experts": ("mixtral", lora("q_proj", "v_proj")),
}


@dataclass(frozen=True)
class Case:
    base: Checkpoint
    merged: Checkpoint
    live: LiveAdapter


def make(folder: Path, family: str, config: PeftConfig, *, dtype: str = "bfloat16") -> Case:
    model = MODELS[family]
    adapter = adapters.save_adapter(model, config, folder / "adapter")
    base = adapters.save_base(model, folder / "base")
    merged = merge(base, adapter, MergeSettings.model_validate({"dtype": dtype}), adapter_origin=adapters.ORIGIN)
    return Case(base, merged.checkpoint, LiveAdapter(base, adapter, merged.unrounded))


def compared(merged: Checkpoint, live: LiveAdapter, dtype: torch.dtype = torch.bfloat16) -> ComparedMerge:
    return compare_merge(merged, live, IDS, dtype=dtype, device=CPU, steps=Steps(lambda _: None))


def floor(checkpoint: Checkpoint) -> float:
    found = noise_floor(checkpoint, IDS, dtype=torch.bfloat16, device=CPU, steps=Steps(lambda _: None))
    return found["mean_kl"]


@pytest.mark.parametrize("name", CASES)
def test_a_right_merge_is_at_the_noise_floor_and_an_unapplied_one_far_above(name: str, tmp_path: Path) -> None:
    case = make(tmp_path, *CASES[name])
    noise = floor(case.merged)
    right, wrong = compared(case.merged, case.live), compared(case.base, case.live)
    assert right.kl.shape == (16, 63)
    assert float(right.kl.mean()) < 3 * noise
    assert float(wrong.kl.mean()) > 30 * noise
    exact = compared(make(tmp_path / "wide", *CASES[name], dtype="float32").merged, case.live, torch.float32)
    assert float(exact.kl.mean()) < 1e-8


def test_an_adapter_of_which_one_layer_was_left_out_is_seen(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj", "v_proj", "down_proj"))
    tensors = adapters.read_tensors(case.live.folder)
    lost = {key: tensor * 0 if "layers.1.mlp.down_proj" in key else tensor for key, tensor in tensors.items()}
    partly = adapters.save_adapter(MODELS["llama"], lora("q_proj", "v_proj", "down_proj"), tmp_path / "partly")
    adapters.write_tensors(partly, lost)
    merged = merge(case.base, partly, MergeSettings(), adapter_origin=adapters.ORIGIN).checkpoint
    assert float(compared(merged, case.live).kl.mean()) > 30 * floor(case.merged)


def refusal(case: Case) -> str:
    with pytest.raises(NotMeasured) as caught:
        compared(case.merged, case.live)
    return str(caught.value)


def test_what_peft_cannot_load_is_not_measured(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj"))
    adapters.edit_config(case.live.folder, peft_type="LORA", target_modules=["no_such_layer"])
    assert "PEFT cannot load the adapter" in refusal(case)


def test_a_tensor_that_peft_does_not_find_is_not_taken_for_applied(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj"))
    tensors = adapters.read_tensors(case.live.folder)
    adapters.write_tensors(case.live.folder, {key: tensors[key] for key in tensors if "layers.1" not in key})
    assert refusal(case) == "PEFT does not find all tensors of the adapter"


def test_another_shape_is_not_measured(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj"))
    tensors = adapters.read_tensors(case.live.folder)
    adapters.write_tensors(case.live.folder, {key: tensor[:, :32] for key, tensor in tensors.items()})
    assert "PEFT cannot load the adapter" in refusal(case)


def test_models_that_do_not_fit_in_memory_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(tmp_path, "llama", lora("q_proj"))
    monkeypatch.setattr("qexport.verifying.live_adapter.available_memory", lambda device: 1000.0)
    assert refusal(case) == "the whole model does not fit in memory"


def prepared(merged: Checkpoint, live: LiveAdapter | None, told: list[object]) -> Preparation:
    return prepare(merged, live, HELD_OUT, dtype=torch.bfloat16, device=CPU, progress=told.append)


def test_the_gate_passes_a_right_merge_and_fails_a_wrong_one(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora(*ALL))
    verdicts = []
    for checkpoint in (case.merged, case.base):
        found = prepared(checkpoint, case.live, [])
        merge_kl = find_figure(found.figures, "merge_kl")
        assert merge_kl is not None
        assert (merge_kl.n, merge_kl.unit, merge_kl.noise_floor) == (16, "window", found.noise_floor["mean_kl"])
        assert (merge_kl.sequence_low, merge_kl.sequence_high) == (merge_kl.low, merge_kl.high)
        verdicts += [gate.verdict for gate in decide([], found.figures, [], ["merge"])]
    assert verdicts == ["pass", "fail"]


def test_a_merge_that_was_not_measured_is_named_and_has_no_figure(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj"))
    adapters.edit_config(case.live.folder, target_modules=["no_such_layer"])
    told: list[object] = []
    found = prepared(case.merged, case.live, told)
    assert not found.figures
    assert len(found.unconfirmed) == 1
    assert found.unconfirmed[0] == "the merge against PEFT (PEFT cannot load the adapter)"  # none of PEFT's own words
    assert next(event.text for event in told if isinstance(event, Notice)).startswith("the merge was not compared with")


def test_without_an_adapter_only_the_floor_is_measured(tmp_path: Path) -> None:
    found = prepared(adapters.save_base(MODELS["llama"], tmp_path), None, [])
    assert found.figures == ()
    assert found.unconfirmed == ()
    assert found.noise_floor["mean_kl"] > 0
