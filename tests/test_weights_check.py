"""Every tensor of an artifact against the merged reference: faults that perplexity hardly shows are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import factories
import trained_models
from adapters import save_adapter
from qexport.artifact.figures import Figure
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge
from qexport.pipeline import run
from qexport.quantizing.rounding import NearestSource, is_rounded
from qexport.reading.stored_model import open_stored
from qexport.recipe import load_recipe
from qexport.tensors import Origin
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference
from qexport.verifying.weights import ComparedWeights, WeightCheck

GROUP = 32
HEAD = 16
"""Rows of a head."""

TARGETS = ["q_proj", "v_proj", "down_proj"]

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


class Made:
    """A base, adapters of three strengths, and artifacts made of them. Each is made at its first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = trained_models.trained()
        model.save_pretrained(folder / "base")
        trained_models.tokenizer().save_pretrained(folder / "base")
        for name, alpha in (("adapter", 8), ("half", 4), ("double", 16)):
            config = LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS)
            save_adapter(model, config, folder / name)
        trained_models.write_calibration(folder / "calibration.jsonl")

    @cache
    def artifact(self, method: str, layout: str = "safetensors", adapter: str | None = "adapter") -> Path:
        """The folder, without a manifest."""
        quantize = dict(METHODS[method])
        if quantize["method"] == "gptq":
            source = str(self.folder / "calibration.jsonl")
            calibration = {"source": source, "samples": 32, "sequence_length": trained_models.WINDOW}
            quantize = {"group_size": GROUP, "calibration": calibration} | quantize
        load = {"base": str(self.folder / "base")} | ({"adapter": str(self.folder / adapter)} if adapter else {})
        output = self.folder / "-".join((*method.split(), *layout.split(), str(adapter)))
        recipe = {"load": load, "quantize": quantize, "export": [LAYOUTS[layout]], "output": str(output)}
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        return factories.without_digests(run(load_recipe(path), device="cpu").artifact_path)

    @cache
    def merged(self, dtype: str = "bfloat16") -> Merged:
        base = load_checkpoint(LoadSettings(base=str(self.folder / "base")))
        settings = MergeSettings.model_validate({"dtype": dtype})
        return merge(base, self.folder / "adapter", settings, adapter_origin=Origin("folder", "adapter"))

    def compared(self, folder: Path, dtype: str = "bfloat16") -> ComparedWeights:
        merged = self.merged(dtype)
        assert merged.adapter is not None
        reference = Reference(
            merged=merged.checkpoint,
            base=merged.base,
            adapter=merged.adapter.origin,
            changed=frozenset(merged.adapter.changed),
            nearest=partial(NearestSource, merged.checkpoint.weights),
            is_rounded=is_rounded,
            prepared=Preparation({}),
            held_out=HeldOut(torch.zeros(1, 4, dtype=torch.int64), (None,), "0" * 64, "held-out.jsonl"),
            prompts=None,
            open_tokenizer=trained_models.tokenizer,
            settings=VerifySettings(text="held-out.jsonl"),
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
        )
        with open_stored(folder, dtype=reference.dtype) as stored:
            stored.check_complete(merged.checkpoint.architecture.structure)
            return WeightCheck(stored, reference).finish()


