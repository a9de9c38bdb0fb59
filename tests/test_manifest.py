from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qexport.artifact.digest import sha256_json
from qexport.artifact.environment import describe_environment
from qexport.artifact.manifest import (
    MANIFEST_NAME,
    CalibrationRecord,
    Comparison,
    FileRecord,
    Gate,
    Generations,
    LayerRecord,
    Manifest,
    Sizes,
    SourceRecord,
    Verification,
)
from qexport.errors import InputError

RECIPE: dict[str, Any] = {"load": {"base": "org/model"}, "quantize": {"method": "gptq", "damp_percent": 0.01}}


def verification(**changes: Any) -> Verification:
    comparison = Comparison(id="a", prompt="Où ?", reference="ici", artifact="là", first_difference=0)
    values: dict[str, Any] = dict(
        reference_perplexity=25.67, artifact_perplexity=29.08, mean_kl=0.125, top1_agreement=0.875,
        tokens=511, windows=1, sequence_length=512, text_sha256="b" * 64,
        generations=Generations(prompts=1, identical=0, max_new_tokens=8, comparisons=[comparison]),
        gates=[Gate(name="max_kl", value=0.125, limit=0.2, passed=True)],
        readers=["qexport 0.1.0"], unconfirmed=["vLLM"],
    )  # fmt: skip
    return Verification(**(values | changes))


def manifest(**changes: Any) -> Manifest:
    layer = LayerRecord(
        name="model.layers.0.mlp.up_proj", method="gptq", bits=4, group_size=64, loss=0.002, rtn_loss=0.003,
        damp_percent=0.01, tokens=32768, dead_columns=0,
    )  # fmt: skip
    values: dict[str, Any] = dict(
        schema_version=1, qexport_version="0.1.0", environment=describe_environment(torch.device("cpu")),
        layout="safetensors", recipe=RECIPE, recipe_sha256=sha256_json(RECIPE),
        base=SourceRecord(kind="hub", name="org/model", revision="abc", sha256={"model.safetensors": "a" * 64}),
        adapter=None, notes=[], quantization={"bits": 4}, layers=[layer],
        calibration=CalibrationRecord(sha256="c" * 64, origin="general.jsonl", samples=64, sequence_length=512),
        tokenizer={"tokenizer.json": "d" * 64}, files={"config.json": FileRecord(size=2, sha256="e" * 64)},
        sizes=Sizes(parameters=100, total_bytes=60, bits_per_weight=4.8), verification=verification(),
    )  # fmt: skip
    return Manifest(**(values | changes))


def test_a_manifest_read_back_equals_the_one_written(tmp_path: Path) -> None:
    original = manifest()
    path = original.write(tmp_path)
    assert path.name == MANIFEST_NAME
    assert Manifest.read(path) == original
    assert Manifest.read(tmp_path) == original


def test_its_text_is_canonical(tmp_path: Path) -> None:
    text = manifest().to_json()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert text.isascii()
    assert Manifest.read(manifest().write(tmp_path)).to_json() == text


def test_it_names_no_host_user_folder_or_time() -> None:
    text = manifest().to_json()
    for secret in (platform.node(), str(Path.cwd()), str(Path.home()) + "/", f'"{getpass.getuser()}"'):
        assert secret not in text
    assert not {"time", "date", "created", "host", "user"} & set(json.loads(text))


def test_it_records_what_the_bytes_depend_on() -> None:
    environment = json.loads(manifest().to_json())["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["cpu_capability"].startswith(torch.backends.cpu.get_cpu_capability())
    assert environment["device"] == "cpu"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1", None, True])
def test_a_figure_that_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="mean_kl"):
        verification(mean_kl=value)


def test_nan_inside_the_recipe_is_refused() -> None:
    with pytest.raises(ValidationError):
        manifest(recipe={"a": float("nan")})


def test_a_recipe_that_was_changed_afterwards_is_noticed(tmp_path: Path) -> None:
    path = manifest().write(tmp_path)
    path.write_text(path.read_text().replace("org/model", "org/other"))
    with pytest.raises(InputError, match="recipe_sha256"):
        Manifest.read(path)


def test_unknown_and_missing_fields_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    content = json.loads(manifest().to_json())
    content["colour"] = 1
    del content["layout"]
    content["sizes"]["parameters"] = "100"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        Manifest.read(path)
    assert all(name in str(caught.value) for name in ("colour", "layout", "sizes.parameters"))


def test_a_newer_schema_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    path.write_text('{"schema_version": 2, "new": {}}')
    with pytest.raises(InputError, match="schema_version 2; this qexport reads up to 1") as caught:
        Manifest.read(path)
    assert "newer one" in str(caught.value.mend)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": true}', '{"schema_version": 0}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(InputError):
        Manifest.read(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.read(tmp_path)
