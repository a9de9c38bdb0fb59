"""What rounding leaves of an adapter: the share itself, in plan and report, and layers that are protected from it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

import adapters
import factories
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.errors import CompatibilityError, RecipeError
from qexport.pipeline import plan, run
from qexport.pipeline.planning import Plan
from qexport.quantizing.adapter_survival import Survival, spread, survival, together
from qexport.quantizing.rounding import nearest_on
from qexport.recipe import Recipe, load_recipe
from qexport.tensors import GroupQuantizedSpec
from qexport.verifying.adapter_strength import moved_by_rounding
from qexport.verifying.adapter_strength import survival as measured

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"method": "nf4"},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8"},
    "gptq": {"method": "gptq", "group_size": 32},
    "none": {"method": "none"},
}
ON_GRID = ("q_proj", "down_proj")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def matrices(size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A base in bfloat16, and a change in float32 of this size beside it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(256, 512, generator=generator).mul_(0.02).bfloat16()
    return base, torch.randn(256, 512, generator=generator).mul_(0.02 * size)


def nf4(matrix: Tensor) -> Tensor:
    """By bitsandbytes itself."""
    return functional.dequantize_4bit(*functional.quantize_4bit(matrix.contiguous(), quant_type="nf4")).float()


@pytest.mark.parametrize(("size", "least", "most"), [(0.1, 0.999, 1.001), (0.001, 0.4, 0.6), (0.0001, 0.0, 0.1)])
def test_a_change_below_bfloat16_s_steps_is_lost_in_the_merge(size: float, least: float, most: float) -> None:
    base, change = matrices(size)
    unrounded = base.float() + change
    found = survival(base, unrounded.bfloat16(), unrounded, lambda matrix: matrix.float())
    moved = (unrounded.bfloat16().double() - base.double()) * change.double()
    assert found.share == pytest.approx(float(moved.sum() / change.double().square().sum()), rel=1e-4)
    assert found.share == found.merged_share
    assert least < found.share < most
    wide = survival(base, unrounded, unrounded, lambda matrix: matrix)
    assert wide.share == pytest.approx(1, rel=1e-4)


def test_nf4_keeps_a_change_unless_the_base_lies_on_its_grid() -> None:
    base, change = matrices(0.02)
    onto = {"stored": base, "as trained": functional.dequantize_4bit(*functional.quantize_4bit(base, quant_type="nf4"))}
    shares = {}
    for name, weights in onto.items():
        unrounded = weights.float() + change
        shares[name] = survival(weights, unrounded, unrounded, nf4).share
    assert shares["stored"] == pytest.approx(1, abs=0.15)
    assert shares["as trained"] < 0.05


def test_layers_are_added_by_their_change() -> None:
    assert together([Survival(3.0, 3.0, 1.0), Survival(1.0, 0.5, 1.0)]) == Survival(4.0, 3.5, 2.0)
    assert Survival(0.0, 0.0, 0.0).share == 1.0
    sizes = dict.fromkeys("abcdefgh", 10)
    assert spread(sizes, 1000) == list("abcdefgh")
    assert spread(sizes, 30) == ["a", "d", "g"]
    assert spread(sizes, 1) == ["a"]


def test_the_interval_over_rows_holds_the_truth() -> None:
    """Over many draws of a change, 95 % of the intervals hold what is left on average."""
    base, _ = matrices(0.0)
    rounded, found = nf4(base), []
    for seed in range(40):
        _, change = matrices(0.3, seed + 1)
        rows = moved_by_rounding(nf4(base.float() + change), rounded, change)
        figure = measured(rows)
        assert figure is not None
        assert figure.value == pytest.approx(float(rows[:, 0].sum() / rows[:, 1].sum()))
        found.append(figure)
    average = sum(figure.value for figure in found) / len(found)
    assert sum((figure.low or 0) <= average <= (figure.high or 0) for figure in found) >= 34


def on_grid(model: PreTrainedModel, method: str) -> PreTrainedModel:
    """A copy in which two layers of each block lie on a method's grid already."""
    found = copy.deepcopy(model)
    grid = GroupQuantizedSpec(64, 64, 4, 32, sym=True, desc_act=False)
    for name, weight in found.named_parameters():
        if name.endswith(tuple(f"{leaf}.weight" for leaf in ON_GRID)):
            wide = weight.data.float()
            weight.data = (nf4(weight.data) if method == "nf4" else nearest_on(wide, grid).dequantize()).bfloat16()
    return found


