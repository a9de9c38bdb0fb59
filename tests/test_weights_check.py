"""Every tensor of an artifact against the merged reference: faults that perplexity hardly shows are named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import factories
import trained_models
from adapters import save_adapter
from onnx_exports import traced_once
from qexport.architectures.architecture import Architecture
from qexport.architectures.folds import folded_inputs, folded_outputs, folds
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import Figure
from qexport.gates.deciding import decide
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import Merged, merge
from qexport.pipeline import run
from qexport.quantizing.rounding import NearestSource, rounding_of
from qexport.reading.onnx.external_data import ExternalData
from qexport.reading.onnx.graph import Graph
from qexport.reading.stored_model import StoredModel, open_stored
from qexport.recipe import load_recipe
from qexport.tensors import GroupQuantized, Origin, TensorSpec, WeightSource
from qexport.text.windows import HeldOut
from qexport.verifying import VerifySettings
from qexport.verifying.adapter_strength import strength_by_weights
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.matrices import MatrixErrors, compare_matrix, projections
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

    def __init__(self, folder: Path, *, uneven: bool = False) -> None:
        self.folder = folder
        model = trained_models.trained()
        if uneven:
            model = _uneven(model)
        model.save_pretrained(folder / "base")
        trained_models.tokenizer().save_pretrained(folder / "base")
        for name, alpha in (("adapter", 8), ("half", 4), ("double", 16)):
            config = LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS)
            save_adapter(model, config, folder / name)
        trained_models.write_calibration(folder / "calibration.jsonl")

    def artifact(self, method: str, layout: str = "safetensors", adapter: str | None = "adapter") -> Path:
        """The folder, without a manifest."""
        output = self.folder / "-".join((*method.split(), *layout.split(), str(adapter)))
        if output.exists():
            return output
        quantize = dict(METHODS[method])
        if quantize["method"] in ("gptq", "awq"):
            source = str(self.folder / "calibration.jsonl")
            calibration = {"source": source, "samples": 32, "sequence_length": trained_models.WINDOW}
            quantize = {"group_size": GROUP, "calibration": calibration} | quantize
        load = {"base": str(self.folder / "base")} | ({"adapter": str(self.folder / adapter)} if adapter else {})
        recipe = {"load": load, "quantize": quantize, "export": [LAYOUTS[layout]], "output": str(output)}
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        with traced_once():
            return factories.without_digests(run(load_recipe(path), device="cpu").artifact_path)

    def merged(self, dtype: str) -> Merged:
        base = load_checkpoint(LoadSettings(base=str(self.folder / "base")))
        settings = MergeSettings.model_validate({"dtype": dtype})
        return merge(base, self.folder / "adapter", settings, adapter_origin=Origin("folder", "adapter"))

    def reference(self, dtype: str) -> Reference:
        merged = self.merged(dtype)
        assert merged.adapter is not None
        return Reference(
            merged=merged.checkpoint,
            base=merged.base,
            adapter=merged.adapter.origin,
            changed=frozenset(merged.adapter.changed),
            nearest=partial(NearestSource, merged.checkpoint.weights),
            rounding_of=rounding_of,
            unrounded=merged.unrounded,
            prepared=Preparation({}),
            held_out=HeldOut(torch.zeros(1, 4, dtype=torch.int64), (None,), "0" * 64, "held-out.jsonl"),
            prompts=None,
            open_tokenizer=trained_models.tokenizer,
            settings=VerifySettings(text="held-out.jsonl"),
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
        )

    def compared(self, folder: Path, dtype: str = "bfloat16") -> ComparedWeights:
        reference = self.reference(dtype)
        with open_stored(folder, dtype=reference.dtype) as stored:
            stored.check_complete(reference.merged.architecture.structure)
            check = WeightCheck(stored, reference)
            if stored.kind != "graph":
                run_both(check, stored, reference, lambda _: None)
            return check.finish()


def _uneven(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with a few channels that are 16 times as large, for AWQ to find."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for fold in folds(Architecture(model.config.to_dict()).structure):
        exponents = torch.zeros(len(state[fold.parameters[0]]), dtype=torch.int64)
        exponents[5::9] = -4
        state[fold.parameters[0]].copy_(folded_outputs(state[fold.parameters[0]], exponents))
        for name in fold.consumers:
            state[f"{name}.weight"].copy_(folded_inputs(state[f"{name}.weight"], exponents))
    return model


def run_both(check: WeightCheck, stored: StoredModel, reference: Reference, finished: Callable[[int], None]) -> None:
    """Both models, block by block."""
    own = reference.runner(replace(reference.merged, weights=check.reference_weights))
    inputs = check.watch(own)
    artifact = BlockRunner(stored.architecture, check.artifact_weights, dtype=reference.dtype, device=own.device)
    run_in_lockstep([own, artifact], trained_models.held_out_ids(8), finished, inputs=inputs)


METHODS: Mapping[str, Mapping[str, Any]] = {
    "gptq": {"method": "gptq", "bits": 4},
    "gptq 2 bits": {"method": "gptq", "bits": 2},
    "gptq 3 bits": {"method": "gptq", "bits": 3, "sym": False},
    "gptq act-order": {"method": "gptq", "bits": 4, "sym": False, "desc_act": True, "static_groups": False},
    "gptq 8 bits": {"method": "gptq", "bits": 8, "group_size": -1},
    "awq": {"method": "awq"},
    "nf4": {"method": "nf4"},
    "nf4 double": {"method": "nf4", "double_quant": True},
    "fp4": {"method": "nf4", "quant_type": "fp4", "block_size": 128},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8"},
    "fp8": {"method": "fp8"},
    "fp8 blocks": {"method": "fp8", "strategy": "block"},
    "nvfp4": {"method": "nvfp4"},
    "mxfp4": {"method": "mxfp4"},
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
    ("awq", "vllm"),
    ("awq", "onnx"),
    ("gptq", "vllm compressed-tensors"),
    ("gptq", "onnx float16"),
    ("none", "onnx float16"),
    ("w8a8", "vllm"),
]
EXACT = ("nf4", "fp4", "int8", "w8a8", "fp8", "fp8 blocks", "nvfp4", "mxfp4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def reason(found: ComparedWeights) -> str:
    """What the failed checks say; empty if all passed."""
    assert {check.gate for check in found.checks} == {"weights"}
    return "; ".join(check.detail for check in found.checks if not check.passed)


def strength(found: ComparedWeights) -> Figure:
    figure = next(each for each in found.figures if each.name == "adapter_strength_weights")
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
    "a group lost": (with_a_group_lost, [f"{LAYER}.o_proj: the scale is zero in row 7, group 0"]),
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


NORM = "model.layers.1.post_attention_layernorm"


def divided(found: Tensors, base: Tensors) -> int:
    """A channel of the norm that AWQ has divided."""
    return int((found[f"{NORM}.weight"] != base[f"{NORM}.weight"]).nonzero()[0])


def not_divided(found: Tensors, base: Tensors) -> None:
    channel = divided(found, base)
    found[f"{NORM}.weight"][channel] = base[f"{NORM}.weight"][channel]


def divided_once_more(found: Tensors, base: Tensors) -> None:
    stored, channel = found[f"{NORM}.weight"], divided(found, base)
    stored[channel] *= 2 if stored[channel].abs() > base[f"{NORM}.weight"][channel].abs() else 0.5


def rounded_otherwise(found: Tensors, base: Tensors) -> None:
    found[f"{NORM}.weight"][divided(found, base)] *= 1 + 2**-7


def with_another_row(found: Tensors, _: Tensors) -> None:
    found["model.layers.1.mlp.up_proj.scales"][:, 3] *= 32


FOLDED: Mapping[str, tuple[Callable[[Tensors, Tensors], None], list[str]]] = {
    "a channel not divided": (not_divided, ["gate_proj: ", "up_proj: ", f"{NORM} is not divided by what 1 columns"]),
    "divided once more": (divided_once_more, [f"{NORM}.weight: 1 of 64 values differ", "1 columns are multiplied by"]),
    "another mantissa": (rounded_otherwise, [f"{NORM}.weight: 1 of 64 values differ"]),
    "a row 32 times as large": (with_another_row, ["model.layers.1.mlp.up_proj: relative error"]),
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("uneven"), uneven=True)


@pytest.mark.parametrize("layout", ["safetensors", "onnx"])
def test_norms_that_are_divided_count_as_equal_and_are_told(uneven: Made, layout: str) -> None:
    found = uneven.compared(uneven.artifact("awq", layout))
    assert reason(found) == ""
    (check,) = [each for each in found.checks if each.name == "unquantized tensors"]
    told = re.fullmatch(r"\d+ tensors equal to the reference's, (\d) of them divided by powers of two .*", check.detail)
    assert told is not None, check.detail
    assert int(told[1]) >= 4
    assert 0.9 < strength(found).value < 1.1


@pytest.mark.parametrize("fault", FOLDED)
def test_a_fault_in_a_fold_is_named(uneven: Made, tmp_path: Path, fault: str) -> None:
    """Each of them changes one value, or the scales of one row."""
    change, named = FOLDED[fault]
    base = load_file(uneven.folder / "base" / "model.safetensors")
    folder = copied(uneven.artifact("awq"), tmp_path / "copy", lambda found: change(found, base))
    found = reason(uneven.compared(folder))
    assert [text for text in named if text not in found] == [], found


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


@pytest.mark.parametrize("g_idx", [[0] * 8 + [1] * 8, [0, 1] * 8], ids=["in order", "by activation"])
def test_a_zero_scale_is_a_fault_only_where_its_own_group_has_values(g_idx: list[int]) -> None:
    group = torch.tensor(g_idx)
    reference = torch.linspace(-1.0, 1.0, 64).reshape(4, 16)
    reference[2, group == 0] = 0.0
    scales = torch.full((2, 4), 1 / 7)
    scales[0, 2] = 0.0
    codes = GroupQuantized(
        (reference * 7).round().add(8).to(torch.uint8), scales, torch.full((2, 4), 8, dtype=torch.uint8), group.int(),
        bits=4, group_size=8, sym=True, desc_act=g_idx[1] == 1,
    )  # fmt: skip
    assert [fault.text for fault in compare_matrix(codes, reference).faults] == []
    scales[1, 2] = 0.0
    reasons = [fault.text for fault in compare_matrix(codes, reference).faults]
    assert "the scale is zero in row 2, group 1" in reasons


def test_errors_that_add_up_on_a_layers_inputs_are_a_fault() -> None:
    """Codes that are too high by half a step for every other input and too low for the rest, as after calibration for
    other inputs; the signs of the layer's inputs change likewise. The weights alone are within their limits.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    reference, inputs = torch.randn(64, 64, generator=generator), signs * torch.rand(16, 64, generator=generator)
    scales, zeros, group = torch.full((1, 64), 0.5), torch.full((1, 64), 8, dtype=torch.uint8), torch.zeros(64).int()

    def found(shift: float) -> MatrixErrors:
        codes = (reference / 0.5 + shift * signs).round().add(8).clamp(0, 15).to(torch.uint8)
        stored = GroupQuantized(codes, scales, zeros, group, bits=4, group_size=64, sym=True, desc_act=False)
        return compare_matrix(stored, reference, inputs=inputs)

    assert found(0.0).faults == []
    assert found(0.0).output_error == found(0.0).nearest_output_error
    (fault,) = found(0.45).faults
    assert fault.text.startswith("relative error of its outputs ")


