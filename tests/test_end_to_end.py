"""Whole runs on tiny models, from the recipe to the published folder and back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

import factories
from adapters import merge_with_peft, save_adapter
from onnx_exports import traced_once
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.integrity import open_artifact
from qexport.artifact.manifest import LISTING_NAME, MANIFEST_NAME
from qexport.artifact.report import Report
from qexport.errors import InputError, NumericalError, QexportError, RecipeError, ResourceError
from qexport.export.tgi.families import tgi_config
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.pipeline import Result, plan, run
from qexport.pipeline.folders import ArtifactFolder
from qexport.pipeline.verification import Verified, measure_folder
from qexport.quantizing import activations
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.recipe import load_recipe
from qexport.verifying.reference import Reference

RECIPES = [
    path for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")) if path.name != "sweep.yaml"
]
GPTQ = next(path for path in RECIPES if path.name == "gptq-4bit.yaml")
FAILING = {"verify.gates": "{mean_kl: {at_most: 0.01}}", "quantize.bits": 2}
REPORT_FILES = {f"report/{name}" for name in ("report.html", "report.json", "report.md", "junit.xml")}
SERVED = {"export": "[{layout: safetensors}, {layout: tgi}, {layout: vllm}]"}
UNMEASURED = {"verify": "null"}
"""For what goes wrong before anything is measured, and has nothing to do with the reference."""

METHODS = {path: load_recipe(path).quantize.method for path in RECIPES}
FALCONS = [path for path in RECIPES if path.name.startswith("falcon")]
TINY: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "falcon-7b": (factories.falcon_config(), ["query_key_value"]),
    "falcon-40b": (factories.falcon_40b_config(), ["query_key_value"]),
    "falcon-h1": (factories.falcon_h1_config(), ["q_proj", "in_proj"]),
}
"""What stands for the base of a recipe whose name begins so, and the layers that its adapter changes."""

MODELS: dict[str, tuple[PretrainedConfig, list[str], int]] = {
    "llama": (factories.llama_config(), ["q_proj", "v_proj"], 32),
    "llama tied": (factories.llama_config(tie_word_embeddings=True), ["gate_proj", "down_proj"], 64),
    "qwen2": (factories.qwen2_config(), ["q_proj", "o_proj"], 32),
    "mistral": (factories.mistral_config(), ["k_proj"], 32),
    "falcon 7b, 71 heads": (
        factories.falcon_config(hidden_size=71 * 8, num_attention_heads=71, ffn_hidden_size=71 * 8),
        ["query_key_value"],
        -1,
    ),
    "falcon 40b": (factories.falcon_40b_config(), ["query_key_value", "dense"], 32),
    "h1": (factories.falcon_h1_config(), ["q_proj", "in_proj"], 32),
    "gpt-neox": (factories.FAMILIES["gpt-neox"], ["query_key_value"], 32),
    "mixtral": (factories.mixtral_config(), ["q_proj"], 32),
}  # fmt: skip


def prepare(folder: Path, config: PretrainedConfig, targets: list[str]) -> PreTrainedModel:
    """A base, an adapter and texts in `folder`."""
    model = factories.build(config)
    factories.save(model, folder / "base")
    save_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets), folder / "adapter", spread=0.3)
    factories.write_text(folder / "calibration.jsonl", seed=1)
    factories.write_text(folder / "held-out.jsonl", seed=2)
    (folder / "prompts.jsonl").write_text('{"id": "a", "prompt": "The miller"}\n{"id": "b", "prompt": "Total: 12"}\n')
    return model


def overrides(
    folder: Path, *, recipe: Path = GPTQ, group_size: int = 32, changes: dict[str, Any] | None = None
) -> list[str]:
    """What turns a shipped recipe into a run on the tiny model in `folder`."""
    groups: dict[str, dict[str, Any]] = {
        "gptq": {"quantize.group_size": group_size},
        "mixed": {
            "quantize.group_sizes": f"[{group_size}]",
            "quantize.target": "{bits_per_weight: 12}",
            "quantize.windows": 8,
            "quantize.window_tokens": 48,
        },
    }
    calibrated: dict[str, Any] = {
        "quantize.calibration.source": folder / "calibration.jsonl",
        "quantize.calibration.samples": 16,
        "quantize.calibration.sequence_length": 48,
    }
    method = METHODS[recipe]
    values: dict[str, Any] = (groups[method] | calibrated if method in groups else {}) | {
        "load.base": folder / "base",
        "load.adapter": folder / "adapter",
        "verify.text": folder / "held-out.jsonl",
        "verify.prompts": folder / "prompts.jsonl",
        "verify.windows": 6,
        "verify.sequence_length": 48,
        "verify.max_new_tokens": 6,
        "verify.profile": "off",
        "verify.gates": "{mean_kl: {at_most: 5.0}}",
        "output": folder / "out",
    }
    return [f"{key}={value}" for key, value in (values | (changes or {})).items()]


def finish(folder: Path, changes: dict[str, Any] | None = None, *, force: bool = False, group_size: int = 32) -> Result:
    """One layout, where the changes do not say more."""
    chosen = overrides(folder, group_size=group_size, changes={"export": "[{layout: safetensors}]"} | (changes or {}))
    return run(load_recipe(GPTQ, chosen), force=force, device="cpu")


@dataclass(frozen=True)
class Finished:
    """A run that several tests look at, and the folder with what it was made from."""

    folder: Path
    result: Result


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One layout, made under another umask than files have otherwise."""
    previous = os.umask(0o027)
    try:
        return finished(tmp_path_factory)
    finally:
        os.umask(previous)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(tmp_path_factory, FAILING)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(tmp_path_factory, SERVED)


