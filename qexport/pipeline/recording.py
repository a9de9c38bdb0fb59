"""Makes the manifest of a run and the report of a verification, from the measurements and the opened artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from qexport.artifact import Identity, Protocol, describe_environment
from qexport.artifact.agreement import verification_of
from qexport.artifact.digests import sha256_bytes, sha256_json
from qexport.artifact.figures import CheckResult, GateResult, overall
from qexport.artifact.integrity import digest_files
from qexport.artifact.manifest import (
    CARD_NAME,
    LICENSES_FOLDER,
    LISTING_NAME,
    CalibrationRecord,
    Manifest,
    Sizes,
    SourceRecord,
    TermsRecord,
)
from qexport.artifact.packages import installed_packages
from qexport.artifact.report import ProfileRecord, ReferenceRecord, Report
from qexport.artifact.served import confirmation, confirming
from qexport.export.model_files import write_files
from qexport.pipeline.baseline import other_reference
from qexport.pipeline.folders import ArtifactFolder, LayoutFolder
from qexport.pipeline.planning import Plan
from qexport.pipeline.serving import ServedArtifact
from qexport.reporting.card import CardFacts, model_card
from qexport.statistics.samples import ALPHA
from qexport.tensors import CalibrationSet, Origin, Terms
from qexport.text.tokenizers import template_digest, tokenizer_digest
from qexport.verifying.estimates import flips_by_margin, kl_histogram, worst_tokens
from qexport.verifying.reference import Reference
from qexport.verifying.verification import Measurement


def make_report(
    opened: ArtifactFolder,
    measured: Measurement,
    gates: Sequence[GateResult],
    checks: Sequence[CheckResult],
    reference: Reference,
    *,
    profile: ProfileRecord,
    served: ServedArtifact,
    notes: Sequence[str],
    command: str,
) -> Report:
    """Makes the report. Apart from `timings`, it has the same bytes each time on the same type of machine.

    Args:
        opened: the measured folder.
        measured: its figures.
        gates: the decisions on them.
        checks: the results of config and tokenizer checks.
        reference: what it was measured against.
        profile: whose limits hold where the user sets none.
        served: what runtimes made of it.
        notes: what a user should know, in addition to the notes of the measurement.
        command: the command that repeats the measurement.
    """
    gates = [*gates, *served.gates]
    identity, dtype = _identity(reference), _name(reference.dtype)
    baseline = reference.baseline.record if reference.baseline else None
    of_reference = [] if baseline is None else other_reference(baseline, identity, dtype)
    return Report(
        schema_version=1,
        qexport_version=version("qexport"),
        verdict=overall(gate.verdict for gate in gates),
        subject=opened.subject(),
        reference=ReferenceRecord(
            base=source_record(reference.base.origin, "base"),
            adapter=source_record(reference.adapter, "adapter") if reference.adapter else None,
            dtype=dtype,
        ),
        identity=identity,
        protocol=_protocol(reference, measured),
        figures=measured.figures,
        gates=list(gates),
        profile=profile,
        checks=list(checks),
        kl_histogram=kl_histogram(measured.tokens),
        flips_by_margin=flips_by_margin(measured.tokens),
        block_drift=measured.block_drift,
        worst_tokens=worst_tokens(measured.tokens, reference.held_out, reference.tokenizer),
        generations=measured.generations,
        tasks=measured.tasks,
        formats=measured.suites.formats,
        refusals=measured.suites.refusals,
        needles=measured.suites.needles,
        layers=list(opened.layers),
        weights=measured.weights,
        document_sums=measured.document_sums,
        baseline=baseline,
        notes=[*notes, *measured.notes, *of_reference],
        readers=[*measured.readers, *confirming(served.records, gates)],
        unconfirmed=[*_unconfirmed(opened, measured, served), *measured.unconfirmed],
        served=list(served.records),
        served_in=served.served_in,
        environment=describe_environment(reference.device),
        command=command,
        timings=measured.timings,
    )


def write_card(folder: LayoutFolder, base: Origin, adapter: Origin | None, report: Report | None) -> None:
    """Writes the model card of a layout, and the licenses and notices of base and adapter beside it.

    Args:
        folder: of the layout, which has no card yet.
        base: where the base came from.
        adapter: where the adapter came from.
        report: on the folder; None if it was not verified.
    """
    layout = folder.layout
    facts = CardFacts(
        layout=layout.name,
        base=source_record(base, "base"),
        adapter=source_record(adapter, "adapter") if adapter else None,
        text=layout.card,
        quantized=layout.quantization is not None,
        notes=folder.notes,
        launch=layout.launch.name if layout.launch else None,
        report=report,
    )
    licenses = {
        path: content
        for role, origin in (*_with_parts(base, "base"), *_with_parts(adapter, "adapter"))
        for path, content in zip(_license_paths(origin, role), origin.terms.files.values(), strict=True)
    }
    write_files(folder.opened.artifact.folder, {CARD_NAME: model_card(facts).encode("utf-8"), **licenses})


def source_record(origin: Origin, role: str, weight: float | None = None) -> SourceRecord:
    """Where a base, an adapter, or a combination of adapters came from, and on which terms."""
    parts = [source_record(part, f"{role}-{index}", share) for index, (part, share) in enumerate(origin.parts, 1)]
    return SourceRecord(
        kind=origin.kind,
        name=origin.name,
        revision=origin.revision,
        sha256=dict(origin.sha256),
        terms=None if origin.terms == Terms() else _terms(origin, role),
        weight=weight,
        parts=parts,
        read_as=origin.read_as,
    )


def _with_parts(origin: Origin | None, role: str) -> Iterator[tuple[str, Origin]]:
    """An origin, or those of a combination, with what each is called."""
    if origin is not None and origin.parts:
        for index, (part, _) in enumerate(origin.parts, 1):
            yield f"{role}-{index}", part
    elif origin is not None:
        yield role, origin


def _terms(origin: Origin, role: str) -> TermsRecord:
    terms = origin.terms
    return TermsRecord(
        license=terms.license,
        license_name=terms.license_name,
        license_link=terms.license_link,
        languages=list(terms.languages),
        files=_license_paths(origin, role),
    )


def _license_paths(origin: Origin, role: str) -> list[str]:
    return [f"{LICENSES_FOLDER}/{role}/{name}" for name in origin.terms.files]


def _unconfirmed(opened: ArtifactFolder, measured: Measurement, served: ServedArtifact) -> list[str]:
    """Loading is unconfirmed with each loader that has not measured the folder, or whose gates did not pass."""
    seen = {reader.partition(" ")[0] for reader in measured.readers}
    verdicts = [(each, confirmation(each, served.gates)) for each in served.records]
    confirmed = {each.runtime.name.casefold() for each, verdict in verdicts if verdict == "pass"}
    loaders = [loader for loader in opened.loaders if loader not in seen]
    return [
        *(f"loading with {loader}" for loader in loaders if loader.partition(" ")[0].casefold() not in confirmed),
        *(f"serving with {each.label} ({verdict})" for each, verdict in verdicts if verdict != "pass"),
        *served.unconfirmed,
    ]


def _identity(reference: Reference) -> Identity:
    return Identity(
        base_sha256=_digest_of_base(reference.base.origin),
        adapter_sha256=_one_digest(reference.adapter.sha256) if reference.adapter else None,
        text_sha256=reference.held_out.sha256,
        prompts_sha256=reference.prompts.prompt_set.sha256 if reference.prompts else None,
        tokenizer_sha256=tokenizer_digest(reference.merged.files),
        template_sha256=template_digest(reference.tokenizer),
    )


def _protocol(reference: Reference, measured: Measurement) -> Protocol:
    windows, predicted = measured.tokens.kl.shape
    length = reference.held_out.input_ids.shape[1]
    return Protocol(
        dtype=_name(reference.dtype),
        sequence_length=length,
        stride=length,
        windows=windows,
        tokens=windows * predicted,
        looks=measured.looks,
        confidence=1 - ALPHA,
    )


def _digest_of_base(origin: Origin) -> str:
    """Of the base's files, and of what they are read as, since other weights come from the same files then."""
    return _one_digest({**origin.sha256, **({"": origin.read_as} if origin.read_as else {})})


