"""The manifest of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from qexport.artifact.digest import sha256_bytes, sha256_json
from qexport.artifact.environment import describe_environment
from qexport.artifact.folder import digest_files
from qexport.artifact.manifest import CalibrationRecord, LayerRecord, Manifest, Sizes, SourceRecord, Verification
from qexport.export.safetensors_layout import Written
from qexport.pipeline.planning import Plan
from qexport.tensors import CalibrationSet, GroupQuantizedSpec, LayerReport, Origin


def make_manifest(
    planned: Plan,
    calibration: CalibrationSet,
    layers: Sequence[LayerReport],
    written: Written,
    figures: Verification | None,
    folder: Path,
    device: torch.device,
) -> Manifest:
    """Says what lies in `folder`, what it was made from, and how it compares with its reference."""
    recipe, checkpoint, adapter = planned.recipe.portable(), planned.merged.checkpoint, planned.merged.adapter
    fallen = [f"{layer.name} was rounded to nearest" for layer in layers if layer.method == "round_to_nearest"]
    return Manifest(
        schema_version=1,
        qexport_version=version("qexport"),
        environment=describe_environment(device),
        layout=planned.recipe.export[0].layout,
        recipe=recipe,
        recipe_sha256=sha256_json(recipe),
        base=_source(checkpoint.origin),
        adapter=_source(adapter.origin) if adapter else None,
        notes=[*(adapter.notes if adapter else ()), *planned.layout.notes, *fallen],
        calibration=_calibration(calibration),
        tokenizer={name: sha256_bytes(content) for name, content in sorted(checkpoint.files.items())},
        quantization=dict(written.quantization),
        layers=[_layer(layer, planned) for layer in layers],
        sizes=Sizes(
            parameters=written.parameters,
            total_bytes=written.total_bytes,
            bits_per_weight=8 * written.total_bytes / written.parameters,
        ),
        files=digest_files(folder),
        verification=figures,
    )


def _source(origin: Origin) -> SourceRecord:
    return SourceRecord(kind=origin.kind, name=origin.name, revision=origin.revision, sha256=dict(origin.sha256))


def _calibration(calibration: CalibrationSet) -> CalibrationRecord:
    samples, sequence_length = calibration.input_ids.shape
    return CalibrationRecord(
        sha256=calibration.sha256, origin=calibration.origin, samples=samples, sequence_length=sequence_length
    )


def _layer(layer: LayerReport, planned: Plan) -> LayerRecord:
    spec = planned.layout.plan[f"{layer.name}.weight"]
    assert isinstance(spec, GroupQuantizedSpec)
    return LayerRecord(bits=spec.bits, group_size=spec.group_size, **asdict(layer))
