"""The method `mixed`: what is measured against whole models, the choice against exhaustive search, and runs."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import factories
import trained_models
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import GateResult
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.partial import MARKER_NAME
from qexport.artifact.publish import Publication
from qexport.cli import main
from qexport.errors import CompatibilityError, InputError, RecipeError
from qexport.export import SafetensorsSettings
from qexport.gates import Bounds
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.pipeline import Result, attempts, made_choice, measured, measuring, mixing, plan, rebuilding, run
from qexport.pipeline.choice_space import choice_space
from qexport.progress import Notice, Progress, silent
from qexport.quantizing.allocation import Allocation, Priced
from qexport.quantizing.layer import Hessian, solve_together
from qexport.quantizing.mixed import Mixed
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.sensitivity import Effects, Unit, measure
from qexport.quantizing.solver import Options
from qexport.reading.stored_model import open_stored
from qexport.recipe import Recipe
from qexport.records import LayerRecord
from qexport.tensors import CalibrationSet, Origin
from test_block_runner import StateDict, token_windows
from test_resume import contents, in_child, prepare_children

CPU = torch.device("cpu")
BITS = (3, 4, 8)
TARGET = 0.0014
"""Which a choice of losses that are measured too small misses, if it is one of `APART`, and the next one does not."""

APART = {"bits": [2, 4, 8]}


def options(bits: int) -> Options:
    return Options(bits, 32, "static", sym=True, damp_percent=0.01, search=True)


def saved(model: PreTrainedModel, folder: Path) -> Checkpoint:
    """The model with the tensor names of files."""
    factories.save(model, folder / "base")
    return load_checkpoint(LoadSettings(base=str(folder / "base")))


@pytest.mark.parametrize(
    "config",
    [factories.llama_config(), factories.falcon_40b_config(), factories.gpt2_config(), factories.mixtral_config()],
    ids=lambda config: config.model_type,
)
def test_gradients_through_blocks_equal_those_of_the_whole_model(config: PretrainedConfig, tmp_path: Path) -> None:
    model = factories.build(config, dtype=torch.float32)
    checkpoint = saved(model, tmp_path)
    architecture = checkpoint.architecture
    runner = BlockRunner(architecture, checkpoint.weights, dtype=torch.float32, device=CPU)
    (window,) = runner.embed(token_windows(1, 24), 1)
    inputs = []
    for index in range(len(runner.structure.blocks)):
        inputs.append(window.hidden)
        with runner.block(index) as block:
            runner.forward(index, block, window)
    with runner.head() as head, torch.enable_grad():
        last = window.hidden.requires_grad_()
        (upstream,) = torch.autograd.grad(head(last).square().sum(), last)
    found: dict[str, Tensor] = {}
    for index in reversed(range(len(runner.structure.blocks))):
        window.hidden = inputs.pop()
        names = [f"{linear.name}.weight" for linear in runner.structure.linears[runner.structure.blocks[index]]]
        with runner.block(index) as block:
            upstream, own = runner.gradients(index, block, window, upstream, names)
        found |= own
    loss = model(input_ids=token_windows(1, 24)).logits.square().sum()
    parameters = dict(model.named_parameters())
    loss.backward()
    for name, gradient in found.items():
        part = architecture.naming.parts[name]
        expected = parameters[part.parameter].grad
        assert expected is not None
        torch.testing.assert_close(gradient, part.of(expected), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def falcon() -> tuple[Checkpoint, list[Unit]]:
    """A trained model of one block, in which each of the four layers is a unit."""
    model = trained_models.trained_falcon()
    checkpoint = Checkpoint(Architecture(trained_models.FALCON.to_dict()), StateDict(model), {}, Origin("folder", "x"))
    linears = checkpoint.architecture.structure.block_linears
    return checkpoint, [Unit((linear,), tuple(map(options, BITS))) for linear in linears]


@pytest.fixture(scope="module")
def windows() -> tuple[Tensor, Tensor]:
    ids = torch.tensor(trained_models.ids(seed=3))[: 144 * 32].view(144, 32)
    return ids[::3], torch.cat([ids[1::3], ids[2::3]])


@pytest.fixture(scope="module")
def losses(falcon: tuple[Checkpoint, list[Unit]], windows: tuple[Tensor, Tensor]) -> list[list[float]]:
    """Of each unit with 3, 4, 8 and 16 bits."""
    found = measure(*falcon, *windows, device=CPU, progress=silent)
    for each in found:
        assert each.losses == pytest.approx(each.divergences, rel=0.8)
    return [[*each.losses, 0.0] for each in found]


class Whole:
    """A whole model whose layers are quantized in memory, one by one, each with Hessians of the unquantized model."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], calibration: Tensor, text: Tensor) -> None:
        self.model, self.text = factories.build(model.config, dtype=torch.float32), text
        self.model.load_state_dict(model.state_dict())
        self.before = {name: self.model.get_parameter(f"{name}.weight").detach().clone() for name in names}
        self.reference = self.predicted()
        self.weights: dict[tuple[str, int], Tensor] = {}
        for name in names:
            seen: list[Tensor] = []
            hook = self.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            self.model(input_ids=calibration)
            hook.remove()
            for bits in BITS:
                hessian = Hessian(seen[0].shape[-1], CPU)
                hessian.add(seen[0].detach())
                solved = solve_together({name: self.before[name]}, hessian, {name: options(bits)}, "error")
                self.weights[name, bits] = solved[name].quantized.dequantize()
            self.weights[name, 16] = self.before[name]

    def predicted(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=self.text).logits
        return logits.double().log_softmax(-1)

    def kl(self, bits: Mapping[str, int]) -> float:
        for name, each in bits.items():
            self.model.get_parameter(f"{name}.weight").data.copy_(self.weights[name, each])
        found = self.predicted()
        return float((self.reference.exp() * (self.reference - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def whole(falcon: tuple[Checkpoint, list[Unit]], windows: tuple[Tensor, Tensor]) -> Whole:
    names = [unit.layers[0].name for unit in falcon[1]]
    return Whole(trained_models.trained_falcon(), names, windows[1], windows[0][::2])


def test_measured_losses_are_those_of_the_whole_model_with_one_layer_quantized(
    falcon: tuple[Checkpoint, list[Unit]], losses: list[list[float]], whole: Whole
) -> None:
    names = [unit.layers[0].name for unit in falcon[1]]
    kept = dict.fromkeys(names, 16)
    for name, own in zip(names, losses, strict=True):
        for bits, loss in zip(BITS, own, strict=False):
            assert loss == pytest.approx(whole.kl(kept | {name: bits}), rel=0.6), f"{name}, {bits} bits"


def test_the_choice_is_within_5_percent_of_the_smallest_of_equal_quality(
    falcon: tuple[Checkpoint, list[Unit]], losses: list[list[float]], whole: Whole
) -> None:
    """Every combination is computed with the whole model; sizes are those of codes and scales."""
    layers = [unit.layers[0] for unit in falcon[1]]
    sizes = [[layer.out_features * layer.in_features * bits // 8 for bits in (*BITS, 16)] for layer in layers]
    allocation = Allocation([Priced(tuple(own), tuple(each)) for own, each in zip(sizes, losses, strict=True)])
    found = {
        chosen: (
            allocation.total(chosen),
            whole.kl({layer.name: (*BITS, 16)[index] for layer, index in zip(layers, chosen, strict=True)}),
        )
        for chosen in itertools.product(range(4), repeat=len(layers))
    }
    assert len(found) == 256
    for target in (0.02, 0.005, 0.002, 0.0005, 0.0001):
        chosen = allocation.reaching(target)
        assert chosen is not None
        size, cost = found[tuple(chosen)]
        least = min(other for other, its_cost in found.values() if its_cost <= cost)
        assert size <= 1.05 * least, f"{target}: {chosen}"


def test_the_products_have_the_same_bits_with_two_threads(
    falcon: tuple[Checkpoint, list[Unit]], windows: tuple[Tensor, Tensor]
) -> None:
    checkpoint, units = falcon
    own = [Unit(unit.layers, unit.options[:1]) for unit in units]
    once = measure(checkpoint, own, windows[0][:4], windows[1][:8], device=CPU, progress=silent)
    torch.set_num_threads(2)
    try:
        again = measure(checkpoint, own, windows[0][:4], windows[1][:8], device=CPU, progress=silent)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.products, other.products)
        assert one.errors == other.errors


@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_that_of_exhaustive_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = []
    for _ in range(5):
        sizes = torch.randint(1, 40, (3,), generator=generator).sort().values.tolist()
        units.append(
            Priced(tuple(sizes), tuple(torch.rand(3, generator=generator).sort(descending=True).values.tolist()))
        )
    allocation = Allocation(units)
    every = [(allocation.total(each), allocation.loss(each)) for each in itertools.product(range(3), repeat=5)]
    for total in range(allocation.least, allocation.most + 3, 7):
        chosen = allocation.within(total)
        assert chosen is not None
        assert allocation.total(chosen) <= total
        assert allocation.loss(chosen) == pytest.approx(min(loss for size, loss in every if size <= total))
    assert allocation.within(allocation.least - 1) is None
    for loss in (0.5, 1.0, 2.0):
        reached = allocation.reaching(loss)
        fitting = [size for size, its_loss in every if its_loss <= loss]
        assert (None if reached is None else allocation.total(reached)) == (min(fitting) if fitting else None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    trained_models.trained_falcon().save_pretrained(folder / "base")
    trained_models.tokenizer().save_pretrained(folder / "base")
    trained_models.write_calibration(folder / "calibration.jsonl")
    trained_models.write_held_out(folder / "held-out.jsonl")
    return folder


def recipe(inputs: Path, goal: dict[str, float], output: Path, *layouts: str, **changes: Any) -> Recipe:
    verify = {"text": str(inputs / "held-out.jsonl"), "sequence_length": 32, "windows": 16, "max_windows": 16}
    return Recipe.model_validate(
        {
            "load": {"base": str(inputs / "base")},
            "quantize": {
                "method": "mixed",
                "target": goal,
                "group_sizes": [32],
                "windows": 16,
                "window_tokens": 32,
                "calibration": {"source": str(inputs / "calibration.jsonl"), "samples": 64, "sequence_length": 32},
            }
            | changes,
            "export": [{"layout": layout} for layout in layouts or ("safetensors",)],
            "verify": verify,
            "output": str(output),
        }
    )


def notices(told: list[Progress | Notice]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Notice))


def test_the_plan_says_what_may_be_chosen_and_reads_no_weights(inputs: Path, tmp_path: Path) -> None:
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out"))
    assert "mixed bits for a mean KL divergence of 0.01" in "\n".join(planned.lines())
    (note,) = [line for line in planned.lines() if "4 units of layers" in line]
    assert "one of 3, 4, 8, 16 bits in groups of 32 in the run: plan --measure shows the choice" in note
    assert planned.as_dict()["choice"] is None


def test_a_plan_that_measures_shows_the_choice_which_a_run_takes_over(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(inputs, {"bits_per_weight": 10.0}, tmp_path / "out")
    planned = measured(plan(wanted))
    assert [path.name for path in tmp_path.iterdir()] == ["out.measured"]
    other = measured(plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", group_sizes=[16, 32])))
    monkeypatch.setattr(measuring, "measure_units", unasked)
    again = measured(plan(wanted))
    assert again.as_dict()["choice"] == planned.as_dict()["choice"] != other.as_dict()["choice"]
    told: list[Progress | Notice] = []
    made = run(wanted, progress=told.append).manifest
    assert "known from qexport plan --measure: out.measured" in notices(told)
    choice = planned.as_dict()["choice"]
    assert choice["bits_per_weight"] == made.sizes.bits_per_weight
    assert choice["bytes"] == made.sizes.total_bytes == planned.total_bytes
    bits = Counter(layer.bits for layer in made.layers)
    assert {each["bits"]: each["layers"] for each in choice["options"]} == bits
    assert sum(each["mean_kl"] for each in choice["options"]) == pytest.approx(choice["mean_kl"])
    shown = "\n".join(planned.lines())
    assert f"chosen    {choice['bits_per_weight']:.2f} bits per weight; the expected mean KL" in shown
    assert all(f"{count} layers at {number} bits in groups of 32" in shown for number, count in bits.items())
    monkeypatch.undo()
    plain = run(wanted.model_copy(update={"output": str(tmp_path / "plain")})).manifest
    assert made.files == plain.files
    assert made.notes == plain.notes


def test_what_was_measured_of_another_target_counts_and_of_another_model_or_text_does_not(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(plan(recipe(inputs, {"bits_per_weight": 10.0}, tmp_path / "out")))
    monkeypatch.setattr(measuring, "measure_units", unasked)
    assert measured(plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out"))).choice
    text = shutil.copy(inputs / "calibration.jsonl", tmp_path / "calibration.jsonl")
    other = {"source": str(text), "samples": 64, "sequence_length": 32}
    assert measured(plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", calibration=other))).choice
    Path(text).write_text(Path(text).read_text().replace("before", "after"))
    base = shutil.copytree(inputs / "base", tmp_path / "base")
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    changed = recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out")
    of_base = changed.model_copy(update={"load": LoadSettings(base=str(base))})
    of_text = recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", calibration=other)
    for each in (of_base, of_text, recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", bits=[3, 8])):
        with pytest.raises(AssertionError, match="measured again"):
            measured(plan(each))


def test_a_damaged_measurement_is_made_again(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(inputs, {"bits_per_weight": 10.0}, tmp_path / "out")
    measured(plan(wanted))
    kept = tmp_path / "out.measured"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    told: list[Progress | Notice] = []
    measured(plan(wanted), progress=told.append)
    assert "known from" not in notices(told)
    monkeypatch.setattr(measuring, "measure_units", unasked)
    measured(plan(wanted))


def test_the_command_plan_shows_the_choice_too(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(recipe(inputs, {"bits_per_weight": 10.0}, tmp_path / "out").model_dump_json(exclude_unset=True))
    assert main(["plan", str(path), "--measure", "--json"]) == 0
    assert 9.5 < json.loads(capsys.readouterr().out)["choice"]["bits_per_weight"] <= 10
    assert main(["plan", str(path), "--measure", "quantize.target={bits_per_weight: 3}"]) == 4
    assert "3 bits per weight are too few" in capsys.readouterr().err


def test_a_plan_of_another_method_measures_nothing(inputs: Path, tmp_path: Path) -> None:
    wanted = recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out").model_copy(update={"quantize": NoQuantization()})
    with pytest.raises(RecipeError, match="a plan measures what the method mixed chooses from"):
        measured(plan(wanted))


@pytest.mark.parametrize(
    ("layouts", "offered"),
    [
        (("safetensors",), [3, 4, 8, 16]),
        (("safetensors", "vllm"), [4, 16]),
        (("onnx",), [4, 8, 16]),
        (("gguf",), [3, 4, 8, 16]),
    ],
)
def test_what_a_layout_cannot_carry_is_not_offered(
    inputs: Path, tmp_path: Path, layouts: tuple[str, ...], offered: list[int]
) -> None:
    if "onnx" in layouts:
        pytest.importorskip("onnx")
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", *layouts))
    assert planned.space is not None
    assert [option.bits for option in planned.space.offered] == offered
    assert sorted(option.bits for option in planned.space.refused) == [
        bits for bits in (3, 4, 8) if bits not in offered
    ]


def test_layouts_with_one_choice_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="only 4 bits in groups of 64") as refused:
        plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", "tgi", group_sizes=[64]))
    assert "TGI reads the same bits and groups everywhere" in str(refused.value)


def test_a_run_keeps_to_the_size_and_says_what_it_chose(inputs: Path, tmp_path: Path) -> None:
    told: list[Progress | Notice] = []
    result = run(recipe(inputs, {"bits_per_weight": 10.0}, tmp_path / "out"), progress=told.append)
    manifest = result.manifest
    assert 9.5 < manifest.sizes.bits_per_weight <= 10
    bits = {layer.name: layer.bits for layer in manifest.layers}
    assert len(set(bits.values())) > 1
    (note,) = [note for note in manifest.notes if note.startswith("mixed bits for 10 bits per weight")]
    assert note in result.report.notes
    assert note in notices(told)
    assert all(f"{list(bits.values()).count(each)} layer" in note for each in set(bits.values()))
    assert "chosen by layer" in (tmp_path / "out" / "README.md").read_text()


def test_a_gguf_file_holds_every_choice_with_the_values_of_the_other_layout(inputs: Path, tmp_path: Path) -> None:
    chosen = recipe(inputs, {"bits_per_weight": 9.0}, tmp_path / "out", "safetensors", "gguf", bits=[2, 3, 8, 16])
    result = run(chosen)
    bits = {layer.name: layer.bits for layer in result.manifest.layers}
    assert len(set(bits.values())) > 1
    with (
        open_stored(tmp_path / "out" / "safetensors", dtype=torch.float32) as other,
        open_stored(tmp_path / "out" / "gguf", dtype=torch.float32) as own,
    ):
        assert {name: layer.bits for name, layer in own.layers.items()} == bits
        for name in other.specs():
            assert torch.equal(own.read(name).float(), other.read(name).float()), name
    (narrow,) = [note for note in result.manifests["gguf"].notes if "bits take the 4.5 bits" in note]
    assert " and ".join(map(str, sorted({2, 3} & set(bits.values())))) in narrow


def test_at_the_size_of_uniform_bits_all_layers_are_alike(inputs: Path, tmp_path: Path) -> None:
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out"))
    assert planned.space is not None
    space, layout = planned.space, planned.layouts[0]
    sizes = space.stored(layout)
    allocation = Allocation([Priced(tuple(own), (0.1, 0.02, 0.0001, 0.0)) for own in sizes])
    lucky = [0, 2, 1, 1]  # one layer with fewer bits pays for more in another
    costs = [[0.0201, 0.02, 0.0001, 0.0], [0.1, 0.02, 0.0185, 0.0], [0.1, 0.02, 0.0001, 0.0], [0.1, 0.02, 0.0001, 0.0]]
    noisy = Allocation([Priced(tuple(own), tuple(cost)) for own, cost in zip(sizes, costs, strict=True)])
    assert noisy.loss(lucky) < noisy.loss([1] * 4)
    assert noisy.total(lucky) > noisy.total([1] * 4)
    assert mixing._or_alike(space, noisy, lucky, noisy.total(lucky)) == [1] * 4
    assert mixing._or_alike(space, allocation, [1, 1, 2, 2], allocation.total([1, 1, 2, 2])) == [1, 1, 2, 2]


def test_what_is_measured_begins_as_texts_do(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", windows=8, window_tokens=8))
    assert planned.space is not None
    seen: list[Tensor] = []

    def note(_: Checkpoint, units: list[Unit], *windows: Tensor, **__: object) -> list[Effects]:
        seen.extend(windows)
        return [Effects(torch.ones(8, len(unit.options)), (1.0,) * len(unit.options), 8) for unit in units]

    monkeypatch.setattr(mixing, "measure", note)
    text = torch.arange(10, 10 + 24 * 15).view(24, 15)
    for start, width in ((1, 7), (None, 8)):
        ids = text if start is None else torch.cat([torch.full((24, 1), start), text], 1)
        calibration = CalibrationSet(ids, "0" * 64, "test", start=start)
        mixing.measure_units(planned.space, calibration, device=CPU, progress=silent)
        whole = torch.cat([seen.pop(), seen.pop()])
        assert whole.shape[1] == 8
        if start is not None:
            assert (whole[:, 0] == start).all()
        body = whole[:, -width:]
        assert (body.diff(dim=1) == 1).all()
        assert len(body.unique()) == body.numel()


@pytest.mark.parametrize(("target", "chosen"), [(0.06, 1), (0.055, 2), (0.021, 2)])
def test_a_choice_for_a_quality_is_made_for_a_part_of_it(target: float, chosen: int) -> None:
    allocation = Allocation([Priced((1, 2, 3), (0.1, 0.05, 0.02))])
    assert mixing._reaching(allocation, target) == [chosen]


def test_a_quality_that_no_choice_is_expected_to_reach_is_refused() -> None:
    with pytest.raises(CompatibilityError, match=r"no choice keeps to a mean KL divergence of 0.01: .* cost 0.02"):
        mixing._reaching(Allocation([Priced((1, 2), (0.1, 0.02))]), 0.01)


@pytest.mark.parametrize("bits", [[3, 4], [3, 4, 16]])
def test_group_sizes_that_divide_no_layer_are_refused(bits: list[int], inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"no group size of \[48\] divides the 64 inputs of"):
        plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", bits=bits, group_sizes=[48]))


def test_a_target_of_quality_is_a_gate(inputs: Path, tmp_path: Path) -> None:
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out"))
    assert planned.recipe.verify is not None
    bounds = planned.recipe.verify.gates["mean_kl"]
    assert bounds is not None
    assert bounds.at_most == 0.01


def measured_too_small(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The planted fault: everything is measured a part of what it is."""

    def small(*arguments: Any, **more: Any) -> list[Effects]:
        return [replace(each, products=each.products / factor**0.5) for each in measure(*arguments, **more)]

    monkeypatch.setattr(mixing, "measure", small)


def mean_kl(result: Result) -> float:
    (figure,) = [each for each in result.report.figures if each.name == "mean_kl" and each.domain is None]
    return figure.value


def test_a_choice_that_fails_its_gate_is_followed_by_a_larger_one_which_passes(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_too_small(monkeypatch, 20)
    told: list[Progress | Notice] = []
    result = run(recipe(inputs, {"mean_kl": TARGET}, tmp_path / "out", **APART), progress=told.append)
    assert result.verdict == "pass"
    assert result.folder == tmp_path / "out"
    assert mean_kl(result) <= TARGET
    (outcome,) = [line for line in notices(told).splitlines() if "attempt 2 of at most 3" in line]
    before, last = [note for note in result.manifest.notes if note.startswith("mixed bits for")]
    assert "attempt 1: " in before
    assert "attempt 2: " in last
    assert before.partition("the mean KL divergence was ")[2].partition(",")[0] in outcome
    assert [note for note in result.report.notes if note.startswith("mixed bits for")] == [before, last]
    assert expected(last) / 4 <= mean_kl(result) <= 1.5 * expected(last)
    assert expected(last) <= 0.95 * TARGET


def expected(note: str) -> float:
    return float(note.rpartition("expected mean KL divergence is ")[2])


def test_an_artifact_that_passes_or_has_no_target_of_quality_is_made_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_too_small(monkeypatch, 20)
    for name, goal, gate in (("size", {"bits_per_weight": 10.0}, 1e-5), ("own", {"mean_kl": TARGET}, 1.0)):
        wanted = with_gate(recipe(inputs, goal, tmp_path / name, **APART), gate)
        told: list[Progress | Notice] = []
        assert run(wanted, progress=told.append).passed == (gate == 1.0)
        assert "attempt" not in notices(told)


def with_gate(wanted: Recipe, at_most: float) -> Recipe:
    assert wanted.verify is not None
    gates = {"mean_kl": Bounds(at_most=at_most)}
    return wanted.model_copy(update={"verify": wanted.verify.model_copy(update={"gates": gates})})


def test_after_the_last_attempt_the_next_choice_is_named_and_passes(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_too_small(monkeypatch, 20)
    monkeypatch.setattr(attempts, "MOST_ATTEMPTS", 1)
    told: list[Progress | Notice] = []
    failed = run(recipe(inputs, {"mean_kl": TARGET}, tmp_path / "out", **APART), progress=told.append)
    assert failed.verdict == "fail"
    assert failed.folder == tmp_path / "out.rejected"
    (advice,) = [line for line in notices(told).splitlines() if "next larger choice" in line]
    bits = float(advice.partition("bits_per_weight: ")[2].partition("}")[0])
    assert bits > failed.manifest.sizes.bits_per_weight
    assert f"{{at_most: {TARGET:g}}}" in advice
    monkeypatch.undo()
    assert mean_kl(run(recipe(inputs, {"bits_per_weight": bits}, tmp_path / "again", **APART))) <= TARGET


def test_without_a_larger_choice_the_run_ends(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_too_small(monkeypatch, 1e6)
    told: list[Progress | Notice] = []
    failed = run(recipe(inputs, {"mean_kl": 1e-5}, tmp_path / "out", bits=[3, 4]), progress=told.append)
    assert failed.verdict == "fail"
    assert "no choice that is offered would reach 1e-05: offer more bits" in notices(told)


def test_no_bits_mend_a_failed_check(made: made_choice.MadeChoice) -> None:
    drift = GateResult(name="mean_kl", figure="mean_kl", value=0.3, low=0.2, high=0.4, verdict="fail", reason="")
    check = GateResult(name="tokenizer", verdict="fail", reason="")
    assert made.missed([drift]) == made_choice.Missed(0.3, 0.3)
    assert made.missed([drift, check]) is None


@pytest.mark.parametrize(
    ("value", "high", "worst"), [(0.012, 0.02, 0.02), (0.009, 0.012, 0.012), (0.012, None, 0.012), (0.009, None, None)]
)
def test_where_no_windows_decide_the_end_of_the_interval_is_held_to_the_target(
    made: made_choice.MadeChoice, value: float, high: float | None, worst: float | None
) -> None:
    gate = GateResult(name="mean_kl", figure="mean_kl", value=value, high=high, verdict="undecided", reason="")
    missed = made.missed([gate])
    assert missed == (None if worst is None else made_choice.Missed(value, worst))
    if missed:
        larger = made.larger(missed)
        assert larger is not None
        assert larger.choice.expected <= 0.95 * 0.01 * value / missed.worst
        assert larger.total_bytes > made.total_bytes
        assert larger.choice.tried == [made_choice.Tried([1] * 4, 0.0085, value)]


@pytest.fixture
def made(inputs: Path, tmp_path: Path) -> made_choice.MadeChoice:
    """A choice for a mean KL divergence of 0.01."""
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out"))
    assert planned.space is not None
    losses = [[0.02, 0.0085 / 4, 0.0003, 0.0]] * 4
    return made_choice.MadeChoice(planned.space, planned.layouts[0], made_choice.Choice(losses, [1] * 4, 0.0085))


def test_a_run_that_is_killed_in_any_attempt_ends_with_the_same_bytes(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_too_small(monkeypatch, 20)
    goal, layouts = {"mean_kl": 0.0003}, ("safetensors", "vllm")
    whole = recipe(inputs, goal, tmp_path / "whole", *layouts)
    prepare_children(whole)
    ended = in_child(whole)
    assert any("attempt 2 of at most 3" in str(event) for event in ended.events)
    chance = random.Random(0)
    for number in range(4):
        output = tmp_path / str(number)
        again = recipe(inputs, goal, output, *layouts)
        assert in_child(again, kill_at=chance.randrange(ended.operations // 3, ended.operations)).killed
        if not output.exists():  # else the rename was done
            in_child(again)
        assert lasting(output) == lasting(tmp_path / "whole")
        assert not output.with_name(f"{number}.partial").exists()


def lasting(artifact: Path) -> dict[str, Any]:
    """Every file's bytes, but those of the report and of what has its digest."""
    found: dict[str, Any] = contents(artifact)
    found = {name: content for name, content in found.items() if not re.search("report/|SHA256SUMS", name)}
    for name in [name for name in found if name.endswith(MANIFEST_NAME)]:
        found[name] = json.loads(found[name])
        del found[name]["verification"]["report_sha256"]
    return found


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("removed", [0, 1, None], ids=["none", "one", "all"])
def test_a_run_that_is_stopped_between_two_attempts_goes_on_in_the_second(
    removed: int | None, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when so many files of the first attempt are removed."""
    measured_too_small(monkeypatch, 20)
    run(recipe(inputs, {"mean_kl": TARGET}, tmp_path / "whole", **APART))
    wanted, written = recipe(inputs, {"mean_kl": TARGET}, tmp_path / "out", **APART), list[Path]()

    def stopping(publication: Publication, kept: Collection[Path]) -> None:
        written.extend(path for path in publication.folder.iterdir() if path.is_file() and path != publication.journal)
        for path in written[:removed]:
            path.unlink()
        if written:  # not before the first attempt
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(Publication, "keep_only", stopping)
        with pytest.raises(Stop):
            run(wanted)
    left = [path for path in (tmp_path / "out.partial").iterdir() if path.is_file() and path.name != MARKER_NAME]
    assert len(left) == (0 if removed is None else len(written) - removed)
    told: list[Progress | Notice] = []
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "measure_units", unasked)
        run(wanted, progress=told.append)
    assert "attempt 2 of at most 3" not in notices(told)  # that was said before
    assert steps_of(told, "quantize") == [0, 1]  # the whole block
    assert lasting(tmp_path / "out") == lasting(tmp_path / "whole")


@pytest.mark.parametrize("whole", [False, True], ids=["one layout, no verification", "whole"])
def test_an_artifact_of_a_second_attempt_is_rebuilt(
    whole: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice depends on the verification and on the other layout, which are left out."""
    measured_too_small(monkeypatch, 20)
    run(recipe(inputs, {"mean_kl": 0.0003}, tmp_path / "out", "safetensors", "vllm"))
    given = rebuilding.recorded(tmp_path / "out" / "safetensors")
    chosen = rebuilding.recipe_of(given, recipe=None, inputs=inputs, overrides=(), verify=whole)
    assert len(chosen.export) == (2 if whole else 1)
    if not whole:
        monkeypatch.setattr(measuring, "measure_units", unasked)
    assert rebuilding.rebuild(given, chosen, device="cpu").equal


def test_a_recorded_choice_that_the_recipe_does_not_offer_is_refused(inputs: Path, tmp_path: Path) -> None:
    planned = plan(recipe(inputs, {"mean_kl": 0.01}, tmp_path / "out", bits=[3, 4], group_sizes=[-1, 32]))
    assert planned.space is not None
    name = planned.space.units[0][0].name
    rows = [LayerRecord.uncalibrated(unit[0].name, "gptq", 4, unit[0].in_features) for unit in planned.space.units]
    assert [str(option) for option in planned.space.recorded(rows)] == ["4 bits in rows"] * 4
    with pytest.raises(InputError, match="the recipe does not offer") as refused:
        planned.space.recorded([LayerRecord.uncalibrated(name, "gptq", 8, 32), *rows[1:]])
    assert f"{name}, 8 bits, groups of 32" in str(refused.value)
    with pytest.raises(InputError, match="the recipe does not offer"):
        planned.space.recorded(rows[1:])


def steps_of(told: list[Progress | Notice], stage: str) -> list[int]:
    return [event.done for event in told if isinstance(event, Progress) and event.stage == stage]


def unasked(*_: object, **__: object) -> None:
    raise AssertionError("measured again")


def test_a_run_that_goes_on_takes_the_same_choice(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(event: Progress | Notice) -> None:
        if isinstance(event, Progress) and event.stage == "quantize" and event.done == 1:
            raise Stop

    wanted = recipe(inputs, {"bits_per_weight": 9.0}, tmp_path / "out").model_copy(update={"verify": None})
    with pytest.raises(Stop):
        run(wanted, progress=stopping)

    monkeypatch.setattr(measuring, "measure_units", unasked)
    once = run(wanted)
    monkeypatch.undo()
    other = run(wanted.model_copy(update={"output": str(tmp_path / "other")}))
    assert once.manifest.files == other.manifest.files
    assert once.manifest.layers == other.manifest.layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {}}, "give either mean_kl or bits_per_weight"),
        ({"target": {"mean_kl": 0.1, "bits_per_weight": 5.0}}, "give either mean_kl or bits_per_weight"),
        ({"bits": [4]}, "there is nothing to choose"),
        ({"bits": [16]}, "there is nothing to choose"),
        ({"bits": [4, 4]}, "each value once"),
    ],
)
def test_settings_without_a_choice_are_refused(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(inputs, {"mean_kl": 0.1}, tmp_path / "out", **changes)


def test_targets_out_of_reach_say_what_can_be_reached(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"the choices make \d+\.\d\d to 16\.00"):
        run(recipe(inputs, {"bits_per_weight": 3.0}, tmp_path / "out"))
    with pytest.raises(CompatibilityError, match="no choice keeps to a mean KL divergence of 1e-06"):
        run(recipe(inputs, {"mean_kl": 1e-6}, tmp_path / "out", bits=[3, 4]).model_copy(update={"verify": None}))


def test_layers_that_an_override_names_take_no_part(inputs: Path, tmp_path: Path) -> None:
    kept = [{"modules": "*.dense_h_to_4h", "dense": True}]
    planned = plan(recipe(inputs, {"bits_per_weight": 9.0}, tmp_path / "out", overrides=kept))
    assert planned.space is not None
    names = [linear.name for unit in planned.space.units for linear in unit]
    assert len(names) == 3
    assert not any(name.endswith("dense_h_to_4h") for name in names)
    assert not any(name.endswith("dense_h_to_4h") for name in planned.outputs.quantized)


def test_joined_layers_are_one_unit_and_experts_of_a_block_another(tmp_path: Path) -> None:
    checkpoint = saved(factories.build(factories.qwen3_moe_config()), tmp_path)
    method = Mixed.model_validate({"target": {"mean_kl": 0.1}, "group_sizes": [32]})
    space = choice_space(method, checkpoint, [SafetensorsSettings()])
    leaves = [sorted({linear.name.rpartition(".")[2] for linear in unit}) for unit in space.units]
    blocks = len(checkpoint.architecture.structure.blocks)
    assert leaves.count(["k_proj", "q_proj", "v_proj"]) == blocks
    assert leaves.count(["down_proj", "gate_proj", "up_proj"]) == 1  # the first block has no experts
    units = [Unit(unit, (options(4),)) for unit in space.units]
    found = measure(checkpoint, units, token_windows(4, 16), token_windows(8, 16), device=CPU, progress=silent)
    assert all(float(each.products.abs().min()) > 0 for each in found)
