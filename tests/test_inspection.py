"""`qexport validate ARTIFACT`: what is in a finished folder, and what a server would say to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import factories
import stored_models
from qexport import load
from qexport.cli import main
from qexport.errors import InputError
from qexport.pipeline import plan, run
from qexport.pipeline.inspection import inspect_artifact
from qexport.recipe import load_recipe
from quantized_models import QuantizedModel, gptq_method

RECIPE = """\
load: {base: ./model}
quantize: {method: none}
export: [{layout: safetensors}, {layout: tgi}]
output: out
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two layouts."""
    folder = tmp_path_factory.mktemp("published")
    factories.save(factories.build(factories.llama_config()), folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "recipe.yaml")
    assert plan(recipe).layouts
    return run(recipe, device="cpu").artifact_path


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("nf4 double", "NF4, double quantization"),
        ("fp4", "FP4"),
        ("int8", "LLM.int8"),
        ("w8a8", "compressed-tensors, int-quantized"),
        ("gptq", "GPTQ, 4 bits, group_size 32, asymmetric"),
    ],
)
def test_a_folder_of_another_maker_is_counted_and_its_loaders_are_named(tmp_path: Path, name: str, method: str) -> None:
    model = factories.build(factories.falcon_config())
    folder = stored_models.write(model, tmp_path / "a", stored_models.QUANTIZATIONS[name])
    found = inspect_artifact(folder)
    assert (found.layout, found.method, found.quantized_layers) == (None, method, 8)
    assert found.unquantized_tensors == len(model.state_dict()) - 1 - 8  # the head is tied
    assert found.total_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    lines = found.lines()
    assert "layout    no manifest, digests unknown" in lines
    assert "loads     qexport.load" in lines


def test_a_loader_that_is_silently_wrong_stands_out(tmp_path: Path) -> None:
    QuantizedModel(factories.build(factories.falcon_config())).write(tmp_path / "a")
    lines = inspect_artifact(tmp_path / "a").lines()
    assert any(line.startswith("WRONG     transformers + gptqmodel: it fills") for line in lines)
    assert "loads     gptqmodel" in lines


def test_the_layout_comes_from_the_manifest_and_every_digest_is_checked(published: Path, tmp_path: Path) -> None:
    assert inspect_artifact(published / "safetensors").layout == "safetensors"
    found = inspect_artifact(published / "tgi")
    assert "layout    tgi" in found.lines()
    assert (
        "digests   unchanged: every file is listed and has its digest, and the root digest is the one in out.sha256"
        in (found.lines())
    )
    assert {loader.name: loader.verdict for loader in found.loaders}["TGI"] == "yes"


def test_a_changed_file_is_refused(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published / "safetensors" / "README.md"
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"x")
        assert main(["validate", str(path.parent)]) == 3
    finally:
        path.write_bytes(before)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "has changed since it was written" in captured.err


FAULTS_WITHOUT_A_MODEL = {
    "a changed file": ("README.md", b"x", "has changed since it was written"),
    "changed weights": ("model.safetensors", b"x", "has changed since it was written"),
    "a file too many": ("notes.txt", b"x", "is not listed"),
    "a changed listing": ("SHA256SUMS", b"x", "SHA256SUMS has changed"),
    "a changed manifest": ("qexport-manifest.json", b" ", "has changed since it was written"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "added", "said"), FAULTS_WITHOUT_A_MODEL.values(), ids=FAULTS_WITHOUT_A_MODEL)
def test_what_needs_no_model_is_said_before_torch_is_imported(
    published: Path, tmp_path: Path, name: str, added: bytes, said: str
) -> None:
    folder = shutil.copytree(published / "safetensors", tmp_path / "a")
    with (folder / name).open("ab") as file:
        file.write(added)
    program = "import sys; from qexport.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "validate", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said in done.stderr
    assert done.returncode == 0, done.stderr


def test_the_folder_above_two_layouts_names_them(published: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        inspect_artifact(published)
    assert f"{published / 'safetensors'}, {published / 'tgi'}" in str(caught.value)


def test_a_folder_whose_tensors_are_not_the_models_is_refused(tmp_path: Path) -> None:
    QuantizedModel(factories.build(factories.llama_config())).write(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match="not the model"):
        inspect_artifact(tmp_path / "a")


def test_a_servers_demands_are_told_one_by_one(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(published / "tgi"), "--server", "tgi"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = inspect_artifact(published / "tgi", server="tgi").checks
    assert len(checks) > 10
    assert [line for line in lines if line.startswith(("ok ", "FAILED "))] == [
        f"ok        {check.name} ({check.source})" for check in checks
    ]


def test_a_demand_that_is_not_met_ends_with_exit_code_4(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(published / "safetensors"), "--server", "tgi"]) == 4
    captured = capsys.readouterr()
    failed = [line for line in captured.out.splitlines() if line.startswith("FAILED")]
    assert any("rope_theta" in line for line in failed)
    assert f"error: {len(failed)} of " in captured.err
    assert "demands of tgi are not met" in captured.err


def test_json_is_one_document_also_where_a_demand_fails(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(published / "safetensors"), "--server", "tgi", "--json"]) == 4
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["layout"] == "safetensors"
    assert document["digests_checked"] is True
    assert document["server"] == "tgi"
    assert {"name", "source", "passed", "detail"} == set(document["checks"][0])
    assert not all(check["passed"] for check in document["checks"])
    assert {"name": "transformers", "verdict": "yes", "reason": ""} in document["loaders"]


def test_a_recipe_is_sent_to_plan(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(published.parent / "recipe.yaml")
    assert main(["validate", recipe, "--server", "tgi"]) == 2
    assert f"for a recipe: qexport plan {recipe}" in capsys.readouterr().err


def test_codes_in_other_groups_are_told(tmp_path: Path) -> None:
    QuantizedModel(factories.build(factories.llama_config()), gptq_method(bits=8, group_size=-1)).write(tmp_path / "a")
    assert inspect_artifact(tmp_path / "a").method == "GPTQ, 8 bits, group_size -1, symmetric"


def test_vllms_demands_are_told_too(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(published / "safetensors"), "--server", "vllm"]) in (0, 4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "FAILED "))]
    assert len(lines) == len(inspect_artifact(published / "safetensors", server="vllm").checks) > 5


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": "two"},
        {"hidden_size": 1 << 62},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}, "hidden_act": "no such"},
    ],
)
def test_values_that_make_no_model_are_the_folders_fault(
    published: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = factories.without_digests(shutil.copytree(published / "safetensors", tmp_path / "a"))
    change_config(folder, changes)
    for reader in (inspect_artifact, load):
        with pytest.raises(InputError):
            reader(folder)


def test_values_that_a_rule_of_vllm_cannot_judge_break_it(published: Path, tmp_path: Path) -> None:
    folder = factories.without_digests(shutil.copytree(published / "safetensors", tmp_path / "a"))
    change_config(folder, {"architectures": 5})
    failed = inspect_artifact(folder, server="vllm").failed
    assert any("cannot be judged" in check.detail for check in failed)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
