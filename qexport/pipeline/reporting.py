"""The report of a verification, from what was measured and what is known of the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from qexport.artifact.digest import sha256_json
from qexport.artifact.environment import describe_environment
from qexport.artifact.figures import GateResult, overall
from qexport.artifact.manifest import LayerRecord, SourceRecord, Verification
from qexport.artifact.protocol import Identity, Protocol
from qexport.artifact.report import Check, Reference, Report, Subject
from qexport.merge.merging import Merged
from qexport.statistics.samples import ALPHA
from qexport.tensors import Origin
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
    checks: Sequence[Check],
    given: Given,
    merged: Merged,
) -> Report:
    """The report; the same bytes but for `timings` where the same was measured on the same type of machine."""
    return Report(
        schema_version=1,
        qexport_version=version("qexport"),
        verdict=overall(gate.verdict for gate in gates),
        subject=described.subject,
        reference=Reference(
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