@dataclass
class Job:
    """Bases, adapters of three sizes, and texts."""

    folder: Path

    def __post_init__(self) -> None:
        model = factories.build(factories.llama_config())
        factories.save(model, self.folder / "base")
        for method in ("nf4", "gptq"):
            factories.save(on_grid(model, method), self.folder / f"on {method}")
        config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
        adapters.save_adapter(model, config, self.folder / "strong", spread=0.3)
        for name, scale in (("weak", 3e-4), ("small", 3e-2)):
            tensors = adapters.read_tensors(adapters.save_adapter(model, config, self.folder / name, spread=0.3))
            scaled = {key: value * (scale if ".lora_B." in key else 1) for key, value in tensors.items()}
            adapters.write_tensors(self.folder / name, scaled)
        factories.write_text(self.folder / "held-out.jsonl", seed=2)
        factories.write_text(self.folder / "calibration.jsonl", seed=1)

    def recipe(
        self, method: dict[str, Any], adapter: str | None = "strong", *, base: str = "base", **more: Any
    ) -> Recipe:
        calibration = {"source": "calibration.jsonl", "samples": 4, "sequence_length": 32}
        calibrated = {"calibration": calibration} if method["method"] == "gptq" else {}
        content = {
            "load": {"base": f"./{base}"} | ({"adapter": f"./{adapter}"} if adapter else {}),
            "quantize": method | calibrated,
            "export": [{"layout": "safetensors"}],
            "output": f"./{adapter}",
        }
        (self.folder / "recipe.yaml").write_text(json.dumps(content | more))
        return load_recipe(self.folder / "recipe.yaml", folder=self.folder)

    @cached_property
    def verify(self) -> dict[str, Any]:
        return {"text": "held-out.jsonl", "sequence_length": 32, "windows": 24, "max_windows": 24}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("survival"))


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_says_what_is_left(job: Job, method: str) -> None:
    strong, weak = (plan(job.recipe(METHODS[method], adapter)) for adapter in ("strong", "weak"))
    for planned, low, high in ((strong, 0.97, 1.03), (weak, -0.1, 0.7)):
        found = planned.survival
        assert found is not None
        assert low < found.whole.share < high
        assert planned.as_dict()["adapter_survival"]["share"] == found.whole.share
        assert f"survives  {found.whole.share:.1%} of the adapter's change is left" in "\n".join(planned.lines())
    assert "weak beside the rounding" not in str(strong.as_dict()["notes"])
    assert "try merge.dtype: float16 or float32" in weak.as_dict()["notes"][-1]
    wide = plan(job.recipe(METHODS[method], "weak", merge={"dtype": "float32"})).survival
    assert wide is not None
    assert wide.whole.merged_share == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("method", "adapter"), [("nf4", "strong"), ("nf4", "weak"), ("gptq", "strong")])
def test_the_report_has_it_by_layer_and_the_gate_finds_a_weak_adapter(job: Job, method: str, adapter: str) -> None:
    recipe = job.recipe(METHODS[method], adapter, verify=job.verify, output=f"./{method}-{adapter}")
    result = run(recipe, device="cpu", force=True)
    report = Report.read(result.artifact_path)
    figure = next(each for each in report.figures if each.name == "adapter_survival")
    assert report.weights is not None
    shares = {layer.name: layer.adapter_survival for layer in report.weights.layers}
    assert {name.rpartition(".")[2] for name, share in shares.items() if share is not None} == set(TARGETS)
    planned = plan(recipe).survival
    assert planned is not None
    if method == "nf4":  # the plan has rounded the very layers
        assert figure.value == pytest.approx(planned.whole.share, rel=1e-5)
        found = {name: share for name, share in shares.items() if share is not None}
        assert found == pytest.approx({name: each.share for name, each in planned.layers.items()}, rel=1e-5)
    else:
        assert figure.value == pytest.approx(1, abs=0.1)
    gate = next(each for each in report.gates if each.name == "adapter_strength")
    if adapter == "strong":
        assert (gate.verdict, gate.figure) == ("pass", "adapter_strength_weights")
    else:
        assert (gate.verdict, gate.figure, gate.limit) == ("fail", "adapter_survival", 0.8)


def protected(planned: Plan) -> set[str]:
    """The linear layers of the plan that stay unquantized."""
    return {linear.name for linear in planned.structure.block_linears} - planned.outputs.quantized.keys()


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_layers_that_would_lose_the_adapter_stay_unquantized_with_what_servers_join(job: Job, method: str) -> None:
    options = METHODS[method] | {"protect_adapter": True}
    planned = plan(job.recipe(options, "small", base=f"on {method}", merge={"dtype": "float32"}))
    joined = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    kept = {f"{block}.{name}" for block in planned.structure.blocks for name in joined}
    assert protected(planned) == kept
    (note,) = planned.protected.notes
    assert note.startswith(f"protect_adapter: {len(kept)} layers stay unquantized, since 4 layers of them would keep")
    assert note in "\n".join(planned.lines())
    assert planned.survival is not None
    assert planned.survival.whole.share > 0.9


def test_a_protected_artifact_says_so(job: Job) -> None:
    method, verify = METHODS["nf4"] | {"protect_adapter": True}, job.verify | {"profile": "off"}
    more: dict[str, Any] = {"merge": {"dtype": "float32"}, "verify": verify, "output": "./protected"}
    recipe = job.recipe(method, "small", base="on nf4", **more)
    result = run(recipe, device="cpu", force=True)
    manifest, report = Manifest.read(result.artifact_path), Report.read(result.artifact_path)
    assert {layer.name for layer in manifest.layers}.isdisjoint(protected(plan(recipe)))
    for notes in (manifest.notes, report.notes):
        assert any(note.startswith("protect_adapter: ") for note in notes)


def test_nothing_is_protected_where_all_is_well_and_not_everything_can_be(job: Job) -> None:
    options = METHODS["nf4"] | {"protect_adapter": True}
    assert not protected(plan(job.recipe(options)))
    with pytest.raises(RecipeError, match="no adapter to protect"):
        plan(job.recipe(options, None))
    others = options | {"skip_modules": ["*.o_proj", "*.mlp.*"]}
    with pytest.raises(CompatibilityError, match="no layer is left to quantize"):
        plan(job.recipe(others, "small", base="on nf4", merge={"dtype": "float32"}))
