"""The bill of materials of a release: a CycloneDX 1.6 ML-BOM. Needs the extra `release`.

cyclonedx-python-lib has no class for the part of the standard on a model, `modelCard`; that part is added to its JSON,
and the whole is validated against the standard's schema, which the library brings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.bom_ref import BomRef
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.spdx import fixup_id
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from qexport.artifact.figures import CATALOGUE
from qexport.artifact.manifest import Manifest, SourceRecord
from qexport.artifact.report import Report
from qexport.errors import QexportError
from qexport.release.provenance import source_uri
from qexport.release.record import Proof, canonical

_NAMESPACE: Final = UUID("6f9619ff-8b86-d011-b42d-00c04fc964ff")


def bill_of_materials(
    manifest: Manifest, config: Mapping[str, Any], report: Report | None, proof: Proof | None, name: str, version: str
) -> str:
    """The bill of materials as canonical JSON, the same bytes each time.

    Args:
        manifest: of the artifact.
        config: the content of config.json.
        report: what verification found.
        proof: its digests.
        name: of the release.
        version: of the release.

    Raises:
        QexportError: the result is not valid, which is a defect.
    """
    model = _model(manifest, name, version)
    bom = Bom(
        serial_number=uuid5(_NAMESPACE, f"{name} {manifest.recipe_sha256}"),
        metadata=BomMetaData(component=model, tools=ToolRepository(components=[_library("qexport", manifest)])),
        components=[*_sources(manifest), *_datasets(manifest, proof), *_libraries(manifest)],
    )
    bom.register_dependency(model, [each for each in bom.components if each.type is not ComponentType.LIBRARY])
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    content["metadata"].pop("timestamp", None)
    content["metadata"]["component"]["modelCard"] = _model_card(manifest, config, report, proof)
    text = canonical(content)
    if (fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise QexportError(f"the bill of materials is not valid: {fault}", where="CycloneDX 1.6")
    return text


def spdx_licenses(sources: Iterable[SourceRecord | None]) -> tuple[str, ...]:
    """The licenses of base and adapter that SPDX has a name for."""
    named = (each.terms.license for each in sources if each is not None and each.terms is not None)
    return tuple(dict.fromkeys(found for text in named if text and (found := fixup_id(text))))


def _model(manifest: Manifest, name: str, version: str) -> Component:
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        name=name,
        version=version,
        licenses=[LicenseFactory().make_from_string(each) for each in spdx_licenses([manifest.base])[:1]],
        properties=[
            Property(name="qexport:layout", value=manifest.layout),
            Property(name="qexport:recipe_sha256", value=manifest.recipe_sha256),
        ],
        components=[_file("", file, record.sha256) for file, record in sorted(manifest.files.items())],
    )


def _sources(manifest: Manifest) -> Iterator[Component]:
    for role, source in manifest.roles:
        uri, licenses = source_uri(source), spdx_licenses([source])
        yield Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=role,
            name=source.name,
            version=source.revision,
            purl=PackageURL.from_string(uri) if uri else None,
            licenses=[LicenseFactory().make_from_string(each) for each in licenses],
            components=[_file(f"{role}/", file, digest) for file, digest in sorted(source.sha256.items())],
        )


def _datasets(manifest: Manifest, proof: Proof | None) -> Iterator[Component]:
    if manifest.calibration is not None:
        yield _data("calibration text", manifest.calibration.sha256)
    if proof is not None:
        yield _data("held-out text", proof.held_out_sha256)
        if proof.prompts_sha256 is not None:
            yield _data("prompts", proof.prompts_sha256)


def _libraries(manifest: Manifest) -> list[Component]:
    return [_library(name, manifest) for name in manifest.packages if name != "qexport"]


def _library(name: str, manifest: Manifest) -> Component:
    version = manifest.packages.get(name, manifest.qexport_version)
    return Component(
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}=={version}",
        name=name,
        version=version,
        purl=PackageURL("pypi", None, name, version),
    )


def _data(name: str, digest: str) -> Component:
    return Component(type=ComponentType.DATA, bom_ref=_ref(name), name=name, hashes=[_hash(digest)])


def _file(place: str, name: str, digest: str) -> Component:
    return Component(
        type=ComponentType.FILE, bom_ref=BomRef(_ref(f"{place}{name}")), name=f"{place}{name}", hashes=[_hash(digest)]
    )


def _ref(name: str) -> str:
    return f"sha256:{quote(name)}"


def _hash(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _model_card(
    manifest: Manifest, config: Mapping[str, Any], report: Report | None, proof: Proof | None
) -> dict[str, Any]:
    """The part of the standard on a model: https://cyclonedx.org/docs/1.6/json/#metadata_component_modelCard."""
    datasets = [{"ref": _ref("calibration text")}] if manifest.calibration is not None else []
    metrics = [] if report is None else [_metric(report, index) for index in range(len(report.figures))]
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": str(config.get("model_type", "")),
            "modelArchitecture": str(next(iter(config.get("architectures") or [""]))),
            "datasets": datasets,
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [each for each in metrics if each is not None]},
        "considerations": {
            "technicalLimitations": [*manifest.notes, *([] if report is None else report.unconfirmed)],
        },
    }


def _metric(report: Report, index: int) -> dict[str, Any] | None:
    figure = report.figures[index]
    if figure.domain is not None:
        return None
    known = figure.low is not None and figure.high is not None
    bounds = {"confidenceInterval": {"lowerBound": str(figure.low), "upperBound": str(figure.high)}} if known else {}
    return {"type": figure.name, "value": str(figure.value), "slice": CATALOGUE[figure.name].label, **bounds}
