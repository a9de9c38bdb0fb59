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
from qexport.artifact.manifest import CalibrationRecord, LayerRecord, Manifest, Sizes, SourceRecord, Verification
from qexport.export.layout import Layout
from qexport.export.weight_files import WrittenWeights
from qexport.pipeline.planning import Plan
from qexport.tensors import (
    BlockQuantizedSpec,
    CalibrationSet,
    GroupQuantizedSpec,
    LayerReport,
    Origin,
    Outputs,
    RowQuantizedSpec,
)


@dataclass(frozen=True)
class Record:
    """What is known of one layout's folder.

    Attributes:
        layout: the layout.
        layers: what quantizing each layer did.
        written: its weights.
        figures: how it compares with the reference.
    """

    layout: Layout
    layers: Sequence[LayerReport]
    written: WrittenWeights
    figures: Verification | None


def make_manifest(
    planned: Plan, calibration: CalibrationSet | None, record: Record, folder: Path, device: torch.device
) -> Manifest:
    """Says what lies in `folder`, what it was made from, and how it compares with its reference."""
    recipe, checkpoint, adapter = planned.recipe.portable(), planned.merged.checkpoint, planned.merged.adapter
    layout, layers = record.layout, record.layers if record.layout.quantization else ()
    fallen = [f"{layer.name} was rounded to nearest" for layer in layers if layer.method == "round_to_nearest"]
    total_bytes, parameters = record.written.total_bytes, layout.weights.parameters
    return Manifest(
        schema_version=1,
        qexport_version=version("qexport"),
        environment=describe_environment(device),
        layout=layout.name,
        recipe=recipe,
        recipe_sha256=sha256_json(recipe),
        base=_source(checkpoint.origin),
        adapter=_source(adapter.origin) if adapter else None,
        notes=[*(adapter.notes if adapter else ()), *layout.notes, *fallen],
        calibration=_calibration(calibration) if calibration else None,
        tokenizer={name: sha256_bytes(content) for name, content in sorted(checkpoint.files.items())},
        quantization=dict(layout.quantization) if layout.quantization else None,
        layers=[_layer(layer, planned.outputs) for layer in layers],
        sizes=Sizes(parameters=parameters, total_bytes=total_bytes, bits_per_weight=8 * total_bytes / parameters),
        files=digest_files(folder, record.written.files),
        verification=_with_unconfirmed(record),
    )


def _with_unconfirmed(record: Record) -> Verification | None:
    """The figures, with the readers that the folder is for and that have not looked at it."""
    if record.figures is None:
        return None
    unread = [f"loading with {reader}" for reader in record.layout.readers]
    return record.figures.model_copy(update={"unconfirmed": [*unread, *record.figures.unconfirmed]})


def _source(origin: Origin) -> SourceRecord:
    return SourceRecord(kind=origin.kind, name=origin.name, revision=origin.revision, sha256=dict(origin.sha256))


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
