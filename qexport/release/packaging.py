"""What registries are told of a release."""

from __future__ import annotations

import json
from typing import Final

from qexport.artifact.manifest import REPORT_FOLDER, SIGNATURE_NAME
from qexport.artifact.report import REPORT_NAME
from qexport.registries import Attachment, Package
from qexport.release.bom import spdx_licenses
from qexport.release.making import Released
from qexport.release.record import BOM_NAME, PROVENANCE_NAME

_ATTACHMENTS: Final = (
    Attachment(f"{REPORT_FOLDER}/{REPORT_NAME}", "application/json", "application/vnd.qexport.report.v1+json"),
    Attachment(BOM_NAME, "application/vnd.cyclonedx+json", "application/vnd.cyclonedx+json"),
    Attachment(PROVENANCE_NAME, "application/vnd.in-toto+json", "application/vnd.in-toto+json"),
    Attachment(
        SIGNATURE_NAME,
        "application/vnd.dev.sigstore.bundle.v0.3+json",
        "application/vnd.dev.sigstore.bundle.v0.3+json",
    ),
)


def package_of(released: Released) -> Package:
    """The release as a registry describes it."""
    manifest = released.manifest
    config = json.loads((released.folder / "config.json").read_bytes())
    return Package(
        folder=released.folder,
        name=released.record.model,
        version=released.record.version,
        format=manifest.layout if manifest.layout in ("onnx", "gguf") else "safetensors",
        architecture=str(config.get("model_type", "")),
        precision=str(config.get("dtype", config.get("torch_dtype", manifest.recipe["merge"]["dtype"]))),
        quantization=None if manifest.quantization is None else str(manifest.recipe["quantize"]["method"]),
        parameters=manifest.sizes.parameters,
        licenses=spdx_licenses(manifest.sources),
        attachments=tuple(each for each in _ATTACHMENTS if (released.folder / each.path).is_file()),
    )
