"""The committed adapter of the demo: what PEFT wrote is whole, small, and trained on text that no measurement uses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "adapters" / "smollm2-release-notes"
LAYERS = 30
RANK = 8
INPUTS = 576
OUTPUTS = {"q_proj": 576, "v_proj": 192}
SHARED_WORDS = 12


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def word_sequences(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + SHARED_WORDS]) for start in range(len(words) - SHARED_WORDS + 1)}


def expected_shapes() -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(LAYERS):
        for projection, outputs in OUTPUTS.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            shapes[f"{stem}.lora_A.weight"] = (RANK, INPUTS)
            shapes[f"{stem}.lora_B.weight"] = (outputs, RANK)
    return shapes


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    return loaded


def test_the_config_names_the_base_and_a_plain_lora_on_the_query_and_value_projections(config: dict[str, Any]) -> None:
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": None,
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_every_layer_has_its_two_pairs_of_factors_in_float32(tensors: dict[str, torch.Tensor]) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_every_factor_is_finite_and_was_trained(tensors: dict[str, torch.Tensor]) -> None:
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert [name for name, tensor in tensors.items() if not tensor.any()] == []  # B starts as zeros


def test_the_adapter_is_smaller_than_two_megabytes() -> None:
    assert sum((FOLDER / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")) < 2e6


def test_the_folder_holds_no_path_of_the_machine_that_trained_it() -> None:
    for name in ("adapter_config.json", "README.md", "train.py"):
        assert re.findall(r"(?<![\w:/.])/(?:\w[\w.-]*/)+|site-packages|\w:\\", (FOLDER / name).read_text("utf-8")) == []


def test_there_are_enough_distinct_examples_and_every_release_note_keeps_the_style() -> None:
    examples = rows(FOLDER / "train.jsonl")
    notes = [row["assistant"] for row in examples if row["id"].startswith("note-")]
    style = re.compile(
        r"Kind: (Added|Changed|Deprecated|Fixed|Removed|Security)\nArea: .+\nNote: .+\.\nAction: .+\.(?!\n)"
    )
    assert len(notes) == 120
    assert [note for note in notes if not style.fullmatch(note)] == []
    assert all(len({row[key] for row in examples}) == len(examples) for key in ("id", "user", "assistant"))


@pytest.mark.parametrize("name", ["general.jsonl", "heldout.jsonl", "heldout-languages.jsonl"])
def test_the_training_text_shares_no_twelve_words_with(name: str) -> None:
    training = set().union(
        *(word_sequences(f"{row['user']} {row['assistant']}") for row in rows(FOLDER / "train.jsonl"))
    )
    measured = set().union(*(word_sequences(row["text"]) for row in rows(ROOT / "calibration" / name)))
    assert training
    assert measured
    assert training & measured == set()


def test_no_prompt_of_the_demo_is_a_training_example() -> None:
    prompts = {row["prompt"] for row in rows(ROOT / "calibration" / "prompts" / "demo.jsonl")}
    assert len(prompts) == 12
    assert prompts & {row["user"] for row in rows(FOLDER / "train.jsonl")} == set()
