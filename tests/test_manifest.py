from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qexport.artifact import describe_environment
from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import Figure
from qexport.artifact.manifest import (
    MANIFEST_NAME,
    CalibrationRecord,
    FileRecord,
    Manifest,
    Sizes,
    SourceRecord,
    Verification,
)
from qexport.errors import InputError
from qexport.records import LayerRecord
from reports import figure, gate_result, identity, protocol

RECIPE: dict[str, Any] = {"load": {"base": "org/model"}, "quantize": {"method": "gptq", "damp_percent": 0.01}}


def verification(**changes: Any) -> Verification:
    values: dict[str, Any] = dict(
        verdict="pass", figures=[figure("mean_kl", 0.125, noise_floor=1e-4), figure("top1_agreement", 0.875)],
        gates=[gate_result()], identity=identity(), protocol=protocol(), readers=["qexport 0.2.0"],
        unconfirmed=["vLLM"], report_sha256="f" * 64,
    )  # fmt: skip
    return Verification(**(values | changes))


def manifest(**changes: Any) -> Manifest:
    layer = LayerRecord(
        name="model.layers.0.mlp.up_proj", method="gptq", bits=4, group_size=64, loss=0.002, rtn_loss=0.003,
        damp_percent=0.01, tokens=32768, dead_columns=0,
    )  # fmt: skip
    values: dict[str, Any] = dict(
        schema_version=2, qexport_version="0.2.0", environment=describe_environment(torch.device("cpu")),
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
    with pytest.raises(ValidationError, match="value"):
        Figure.model_validate(figure("mean_kl", 0.1).model_dump() | {"value": value})


def test_a_figure_is_found_by_its_name_and_one_that_was_not_measured_is_an_error() -> None:
    assert verification().value("mean_kl") == 0.125
    with pytest.raises(KeyError, match="kl_p99"):
        verification().value("kl_p99")


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
    path.write_text('{"schema_version": 3, "new": {}}')
    with pytest.raises(InputError, match="schema_version 3; this qexport reads up to 2") as caught:
        Manifest.read(path)
    assert "newer one" in str(caught.value.mend)


def test_an_older_schema_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Its figures had no intervals, and its gates no verdicts."""
    path = tmp_path / MANIFEST_NAME
    path.write_text('{"schema_version": 1, "verification": {"mean_kl": 0.1}}')
    with pytest.raises(InputError, match="schema_version 1; this qexport reads 2") as caught:
        Manifest.read(path)
    assert "make the artifact again" in str(caught.value.mend)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": true}', '{"schema_version": 0}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(InputError):
        Manifest.read(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.read(tmp_path)
