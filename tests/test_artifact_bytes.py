"""Every file of every artifact has the bytes on record, for each method and layout; what is refused stays refused.

`artifact_bytes.json` holds the SHA-256 of every file but README.md, which is prose, and the report. The versions in
the manifest, in configs and in model.onnx are taken out first. Write it anew where bytes are meant to change, and on a
processor or version of torch that has no record (there on a commit whose bytes are right), and look at the difference:

    python tests/test_artifact_bytes.py --write

GPTQ's codes come from matrix products. Their last bits depend on the processor's instructions, on its maker (MKL
chooses by that) and on torch, so the files with codes have a digest for each. The codes of AMD processors with AVX2
alone and with AVX-512 are the same, but for some of 8 bits and of experts; most of their losses, which the manifest's
layers hold, differ. A processor without AVX-512 can be emulated in part only: on one with it, ATEN_CPU_CAPABILITY=avx2
changed no file; ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2 with it changed a few of those with codes, and
no others. The key of such a record names the variables, since a real one may give other bytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from artifact_cases import CASES, LAYOUTS, MODELS, TOGETHER, TOGETHER_METHODS, layouts_of, prepare, recipe
from onnx_exports import traced_once
from qexport.artifact import describe_environment
from qexport.artifact.digests import sha256_bytes, sha256_file, sha256_json
from qexport.artifact.integrity import open_artifact
from qexport.artifact.manifest import CARD_NAME, MANIFEST_NAME
from qexport.errors import CompatibilityError
from qexport.pipeline import run
from qexport.quantizing import gptq_pass
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.method import PassInputs
from qexport.recipe import Recipe
from qexport.tensors import TensorRecord

RECORD = Path(__file__).with_name("artifact_bytes.json")
COMMAND = f"python tests/{Path(__file__).name} --write"
EMULATION = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
PACKAGES = ("qexport", "torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnx-ir", "onnxscript")
MANIFEST_PARTS = ("recipe", "layers")

QUANTIZER = f"qexport:{version('qexport')}".encode()
"""What GPTQ's config says of its maker; as every version, it is taken out."""

Digests = dict[str, str]
"""By the name of a file; a file inside one of several layouts has the layout's name in front."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folders = {model: tmp_path_factory.mktemp("model") for model in MODELS}
    for model, folder in folders.items():
        prepare(model, folder)
    return folders


@pytest.mark.parametrize(("model", "method"), CASES, ids=[", ".join(case) for case in CASES])
def test_bytes_are_those_on_record(model: str, method: str, inputs: Mapping[str, Path], tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text(encoding="ascii"))
    differences: list[str] = []
    unknown = False
    with passed_once():
        found = {layout: made(inputs[model], method, LAYOUTS[layout], tmp_path) for layout in layouts_of(model)}
    assert found.keys() == record["artifacts"][f"{model}, {method}"].keys()
    for layout, files in found.items():
        expected = record["artifacts"][f"{model}, {method}"][layout]
        known = on_record(expected)
        unknown |= None in known.values()
        differences += different(f"{model}, {method}, {layout}", files, known)
    if model == "llama" and method in TOGETHER_METHODS:
        for layouts in TOGETHER:
            exports = [each for layout in layouts for each in LAYOUTS[layout]]
            files = made(inputs[model], method, exports, tmp_path)
            differences += different(f"{model}, {method}, {' + '.join(layouts)}", files, together(found, layouts))
    assert not differences, "\n".join([*differences, *other_versions(record["versions"])])
    if unknown:
        pytest.skip(f"no GPTQ bytes on record for {processor()}: on a commit whose bytes are right, run {COMMAND}")


def test_every_case_is_on_record() -> None:
    assert list(json.loads(RECORD.read_text(encoding="ascii"))["artifacts"]) == [", ".join(case) for case in CASES]


def test_a_difference_names_artifact_file_and_both_digests() -> None:
    known: dict[str, str | None] = {"config.json": "a", "old": "b", "model.safetensors": None}
    assert different("case", {"config.json": "c", "new": "d", "model.safetensors": "e"}, known) == [
        "case: config.json is c, on record is a",
        "case: new is d, on record is nothing",
        "case: old is nothing, on record is b",
    ]


def made(folder: Path, method: str, exports: list[dict[str, Any]], scratch: Path) -> Digests:
    """The digests of what a recipe makes, or the refusal under the name `refused`."""
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        chosen = Recipe.model_validate(recipe(folder, method, exports) | {"output": f"{output}/out"})
        try:
            with traced_once():
                result = run(chosen, device="cpu")
        except CompatibilityError as error:
            return {"refused": str(error).splitlines()[0]}
        several = len(exports) > 1
        return {
            f"{layout}/{name}" if several else name: digest
            for layout in result.manifests
            for name, digest in digests(result.artifact_path / layout if several else result.artifact_path)
        }


@contextmanager
def passed_once() -> Iterator[None]:
    """Inside, GPTQ's pass is made for the first artifact of a model, and those whose pass is given the same get what it
    yielded. Artifacts that are made together have passes of their own.
    """
    known: list[tuple[tuple[Any, ...], list[TensorRecord]]] = []

    def quantize(method: Gptq, inputs: PassInputs) -> Iterator[TensorRecord]:
        assert inputs.calibration is not None
        given = (method, inputs.outputs, inputs.calibration.sha256, inputs.dtype)
        for other, records in known:
            if other == given:
                yield from records
                return
        yielded = []
        for record in gptq_pass.quantize(method, inputs):
            yielded.append(record)
            yield record
        known.append((given, yielded))

    with patch.object(Gptq, "quantize", quantize):
        yield


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Of every file in a layout's folder, and of the parts of its manifest."""
    manifest = open_artifact(folder).manifest
    for name in manifest.files:
        if name == "model.onnx":
            yield name, sha256_bytes(without_version((folder / name).read_bytes()))
        elif name.endswith(".json"):
            yield name, sha256_bytes((folder / name).read_bytes().replace(QUANTIZER, b"qexport"))
        elif name != CARD_NAME:
            yield name, sha256_file(folder / name)
    content = manifest.model_dump(mode="json")
    for key in ("qexport_version", "environment", "packages", "recipe_sha256"):
        del content[key]
    content["files"] = sorted(content["files"])  # their digests are compared one by one
    for part in MANIFEST_PARTS:
        yield f"{MANIFEST_NAME} {part}", sha256_json(content.pop(part))
    yield MANIFEST_NAME, sha256_bytes(json.dumps(content, sort_keys=True).encode().replace(QUANTIZER, b"qexport"))


