"""One pass, five layouts: each folder is read back, and holds the very codes and values of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from artifact_cases import prepare, recipe
from onnx_exports import traced_once
from qexport.pipeline import run
from qexport.reading.stored_model import StoredModel, open_stored
from qexport.recipe import Recipe
from qexport.tensors import GroupQuantized

LAYOUTS = ("safetensors", "tgi", "vllm", "onnx", "gguf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    prepare("llama", folder)
    content = recipe(folder, "gptq", [{"layout": layout} for layout in LAYOUTS])
    with traced_once():
        run(Recipe.model_validate(content | {"output": str(folder / "out")}))
    return {layout: folder / "out" / layout for layout in LAYOUTS}


def codes(model: StoredModel) -> dict[str, GroupQuantized]:
    found = {module: model.stored(f"{module}.weight") for module in model.layers}
    return {module: weight for module, weight in found.items() if isinstance(weight, GroupQuantized)}


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_has_the_same_codes(layout: str, folders: dict[str, Path]) -> None:
    with (
        open_stored(folders["safetensors"], dtype=torch.float32) as reference,
        open_stored(folders[layout], dtype=torch.float32) as other,
    ):
        expected, found = codes(reference), codes(other)
        assert expected
        assert expected.keys() == found.keys() == reference.layers.keys()
        for module, weight in expected.items():
            for part in ("codes", "scales", "zeros", "g_idx"):
                assert torch.equal(getattr(found[module], part), getattr(weight, part)), (module, part)
        assert other.specs().keys() == reference.specs().keys()
        assert all(torch.equal(other.read(name), reference.read(name)) for name in reference.specs())


def test_a_head_of_its_own_bits_is_read_back(tmp_path: Path) -> None:
    prepare("llama", tmp_path)
    content = recipe(tmp_path, "gptq", [{"layout": "safetensors"}])
    content["quantize"] |= {"lm_head": True, "overrides": [{"modules": "lm_head", "bits": 8}]}
    run(Recipe.model_validate(content | {"output": str(tmp_path / "out")}))
    with open_stored(tmp_path / "out", dtype=torch.float32) as stored:
        assert stored.layers["lm_head"].bits == 8
        assert {layer.bits for module, layer in stored.layers.items() if module != "lm_head"} == {4}
