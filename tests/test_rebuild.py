"""`qexport rebuild`: the same bytes from the same inputs; other inputs refused, other bytes found and explained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import factories
from qexport.artifact.attestation import PREDICATE_TYPE, FirstDifference, Rebuild
from qexport.artifact.digests import sha256_file, sha256_json
from qexport.artifact.integrity import write_listing
from qexport.artifact.manifest import MANIFEST_NAME, FileRecord, Manifest
from qexport.artifact.roots import roots_path
from qexport.cli import main
from qexport.pipeline import run
from qexport.pipeline.first_difference import causes_of, first_difference
from qexport.recipe import load_recipe

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified GPTQ artifact of two layouts, beside its inputs."""
    folder = tmp_path_factory.mktemp("rebuild")
    factories.save(factories.build(factories.llama_config(num_hidden_layers=1)), folder / "base")
    factories.write_text(folder / "calibration.jsonl", seed=1)
    factories.write_text(folder / "held-out.jsonl", seed=2)
    recipe = {
        "load": {"base": "./base"},
        "quantize": {
            "method": "gptq",
            "group_size": 32,
            "calibration": {"source": "calibration.jsonl", "samples": 4, "sequence_length": 32},
        },
        "export": [{"layout": "safetensors"}, {"layout": "vllm"}],
        "verify": {"text": "held-out.jsonl", "windows": 2, "sequence_length": 32, "profile": "off"},
        "output": "./out",
    }
    (folder / "r.yaml").write_text(json.dumps(recipe))
    run(load_recipe(folder / "r.yaml"), device="cpu")
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy of one layout without anything that confirms its digests."""
    return shutil.copytree(made / "out/safetensors", tmp_path / "artifact")


def record(folder: Path, **changes: Any) -> None:
    """Writes manifest and listing again, for what is in the folder now."""
    manifest = Manifest.read(folder)
    files = {
        name: FileRecord(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        for name in manifest.files
    }
    changed = manifest.model_copy(update={"files": files, **changes})
    changed.write(folder)
    write_listing(folder, changed)
    roots_path(folder).unlink(missing_ok=True)


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    content["recipe_sha256"] = sha256_json(content["recipe"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def rebuilt(*arguments: str, code: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["rebuild", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_same_inputs_give_the_same_bytes(
    made: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "attestation.json"
    found = rebuilt(str(artifact), "--inputs", str(made), "--attestation", str(file), code=0, capsys=capsys)
    assert json.loads(file.read_text()) == found
    assert found["predicateType"] == PREDICATE_TYPE
    assert found["predicate"]["result"] == "equal"
    assert found["predicate"]["artifact"]["manifestSha256"] == sha256_file(artifact / MANIFEST_NAME)
    assert found["predicate"]["inputs"].keys() == {"load.base", "tokenizer", "quantize.calibration"}
    subjects = {each["name"]: each["digest"]["sha256"] for each in found["subject"]}
    assert subjects[WEIGHTS] == sha256_file(artifact / WEIGHTS)
    assert subjects.keys() == Manifest.read(artifact).files.keys() - {"README.md"}
    assert not {path for path in tmp_path.iterdir() if path.name not in ("artifact", "attestation.json")}


def test_a_manifest_alone_and_a_recipe_are_enough(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(shutil.copy(made / "out/vllm" / MANIFEST_NAME, tmp_path / "m.json"))
    places = ["--recipe", str(made / "r.yaml"), "--to", str(tmp_path / "new"), "--verify"]
    found = rebuilt(manifest, *places, code=0, capsys=capsys)
    assert MANIFEST_NAME in {each["name"] for each in found["subject"]}
    assert found["predicate"]["notCompared"].keys() == {"report"}
    assert (tmp_path / "new/vllm" / MANIFEST_NAME).read_bytes() == Path(manifest).read_bytes()


def test_other_bytes_are_found_at_their_place(made: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(artifact / WEIGHTS)
    name = sorted(name for name in tensors if name.endswith(".scales"))[2]
    before = (artifact / WEIGHTS).read_bytes()
    tensors[name][0, 3] *= 2
    save_file(tensors, artifact / WEIGHTS, {"format": "pt"})
    after = (artifact / WEIGHTS).read_bytes()
    record(artifact)
    found = rebuilt(str(artifact), "--inputs", str(made), code=6, capsys=capsys)["predicate"]
    byte = next(place for place, (x, y) in enumerate(zip(before, after, strict=True)) if x != y)
    assert found["result"] == "different"
    assert [each["name"] for each in found["different"]] == [WEIGHTS]
    assert found["firstDifference"] == {"file": WEIGHTS, "byte": byte, "tensor": name, "tensors": 1}
    assert [cause.split(":")[0] for cause in found["causes"]] == ["nothing that is recorded differs"]


def test_weights_come_first_and_bytes_are_counted_from_the_start(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "model.onnx.data").write_bytes(bytes(3 << 20))
        (folder / "config.json").write_text(folder.name)
    with (b / "model.onnx.data").open("r+b") as file:
        file.seek(2_500_000)
        file.write(b"x")
    names = ["config.json", "model.onnx.data"]
    assert first_difference(names, a, b) == FirstDifference("model.onnx.data", 2_500_000)
    assert first_difference(names, None, b) == FirstDifference("model.onnx.data")
    (b / "model.onnx.data").write_bytes(bytes(5))
    assert first_difference(names, a, b) == FirstDifference("model.onnx.data", 5)


def test_the_cause_is_named(made: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.read(artifact)
    (artifact / WEIGHTS).write_bytes((made / "base" / WEIGHTS).read_bytes())
    environment = manifest.environment.model_copy(update={"torch": "1.0", "cpu_capability": "AVX"})
    record(artifact, environment=environment, qexport_version="0.1")
    assert main(["rebuild", str(artifact), "--inputs", str(made)]) == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cause")]
    assert lines[0] == f"cause     another version of torch: {torch.__version__} here, 1.0 recorded"
    assert "another type of CPU" in lines[1]
    assert "another version of qexport" in lines[2]


def test_other_files_first_blame_qexport_and_names(made: Path) -> None:
    manifest = Manifest.read(made / "out/vllm")
    here = manifest.environment.model_copy(update={"torch": "1.0"})
    found = Rebuild("vllm", "", None, {}, ("0.1", manifest.environment), ("0.2", here), {"a": "1"}, {"a": "2"}, {})
    causes = causes_of(found, FirstDifference("launch/README.md"), ["the base is called x here, and y in the manifest"])
    assert [cause.split(":")[0] for cause in causes] == [
        "the base is called x here, and y in the manifest",
        "another version of qexport",
        "another version of torch",
    ]


@pytest.mark.parametrize("spoiled", ["base", "calibration", "tokenizer"])
def test_an_input_with_another_digest_is_refused_before_anything_is_built(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoiled: str
) -> None:
    inputs = tmp_path / "inputs"
    shutil.copytree(made, inputs, ignore=shutil.ignore_patterns("out*"))
    if spoiled == "base":
        tensors = load_file(inputs / "base" / WEIGHTS)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, inputs / "base" / WEIGHTS, {"format": "pt"})
    elif spoiled == "tokenizer":
        config = json.loads((inputs / "base/tokenizer_config.json").read_text())
        (inputs / "base/tokenizer_config.json").write_text(json.dumps(config | {"x": 1}))
    else:
        factories.write_text(inputs / "calibration.jsonl", seed=3)
    new = tmp_path / "new"
    assert main(["rebuild", str(made / "out/vllm"), "--inputs", str(inputs), "--to", str(new)]) == 3
    error = capsys.readouterr().err
    assert "these are not the inputs that the artifact was made from" in error
    assert {"base": f"load.base: {WEIGHTS}", "calibration": "quantize.calibration: text"}.get(
        spoiled, "tokenizer: "
    ) in error
    assert not new.exists()


def test_what_cannot_be_built_again(made: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--recipe", str(made / "r.yaml"), "quantize.group_size=64"]
    assert main(["rebuild", str(artifact), *other]) == 2
    assert "quantize.group_size: 32 -> 64" in capsys.readouterr().err
    assert main(["rebuild", str(artifact), "--recipe", str(made / "r.yaml"), "export=[{layout: vllm}]"]) == 2
    assert "does not export safetensors" in capsys.readouterr().err
    exported = "export=[{layout: safetensors, max_shard_size: 1MB}]"
    assert main(["rebuild", str(artifact), "--recipe", str(made / "r.yaml"), exported]) == 2
    error = capsys.readouterr().err
    assert "this is not the recipe that the artifact was made with" in error
    assert "max_shard_size" in error
    assert main(["rebuild", str(artifact), "--inputs", str(made / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (artifact / "README.md").write_text("edited")
    assert main(["rebuild", str(artifact), "--inputs", str(made)]) == 3
    assert "has changed since it was written" in capsys.readouterr().err
    assert main(["rebuild", str(made / "out"), "--inputs", str(made)]) == 3


def test_the_digest_of_the_recipe_must_fit(made: Path, tmp_path: Path) -> None:
    content = json.loads((made / "out/vllm" / MANIFEST_NAME).read_text())
    content["recipe"]["quantize"]["group_size"] = 64
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    assert main(["rebuild", str(path), "--inputs", str(made)]) == 3
    content["recipe_sha256"] = sha256_json(content["recipe"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    assert main(["rebuild", str(path), "--inputs", str(made)]) == 6


def test_a_manifest_starts_no_programs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, started = made / "program.sh", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    program.chmod(0o755)
    content = json.loads((made / "out/vllm" / MANIFEST_NAME).read_text())
    content["recipe"]["verify"]["through"] = [{"runtime": "vllm", "python": program.name}]
    write_manifest(tmp_path / "m.json", content)
    found = rebuilt(str(tmp_path / "m.json"), "--inputs", str(made), "--verify", code=0, capsys=capsys)["predicate"]
    assert not started.exists()
    assert found["notCompared"].keys() == {"report", "verify.through", MANIFEST_NAME, "README.md"}


def test_a_file_that_is_not_recorded_differs(made: Path) -> None:
    environment = Manifest.read(made / "out/vllm").environment
    maker = ("1", environment)
    found = Rebuild("vllm", "", None, {}, maker, maker, {"a": "1"}, {"a": "1", "b": "2"}, {})
    assert not found.equal
    assert found.different == ["b"]
    assert found.statement()["predicate"]["different"] == [{"name": "b", "recorded": None, "rebuilt": "2"}]


@pytest.mark.parametrize(("part", "words"), [("files", "names no files"), ("load", "what was loaded")])
def test_a_manifest_that_says_too_little(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, words: str
) -> None:
    content = json.loads((made / "out/vllm" / MANIFEST_NAME).read_text())
    if part == "files":
        content["files"] = {}
    else:
        del content["recipe"]["load"]
    write_manifest(tmp_path / "m.json", content)
    assert main(["rebuild", str(tmp_path / "m.json"), "--inputs", str(made)]) == 3
    error = capsys.readouterr().err
    assert words in error
    assert str(tmp_path / "m.json") in error


def test_a_folder_for_the_attestation_is_there_before_anything_is_built(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rebuild", str(made / "out/vllm"), "--attestation", str(tmp_path / "no/a.json")]) == 2
    assert "the folder does not exist" in capsys.readouterr().err


def test_a_gguf_file_counts_as_weights(tmp_path: Path) -> None:
    assert first_difference(["config.json", "model.gguf"], None, tmp_path) == FirstDifference("model.gguf")
