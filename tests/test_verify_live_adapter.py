"""The merge held against the adapter as PEFT computes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoKrConfig, LoraConfig, PeftConfig
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

import adapters
import factories
import trained_models
from memory_growth import LAYER, growth, wide_model
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.memory import Budget, keeping_to
from qexport.artifact.figures import GateResult, find_figure
from qexport.gates.deciding import MOST_MERGE_ERROR, decide
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.progress import Notice, Steps
from qexport.tensors import Origin
from qexport.text.windows import HeldOut
from qexport.verifying.live_adapter import ComparedMerge, LiveAdapter, NotMeasured, compare_merge
from qexport.verifying.reference import Preparation, merge_figures, noise_floor, prepare

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(1, factories.VOCABULARY, (16, 256), generator=torch.Generator().manual_seed(5))
HELD_OUT = HeldOut(IDS, ("code",) * 16, "0" * 64, "held-out.jsonl")


def lora(*modules: str, **options: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), **options)  # type: ignore[arg-type]


CONFIGS: Mapping[str, PretrainedConfig] = {
    "tied": factories.qwen2_config(),
    "gpt-2": factories.gpt2_config(tie_word_embeddings=False),
    "mixtral": factories.mixtral_config(),
}


@cache
def model_of(family: str) -> PreTrainedModel:
    return trained_models.trained() if family == "llama" else factories.build(CONFIGS[family])


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


def make(folder: Path, family: str, config: PeftConfig, *, dtype: str = "bfloat16", spread: float = 0.1) -> Case:
    model = model_of(family)
    adapter = adapters.save_adapter(model, config, folder / "adapter", spread=spread)
    base = adapters.save_base(model, folder / "base")
    merged = merge(base, adapter, MergeSettings.model_validate({"dtype": dtype}), adapter_origin=adapters.ORIGIN)
    return Case(base, merged.checkpoint, LiveAdapter(base, adapter, merged.unrounded))


def compared(merged: Checkpoint, live: LiveAdapter) -> ComparedMerge:
    return compare_merge(merged, live, IDS, dtype=torch.float32, device=CPU, steps=Steps(lambda _: None))


def floor(checkpoint: Checkpoint) -> float:
    found = noise_floor(checkpoint, IDS, dtype=torch.bfloat16, device=CPU, steps=Steps(lambda _: None))
    return found["mean_kl"]


@pytest.mark.parametrize("name", CASES)
def test_a_right_merge_is_at_the_noise_floor_and_an_unapplied_one_far_above(name: str, tmp_path: Path) -> None:
    case = make(tmp_path, *CASES[name])
    noise = floor(case.merged)
    found = compared(case.merged, case.live)
    assert found.merged.kl.shape == (16, 63)
    assert float(found.merged.kl.mean()) < 3 * noise
    assert float(found.base.kl.mean()) > 30 * noise
    assert float(found.unrounded.kl.mean()) < 1e-10 * float(found.base.kl.mean())
    assert gate(found, noise).verdict == "pass"


def test_an_adapter_of_which_one_layer_was_left_out_is_seen(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj", "v_proj", "down_proj"))
    tensors = adapters.read_tensors(case.live.folder)
    lost = {key: tensor * 0 if "layers.1.mlp.down_proj" in key else tensor for key, tensor in tensors.items()}
    partly = adapters.save_adapter(model_of("llama"), lora("q_proj", "v_proj", "down_proj"), tmp_path / "partly")
    adapters.write_tensors(partly, lost)
    merged = merge(case.base, partly, MergeSettings(), adapter_origin=adapters.ORIGIN).checkpoint
    assert float(compared(merged, case.live).merged.kl.mean()) > 30 * floor(case.merged)


@dataclass(frozen=True)
class Fault:
    """A merge that reads another configuration, or another tensor, than PEFT."""

    config: Mapping[str, Any]
    lost: str = "nothing"


PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 16}}
WEAK = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **PATTERNS)  # type: ignore[arg-type]

FAULTS: Mapping[str, Fault] = {
    "half the scale": Fault({"lora_alpha": 4, "alpha_pattern": {"down_proj": 8}}),
    "another alpha": Fault({"lora_alpha": 10, "alpha_pattern": {"down_proj": 20}}),
    "the square root of rsLoRA": Fault({"use_rslora": True}),
    "the alpha pattern ignored": Fault({"alpha_pattern": {}}),
    "the rank pattern ignored in the scale": Fault({"alpha_pattern": {"down_proj": 16, "v_proj": 4}}),
    "one block left out": Fault({}, lost="layers.1."),
    "one kind of layer left out": Fault({}, lost="q_proj"),
}


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An adapter whose effect is some ten times the noise floor, as 0.01 nats are on real models."""
    return make(tmp_path_factory.mktemp("weak"), "llama", WEAK, spread=0.0028)


