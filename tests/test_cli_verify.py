"""`qexport verify`: a finished folder, of qexport or of another maker, against a recipe or a model."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import factories
from adapters import load_adapter
from qexport import pipeline
from qexport.architectures import machine_memory
from qexport.architectures.memory import Budget, Memory, budget
from qexport.artifact.figures import find_figure
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.report import Report
from qexport.cli import main
from qexport.cli.verifying import References, reference_of
from qexport.errors import InputError
from qexport.execution import ExecutionSettings
from qexport.pipeline import expectations, expected_memory, verification
from qexport.verifying.window_share import WindowShare
from test_cli import tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, what it names, and its artifact in `out`."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["run", str(tiny_run(folder)), "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def of_transformers(made: Path) -> Path:
    """The merged model in NF4, as transformers saves it with bitsandbytes."""
    merged = load_adapter(AutoModelForCausalLM.from_pretrained(made / "model"), made / "adapter").merge_and_unload()
    merged.save_pretrained(made / "merged")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(made / "merged", quantization_config=config)
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(made / "theirs")
    for path in (made / "model").iterdir():
        if not path.name.endswith(".safetensors") and path.name != "config.json":
            shutil.copy(path, made / "theirs")
    return made / "theirs"


def verified(artifact: Path, reference: Path, *options: str) -> int:
    return main(["verify", str(artifact), "--reference", str(reference), "--device", "cpu", *options])


def limits(folder: Path, text: str) -> str:
    path = folder / "gates.yaml"
    path.write_text(text)
    return str(path)


def test_a_recipe_measures_what_its_run_has_measured(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(made / "out", made / "recipe.yaml", "--json", "--report", str(tmp_path / "report")) == 0
    captured = capsys.readouterr()
    found, before = Report.model_validate_json(captured.out), Report.read(made / "out")
    assert (found.figures, found.gates, found.generations) == (before.figures, before.gates, before.generations)
    assert (found.identity, found.protocol, found.layers) == (before.identity, before.protocol, before.layers)
    assert found.subject.weights_sha256 == before.subject.weights_sha256
    assert found.command == "qexport verify out --reference recipe.yaml"
    assert Report.read(tmp_path / "report") == found
    written = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert written == ["junit.xml", "report.html", "report.json", "report.md"]
    assert str(made) not in captured.out


def test_the_reports_table_is_shown(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert verified(made / "out", made / "recipe.yaml", "verify.gates={median_kl: {at_most: 9.0}}") == 0
    captured = capsys.readouterr()
    assert any(line.split()[:2] == ["median_kl", "passed"] for line in captured.out.splitlines())
    assert "verify " in captured.err


def test_a_model_with_its_adapter_is_a_reference_too(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is named as in a recipe: here by its name in the current directory."""
    monkeypatch.chdir(made)
    gates = limits(tmp_path, "profile: off\ngates: {mean_kl: {at_most: 0.9}}")
    text = [*short_text(made, tmp_path), "--gates", gates, "--json"]
    assert verified(made / "out", Path("model"), "--adapter", "adapter", *text) == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    assert found.identity.adapter_sha256 == Report.read(made / "out").identity.adapter_sha256
    assert [gate.name for gate in found.gates if gate.limit == 0.9] == ["mean_kl"]


def short_text(made: Path, folder: Path) -> list[str]:
    """Held-out text of some windows of 512 tokens, which is what `verify` takes where no recipe says otherwise."""
    path = factories.write_text(folder / "text.jsonl", passages=60, seed=2)
    return ["--text", str(path)]