def _one_digest(files: Mapping[str, str]) -> str:
    return sha256_json(dict(files))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_manifest(
    planned: Plan, calibration: CalibrationSet | None, folder: LayoutFolder, report: Report | None, device: torch.device
) -> Manifest:
    """Makes the manifest: what the folder contains, what it was made from, and how it compares with its reference."""
    layout, opened = folder.layout, folder.opened
    total_bytes = folder.written.total_bytes + layout.weights.shared_bytes
    parameters = layout.weights.parameters
    return Manifest(
        schema_version=2,
        **made_from(planned, calibration, device),
        layout=layout.name,
        notes=list(folder.notes),
        quantization=dict(layout.quantization) if layout.quantization else None,
        graph=layout.graph,
        layers=list(opened.layers),
        sizes=Sizes(parameters=parameters, total_bytes=total_bytes, bits_per_weight=8 * total_bytes / parameters),
        files=digest_files(opened.artifact.folder, folder.written.files),
        listing=LISTING_NAME,
        verification=verification_of(report) if report else None,
        card=layout.card,
        launch=layout.launch.model_dump(mode="json") if layout.launch else None,
    )


def made_from(planned: Plan, calibration: CalibrationSet | None, device: torch.device) -> dict[str, Any]:
    """The fields of every manifest of a run that are known before it: what it is made from, and with what."""
    recipe, checkpoint, adapter = planned.recipe.portable(), planned.merged.checkpoint, planned.merged.adapter
    return {
        "qexport_version": version("qexport"),
        "environment": describe_environment(device),
        "recipe": recipe,
        "recipe_sha256": sha256_json(recipe),
        "base": source_record(checkpoint.origin, "base"),
        "adapter": source_record(adapter.origin, "adapter") if adapter else None,
        "calibration": _calibration(calibration) if calibration else None,
        "packages": installed_packages(),
        "tokenizer": {name: sha256_bytes(content) for name, content in sorted(checkpoint.files.items())},
    }


def _calibration(calibration: CalibrationSet) -> CalibrationRecord:
    samples, sequence_length = calibration.input_ids.shape
    return CalibrationRecord(
        sha256=calibration.sha256, origin=calibration.origin, samples=samples, sequence_length=sequence_length
    )