def test_outputs_are_those_on_the_references_own_inputs(made: Made) -> None:
    """Against a whole model in transformers, whose layers are given the reference's inputs by hooks. In float32,
    where block by block equals the whole model on every CPU.
    """
    reference, name = made.reference("float32"), f"{LAYER}.o_proj"
    weights = reference.merged.weights
    model = factories.build(trained_models.CONFIG, dtype=torch.float32)
    model.load_state_dict({key: weights.read(key) for key in weights.specs()})
    inputs: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).float()))
    with torch.no_grad():
        model(trained_models.held_out_ids(8))
    folder = made.artifact("gptq")
    with open_stored(folder, dtype=torch.float32) as stored:
        values = stored.stored(f"{name}.weight")
    assert isinstance(values, GroupQuantized)
    wanted = weights.read(f"{name}.weight").float()
    error = ((values.dequantize() - wanted) @ inputs[0].T).norm() / (wanted @ inputs[0].T).norm()
    layers = {layer.name: layer for layer in made.compared(folder, "float32").record.layers}
    assert layers[name].output_error == pytest.approx(float(error), rel=1e-4)
    ratios = [layer.output_ratio for layer in layers.values() if layer.name != "lm_head"]
    assert all(ratio is not None and ratio < 1 for ratio in ratios), "GPTQ makes the outputs' errors smaller"


