"""The manifest of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from qexport.artifact.digest import sha256_bytes, sha256_json
from qexport.artifact.environment import describe_environment
from qexport.artifact.folder import digest_files
from qexport.artifact.manifest import CalibrationRecord, LayerRecord, Manifest, Sizes
from qexport.artifact.report import Report
from qexport.export.layout import Layout
from qexport.export.written_weights import WrittenWeights
from qexport.pipeline.planning import Plan
from qexport.pipeline.reporting import source_record, verification_of
from qexport.tensors import (
    BlockQuantizedSpec,
    CalibrationSet,
    GroupQuantizedSpec,
    LayerReport,
    Outputs,
    RowQuantizedSpec,
)


@dataclass(frozen=True)
class Record:
    """What is known of one layout's folder.

    Attributes:
        layout: the layout.
        folder: where it lies.
        layers: what quantizing each layer did; empty where the layout has 16-bit weights.
        written: its weights.
        notes: what a user should know.
    """

    layout: Layout
    folder: Path
    layers: Sequence[LayerRecord]
    written: WrittenWeights
    notes: Sequence[str]


def make_record(
    planned: Plan, layout: Layout, output: Path, layers: Sequence[LayerReport], written: WrittenWeights
) -> Record:
    """What is known of a layout once its files are written."""
    own = layers if layout.quantization else ()
    fallen = [f"{layer.name} was rounded to nearest" for layer in own if layer.method == "round_to_nearest"]
    adapter = planned.merged.adapter
    notes = [*(adapter.notes if adapter else ()), *layout.notes, *fallen]
    records = [_layer(layer, planned.outputs) for layer in own]
    return Record(layout, planned.folder(output, layout), records, written, notes)


def make_manifest(
    planned: Plan, calibration: CalibrationSet | None, record: Record, report: Report | None, device: torch.device
) -> Manifest:
    """Says what lies in the folder, what it was made from, and how it compares with its reference."""
    recipe, checkpoint, adapter = planned.recipe.portable(), planned.merged.checkpoint, planned.merged.adapter
    layout = record.layout
    total_bytes = record.written.total_bytes + layout.weights.shared_bytes
    parameters = layout.weights.parameters
    return Manifest(
        schema_version=2,
        qexport_version=version("qexport"),
        environment=describe_environment(device),
        layout=layout.name,
        recipe=recipe,
        recipe_sha256=sha256_json(recipe),
        base=source_record(checkpoint.origin),
        adapter=source_record(adapter.origin) if adapter else None,
        notes=list(record.notes),
        calibration=_calibration(calibration) if calibration else None,
        tokenizer={name: sha256_bytes(content) for name, content in sorted(checkpoint.files.items())},
        quantization=dict(layout.quantization) if layout.quantization else None,
        graph=layout.graph,
        layers=list(record.layers),
        sizes=Sizes(parameters=parameters, total_bytes=total_bytes, bits_per_weight=8 * total_bytes / parameters),
        files=digest_files(record.folder, record.written.files),
        verification=verification_of(report) if report else None,
    )


def _calibration(calibration: CalibrationSet) -> CalibrationRecord:
    samples, sequence_length = calibration.input_ids.shape
    return CalibrationRecord(
        sha256=calibration.sha256, origin=calibration.origin, samples=samples, sequence_length=sequence_length
    )


def _layer(layer: LayerReport, outputs: Outputs) -> LayerRecord:
    spec = outputs.quantized[layer.name]
    match spec:
        case GroupQuantizedSpec():
            bits, group_size = spec.bits, spec.group_size
        case BlockQuantizedSpec():
            bits, group_size = 4, spec.block_size
        case RowQuantizedSpec():
            bits, group_size = 8, spec.in_features
    return LayerRecord(bits=bits, group_size=group_size, **asdict(layer))