def test_an_artifact_is_not_worse_than_itself(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    assert verified(made / "out", made / "recipe.yaml", "--baseline", "out", "--json") == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    paired = {gate.name: (gate.verdict, gate.value) for gate in found.gates if gate.name.startswith("baseline_")}
    assert paired == {
        "baseline_mean_kl": ("pass", 0.0), "baseline_perplexity_ratio": ("pass", 1.0),
        "baseline_top1_agreement": ("pass", 0.0), "baseline_decisive_flips": ("pass", 0.0),
    }  # fmt: skip
    before = Report.read(made / "out")
    assert found.baseline is not None
    assert found.baseline.report_sha256 == before.digest()
    assert found.document_sums == before.document_sums
    assert found.command == "qexport verify out --reference recipe.yaml --baseline out"
    assert not any("another reference" in note for note in found.notes)


def test_an_artifact_that_is_worse_than_the_release_fails_and_says_by_how_much(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The release is the artifact's own report with half of its divergence, and with another adapter."""
    content = json.loads(Report.read(made / "out").to_json())
    content["document_sums"]["kl"] = [value / 2 for value in content["document_sums"]["kl"]]
    drift = next(each for each in content["figures"] if each["name"] == "mean_kl" and each["domain"] is None)
    drift["value"] /= 2
    content["identity"]["adapter_sha256"] = "0" * 64
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert verified(made / "out", made / "recipe.yaml", "--baseline", str(tmp_path), "--report", str(tmp_path)) == 6
    said = capsys.readouterr().err
    assert "error: 1 gate failed: baseline_mean_kl is 0.00" in said
    assert "where the limit is at most 0.000" in said
    assert "keep the release that is in production" in said
    found = Report.read(tmp_path)
    assert [gate.name for gate in found.gates if gate.verdict == "fail"] == ["baseline_mean_kl"]
    assert any("has another reference (adapter)" in note for note in found.notes)
    assert "Against the release" in (tmp_path / "report.html").read_text()
    gates = limits(tmp_path, "profile: off")
    assert main(["gate", str(tmp_path), "--gates", gates]) == 6
    assert "baseline_mean_kl" in capsys.readouterr().err


def test_without_the_adapter_the_artifact_is_another_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = limits(tmp_path, "profile: off\ngates: {mean_kl: {at_most: 0.02}, kl_over_rtn: {at_most: 0}}")
    assert verified(made / "out", made / "model", *short_text(made, tmp_path), "--gates", gates) == 6
    said = capsys.readouterr().err
    assert "error: 3 gates failed: weights (not as in the reference: " in said
    assert "kl_over_rtn is " in said


@pytest.mark.parametrize(
    ("gates", "code", "words"),
    [
        ("profile: off\ngates: {mean_kl: {at_most: 0.001}}", 6, "error: 1 gate failed: mean_kl is "),
        ("profile: off\ngates: {chrf: {domains: {law: {at_least: 1.0}}}}", 7, "error: 1 gate could not be decided"),
        ("profile: off\ngates: {mean_kl: {domains: {law: {at_most: 9.0}}}}", 2, "the held-out text has no such domain"),
        ("profile: off\ngates: {mean_kl: {at_most: 1.0e-9}}", 2, "noise floor"),
        ("profile: of", 2, "gates.yaml:1: profile: "),
    ],
    ids=["failed", "undecided", "never decided", "below the noise", "no gates"],
)
def test_gates_decide_the_exit_code(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gates: str, code: int, words: str
) -> None:
    report = tmp_path / "report"
    options = ["--gates", limits(tmp_path, gates), "--report", str(report), "--json"]
    assert verified(made / "out", made / "recipe.yaml", *options) == code
    captured = capsys.readouterr()
    assert words in captured.err
    document = json.loads(captured.out)
    if code == 2:
        assert document["error"]["exit_code"] == 2
        assert not report.exists()
    else:
        assert document["verdict"] == Report.read(report).verdict == {6: "fail", 7: "undecided"}[code]


@pytest.mark.parametrize(
    ("reference", "options", "words"),
    [
        ("recipe.yaml", ["--adapter", "adapter"], "--adapter is for a model as reference"),
        (
            "model",
            ["merge.dtype=float32", "--text", "heldout.jsonl"],
            "overrides apply to a recipe, and the reference is a model",
        ),
        ("model", ["--adapter", "adapter"], "there is no held-out text to measure on"),
        ("bare.yaml", [], "there is no held-out text to measure on: "),
        ("none.yaml", [], "the recipe cannot be read"),
        ("no such model", ["--text", "heldout.jsonl"], "is not a hub id"),
        ("model", ["--adapter", "no such", "--text", "heldout.jsonl"], "is not a hub id"),
        ("recipe.yaml", ["--gates", "none.yaml"], "the file of gates cannot be read"),
        ("recipe.yaml", ["verify.windows=0"], "verify.windows"),
        ("recipe.yaml", ["verify.text=[]"], "verify.text"),
        ("recipe.yaml", ["--report", "recipe.yaml"], "a file is in the way of the report's folder"),
        ("recipe.yaml", ["--max-memory", "8"], "'8' is not a size"),
        ("recipe.yaml", ["max_memory=0GB"], "max_memory"),
        ("recipe.yaml", ["--max-memory", ""], "'' is not a size"),
        ("no such model", ["--max-memory", "8 apples"], "where: --max-memory"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    reference: str, options: list[str], words: str,
) -> None:  # fmt: skip
    """Before the pipeline is called, whose import takes seconds."""
    monkeypatch.setattr(pipeline, "verify", None)
    monkeypatch.chdir(made)
    recipe = (made / "recipe.yaml").read_text().splitlines()
    (made / "bare.yaml").write_text("\n".join(line for line in recipe if not line.startswith("verify")))
    assert verified(made / "out", Path(reference), *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_the_workers_of_the_command_line_replace_the_recipes(made: Path) -> None:
    def chosen(*overrides: str, workers: int | None = None) -> ExecutionSettings | None:
        recipe = str(made / "recipe.yaml")
        return reference_of(References(recipe, overrides, None, (), None, None, None, workers=workers)).execution

    recipes = ("execution.workers=3", "execution.threads=2")
    assert chosen() is None
    assert chosen(*recipes) == ExecutionSettings(workers=3, threads=2)
    assert chosen(*recipes, workers=5) == ExecutionSettings(workers=5, threads=2)
    assert chosen(workers=5) == ExecutionSettings(workers=5)


def test_a_limit_of_memory_holds_for_whole_models(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if this process had 500 MB already: no whole model fits beside it."""
    monkeypatch.setattr(machine_memory, "resident", lambda: Memory(5 * 10**8, 5 * 10**8))
    for options in ([], ["max_memory=500MB"], ["max_memory=4TB", "--max-memory", "500MB"]):
        assert verified(
            made / "out", made / "recipe.yaml", "verify.max_windows=8", "verify.profile=off", *options, "--json"
        ) in (0, 7)
        captured = capsys.readouterr()
        report = Report.model_validate_json(captured.out)
        assert report.generations is not None
        assert ("the prompts are continued block by block" in captured.err) == bool(options)
        assert report.command.endswith(" ".join(options))
    assert budget() == Budget()


@pytest.mark.parametrize("reference", ["recipe.yaml", "model"])
def test_a_verification_that_needs_more_than_it_may_take_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str
) -> None:
    options = short_text(made, tmp_path) if reference == "model" else []
    assert verified(made / "out", made / reference, *options, "--max-memory", "300MB") == 8
    captured = capsys.readouterr()
    assert re.search(r"the verification needs about 4\d\d\.\d MB of memory, max_memory allows 300", captured.err)
    assert "mend:  allow 4" in captured.err


def test_the_limit_of_a_recipe_its_option_and_the_machine(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        seen.append(budget().limit)
        raise InputError("seen")

    def limit(reference: str, *options: str) -> float:
        assert verified(made / "out", made / reference, *options) == 3
        return seen[-1]

    seen: list[float] = []
    monkeypatch.setattr(verification, "prepare_reference", refuse)

    text = short_text(made, tmp_path)
    monkeypatch.setattr(expectations, "total_memory", lambda: 7e9)
    assert limit("recipe.yaml") == limit("model", *text) == 7e9
    assert limit("recipe.yaml", "max_memory=2GB") == 2e9
    assert limit("recipe.yaml", "max_memory=2GB", "--max-memory", "3GB") == 3e9
    assert limit("model", *text, "--max-memory", "3GB") == 3e9


def test_fewer_windows_go_through_a_block_where_more_do_not_fit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_at_a_time(share: WindowShare, input_ids: torch.Tensor, at_once: int) -> None:
        if len(input_ids) == 8:
            counts.append(at_once)
        begin(share, input_ids, at_once)

    counts: list[int] = []
    begin = WindowShare.begin
    monkeypatch.setattr(WindowShare, "begin", one_at_a_time)
    monkeypatch.setattr(expected_memory, "_needs", lambda _, chosen: {"verify": min(chosen.compared_tokens, 1e4) * 1e5})
    assert (
        verified(
            made / "out", made / "recipe.yaml", "verify.max_windows=8", "verify.profile=off", "--max-memory", "500MB"
        )
        == 0
    )
    assert set(counts) == {1}


def test_windows_beyond_the_most_are_told(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        verified(
            made / "out",
            made / "recipe.yaml",
            "verify.max_windows=7",
            "verify.windows=8",
            "verify.profile=off",
            "--json",
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "note: verify.windows is 8, but max_windows limits it to 7" in captured.err
    assert Report.model_validate_json(captured.out).protocol.windows == 7


def test_a_reference_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "out"]) == 2
    assert "--reference" in capsys.readouterr().err


def test_a_recipe_without_verify_takes_the_text_of_the_command_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = limits(tmp_path, "profile: off\ngates: {mean_kl: {at_most: 0.9}}")
    options = ["verify=null", *short_text(made, tmp_path), "--prompts", str(made / "prompts.jsonl"), "--gates", gates]
    assert verified(made / "out", made / "recipe.yaml", *options, "--json") == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    assert found.generations is not None
    assert [each.id for each in found.generations.comparisons] == ["mill"]


def test_text_and_prompts_of_the_command_line_replace_the_recipes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "other", "prompt": "A letter"}\n')
    options = [*short_text(made, tmp_path), "--prompts", str(tmp_path / "p.jsonl"), "--json"]
    assert verified(made / "out", made / "recipe.yaml", *options) == 0
    found, before = Report.model_validate_json(capsys.readouterr().out), Report.read(made / "out")
    assert found.generations is not None
    assert [each.id for each in found.generations.comparisons] == ["other"]
    assert found.identity.text_sha256 != before.identity.text_sha256
    assert found.protocol.sequence_length == 32


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "model-00002-of-00002.safetensors"])
def test_a_file_that_a_loader_would_read_beside_the_artifact_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    own, foreign = (shutil.copytree(made / "out", tmp_path / each) for each in ("own", "foreign"))
    factories.without_digests(foreign)
    for artifact, words in ((own, "is not listed"), (foreign, "a loader would read beside the artifact")):
        (artifact / name).write_bytes(b"{}")
        for command in (
            ["validate", str(artifact)],
            ["verify", str(artifact), "--reference", str(made / "recipe.yaml")],
        ):
            assert main(command) == 3
            error = capsys.readouterr().err
            assert words in error
            assert name in error


def test_two_configs_that_contradict_each_other_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = factories.without_digests(shutil.copytree(made / "out", tmp_path / "a"))
    second = artifact / "quantize_config.json"
    second.write_text(json.dumps(json.loads(second.read_text()) | {"desc_act": True}))
    for command in (["validate", str(artifact)], ["verify", str(artifact), "--reference", str(made / "recipe.yaml")]):
        assert main(command) == 3
        assert "desc_act is True, in config.json False" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["no folder", "no model", "another file", "another shape"])
def test_a_folder_that_is_no_form_of_the_reference_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    artifact = tmp_path / "a"
    match fault:
        case "no model":
            artifact.mkdir()
        case "another file":
            shutil.copytree(made / "out", artifact)
            (artifact / "extra.py").write_text("")
        case "another shape":
            factories.save(factories.build(factories.llama_config(num_hidden_layers=3)), artifact)
    assert verified(artifact, made / "recipe.yaml", "--report", str(tmp_path / "report")) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "model.layers.2.mlp.up_proj.weight: unexpected" if fault == "another shape" else str(artifact)
    ) in captured.err
    assert not (tmp_path / "report").exists()


def test_a_folder_without_a_manifest_is_measured_all_the_same(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = factories.without_digests(shutil.copytree(made / "out", tmp_path / "a"))
    shutil.rmtree(artifact / "report")
    assert verified(artifact, made / "recipe.yaml", "--json") == 0
    found, before = Report.model_validate_json(capsys.readouterr().out), Report.read(made / "out")
    assert found.figures == before.figures
    assert (found.subject.name, found.subject.layouts, found.subject.method) == ("a", [], before.subject.method)
    assert found.subject.weights_sha256 == before.subject.weights_sha256
    assert {(layer.name, layer.bits) for layer in found.layers} == {(layer.name, layer.bits) for layer in before.layers}
    assert {layer.loss for layer in found.layers} == {None}, "nobody has told"
    assert not [path.name for path in artifact.iterdir() if path.name in ("report", MANIFEST_NAME)]


def test_what_transformers_has_saved_with_bitsandbytes_is_measured(
    made: Path, of_transformers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(of_transformers, made / "recipe.yaml", "verify.profile=off", "--json") == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    assert found.subject.method == "NF4"
    assert {layer.method for layer in found.layers} == {"nf4"}
    kl = find_figure(found.figures, "mean_kl")
    assert kl is not None
    assert kl.value == pytest.approx(independent_kl(made, of_transformers, found), rel=0.15)
    assert "better_than_rtn" not in {gate.name for gate in found.gates}


@torch.no_grad()
def independent_kl(made: Path, artifact: Path, found: Report) -> float:
    """The mean over another cut of the same text, by transformers alone: near, not equal."""
    tokenizer: Any = factories.tokenizer()
    lines = [json.loads(line)["text"] for line in (made / "heldout.jsonl").read_text().splitlines()]
    ids = [token for text in lines for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    count = found.protocol.windows
    windows = torch.tensor(ids[: count * 32]).reshape(count, 32)
    own, other = (
        AutoModelForCausalLM.from_pretrained(folder)(windows).logits[:, :-1].double().log_softmax(-1)
        for folder in (made / "merged", artifact)
    )
    return float((own.exp() * (own - other)).sum(-1).mean())


def test_the_layouts_above_a_folder_are_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("safetensors", "vllm"):
        shutil.copytree(made / "out", tmp_path / "several" / layout, copy_function=os.link)
    assert verified(tmp_path / "several", made / "recipe.yaml") == 3
    assert str(tmp_path / "several" / "vllm") in capsys.readouterr().err


def test_a_merge_that_cannot_be_proven_ends_the_run_before_its_work(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.get_peft_model", lambda *_, **__: 1 / 0)
    with monkeypatch.context() as until_quantizing:
        until_quantizing.setattr("qexport.quantizing.gptq.Gptq.quantize", lambda *_, **__: pytest.fail("it went on"))
        run = ["run", str(made / "recipe.yaml"), "--device", "cpu", "--output", str(tmp_path / "out")]
        assert main(run) == 7
    assert "PEFT cannot load the adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert verified(made / "out", made / "recipe.yaml") == 7
    assert "1 gate could not be decided: merge (" in capsys.readouterr().err
    waived = limits(tmp_path, "profile: off\ngates: {merge_kl: null}")
    assert verified(made / "out", made / "recipe.yaml", "--gates", waived, "--json") == 0
    found = Report.model_validate_json(capsys.readouterr().out)
    assert "merge" not in {gate.name for gate in found.gates}
    assert "the gate merge is waived: verify.gates sets merge_kl to null" in found.notes
