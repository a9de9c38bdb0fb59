"""What works without the packages of the extra `onnx`, and what is said where one is wanted."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

import factories
from fresh import Fresh

_BLOCKED = """
import contextlib, io, json, sys

for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
    assert name not in sys.modules
    sys.modules[name] = None
from qexport.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        found.append((main(arguments), errors.getvalue()))
print("\\0" + json.dumps(found))
"""


@dataclass(frozen=True)
class Found:
    code: int
    errors: str


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, fresh: Fresh) -> list[Found]:
    """A run, the check of its artifact, and that of a recipe with the layout, in one process without the packages."""
    folder = tmp_path_factory.mktemp("extra")
    factories.save(factories.build(factories.llama_config()), folder / "base")
    path = folder / "recipe.yaml"
    path.write_text("load: {base: ./base}\nquantize: {method: none}\nexport: [{layout: safetensors}]\noutput: ./out\n")
    calls = [["run", str(path)], ["validate", str(folder / "out")], ["plan", str(path), "export=[{layout: onnx}]"]]
    done = fresh.run(_BLOCKED, json.dumps(calls))
    assert done.code == 0, done.err
    return [Found(*each) for each in json.loads(done.out.rpartition("\0")[2])]


def test_every_other_layout_works_without_the_packages(found: list[Found]) -> None:
    run, validated, _ = found
    assert run.code == 0, run.errors
    assert validated.code == 0, validated.errors


def test_the_layout_says_how_to_install_them(found: list[Found]) -> None:
    _, _, refused = found
    assert refused.code == 2
    assert "the layout onnx needs the package onnx" in refused.errors
    assert "pip install 'qexport[onnx]'" in refused.errors
