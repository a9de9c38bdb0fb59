"""The page of a sweep of eight variants, with the sizes and drifts of the demo's."""

from __future__ import annotations

from typing import Final

import reports
import rich_report
from qexport.artifact.figures import GateResult, Verdict
from qexport.artifact.manifest import Sizes
from qexport.artifact.report import Report
from qexport.artifact.sweep import Cost, SweepRecord, VariantRecord, VariantState
from qexport.reporting.sweep import sweep_page

PARAMETERS: Final = 134_515_008
MEASURED: Final[dict[str, tuple[int, float, Verdict]]] = {
    "bits-3_group_size-64": (101, 0.5, "fail"),
    "nf4-double": (112, 0.098, "pass"),
    "bits-4_group_size-64": (114, 0.0846, "pass"),
    "nf4": (118, 0.0952, "pass"),
    "bits-4_group_size-32": (119, 0.0711, "pass"),
    "int8": (163, 0.0012, "pass"),
    "w8a8": (163, 0.0041, "undecided"),
}
"""Megabytes, mean KL divergence and verdict of each variant; of the eighth nothing was measured."""


def page() -> str:
    """What `comparison.html` holds."""
    variants = [_variant(name, state, megabytes) for name, (megabytes, _, state) in MEASURED.items()]
    refused = _variant("bits-8_group_size-64", "refused", None)
    record = SweepRecord(
        schema_version=1,
        qexport_version="0.2.0",
        recipe="gptq-4bit.yaml",
        keep="all",
        variants=[*variants, refused],
        recommended="nf4-double",
        finished=True,
    )
    return sweep_page(record, {name: _report(*values) for name, values in MEASURED.items()})


def _variant(name: str, state: VariantState, megabytes: int | None) -> VariantRecord:
    measured = megabytes is not None
    return VariantRecord(
        name=name,
        method="GPTQ 4-bit, group 64" if measured else rich_report.LONG_WORD,
        overrides=["quantize.bits=4"],
        state=state,
        reason="16 gates passed" if state == "pass" else f"mean_kl 0.5 is above 0.22 {rich_report.SCRIPT}",
        total_bytes=megabytes * 10**6 if megabytes else None,
        folder=name if measured else None,
        report=f"reports/{name}/report.json" if measured else None,
        windows=24 if measured else None,
        cost=Cost(cpu_seconds=104.3, seconds=71.2) if measured else None,
        identity="1" * 64 if measured else None,
    )


def _report(megabytes: int, drift: float, verdict: Verdict) -> Report:
    sizes = Sizes(parameters=PARAMETERS, total_bytes=megabytes * 10**6, bits_per_weight=megabytes * 8e6 / PARAMETERS)
    subject = reports.subject().model_copy(update={"sizes": sizes})
    others = [figure for figure in reports.figures() if figure.name != "mean_kl"]
    gate = GateResult(**{**reports.gate_result().model_dump(), "verdict": verdict})
    figures = [reports.figure("mean_kl", drift, half=drift / 20), *others]
    return reports.report([gate], subject=subject, figures=figures)
