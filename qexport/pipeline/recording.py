"""The manifest of a run and the report of a verification, from what was measured and what is known of the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from qexport.artifact.digests import sha256_bytes, sha256_json
from qexport.artifact.figures import CheckResult, GateResult, overall
from qexport.artifact.folder import digest_files
from qexport.artifact.manifest import CalibrationRecord, Manifest, Sizes, SourceRecord, Verification
from qexport.artifact.record import Identity, Protocol, describe_environment
from qexport.artifact.report import ReferenceRecord, Report, Subject
from qexport.export.layouts import Layout
from qexport.export.tensor_writer import WrittenWeights
from qexport.merge.merging import Merged
from qexport.pipeline.planning import Plan
from qexport.records import LayerRecord
from qexport.statistics.samples import ALPHA
from qexport.tensors import CalibrationSet, Origin
from qexport.text.tokenizer_identity import template_digest, tokenizer_digest
from qexport.verifying.tails import flips_by_margin, kl_histogram, worst_tokens
from qexport.verifying.verification import Given, Measurement


@dataclass(frozen=True)
class Described:
    """What is known of the artifact beside its figures.

    Attributes:
        subject: what it is.
        layers: what quantizing each layer did; empty where nobody has recorded it.
        notes: for the reader.
        unread: readers that it is for and that have not looked at it.
        command: measures the same again.
    """

    subject: Subject
    layers: Sequence[LayerRecord]
    notes: Sequence[str]
    unread: Sequence[str]
    command: str


def make_report(
    described: Described,
    measured: Measurement,
    gates: Sequence[GateResult],
    checks: Sequence[CheckResult],
    given: Given,
    merged: Merged,
) -> Report:
    """The report; the same bytes but for `timings` where the same was measured on the same type of machine."""
    return Report(
        schema_version=1,
        qexport_version=version("qexport"),
        verdict=overall(gate.verdict for gate in gates),
        subject=described.subject,
        reference=ReferenceRecord(
            base=source_record(merged.base.origin),
            adapter=source_record(merged.adapter.origin) if merged.adapter else None,
            dtype=_name(given.dtype),
        ),
        identity=_identity(given, merged),
        protocol=_protocol(given, measured),
        figures=measured.figures,
        gates=list(gates),
        checks=list(checks),
        kl_histogram=kl_histogram(measured.tokens),
        flips_by_margin=flips_by_margin(measured.tokens),
        block_drift=measured.block_drift,
        worst_tokens=worst_tokens(measured.tokens, given.held_out, given.tokenizer),
        generations=measured.generations,
        tasks=measured.tasks,
        layers=list(described.layers),
        notes=[*described.notes, *measured.notes],
        readers=measured.readers,
        unconfirmed=[*_unconfirmed(described, measured), *measured.unconfirmed],
        environment=describe_environment(given.device),
        command=described.command,
        timings=measured.timings,
    )


def verification_of(report: Report) -> Verification:
    """The report's main points, for the manifest."""
    return Verification(
        verdict=report.verdict,
        figures=[figure for figure in report.figures if figure.domain is None],
        gates=report.gates,
        identity=report.identity,
        protocol=report.protocol,
        readers=report.readers,
        unconfirmed=report.unconfirmed,
        report_sha256=report.digest(),
    )


def source_record(origin: Origin) -> SourceRecord:
    """Where a base or an adapter came from."""
    return SourceRecord(kind=origin.kind, name=origin.name, revision=origin.revision, sha256=dict(origin.sha256))


def _unconfirmed(described: Described, measured: Measurement) -> list[str]:
    """Readers that have measured the folder have loaded it."""
    seen = {reader.partition(" ")[0] for reader in measured.readers}
    return [f"loading with {reader}" for reader in described.unread if reader not in seen]


def _identity(given: Given, merged: Merged) -> Identity:
    return Identity(
        base_sha256=_one_digest(merged.base.origin.sha256),
        adapter_sha256=_one_digest(merged.adapter.origin.sha256) if merged.adapter else None,
        text_sha256=given.held_out.sha256,
        prompts_sha256=given.prompts.prompt_set.sha256 if given.prompts else None,
        tokenizer_sha256=tokenizer_digest(given.reference.files),
        template_sha256=template_digest(given.tokenizer),
    )


def _protocol(given: Given, measured: Measurement) -> Protocol:
    windows, predicted = measured.tokens.kl.shape
    length = given.held_out.input_ids.shape[1]
    return Protocol(
        dtype=_name(given.dtype),
        sequence_length=length,
        stride=length,
        windows=windows,
        tokens=windows * predicted,
        looks=measured.looks,
        confidence=1 - ALPHA,
    )


def _one_digest(files: Mapping[str, str]) -> str:
    return sha256_json(dict(files))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    planned: Plan, layout: Layout, output: Path, layers: Sequence[LayerRecord], written: WrittenWeights
) -> Record:
    """What is known of a layout once its files are written."""
    own = layers if layout.quantization else ()
    fallen = [f"{layer.name} was rounded to nearest" for layer in own if layer.method == "round_to_nearest"]
    adapter = planned.merged.adapter
    notes = [*(adapter.notes if adapter else ()), *layout.notes, *fallen]
    return Record(layout, planned.folder(output, layout), own, written, notes)


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