@pytest.mark.parametrize("method", ["nf4", "w8a8", "fp8", "fp8 blocks", "nvfp4", "mxfp4"])
def test_codes_that_the_method_does_not_give_are_judged_by_their_error(made: Made, tmp_path: Path, method: str) -> None:
    """Two rows exchanged: as large as before, and all codes in range."""
    name = f"{LAYER}.o_proj.weight"

    def change(found: Tensors) -> None:
        part = f"{name}_packed" if method in ("nvfp4", "mxfp4") else name
        rows = found[part].view(64, -1) if method == "nf4" else found[part]
        rows[[3, 9]] = rows[[9, 3]]

    layout = "vllm" if method == "w8a8" else "safetensors"
    compared = made.compared(copied(made.artifact(method, layout), tmp_path / "copy", change))
    assert f"{LAYER}.o_proj: " in reason(compared)
    (inexact,) = [layer for layer in compared.record.layers if not layer.exact]
    assert inexact.name == f"{LAYER}.o_proj"
    assert inexact.worst_row in (3, 9)


def test_a_scale_in_the_data_of_a_graph_is_named(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.artifact("gptq", "onnx"), tmp_path / "copy"))
    place = Graph(folder).initializers[f"{LAYER}.o_proj.scales"].place
    assert isinstance(place, ExternalData)
    content = bytearray(place.path.read_bytes())
    scales = torch.frombuffer(content, dtype=torch.float32, offset=place.offset, count=place.length // 4)
    scales[0] *= 1.5
    place.path.write_bytes(content)
    assert f"{LAYER}.o_proj: groups that are not the reference's: row 0, group 0" in reason(made.compared(folder))
    scales.mul_(1.5)
    place.path.write_bytes(content)
    assert f"{LAYER}.o_proj: relative error" in reason(made.compared(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_of_another_program_in_another_dtype_equals_the_reference(
    made: Made, tmp_path: Path, dtype: torch.dtype
) -> None:
    """What is finer than the reference's dtype is rounded; what is coarser is expected rounded."""
    folder = Path(shutil.copytree(made.artifact("none"), tmp_path / "copy"))
    merged = made.merged("float32").checkpoint.weights
    tensors = {name: merged.read(name).to(dtype) for name in merged.specs()}
    save_file(tensors, folder / "model.safetensors")
    assert reason(made.compared(folder)) == ""
    assert reason(made.compared(folder, "float32")) == ""
    tensors["model.layers.0.input_layernorm.weight"][7] *= 1.02
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.0.input_layernorm.weight: 1 of 64 values differ from row 7 on" in reason(made.compared(folder))


def test_a_merge_that_rounds_the_change_first_is_a_merge(made: Made, tmp_path: Path) -> None:
    """PEFT does so with models of 16 bits. The same differences where there is no adapter are faults."""
    folder = Path(shutil.copytree(made.artifact("none"), tmp_path / "copy"))
    merged, base = made.merged("float32").checkpoint.weights, made.merged("bfloat16").base.weights
    tensors = load_file(folder / "model.safetensors")
    twice = {name: base.read(name) + (merged.read(name) - base.read(name)).bfloat16() for name in tensors}
    assert any(not torch.equal(twice[name], tensors[name]) for name in tensors)
    save_file(twice, folder / "model.safetensors")
    assert reason(made.compared(folder)) == ""
    twice[f"{LAYER}.k_proj.weight"][5, 5] *= 1.01
    save_file(twice, folder / "model.safetensors")
    assert f"{LAYER}.k_proj.weight: 1 of 2048 values differ from row 5 on" in reason(made.compared(folder))


@pytest.mark.parametrize(("adapter", "expected"), [("half", 0.5), ("double", 2.0), (None, 0.0)])
@pytest.mark.parametrize("method", ["gptq", "nf4"])
def test_the_share_of_the_adapter_is_found_below_the_error_of_rounding(
    made: Made, method: str, adapter: str | None, expected: float
) -> None:
    figure = strength(made.compared(made.artifact(method, adapter=adapter)))
    assert figure.low is not None
    assert figure.high is not None
    assert figure.value == pytest.approx(expected, abs=0.1)
    assert figure.high - figure.low < 0.1
    assert (figure.n, figure.unit) == (trained_models.BLOCKS * (64 + 32 + 64), "row")
    (gate,) = decide([], [figure], [], ["adapter_strength"])
    assert (gate.verdict, gate.figure) == ("fail", "adapter_strength_weights")


@given(st.floats(0.3, 3.0), st.floats(0.7, 1.1), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_fit_is_that_of_least_squares(share: float, shrunk: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, change, noise = (torch.randn(60, 40, generator=generator) for _ in range(3))
    change, noise = change * 0.05, noise * 0.1
    found = strength_by_weights(projections(shrunk * (base + share * change) + noise, base + change, base))
    own = (shrunk * (base + share * change) + noise).double().flatten()
    columns = torch.stack([base.double().flatten(), (base + change - base).double().flatten()], 1)
    of_base, of_change = torch.linalg.lstsq(columns, own[:, None]).solution[:, 0].tolist()
    assert found is not None
    assert found.value == pytest.approx(of_change / of_base, rel=1e-4)
    assert found.low is not None
    deviation = 0.1 / 0.05 / (60 * 40) ** 0.5 / shrunk
    assert (found.value - found.low) / 1.96 == pytest.approx(deviation, rel=0.5)


class Counted:
    """Counts how often each tensor is read."""

    def __init__(self, weights: WeightSource) -> None:
        self.weights, self.reads = weights, Counter[str]()

    def specs(self) -> Mapping[str, TensorSpec]:
        return self.weights.specs()

    def read(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self.weights.read(name)


def test_blocks_that_are_run_are_not_read_again_and_never_more_than_one_is_kept(made: Made) -> None:
    reference = made.reference("bfloat16")
    counted = Counted(reference.merged.weights)
    reference = replace(reference, merged=replace(reference.merged, weights=counted), changed=frozenset())
    with open_stored(made.artifact("gptq"), dtype=torch.bfloat16) as stored:
        check = WeightCheck(stored, reference)
        kept: list[int] = []
        run_both(check, stored, reference, lambda _: kept.append(len(check.kept)))
        before = counted.reads.copy()
        found = check.finish()
    assert kept == [0] * trained_models.BLOCKS
    assert reason(found) == ""
    inside = [name for name in stored.specs() if ".layers." in name]
    assert {counted.reads[name] for name in inside} == {1}
    assert counted.reads - before == Counter({"lm_head.weight": 1})
    whole = made.compared(made.artifact("gptq")).record
    layers = [layer.model_copy(update={"adapter_survival": None}) for layer in whole.layers]
    assert found.record == whole.model_copy(update={"layers": layers})
