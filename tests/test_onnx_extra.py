"""What works without the packages of the extra `onnx`, and what is said where one is wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import factories

_BLOCKED = """
import sys

for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
    sys.modules[name] = None
from qexport.cli import main
sys.exit(main())
"""


def without_onnx(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extra")
    factories.save(factories.build(factories.llama_config()), folder / "base")
    path = folder / "recipe.yaml"
    path.write_text("load: {base: ./base}\nquantize: {method: none}\nexport: [{layout: safetensors}]\noutput: ./out\n")
    return path


def test_every_other_layout_works_without_the_packages(recipe: Path) -> None:
    found = without_onnx("run", recipe)
    assert found.returncode == 0, found.stderr
    assert without_onnx("validate", recipe.parent / "out").returncode == 0


def test_the_layout_says_how_to_install_them(recipe: Path) -> None:
    found = without_onnx("validate", recipe, "export=[{layout: onnx}]")
    assert found.returncode == 2
    assert "the layout onnx needs the package onnx" in found.stderr
    assert "pip install 'qexport[onnx]'" in found.stderr