def finished(factory: pytest.TempPathFactory, changes: dict[str, Any] | None = None) -> Finished:
    folder = factory.mktemp("finished")
    prepare(folder, factories.llama_config(), ["q_proj"])
    return Finished(folder, finish(folder, changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_report(files: dict[str, bytes]) -> dict[str, bytes]:
    """What two runs must agree on to the byte; the report holds timings, and the listing its digests."""
    return {name: content for name, content in files.items() if not name.startswith(("report/", LISTING_NAME))}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    config, targets, group_size = MODELS[name]
    model = prepare(tmp_path, config, targets)
    result = finish(tmp_path, group_size=group_size)
    manifest = open_artifact(result.artifact_path).manifest
    assert manifest == result.manifest
    assert manifest.verification is not None
    # eight short windows do not always decide whether the merge of a random mixture is as near as the noise floor asks
    not_passed = {gate.name: gate.verdict for gate in manifest.verification.gates if not gate.passed}
    assert not_passed in ({}, {"merge": "undecided"} if name == "mixtral" else {})
    merged = merge_with_peft(model, tmp_path / "adapter")
    with SafetensorsWeights(result.artifact_path, dtype=torch.float32) as source:
        if name != "mixtral":  # its experts are no linear layers in memory
            assert {layer.name for layer in manifest.layers} == set(linear_names(model))
        for layer in manifest.layers:
            if f"{layer.name}.weight" not in merged:
                assert ".experts." in layer.name
                continue
            weight = merged[f"{layer.name}.weight"].float()
            error = (source.read(f"{layer.name}.weight") - weight).square().mean() / weight.square().mean()
            assert error < 0.06, "the weights must be those of base and adapter, rounded to 4 bits"
    assert 0 < manifest.verification.value("mean_kl") < 1
    assert any("qexport.load" in note for note in manifest.notes) == name.startswith("falcon")
    report = Report.read(result.artifact_path)
    assert report == result.reports["safetensors"]
    assert report.generations is not None
    assert report.generations.prompts == 2


def linear_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not name.endswith("mamba.out_proj")
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    llama = (factories.llama_config(), ["q_proj", "v_proj"])
    prepare(tmp_path, *next((tiny for name, tiny in TINY.items() if recipe.name.startswith(name)), llama))
    with traced_once():
        result = run(load_recipe(recipe, overrides(tmp_path, recipe=recipe)), device="cpu")
    assert result.passed
    several = len(result.manifests) > 1
    for layout, manifest in result.manifests.items():
        assert open_artifact(result.artifact_path / layout if several else result.artifact_path).manifest == manifest
        assert manifest.quantization is not None or layout == "tgi" or METHODS[recipe] == "none"


@cache
def loaded(base: str) -> Checkpoint:
    return load_checkpoint(LoadSettings(base=base))


@pytest.fixture
def found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes name the same base, whose tokenizer takes most of the time of a plan."""
    monkeypatch.setattr("qexport.pipeline.planning.load_checkpoint", lambda load, **_: loaded(load.base))


@pytest.mark.smollm2
@pytest.mark.usefixtures("found_once")
@pytest.mark.parametrize("recipe", [path for path in RECIPES if path not in FALCONS], ids=lambda path: path.name)
def test_every_shipped_recipe_can_be_planned_as_it_stands(recipe: Path) -> None:
    planned = plan(load_recipe(recipe))
    adapter = planned.merged.adapter
    assert adapter is not None
    assert (adapter.origin.name, len(adapter.changed), list(adapter.notes)) == ("smollm2-release-notes", 60, [])


@pytest.mark.parametrize("path", FALCONS, ids=lambda path: path.name)
def test_a_recipe_with_hub_ids_says_offline_what_is_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(path)
    assert recipe.load.base.startswith("tiiuae/")
    assert "your-name" not in path.read_text()
    with pytest.raises(InputError, match=recipe.load.base):
        plan(recipe)


def test_two_runs_write_the_same_bytes_wherever_they_lie(usual: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "there" / "deeper"
    folder.mkdir(parents=True)
    prepare(folder, factories.llama_config(), ["q_proj"])
    runs = [contents(usual.result.artifact_path), contents(finish(folder).artifact_path)]
    assert without_report(runs[0]) == without_report(runs[1])
    assert runs[0].keys() - without_report(runs[0]) == {*REPORT_FILES, LISTING_NAME}
    lists = [set(files[LISTING_NAME].splitlines()) for files in runs]
    assert all(b"  report/" in line for line in lists[0] ^ lists[1])
    reports = [json.loads(files["report/report.json"]) for files in runs]
    assert all(report.pop("timings")["seconds"] > 0 for report in reports)
    assert reports[0] == reports[1]
    for place, files in zip((usual.folder, tmp_path), runs, strict=True):
        assert not any(str(place).encode() in content for content in files.values())


def test_no_calibration_text_and_no_user_enters_the_artifact(usual: Finished) -> None:
    files = contents(usual.result.artifact_path)
    passages = [json.loads(line)["text"] for line in (usual.folder / "calibration.jsonl").read_text().splitlines()]
    for content in files.values():
        assert not any(passage.encode() in content for passage in passages)


def test_the_bases_files_travel_byte_for_byte_and_modes_follow_the_umask(usual: Finished) -> None:
    artifact = usual.result.artifact_path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (artifact / name).read_bytes() == (usual.folder / "base" / name).read_bytes()
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in artifact.rglob("*")}
    assert modes == {False: 0o640, True: 0o750}


def test_an_adapter_that_changes_everything_is_seen_in_the_reference(tmp_path: Path) -> None:
    """The reference is base and adapter, not the base: with another adapter its perplexity is another."""
    prepare(tmp_path, factories.llama_config(), ["q_proj", "v_proj", "o_proj", "down_proj"])
    with_adapter = finish(tmp_path).manifest.verification
    chosen = overrides(tmp_path, changes={"export": "[{layout: safetensors}]"})
    recipe = load_recipe(GPTQ, [text for text in chosen if not text.startswith("load.adapter")])
    bare = recipe.model_copy(update={"load": recipe.load.model_copy(update={"adapter": None})})
    without = run(bare, force=True, device="cpu").manifest.verification
    assert with_adapter is not None
    assert without is not None
    assert abs(with_adapter.value("reference_perplexity") / without.value("reference_perplexity") - 1) > 0.003


def test_a_failed_gate_sets_the_artifact_aside(failed: Finished) -> None:
    folder, result = failed.folder, failed.result
    assert (result.verdict, result.passed) == ("fail", False)
    assert result.artifact_path == folder / "out.rejected"
    assert (result.artifact_path / MANIFEST_NAME).exists()
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("out")) == [
        "out.rejected",
        "out.rejected.sha256",
    ]


def test_a_failed_gate_leaves_its_report_beside_the_artifact(failed: Finished) -> None:
    result = failed.result
    report = Report.read(result.artifact_path)
    assert report.verdict == "fail"
    assert [gate.name for gate in report.gates if gate.verdict == "fail"] == ["mean_kl"]
    assert result.manifest.verification is not None
    assert result.manifest.verification.verdict == "fail"
    assert contents(result.artifact_path).keys() >= REPORT_FILES


def test_an_undecided_gate_sets_the_artifact_aside_too(tmp_path: Path) -> None:
    """Nobody has measured this domain, and without a measured value is no pass."""
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    result = finish(tmp_path, {"verify.gates": "{chrf: {domains: {law: {at_least: 5.0}}}}"})
    assert (result.verdict, result.artifact_path) == ("undecided", tmp_path / "out.rejected")
    not_passed = [gate for gate in Report.read(result.artifact_path).gates if not gate.passed]
    assert [(gate.name, gate.verdict, gate.value) for gate in not_passed] == [("chrf[law]", "undecided", None)]
    assert not (tmp_path / "out").exists()


def test_a_limit_below_the_noise_is_refused_before_anything_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    monkeypatch.setattr("qexport.quantizing.gptq.Gptq.quantize", interrupt)
    with pytest.raises(RecipeError, match="noise floor"):
        finish(tmp_path, {"verify.gates": "{mean_kl: {at_most: 1.0e-9}}"})
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_every_layout_has_its_report_and_its_manifest_has_the_reports_digest(served: Finished) -> None:
    result = served.result
    for layout, manifest in result.manifests.items():
        folder = result.artifact_path / layout
        report = Report.read(folder)
        assert contents(folder).keys() >= REPORT_FILES
        assert report.subject.layouts == [layout]
        assert manifest.verification is not None
        assert manifest.verification.report_sha256 == report.digest()
        assert manifest.verification.gates == report.gates
        assert manifest.verification.figures == [figure for figure in report.figures if figure.domain is None]
        assert not any(name.startswith("report/") for name in manifest.files)
    assert "loading with vLLM" in " ".join(Report.read(result.artifact_path / "vllm").unconfirmed)


@pytest.mark.parametrize("fault", ["prompts", "harness"])
def test_what_verification_would_stumble_over_is_found_in_planning(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    monkeypatch.setattr("qexport.verifying.tasks.measuring._NEEDED", {"no-such-package": (1,)})
    changes: dict[str, dict[str, Any]] = {
        "prompts": {"verify.prompts": tmp_path / "none.jsonl"},
        "harness": {"verify.tasks.tasks": "[arc_easy]"},
    }
    with pytest.raises((InputError, RecipeError), match="none.jsonl" if fault == "prompts" else "no-such-package"):
        plan(load_recipe(GPTQ, overrides(tmp_path, changes=changes[fault])))


def test_a_task_file_that_is_none_is_found_in_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    monkeypatch.setattr("qexport.verifying.tasks.measuring._NEEDED", {})
    (tmp_path / "task.yaml").write_text("task: mine\nprocess_docs: !function evil.run\n")
    with pytest.raises(InputError, match="is not plain data"):
        plan(load_recipe(GPTQ, overrides(tmp_path, changes={"verify.tasks.tasks": f"[{tmp_path}/task.yaml]"})))


def test_an_old_output_is_refused_before_any_work_and_replaced_when_forced(usual: Finished, tmp_path: Path) -> None:
    shutil.copytree(usual.folder, tmp_path, dirs_exist_ok=True)
    first = tmp_path / "out"
    before = contents(first)
    with pytest.raises(RecipeError, match="not empty"):
        finish(tmp_path)
    assert contents(first) == before
    (first / "old").write_text("old")
    after = contents(finish(tmp_path, force=True).artifact_path)
    assert without_report(after) == without_report(before)
    assert after.keys() == before.keys()


@pytest.mark.parametrize("fault", ["nan in the last block", "interrupt"])
def test_what_fails_late_leaves_only_what_a_run_can_go_on_with(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(tmp_path, factories.llama_config(), ["q_proj"])
    expected: type[BaseException] = KeyboardInterrupt
    if fault == "interrupt":
        monkeypatch.setattr("qexport.pipeline.running.measure_folder", interrupt)
    else:
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
        model.save_pretrained(tmp_path / "base")
        expected = InputError
    with pytest.raises(expected):
        finish(tmp_path)
    left = ["out.partial"] if fault == "interrupt" else []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == left


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "words"), [({}, "logits hold NaN or Inf"), ({"verify": "null"}, "not finite")], ids=["verify", "none"]
)
def test_a_model_that_overflows_is_a_numerical_error(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """With verification the reference alone tells it, before anything is quantized; without, quantizing does."""
    model = prepare(tmp_path, factories.llama_config(), ["q_proj"])
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(3e38)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(NumericalError, match=words):
        finish(tmp_path, changes)


def test_calibrating_on_the_held_out_text_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "calibration.jsonl").read_bytes())
    with pytest.raises(InputError, match="calibration documents too"):
        finish(tmp_path, {"verify.text": tmp_path / "copy.jsonl"})


def test_a_base_that_names_two_ends_of_text_is_refused_before_any_work(tmp_path: Path) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(InputError, match="contradict each other: 0 ends a text for the tokenizer"):
        finish(tmp_path)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_the_artifact_is_split_into_shards_of_the_size_asked_for(tmp_path: Path) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    artifact = finish(tmp_path, {"export.0.max_shard_size": "60KB"}).artifact_path
    shards = sorted(artifact.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (artifact / "model.safetensors.index.json").exists()


def test_codes_on_the_disk_are_those_that_were_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that wrote other codes than it was given is caught by reading back."""
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    from qexport.export import tensor_writer

    honest = tensor_writer.write_at
    monkeypatch.setattr(
        tensor_writer, "write_at", lambda path, at, content: honest(path, at, flipped(content) if at else content)
    )
    with pytest.raises(QexportError, match="bytes on disk"):
        finish(tmp_path, UNMEASURED)
    assert not (tmp_path / "out").exists()


def flipped(content: memoryview) -> memoryview:
    spoiled = bytearray(content)
    spoiled[-1] ^= 1
    return memoryview(spoiled)


def test_layouts_with_the_same_weights_share_them_on_the_disk(served: Finished) -> None:
    result = served.result
    assert list(result.manifests) == ["safetensors", "tgi", "vllm"]
    weights = [(result.artifact_path / layout / "model.safetensors").stat() for layout in result.manifests]
    assert len({stat.st_ino for stat in weights}) == 1
    for layout, manifest in result.manifests.items():
        assert open_artifact(result.artifact_path / layout).manifest == manifest
        assert manifest.layout == layout
    assert len({json.dumps(manifest.sizes.model_dump()) for manifest in result.manifests.values()}) == 1


def test_weights_that_layouts_share_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    measured: list[str] = []

    def counting(reference: Reference, opened: ArtifactFolder, **options: Any) -> Verified:
        measured.append(opened.artifact.folder.name)
        return measure_folder(reference, opened, **options)

    monkeypatch.setattr("qexport.pipeline.running.measure_folder", counting)
    nf4 = next(path for path in RECIPES if path.name == "nf4.yaml")
    result = run(load_recipe(nf4, overrides(tmp_path, recipe=nf4)), device="cpu")
    assert measured == ["safetensors", "tgi"]
    drift = {layout: manifest.verification for layout, manifest in result.manifests.items()}
    assert drift["tgi"] is not None
    assert drift["safetensors"] is not None
    assert drift["tgi"].value("mean_kl") == 0 < drift["safetensors"].value("mean_kl")
    assert result.manifests["tgi"].quantization is None
    assert result.manifests["tgi"].layers == []
    measured.clear()
    finish(tmp_path, SERVED | {"output": tmp_path / "gptq"})
    assert measured == ["safetensors"]


def test_a_fault_in_one_of_several_layouts_publishes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])

    def fail(self: object, folder: Path) -> None:
        raise QexportError("planted", where=folder.name)

    monkeypatch.setattr("qexport.export.vllm.layout.VllmLayout.check", fail)
    with pytest.raises(QexportError, match="planted"):
        finish(tmp_path, SERVED | UNMEASURED)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_a_config_that_says_something_else_to_a_server_is_caught_although_the_weights_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    monkeypatch.setattr(
        "qexport.export.tgi.layout.tgi_config", lambda config: tgi_config(config) | {"rms_norm_eps": 0.5}
    )
    with pytest.raises(QexportError, match=r"rms_norm_eps is 0\.5, not 1e-06"):
        finish(tmp_path, SERVED | UNMEASURED)
    assert not (tmp_path / "out").exists()


def test_a_prompt_beyond_the_models_positions_is_refused_before_any_work(tmp_path: Path) -> None:
    prepare(tmp_path, factories.gpt2_config(n_positions=64), ["c_attn"])
    prompts = [{"id": "short", "prompt": "a"}, {"id": "long", "prompt": "b " * 60}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    with pytest.raises(InputError, match="64 positions") as caught:
        finish(tmp_path)
    assert "long" in str(caught.value.where)
    assert "short" not in str(caught.value.where)


def test_a_full_disk_under_gptq_frees_what_waited_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offloaded activations are in a file without a name; a program that goes on must not keep it."""
    prepare(tmp_path, factories.llama_config(), ["q_proj"])
    honest = activations._write

    def full(file: FileIO, content: memoryview, place: int) -> None:
        honest(file, content, place)
        if place:
            raise OSError(errno.ENOSPC, "planted")

    monkeypatch.setattr(activations, "_write", full)
    with pytest.raises(ResourceError, match="disk is full"):
        finish(tmp_path, UNMEASURED)
    opened = [str(path.readlink()) for path in list(Path("/proc/self/fd").iterdir()) if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path / "out"))]
