"""The report: everything that verification found, as `report.json` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from qexport.artifact.consistency import (
    impossible_drift,
    impossible_figures,
    impossible_layers,
    impossible_sizes,
    impossible_verdict,
)
from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import CheckResult, Figure, GateResult, Verdict
from qexport.artifact.manifest import REPORT_FOLDER, Sizes, SourceRecord
from qexport.artifact.measurements import (
    BlockDrift,
    Generations,
    Histogram,
    MarginBin,
    TaskRecord,
    Timings,
    WorstToken,
)
from qexport.artifact.record import Environment, Identity, Protocol
from qexport.errors import InputError, listed
from qexport.records import LayerRecord, Record

REPORT_NAME: Final = "report.json"
SCHEMA_VERSION: Final = 1


class Subject(Record):
    """The artifact that was measured."""

    name: str
    """For a reader: the folder's last component, or base and adapter."""

    layouts: list[str]
    """The layouts whose weights these are; empty for a folder of another maker."""

    method: str
    """For a reader, for example `GPTQ, 4 bits, group_size 64, symmetric`."""

    sizes: Sizes
    reference_bytes: int
    """Bytes of the merged model's tensors in the dtype of the merge."""

    weights_sha256: dict[str, str]
    """The digest of each weight file, by its name."""


class ReferenceRecord(Record):
    """What the artifact was held against."""

    base: SourceRecord
    adapter: SourceRecord | None
    dtype: str
    """What the blocks computed in."""


class Report(Record):
    """The content of `report.json`."""

    schema_version: Literal[1]
    qexport_version: str
    verdict: Verdict
    subject: Subject
    reference: ReferenceRecord
    identity: Identity
    protocol: Protocol
    figures: list[Figure]
    gates: list[GateResult]
    checks: list[CheckResult]
    kl_histogram: Histogram
    flips_by_margin: list[MarginBin]
    block_drift: list[BlockDrift]
    worst_tokens: list[WorstToken]
    generations: Generations | None
    tasks: list[TaskRecord]
    layers: list[LayerRecord]
    notes: list[str]
    readers: list[str]
    unconfirmed: list[str]
    environment: Environment

    command: str
    """Measures the same again."""

    timings: Timings

    @property
    def all_figures(self) -> list[Figure]:
        """Those of the measurement and those of the speed."""
        return [*self.figures, *self.timings.figures]

    @property
    def domains(self) -> list[str]:
        """The domains of the held-out text, in their order."""
        found = (f.domain for f in self.figures if f.unit == "window" and f.domain is not None)
        return list(dict.fromkeys(found))

    def contradictions(self) -> list[str]:
        """What cannot be true of any measurement, one sentence each; none in a report that qexport has written."""
        return [
            *impossible_figures(self.all_figures),
            *impossible_drift(self.kl_histogram, self.flips_by_margin, self.block_drift),
            *impossible_layers(self.layers),
            *impossible_sizes(self.subject.sizes, self.subject.reference_bytes),
            *impossible_verdict(self.verdict, self.gates),
        ]

    def digest(self) -> str:
        """The hex digest of all but `timings`, which is the same for the same artifact, text and machine type."""
        return sha256_json(self.model_dump(mode="json", exclude={"timings"}))

    def to_json(self) -> str:
        """The canonical text: sorted keys, two spaces, ASCII, a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Report:
        """Reads a report.

        Args:
            path: the file, an artifact's folder, or its report's folder.

        Raises:
            InputError: there is none, it is no JSON, a newer qexport wrote it, a field is wrong, or it contradicts
                itself.
        """
        place = _place(path)
        content = _read_object(place)
        version = content.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise InputError(
                f"the report has schema_version {version!r}; this qexport reads {SCHEMA_VERSION}",
                where=str(place),
                mend="read it with the qexport that wrote it, or verify the artifact again",
            )
        try:
            found = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise InputError(f"the report is malformed: {listed(problems)}", where=str(place)) from error
        if wrong := found.contradictions():
            raise InputError(
                f"the report contradicts itself: {listed(wrong)}", where=str(place), mend="verify the artifact again"
            )
        return found


def report_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json`."""
    return Report.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def _place(path: Path) -> Path:
    with suppress(OSError):  # a path that cannot be looked at cannot be read either, which is told there
        return next((at for at in (path / REPORT_FOLDER / REPORT_NAME, path / REPORT_NAME) if at.is_file()), path)
    return path


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _read_object(place: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, UnicodeDecodeError) as error:
        mend = "name a report.json, or a folder that was verified"
        raise InputError("the report cannot be read", where=str(place), mend=mend) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the report is no JSON: {error}", where=str(place)) from error
    if not isinstance(content, dict):
        raise InputError("the report is no JSON object", where=str(place))
    return content
