"""A second real model, so that nothing is made for one: Gemma 3 of 270 million parameters, from its GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from qexport import run
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.recipe import load_recipe

FILE = os.environ.get("QEXPORT_GEMMA", "")
RECIPES = Path(__file__).parents[2] / "recipes"

pytestmark = pytest.mark.skipif(not FILE, reason="QEXPORT_GEMMA names no file")


def test_the_model_is_the_one_that_transformers_reads() -> None:
    found, path = load_checkpoint(LoadSettings(base=FILE)), Path(FILE)
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    expected = {name: t for name, t in oracle.state_dict().items() if name not in oracle.all_tied_weights_keys}
    assert set(found.weights.specs()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.weights.read(name), tensor), name
    for key in ("layer_types", "rope_parameters", "query_pre_attn_scalar", "sliding_window", "head_dim"):
        assert found.config[key] == getattr(oracle.config, key), key


def test_a_text_begins_with_its_token() -> None:
    tokenizer = open_tokenizer(load_checkpoint(LoadSettings(base=FILE)))
    assert tokenizer("Hello  world 2024\n")["input_ids"] == [
        2,
        9259,
        138,
        12392,
        236743,
        236778,
        236771,
        236778,
        236812,
        107,
    ]


@pytest.mark.parametrize(
    ("recipe", "most"), [("gptq-4bit", 0.2), ("nf4", 0.3), ("int8", 0.01), ("w8a8", 0.06), ("bf16", 1e-9)]
)
def test_a_run_passes_the_gates_of_its_profile(recipe: str, most: float, tmp_path: Path) -> None:
    """The figures of benchmarks/README.md, with some room."""
    overrides = [
        f"load.base={FILE}", "load.adapter=null", "export=[{layout: safetensors}]", f"output={tmp_path / 'out'}",
        "verify={text: calibration/heldout.jsonl, windows: 24, sequence_length: 256}",
    ]  # fmt: skip
    if recipe == "gptq-4bit":
        overrides += ["quantize.calibration.samples=32", "quantize.calibration.sequence_length=256"]
    result = run(load_recipe(RECIPES / f"{recipe}.yaml", overrides))
    result.raise_for_verdict()
    manifest = result.manifests["safetensors"]
    assert manifest.verification is not None
    assert manifest.verification.value("mean_kl") < most