def test_a_weak_adapter_rightly_merged_passes(weak: Case) -> None:
    found, noise = compared(weak.merged, weak.live), floor(weak.merged)
    assert 5 * noise < float(found.base.kl.mean()) < 15 * noise
    assert gate(found, noise).verdict == "pass"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_although_all_of_the_adapters_effect_is_close_to_noise(
    weak: Case, name: str, tmp_path: Path
) -> None:
    fault, wrong = FAULTS[name], tmp_path / "wrong"
    shutil.copytree(weak.live.folder, wrong)
    adapters.edit_config(wrong, **fault.config)
    tensors = adapters.read_tensors(wrong)
    adapters.write_tensors(wrong, {key: each * (fault.lost not in key) for key, each in tensors.items()})
    merged = merge(weak.base, wrong, MergeSettings(), adapter_origin=adapters.ORIGIN)
    noise = floor(weak.merged)
    found = compared(merged.checkpoint, replace(weak.live, unrounded=merged.unrounded))
    absolute, relative = merge_figures(found, noise, torch.bfloat16)
    assert decide([], [absolute, relative], [], ["merge"])[0].verdict == "fail"
    assert relative.low is not None
    assert relative.low > MOST_MERGE_ERROR
    if name == "half the scale":
        assert relative.value == pytest.approx(0.25, rel=0.1)
        assert decide([], [absolute], [], ["merge"])[0].verdict != "fail", "the other figure alone would do"


def test_fewer_windows_at_a_time_give_the_same_figures(weak: Case) -> None:
    """Products in float32 may depend on the batch: logits then move by less than `moved`, and a divergence, which grows
    with the square of the logits' distance, by so much times that distance. Other windows differ by far more.
    """
    moved = 3e-5
    found = compared(weak.merged, weak.live)
    with keeping_to(Budget(compared_tokens=128)):
        batched = compared(weak.merged, weak.live)
    for ours, theirs in ((found.merged, batched.merged), (found.base, batched.base)):
        assert ours.kl.shape == theirs.kl.shape
        allowed = moved * (2 * theirs.kl).sqrt() + moved**2
        assert bool(((ours.kl - theirs.kl).abs() <= allowed).all())
        for other in range(1, len(theirs.kl)):
            differs = (ours.kl - theirs.kl.roll(other, 0)).abs() > allowed
            assert bool((differs.float().mean(1) > 0.9).all()), "a window in another's place would go unnoticed"


def gate(found: ComparedMerge, noise: float) -> GateResult:
    (result,) = decide([], merge_figures(found, noise, torch.bfloat16), [], ["merge"])
    return result


def test_an_adapter_without_effect_has_no_relative_error(weak: Case) -> None:
    found = compared(weak.merged, weak.live)
    (only,) = merge_figures(replace(found, base=replace(found.base, kl=found.base.kl * 0)), 1e-4, torch.bfloat16)
    assert only.name == "merge_kl"


def test_the_relative_error_is_a_ratio_of_means(weak: Case) -> None:
    found = compared(weak.merged, weak.live)
    error = find_figure(merge_figures(replace(found, unrounded=found.merged), 1e-4, torch.bfloat16), "merge_error")
    assert error is not None
    assert error.value == pytest.approx(float(found.merged.kl.mean() / found.base.kl.mean()))
    noise = 1e-4 * 2**-16 / float(found.base.kl.mean())
    assert error.noise_floor == pytest.approx(noise)


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


def test_an_adapter_that_the_disk_cannot_read_is_not_one_that_peft_cannot_load(tmp_path: Path) -> None:
    case = make(tmp_path, "llama", lora("q_proj"))
    config = case.live.folder / "adapter_config.json"
    config.unlink()
    config.symlink_to("/proc/self/mem")  # reading where nothing is mapped is an error of input or output
    with pytest.raises(OSError, match="Input/output error"):
        compared(case.merged, case.live)


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
        verdicts += [result.verdict for result in decide([], found.figures, [], ["merge"])]
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
    found = prepared(adapters.save_base(model_of("llama"), tmp_path), None, [])
    assert found.figures == ()
    assert found.unconfirmed == ()
    assert found.noise_floor["mean_kl"] > 0


def wide_pair(layers: int, folder: Path) -> tuple[Checkpoint, Path]:
    """A base that is made when it is read, and an adapter."""
    base = wide_model(layers, lambda shape: torch.full(shape, 0.02))
    names = [linear for linear in base.architecture.structure.block_linears if "mlp" in linear.name]
    LoraConfig(r=32, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(str(folder))
    tensors = {f"base_model.model.{each.name}.lora_A.weight": torch.rand(32, each.in_features) for each in names}
    tensors |= {f"base_model.model.{each.name}.lora_B.weight": torch.rand(each.out_features, 32) for each in names}
    save_file(tensors, folder / "adapter_model.safetensors")
    return base, folder


def compare_merged(base: Checkpoint, adapter: Path) -> None:
    merged = merge(base, adapter, MergeSettings(), adapter_origin=Origin("folder", "adapter"))
    live = LiveAdapter(base, adapter, merged.unrounded)
    ids = torch.randint(factories.VOCABULARY, (4, 8))
    found = compare_merge(merged.checkpoint, live, ids, dtype=torch.float32, device=CPU, steps=Steps(lambda _: None))
    assert float(found.unrounded.kl.max()) < 1e-6


def test_the_peak_of_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """The larger model's peak counts from the smaller one's on; its other weights take twice as much as is allowed."""
    pairs = [wide_pair(layers, tmp_path / str(layers)) for layers in (2, 16)]
    small, large = growth(*[partial(compare_merged, *pair) for pair in pairs])
    assert large - small < 14 * LAYER * torch.bfloat16.itemsize / 2
