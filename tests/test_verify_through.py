"""`verify.through` and `--through`: a run and a verification whose artifact a child process serves."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

import trained_models
from endpoint_server import serving
from qexport.artifact.report import Report
from qexport.artifact.served import is_through
from qexport.cli.app import app
from qexport.errors import CompatibilityError, RecipeError
from qexport.gates.deciding_again import decide_again
from qexport.gates.limits import Limit
from qexport.gates.profiles import profile_record
from qexport.gates.serving import decide_served_again
from qexport.pipeline import plan, run
from qexport.pipeline.reference import Gates
from qexport.pipeline.result import Result
from qexport.pipeline.runtimes import check_runtimes, home, refuse_full_context, refuse_homeless, runtimes_of
from qexport.pipeline.serving import measure_through
from qexport.pipeline.verification import verify
from qexport.progress import silent
from qexport.quantizing import profile_of_layer
from qexport.reading.stored_model import open_stored
from qexport.recipe import load_recipe
from qexport.reporting.html import report_html
from qexport.runtimes import RuntimeSettings, parse_through, portable_through
from qexport.verifying import VerifySettings
from qexport.verifying.served import own_reading
from qexport.verifying.speed import Continuing

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PROGRAM = ROOT / "tests" / "runtime_programs" / "llama_program"


@dataclass(frozen=True)
class Made:
    """A recipe, the interpreter that it names, and what its run published."""

    recipe: Path
    python: Path
    result: Result

    def verify(self, *arguments: str) -> Any:
        options = ["verify", str(self.result.artifact_path), "--reference", str(self.recipe), "--json", *arguments]
        return CliRunner().invoke(app, options)


@pytest.fixture(scope="module")
def programs() -> Any:
    """The stand-in takes the place of vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules["qexport.runtimes.child"].PROGRAMS, "vllm", str(PROGRAM))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, programs: Any) -> Made:
    folder = tmp_path_factory.mktemp("through")
    modules = folder / "modules"
    modules.mkdir()
    (modules / "vllm.py").touch()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{modules}:{ROOT}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    trained_models.trained().save_pretrained(folder / "base")
    trained_models.tokenizer().save_pretrained(folder / "base")
    trained_models.write_held_out(folder / "held-out.jsonl", passages=200)
    recipe = {
        "load": {"base": "./base"},
        "quantize": {"method": "nf4"},
        "export": [{"layout": "safetensors"}],
        "verify": {
            "text": "./held-out.jsonl", "windows": 6, "max_windows": 6, "sequence_length": 48, "profile": "off",
            "gates": {"artifact_perplexity": {"at_most": 1000}},
            "through": [{"runtime": "vllm", "python": "./python", "dtype": "float32"}, {"url": "http://localhost:9"}],
        },
        "output": "./artifact",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return Made(folder / "recipe.yaml", python, run(load_recipe(folder / "recipe.yaml"), device="cpu"))


def test_a_run_is_confirmed_by_the_runtime(made: Made) -> None:
    report = made.result.report
    (served,) = report.served
    figures = {figure.name: figure.value for figure in served.figures if figure.domain is None}
    own = {figure.name: figure.value for figure in report.figures if figure.domain is None}
    assert made.result.passed
    assert {gate.name for gate in report.gates} >= {
        "artifact_perplexity", "artifact_perplexity through vllm float32", "fidelity_kl through vllm float32",
    }  # fmt: skip
    assert (served.runtime.name, served.runtime.version, served.runtime.dtype) == ("vllm", "1.2", "float32")
    assert (served.runtime.kernels, served.runtime.arguments) == ({"Linear4bit": 21}, {"eager": "True"})
    assert figures["fidelity_kl"] < 1e-9
    assert figures["mean_kl"] == pytest.approx(own["mean_kl"], rel=0.05)
    assert figures["fidelity_continuations"] == 1.0
    assert "vllm float32 (vllm 1.2)" in report.readers
    assert [each for each in report.unconfirmed if "localhost" in each]


def test_the_report_is_read_again_and_says_who_confirmed(made: Made) -> None:
    path = made.result.artifact_path
    report = Report.read(path)
    assert report == made.result.report
    assert "vllm float32 (vllm 1.2)" in report_html(report)
    manifest = (path / "qexport-manifest.json").read_text()
    card = (path / "README.md").read_text().replace("\\", "")
    assert "## Verification\n\nPassed: All 7 gates passed. Measured through qexport" in card
    assert "vllm float32 (vllm 1.2); unconfirmed: " in card
    assert str(made.python) not in manifest + (path / "report" / "report.json").read_text()
    assert json.loads(manifest)["recipe"]["verify"]["through"][0]["python"] == "python"


def test_gates_are_decided_again_for_the_runtime_too(made: Made) -> None:
    report = made.result.report
    strict = VerifySettings.model_validate(
        {"text": "x", "profile": "off", "gates": {"mean_kl": {"at_most": 1e-4}, "fidelity_kl": {"at_most": 0.5}}}
    )
    own, _ = decide_again(report, strict, profile_of_layer)
    served, notes = decide_served_again(report, strict, profile_of_layer)
    assert {gate.name for gate in own} == {"config", "files", "tokenizer", "weights", "mean_kl"}
    assert {gate.name: gate.limit for gate in served} == {
        "mean_kl through vllm float32": 1e-4, "fidelity_kl through vllm float32": 0.5,
    }  # fmt: skip
    assert notes == []
    waived = VerifySettings.model_validate({"text": "x", "profile": "off", "gates": {"fidelity_kl": None}})
    served, notes = decide_served_again(report, waived, profile_of_layer)
    assert served == []
    assert notes == ["the gate fidelity_kl is waived: verify.gates sets fidelity_kl to null"]


def test_a_limit_set_to_null_is_waived_and_limits_on_other_figures_are_listed(made: Made) -> None:
    changes = ["verify.gates.fidelity_kl=null", "verify.gates.identical_generations={at_least: 0.5}"]
    recipe = load_recipe(made.recipe, changes)
    assert recipe.verify is not None
    check_runtimes(recipe.verify.model_copy(update={"through": []}))  # null limits nothing
    program = [each for each in recipe.verify.through if each.runtime]
    settings = recipe.verify.model_copy(update={"through": program})
    report = verify(made.result.artifact_path, recipe.load, settings, device="cpu")
    (served,) = report.served
    names = {gate.name for gate in report.gates if is_through(gate)}
    assert names == {"artifact_perplexity through vllm float32"}
    assert served.fidelity_limit is not None
    assert served.notes == [
        "the gate fidelity_kl is waived: verify.gates sets fidelity_kl to null",
        "not limited here: identical_generations",
    ]


def test_the_speed_of_codes_is_the_runtimes(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report, its page and the gates name the runtime; our own reader is not timed. The clock does not depend on
    the machine.
    """

    def timed(runtime: Continuing, prompt: list[int], new_tokens: int) -> tuple[float, int]:
        return 0.1 * new_tokens, len(runtime.continued([prompt], new_tokens)[0])

    monkeypatch.setattr("qexport.verifying.speed._timed", timed)
    changes = [
        "verify.speed={repeats: 6, prompt_tokens: 8, new_tokens: 3}",
        "verify.gates.speed_ratio={at_least: 0.000001}",
    ]
    recipe = load_recipe(made.recipe, changes)
    assert recipe.verify is not None
    program = [each for each in recipe.verify.through if each.runtime]
    settings = recipe.verify.model_copy(update={"through": program})
    report = verify(made.result.artifact_path, recipe.load, settings, device="cpu")
    (served,) = report.served
    assert report.timings.speed is None
    assert served.speed is not None
    assert served.speed.prompt_tokens == 8
    assert served.speed.artifact_tokens_per_second == pytest.approx([10.0] * 6)
    assert {"speed_ratio", "first_token_ratio"} <= {figure.name for figure in served.figures}
    speeds = {gate.name: gate.verdict for gate in report.gates if gate.figure == "speed_ratio"}
    assert speeds == {"speed_ratio through vllm float32": "pass"}
    again, _ = decide_again(report, settings, profile_of_layer)
    assert "speed_ratio" not in {gate.figure for gate in again}
    page = report_html(report)
    assert "speed through vllm float32" in page
    assert "qexport.load" not in page
    nothing = recipe.verify.model_copy(update={"through": []})
    alone = verify(made.result.artifact_path, recipe.load, nothing, device="cpu")
    assert {gate.name: gate.verdict for gate in alone.gates}["speed_ratio"] == "undecided"
    assert "is measured through one: verify.through or --through" in report_html(alone)


def test_a_limit_on_a_runtime_that_was_not_asked_is_undecided(made: Made) -> None:
    settings = VerifySettings.model_validate({"text": "x", "profile": "off", "gates": {"fidelity_kl": {"at_most": 1}}})
    unserved = made.result.report.model_copy(update={"served": []})
    gates, _ = decide_again(unserved, settings, profile_of_layer)
    assert {gate.name: gate.verdict for gate in gates}["fidelity_kl"] == "undecided"
    assert decide_served_again(unserved, settings, profile_of_layer) == ([], [])


def test_what_is_served_otherwise_fails_the_command(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXPORT_TEST_FAULT", "norm x 1.1")
    found = made.verify("--through", f"vllm@{made.python},dtype=float32")
    report = json.loads(found.stdout)
    assert found.exit_code == 6
    assert "fidelity_kl through vllm float32 is" in found.stderr
    assert "check that it serves this very folder" in found.stderr
    assert "serving with vllm float32 (fail)" in report["unconfirmed"]
    assert "--through vllm@python,dtype=float32" in report["command"]


def test_another_dtype_than_the_entry_says_has_the_limit_of_the_narrower(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXPORT_TEST_FAULT", "bfloat16")
    more = ["verify.windows=18", "verify.max_windows=18"]  # with six, the gate is undecided on some CPUs
    found = made.verify(*more, "--through", f"vllm@{made.python},dtype=float32")
    (served,) = json.loads(found.stdout)["served"]
    assert found.exit_code == 6
    assert "fidelity_kl through vllm float32 is" in found.stderr
    assert served["runtime"]["dtype"] == "bfloat16"
    assert "vllm float32 says that it computes in bfloat16, not in float32" in served["notes"]
    unsaid = json.loads(made.verify("--through", f"vllm@{made.python}").stdout)
    (gate,) = [gate for gate in unsaid["gates"] if gate["name"] == "fidelity_kl through vllm"]
    assert gate["verdict"] == "pass"


def test_a_runtime_that_cannot_load_the_layout_is_refused_first(made: Made) -> None:
    found = made.verify("--through", f"gptqmodel@{made.python}")
    assert found.exit_code == 2  # the environment has no such module
    assert "its environment has no module gptqmodel" in found.stderr


def test_a_plan_finds_a_missing_interpreter_and_a_layout_for_none(made: Made) -> None:
    with pytest.raises(RecipeError, match=r"vllm is not there: .*No such file"):
        plan(load_recipe(made.recipe, ["verify.through.0.python=./nowhere"]))
    settings = VerifySettings.model_validate({"text": "x", "through": [{"runtime": "onnxruntime-genai"}]})
    with pytest.raises(CompatibilityError, match="loads none of the layouts safetensors, tgi"):
        refuse_homeless(settings, ["safetensors", "tgi"])
    with pytest.raises(RecipeError, match="only a runtime gives what these gates limit"):
        plan(load_recipe(made.recipe, ["verify.through=[]", "verify.gates.fidelity_kl={at_most: 0.1}"]))


def test_a_plan_refuses_gates_on_the_speed_of_codes_that_no_runtime_measures(made: Made) -> None:
    gate = "verify.gates.first_token_ratio={at_least: 0.5}"
    with pytest.raises(RecipeError, match="only the speed of a runtime is measured") as found:
        plan(load_recipe(made.recipe, ["verify.through=[]", gate]))
    assert found.value.where == "verify.gates.first_token_ratio; layouts: safetensors"
    plan(load_recipe(made.recipe, ["verify.through=[]", "verify.gates.first_token_ratio=null"]))
    plan(load_recipe(made.recipe, ["verify.through=[]", gate, "quantize={method: none}"]))
    plan(load_recipe(made.recipe, [gate]))


def test_a_run_refuses_limits_that_only_endpoints_could_decide(made: Made) -> None:
    changes = ["verify.through=[{url: 'http://localhost:9'}]", "verify.gates.fidelity_kl={at_most: 0.1}"]
    with pytest.raises(RecipeError, match="a run asks no endpoint") as found:
        plan(load_recipe(made.recipe, changes))
    assert found.value.where == "verify.gates.fidelity_kl"


def test_windows_as_long_as_the_context_leave_a_program_no_room(made: Made) -> None:
    with pytest.raises(
        CompatibilityError, match=r"vllm needs room for 257 tokens, the model's context has 256"
    ) as found:
        plan(load_recipe(made.recipe, ["verify.sequence_length=256"]))
    assert found.value.mend == "set verify.sequence_length to 255 or less"
    plan(load_recipe(made.recipe, ["verify.sequence_length=255"]))
    short = load_recipe(made.recipe, ["verify.sequence_length=30"]).verify
    assert short is not None
    with pytest.raises(CompatibilityError, match="room for 46 tokens"):  # 29 are continued by 16
        refuse_full_context(short, {"max_position_embeddings": 45})
    refuse_full_context(short, {"max_position_embeddings": 46})
    refuse_full_context(short.model_copy(update={"through": short.through[1:]}), {"max_position_embeddings": 30})


def test_limits_on_what_only_runtimes_tell_hold_once_for_the_same_weights(made: Made) -> None:
    changes = [
        "quantize={method: none}",
        "export=[{layout: safetensors}, {layout: vllm}]",
        "verify.gates.fidelity_kl={at_most: 0.5}",
        f"output={made.recipe.parent}/both",
    ]
    recipe = load_recipe(made.recipe, changes)
    result = run(recipe, device="cpu")
    assert result.passed
    reports = {name: Report.read(result.artifact_path / name) for name in ("vllm", "safetensors")}
    assert {name: report.served_in for name, report in reports.items()} == {"vllm": None, "safetensors": "vllm"}
    assert [len(report.served) for report in reports.values()] == [1, 0]
    assert "fidelity_kl through vllm float32" in {gate.name for gate in reports["vllm"].gates}
    assert recipe.verify is not None
    for report in reports.values():
        again, _ = decide_again(report, recipe.verify, profile_of_layer)
        served, notes = decide_served_again(report, recipe.verify, profile_of_layer)
        assert {gate.name: gate.verdict for gate in [*again, *served]} == {
            gate.name: gate.verdict for gate in report.gates
        }
    assert notes == ["limits on what only runtimes tell are decided in the report of the layout vllm"]


def test_an_endpoint_that_rounds_activations_must_drift_as_our_reading_does(made: Made) -> None:
    """It serves what our reading computes, then the same with a layer of zeros."""
    changes = ["quantize={method: w8a8}", "verify.through=[]", f"output={made.recipe.parent}/w8a8"]
    recipe = load_recipe(made.recipe, changes)
    folder = run(recipe, device="cpu").artifact_path
    assert recipe.verify is not None
    verdicts = []
    with open_stored(folder, dtype=torch.float32) as artifact, own_reading(artifact, CPU).whole() as model:
        for factor in (1.0, 0.0):
            model.get_parameter("model.layers.1.mlp.down_proj.weight").data.mul_(factor)
            with serving("vllm", model, trained_models.tokenizer()) as (url, _):
                settings = recipe.verify.model_copy(update={"through": [RuntimeSettings(url=url)]})
                report = verify(folder, recipe.load, settings, device="cpu")
            verdicts.append({gate.name.split(" through")[0]: gate.verdict for gate in report.gates if is_through(gate)})
            again, _ = decide_served_again(report, settings, profile_of_layer)
            assert again == [gate for gate in report.gates if is_through(gate)]
    sound = {"tokenizer": "pass", "artifact_perplexity": "pass"}
    assert verdicts[0] == sound | {"kl_over_reading at_most": "pass", "kl_over_reading at_least": "pass"}
    assert verdicts[1] == sound | {"kl_over_reading at_most": "fail", "kl_over_reading at_least": "pass"}


def test_a_layout_that_no_program_serves_is_undecided() -> None:
    limits = [Limit("mean_kl", None, "at_most", 1.0, True), Limit("fidelity_kl", None, "at_most", 1.0, True)]
    gates = Gates(profile_record(VerifySettings(text="x"), "off"), limits, [], [])
    nothing: Any = None  # is not looked at without runtimes
    found = measure_through(nothing, nothing, gates, [], progress=silent)
    assert [(gate.name, gate.verdict, gate.reason) for gate in found.gates] == [
        ("fidelity_kl", "undecided", "not measured")
    ]
    assert found.decided_in("vllm").gates == ()


def test_each_runtime_serves_one_layout() -> None:
    settings = VerifySettings.model_validate(
        {"text": "x", "through": [{"runtime": "vllm"}, {"runtime": "gptqmodel"}, {"url": "http://h:1"}]}
    )
    assert home(RuntimeSettings(runtime="llama.cpp"), ["safetensors", "gguf"]) == "gguf"
    layouts = ["safetensors", "tgi", "vllm"]
    assert [home(each, layouts) for each in settings.through] == ["vllm", "safetensors", None]
    assert runtimes_of("vllm", settings, layouts)[0] == settings.through[:1]
    assert runtimes_of("tgi", settings, layouts)[0] == []


PARSED = {
    "vllm": {"runtime": "vllm"},
    "vllm@.venv/bin/python,dtype=float16": {"runtime": "vllm", "python": ".venv/bin/python", "dtype": "float16"},
    "http://localhost:8000,timeout=9": {"url": "http://localhost:8000", "timeout": 9},
    "llama.cpp@a/python,dtype=float32": {"runtime": "llama.cpp", "python": "a/python", "dtype": "float32"},
    "gptqmodel,max_memory=8GB": {"runtime": "gptqmodel", "max_memory": "8GB"},
}


@pytest.mark.parametrize("text", PARSED)
def test_options_are_parsed(text: str) -> None:
    assert parse_through(text) == RuntimeSettings.model_validate(PARSED[text])


@pytest.mark.parametrize(
    "text",
    ["tgi", "llama.cpp,dtype=float16", "", "vllm,dtype", "vllm,dtype=int8", "vllm,dtype=float16,dtype=float32",
     "ftp://x", "http://u:p@host", "http://h/?key=1", "http://h,python=x", "vllm,timeout=0"],
)  # fmt: skip
def test_other_options_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--through was not understood"):
        parse_through(text)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        found = parse_through(text)
    except RecipeError:
        return
    assert (found.runtime is None) != (found.url is None)


def test_commands_name_no_folder_of_this_machine() -> None:
    assert portable_through("vllm@/a/b/python,dtype=float16") == "vllm@python,dtype=float16"
    assert portable_through("http://host:1") == "http://host:1"
    assert portable_through("vllm") == "vllm"


def test_two_entries_need_two_labels() -> None:
    with pytest.raises(ValidationError, match="vllm is listed twice"):
        VerifySettings.model_validate({"text": "x", "through": [{"runtime": "vllm"}, {"runtime": "vllm"}]})
