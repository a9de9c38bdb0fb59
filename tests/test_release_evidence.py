"""The evidence of a release by programs that share no code with ours: the schema of CycloneDX, in-toto's own types."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from jsonschema import Draft7Validator
from packageurl import PackageURL
from referencing import Registry, Resource

import releases
from qexport.artifact.digests import sha256_file
from qexport.artifact.manifest import Manifest
from qexport.cli import main
from qexport.registries import Attachment
from qexport.release.making import Released
from qexport.release.packaging import package_of
from qexport.release.record import ReleaseRecord

NAME = "tiny-notes-1.4.0+w8a8"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    artifact = releases.proven(folder) / "safetensors"
    assert main(["release", str(artifact), "--to", str(folder), "--version", releases.VERSION]) == 0
    return folder / NAME


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def bom_validator() -> Draft7Validator:
    folder = files("cyclonedx.schema._res")
    names = {"bom-1.6": "bom-1.6.SNAPSHOT", "spdx": "spdx.SNAPSHOT", "jsf-0.82": "jsf-0.82.SNAPSHOT"}
    content = {name: json.loads((folder / f"{file}.schema.json").read_text()) for name, file in names.items()}
    resources = [
        (f"http://cyclonedx.org/schema/{name}.{kind}schema.json", Resource.from_contents(schema))
        for name, schema in content.items()
        for kind in ("", "SNAPSHOT.")
    ]
    return Draft7Validator(content["bom-1.6"], registry=Registry().with_resources(resources))


def test_the_bill_of_materials_fits_the_standards_schema_and_a_planted_fault_does_not(release: Path) -> None:
    content = read(release / "evidence/bom.cdx.json")
    assert content["specVersion"] == "1.6"
    validator = bom_validator()
    assert list(validator.iter_errors(content)) == []
    content["metadata"]["component"]["modelCard"]["modelParameters"]["tasks"] = "x"
    assert list(validator.iter_errors(content))


def test_the_bill_of_materials_has_every_file_and_package(release: Path) -> None:
    content, manifest = read(release / "evidence/bom.cdx.json"), Manifest.read(release)
    model = content["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", NAME, "1.4.0")
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    for each in model["components"]:
        assert each["hashes"] == [{"alg": "SHA-256", "content": sha256_file(release / each["name"])}]
    assert {each["name"] for each in model["components"]} >= {"model.safetensors", "config.json", "README.md"}
    packages = {each["name"]: each["version"] for each in content["components"] if each["type"] == "library"}
    assert packages == {name: version for name, version in manifest.packages.items() if name != "qexport"}
    assert {"torch", "transformers", "safetensors"} <= packages.keys()
    [held_out] = [each for each in content["components"] if each["name"] == "held-out text"]
    assert manifest.verification is not None
    assert held_out["hashes"][0]["content"] == manifest.verification.identity.text_sha256


def test_the_provenance_is_a_statement_by_in_totos_own_types(release: Path) -> None:
    content = read(release / "evidence/provenance.json")
    found = ParseDict(content, statement_pb2.Statement())
    Statement.copy_from_pb(found).validate()
    assert len(found.subject) == len(content["subject"]) > 0
    provenance = ParseDict(content["predicate"], provenance_pb2.Provenance())
    assert provenance.build_definition.build_type.endswith("docs/release.md#provenance")
    assert provenance.run_details.byproducts[0].digest["sha256"] == sha256_file(release / "report/report.json")
    for each in content["subject"]:
        assert each["digest"]["sha256"] == sha256_file(release / each["name"])
    for material in provenance.build_definition.resolved_dependencies:
        assert material.digest or PackageURL.from_string(material.uri).version
    names = {material.name for material in provenance.build_definition.resolved_dependencies}
    assert {"base/model.safetensors", "adapter/adapter_model.safetensors", "held-out text", "torch"} <= names


def test_the_versions_are_what_pip_reads(release: Path) -> None:
    lines = (release / "evidence/requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines] == sorted(Manifest.read(release).packages)


def test_registries_are_told_what_the_folder_is(release: Path) -> None:
    manifest = Manifest.read(release)
    package = package_of(Released(release, ReleaseRecord.read(release), manifest, ""))
    assert (package.name, package.version, package.format) == ("tiny-notes", "1.4.0", "safetensors")
    assert (package.architecture, package.precision, package.quantization) == ("llama", "bfloat16", "w8a8")
    assert package.licenses == ("Apache-2.0",)
    assert all(isinstance(each, Attachment) for each in package.attachments)
    assert {each.path for each in package.attachments} == {
        "report/report.json", "evidence/bom.cdx.json", "evidence/provenance.json",
    }  # fmt: skip