def without_version(graph: bytes) -> bytes:
    """The graph without the version of qexport, field 3 of a ModelProto; the name before it is field 2."""
    name, own = b"\x12\x07qexport", version("qexport").encode()
    field = b"\x1a" + bytes([len(own)]) + own
    assert graph.count(name + field) == 1
    return graph.replace(name + field, name)


def together(found: Mapping[str, Digests], layouts: list[str]) -> dict[str, str | None]:
    """What several layouts hold if each folder is as it is alone; its manifest's recipe is another."""
    refused = [found[layout]["refused"] for layout in layouts if "refused" in found[layout]]
    if refused:
        return {"refused": refused[0] if len(refused) == 1 else f"{len(refused)} layouts cannot be written"}
    return {
        f"{LAYOUTS[layout][0]['layout']}/{name}": None if name == f"{MANIFEST_NAME} recipe" else digest
        for layout in layouts
        for name, digest in found[layout].items()
    }


def on_record(files: Mapping[str, str | Mapping[str, str]]) -> dict[str, str | None]:
    """The digests that hold here; None where this processor has none."""
    return {name: digest if isinstance(digest, str) else digest.get(processor()) for name, digest in files.items()}


def different(case: str, found: Digests, known: Mapping[str, str | None]) -> list[str]:
    return [
        f"{case}: {name} is {found.get(name, 'nothing')}, on record is {known.get(name, 'nothing')}"
        for name in sorted(found.keys() | known.keys())
        if found.get(name) != known.get(name, "nothing") and not (name in found and known.get(name, "") is None)
    ]


def other_versions(recorded: Mapping[str, str]) -> list[str]:
    """What else may be the reason."""
    return [
        f"the record was written with {package} {recorded[package]}, this is {own}"
        for package, own in versions().items()
        if recorded[package] != own
    ]


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


@cache
def processor() -> str:
    """What GPTQ's bytes depend on."""
    own = describe_environment(torch.device("cpu"))
    told = Path("/proc/cpuinfo")
    maker = re.search(r"^(?:vendor_id|CPU implementer)\s*: (\S+)", told.read_text() if told.exists() else "", re.M)
    held_back = [f"{name}={os.environ[name]}" for name in EMULATION if name in os.environ]
    known = [own.architecture, maker[1] if maker else "unknown maker", own.cpu_capability, f"torch {own.torch}"]
    return ", ".join(known + held_back)


def depends_on_processor(method: str, name: str) -> bool:
    """Codes, scales and losses of GPTQ."""
    weights = name.endswith((".safetensors", ".onnx.data", ".gguf")) or name.endswith(f"{MANIFEST_NAME} layers")
    return method.startswith("gptq") and weights


def write() -> None:
    """Writes the record. Digests of other processors stay where those of this one are as they were on record."""
    old = json.loads(RECORD.read_text(encoding="ascii"))["artifacts"] if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            prepare(model, Path(scratch) / model)
        artifacts = {
            f"{model}, {method}": {
                layout: recorded(
                    method,
                    made(Path(scratch) / model, method, LAYOUTS[layout], Path(scratch)),
                    old.get(f"{model}, {method}", {}).get(layout, {}),
                )
                for layout in layouts_of(model)
            }
            for model, method in CASES
        }
    content = {"versions": versions(), "artifacts": artifacts}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")


def recorded(method: str, found: Digests, old: Mapping[str, str | Mapping[str, str]]) -> dict[str, Any]:
    """The files of one artifact as they are put on record."""
    return {
        name: of_processors(digest, old.get(name)) if depends_on_processor(method, name) else digest
        for name, digest in sorted(found.items())
    }


def of_processors(digest: str, old: str | Mapping[str, str] | None) -> dict[str, str]:
    """With the digests of other processors, unless this one's shows that they are out of date."""
    known = dict(old) if isinstance(old, Mapping) else {}
    valid = known if known.get(processor(), digest) == digest else {}
    return dict(sorted((valid | {processor(): digest}).items()))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {COMMAND}")
    write()