METHODS: Mapping[str, Mapping[str, Any]] = {
    "gptq": {"method": "gptq", "bits": 4},
    "gptq 2 bits": {"method": "gptq", "bits": 2},
    "gptq 3 bits": {"method": "gptq", "bits": 3, "sym": False},
    "gptq act-order": {"method": "gptq", "bits": 4, "sym": False, "desc_act": True, "static_groups": False},
    "gptq 8 bits": {"method": "gptq", "bits": 8, "group_size": -1},
    "nf4": {"method": "nf4"},
    "nf4 double": {"method": "nf4", "double_quant": True},
    "fp4": {"method": "nf4", "quant_type": "fp4", "block_size": 128},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8"},
    "none": {"method": "none"},
}
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "safetensors": {"layout": "safetensors"},
    "tgi": {"layout": "tgi"},
    "vllm": {"layout": "vllm"},
    "vllm compressed-tensors": {"layout": "vllm", "format": "compressed-tensors"},
    "onnx": {"layout": "onnx"},
    "onnx float16": {"layout": "onnx", "activations": "float16"},
}
CASES = [
    *((method, "safetensors") for method in METHODS if method != "w8a8"),
    *((method, "onnx") for method in ("gptq", "gptq 2 bits", "gptq act-order", "nf4", "int8", "w8a8", "none")),
    ("gptq", "tgi"),
    ("gptq", "vllm compressed-tensors"),
    ("gptq", "onnx float16"),
    ("none", "onnx float16"),
    ("w8a8", "vllm"),
]
EXACT = ("nf4", "fp4", "int8", "w8a8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def reason(found: ComparedWeights) -> str:
    """What the failed checks say; empty if all passed."""
    assert {check.gate for check in found.checks} == {"weights"}
    return "; ".join(check.detail for check in found.checks if not check.passed)


def strength(found: ComparedWeights) -> Figure:
    (figure,) = found.figures
    return figure


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_sound_artifacts_raise_no_alarm_and_hold_the_whole_adapter(made: Made, method: str, layout: str) -> None:
    found = made.compared(made.artifact(method, layout))
    assert reason(found) == ""
    assert len(found.checks) == (1 if method == "none" else 2)
    figure = strength(found)
    assert figure.low is not None
    assert figure.high is not None
    assert 0.9 < figure.low <= figure.value <= figure.high < 1.1
    exact = method.startswith(EXACT) and (method, layout) != ("int8", "onnx")
    assert [layer.exact for layer in found.record.layers] == [exact] * len(found.record.layers)


LAYER = "model.layers.1.self_attn"
ZERO_POINTS = -0x77777778
"""Eight codes of 8, the zero point of 4 symmetric bits."""


def scaled(prefix: str, factor: float) -> Change:
    return lambda found: [found[name].mul_(factor) for name in found if name.startswith(prefix) and "scales" in name]


def swapped(one: str, other: str) -> Change:
    def change(found: Tensors) -> None:
        for name in [name for name in found if name.startswith(f"{one}.")]:
            twin = name.replace(one, other)
            found[name], found[twin] = found[twin], found[name]

    return change


def flipped(name: str) -> Change:
    return lambda found: found[name].copy_(found[name].flip(0))


def without_a_head(found: Tensors) -> None:
    found[f"{LAYER}.q_proj.qweight"][:, HEAD : 2 * HEAD] = ZERO_POINTS


def with_swapped_key_heads(found: Tensors) -> None:
    for part in ("qweight", "scales"):
        name = f"{LAYER}.k_proj.{part}"
        found[name] = found[name].roll(HEAD, 1).contiguous()


def with_a_negative_scale(found: Tensors) -> None:
    found[f"{LAYER}.o_proj.scales"][1, 5].neg_()


def with_a_group_lost(found: Tensors) -> None:
    found[f"{LAYER}.o_proj.scales"][0, 7] = 0


FAULTS: Mapping[str, tuple[Change, list[str]]] = {
    "the scales of a layer x 1.5": (
        scaled(f"{LAYER}.o_proj.", 1.5), [f"{LAYER}.o_proj: relative error", "times that of rounding to nearest"],
    ),
    "the scales of a block x 1.1": (
        scaled("model.layers.1.", 1.1), ["model.layers.1.", "values 1.", "times as large", "and 4 more"],
    ),
    "the scales of a layer x 0.9": (scaled(f"{LAYER}.v_proj.", 0.9), [f"{LAYER}.v_proj: ", "times as large"]),
    "a query head zeroed": (without_a_head, [f"{LAYER}.q_proj: all values are zero in rows 16 to 31"]),
    "g_idx reversed": (flipped(f"{LAYER}.o_proj.g_idx"), [f"{LAYER}.o_proj: g_idx gives input 0 the group 1, not 0"]),
    "groups of scales reversed": (flipped("model.layers.2.mlp.up_proj.scales"), ["model.layers.2.mlp.up_proj: "]),
    "a negative scale": (with_a_negative_scale, [f"{LAYER}.o_proj: a negative scale in row 5, group 1"]),
    "a group lost": (with_a_group_lost, [f"{LAYER}.o_proj: all values are zero in 1 groups, the first one row 7, group 0"]),
    "gate and up swapped": (
        swapped("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
        ["model.layers.1.mlp.gate_proj: ", "model.layers.1.mlp.up_proj: "],
    ),
    "q of two layers swapped": (
        swapped("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ["model.layers.0.self_attn.q_proj: ", "model.layers.1.self_attn.q_proj: "],
    ),
    "key heads swapped": (with_swapped_key_heads, [f"{LAYER}.k_proj: "]),
    "the final norm x 1.1": (
        lambda found: found["model.norm.weight"].mul_(1.1),
        ["model.norm.weight: ", "of 64 values differ from row 0 on, 1.1 times as large on the whole"],
    ),
}  # fmt: skip


def copied(artifact: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(artifact, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_place(made: Made, tmp_path: Path, fault: str) -> None:
    change, named = FAULTS[fault]
    found = reason(made.compared(copied(made.artifact("gptq"), tmp_path / "copy", change)))
    assert [text for text in named if text not in found] == [], found
    assert found.count("model.") <= 4, "nothing else is named"
