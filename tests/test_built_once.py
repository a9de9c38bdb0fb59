"""What a verified run builds and opens: each architecture once, each folder once, each check once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import factories
from qexport.architectures import architecture
from qexport.architectures.architecture import Architecture
from qexport.loading import LoadSettings
from qexport.pipeline import run, verify
from qexport.reading.onnx.weights import OnnxWeights
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.recipe import load_recipe
from qexport.verifying import VerifySettings
from test_end_to_end import GPTQ, overrides, prepare

LAYOUTS = ("safetensors", "tgi", "onnx")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each thing was done, by its name: a model built, names resolved, a folder opened or checked."""
    counts = Counter[str]()

    def count(owner: Any, name: str, key: Callable[..., str]) -> None:
        usual = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            counts[key(*args)] += 1
            return usual(*args, **options)

        patch.setattr(owner, name, counting)

    with monkeypatch.context() as patch:
        count(architecture, "build_on_meta", lambda config: f"model {json.dumps(config.to_dict(), sort_keys=True)}")
        count(architecture, "name_parameters", lambda model: "names")
        count(architecture, "describe_model", lambda model, naming: "structure")
        for kind in (SafetensorsWeights, OnnxWeights):
            count(kind, "__init__", lambda artifact, folder: f"open {folder.name}")
            count(kind, "check_complete", lambda artifact, *_: f"check {artifact.folder.name}")
        yield counts


def once(counts: Mapping[str, int]) -> bool:
    """Whether nothing was done twice, and no more models were built than one in each of two dtypes."""
    return set(counts.values()) == {1} and 1 <= sum(name.startswith("model ") for name in counts) <= 2


def test_a_verified_run_builds_each_architecture_and_opens_each_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, factories.llama_config(), ["q_proj", "v_proj"])
    layouts = ", ".join(f"{{layout: {name}}}" for name in LAYOUTS)
    speed = "{prompt_tokens: 8, new_tokens: 4, repeats: 6}"
    recipe = load_recipe(GPTQ, overrides(tmp_path, changes={"export": f"[{layouts}]", "verify.speed": speed}))
    with counted(monkeypatch) as counts:
        result = run(recipe, device="cpu")
    assert {name for name, report in result.reports.items() if report.timings.speed} == {"onnx"}
    assert once(counts), counts
    assert {name for name in counts if not name.startswith("model ")} == {
        "names", "structure", *(f"{what} {name}" for what in ("open", "check") for name in LAYOUTS),
    }  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder that is to be verified, beside its base and its adapter."""
    prepare(tmp_path, factories.llama_config(), ["q_proj", "v_proj"])
    changes = {"export": "[{layout: safetensors}]", "quantize": "{method: nf4}", "verify": "null"}
    return run(load_recipe(GPTQ, overrides_without_verify(tmp_path, changes)), device="cpu").artifact_path


def overrides_without_verify(folder: Path, changes: dict[str, Any]) -> list[str]:
    kept = [each for each in overrides(folder) if not each.startswith(("verify", "quantize", "export"))]
    return [*kept, *(f"{key}={value}" for key, value in changes.items())]


def measured(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    folder = artifact.parent
    load = LoadSettings(base=str(folder / "base"), adapter=str(folder / "adapter"))
    text = str(folder / "held-out.jsonl")
    settings = VerifySettings(text=text, windows=2, max_windows=2, sequence_length=32, profile="off")
    with counted(monkeypatch) as counts:
        verify(artifact, load, settings, device="cpu")
    return counts


def test_a_verification_builds_the_architecture_and_opens_the_folder_once(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert once(measured(artifact, monkeypatch))


def test_an_architecture_that_is_not_passed_on_is_noticed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Architecture, "of_config", lambda config, known: Architecture(config))
    assert not once(measured(artifact, monkeypatch))


def test_a_folder_that_is_checked_again_is_noticed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.pipeline.verification.check_parameters", check_twice)
    assert not once(measured(artifact, monkeypatch))


def check_twice(reference: Any, artifact: SafetensorsWeights) -> None:
    artifact.check_complete(reference.architecture.structure)
    artifact.check_complete()
