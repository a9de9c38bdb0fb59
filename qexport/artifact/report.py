"""The report: everything that verification found, as `report.json` holds it, and a check for contradictions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version as package_version
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from qexport.artifact import Environment, Identity, Protocol
from qexport.artifact.answers import Answers, impossible_answers
from qexport.artifact.baseline import BaselineRecord, DocumentSums, impossible_baseline, impossible_sums
from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import CATALOGUE, CheckResult, Figure, GateResult, Verdict, overall
from qexport.artifact.manifest import REPORT_FOLDER, Sizes, SourceRecord
from qexport.artifact.measurements import (
    BlockDrift,
    Generations,
    Histogram,
    MarginBin,
    TaskRecord,
    Timings,
    WeightsRecord,
    WorstToken,
)
from qexport.artifact.served import ServedRecord
from qexport.errors import InputError, listed
from qexport.records import LayerRecord, Record, added
from qexport.tensors.strict_files import read_bounded

_BITS: Final = (2, 3, 4, 8)


def impossible_figures(figures: Sequence[Figure]) -> Iterator[str]:
    """Contradictions in the figures of the measurement and of the speed."""
    counted = Counter((figure.name, figure.domain) for figure in figures)
    for figure in figures:
        place = figure.name if figure.domain is None else f"{figure.name}[{figure.domain}]"
        if figure.name not in CATALOGUE:
            yield f"{place}: unknown figure"
        if counted.pop((figure.name, figure.domain), 0) > 1:
            yield f"{place}: is listed more than once"
        if figure.n < 1 or (figure.tokens is not None and figure.tokens < 0):
            yield f"{place}: measured on {figure.n} units and {figure.tokens} tokens"
        for low, high in ((figure.low, figure.high), (figure.sequence_low, figure.sequence_high)):
            if low is not None and high is not None and low > high:
                yield f"{place}: an interval from {low:g} to {high:g}"


def impossible_drift(histogram: Histogram, flips: Sequence[MarginBin], blocks: Sequence[BlockDrift]) -> Iterator[str]:
    """Contradictions in the distribution of the drift."""
    edges, counts = histogram.edges, histogram.counts
    rising = all(low < high for low, high in pairwise(edges))
    if len(counts) < 1 or len(edges) != len(counts) + 1 or not rising or edges[0] < 0 or min(counts) < 0:
        yield "kl_histogram: edges and counts do not fit together"
    if any(each.flips < 0 or each.tokens < each.flips for each in flips):
        yield "flips_by_margin: more flips than tokens"
    if any(each.relative_error < 0 for each in blocks):
        yield "block_drift: an error below 0"


def impossible_layers(layers: Sequence[LayerRecord]) -> Iterator[str]:
    """Contradictions in the records of the layers."""
    for layer in layers:
        if layer.bits not in _BITS:
            yield f"{layer.name}: {layer.bits} bits"
        if any(value is not None and value < 0 for value in (layer.loss, layer.rtn_loss, layer.damp_percent)):
            yield f"{layer.name}: a loss or damping below 0"


def impossible_weights(weights: WeightsRecord) -> Iterator[str]:
    """Contradictions in the comparison of the weights."""
    if not 0 <= len(weights.unequal) <= weights.unquantized:
        yield f"weights: {len(weights.unequal)} unequal of {weights.unquantized} unquantized tensors"
    for layer in weights.layers:
        if min(layer.relative_error, layer.nearest_error, layer.worst_row, layer.worst_row_ratio) < 0:
            yield f"weights: {layer.name}: an error or a row below 0"


def impossible_sizes(sizes: Sizes, reference_bytes: int) -> Iterator[str]:
    """Contradictions in the sizes of the artifact and the merged model."""
    if min(sizes.parameters, sizes.total_bytes, reference_bytes) < 1 or sizes.bits_per_weight <= 0:
        yield "subject: a size that is not above 0"


def impossible_verdict(verdict: Verdict, gates: Sequence[GateResult]) -> Iterator[str]:
    """Contradictions in the verdicts of the whole and of each gate."""
    if verdict != (found := overall(gate.verdict for gate in gates)):
        yield f"verdict: {verdict}, but its gates give {found}"
    for gate in gates:
        if gate.passed and gate.figure is not None and None in (gate.value, gate.low, gate.high, gate.limit):
            yield f"gate {gate.name}: passed without a measured value"


REPORT_NAME: Final = "report.json"
_LARGEST: Final = 1 << 27
SCHEMA_VERSION: Final = 1


class Subject(Record):
    """The artifact that was measured."""

    name: str
    """For people: the folder's last component, or base and adapter."""

    layouts: list[str]
    """The layouts whose weights these are; empty for a folder that another program made."""

    method: str
    """For people, for example `GPTQ, 4 bits, group_size 64, symmetric`."""

    sizes: Sizes
    reference_bytes: int
    """Bytes of the merged model's tensors in the dtype of the merge."""

    weights_sha256: dict[str, str]
    """The digest of each weight file, by its name."""


class ReferenceRecord(Record):
    """What the artifact was compared with."""

    base: SourceRecord
    adapter: SourceRecord | None
    dtype: str
    """What the blocks computed in."""


class ProfileRecord(Record):
    """The limits that hold where the user sets none."""

    name: str
    """`off` if there are none."""

    strict: bool
    """Whether they are those of the variant `strict`."""

    chosen: str
    """How it was chosen: `by method and size`, or `by name`."""

    reason: str
    """What its limits are derived from."""


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
    profile: ProfileRecord | None = added()
    checks: list[CheckResult]
    kl_histogram: Histogram
    flips_by_margin: list[MarginBin]
    block_drift: list[BlockDrift]
    worst_tokens: list[WorstToken]
    generations: Generations | None
    tasks: list[TaskRecord]
    formats: Answers | None = added()
    refusals: Answers | None = added()
    needles: Answers | None = added()
    layers: list[LayerRecord]
    weights: WeightsRecord | None = added()
    """None in the reports of versions that did not compare weights."""

    document_sums: DocumentSums | None = added()
    """What a later release is compared with, paired by document. None in the reports of versions that did not record
    it."""

    baseline: BaselineRecord | None = added()
    """The release that the artifact was compared with. Absent if none was named."""

    notes: list[str]
    readers: list[str]
    unconfirmed: list[str]
    environment: Environment

    served: list[ServedRecord] = added([])
    """The artifact as other runtimes compute it. Absent if none was asked."""

    served_in: str | None = added()
    """The layout of the same run with the same weights that runtimes have computed in place of this one: its report has
    the gates on what only runtimes tell. Absent if there is none."""

    command: str
    """The command that repeats the measurement."""

    timings: Timings

    @property
    def all_figures(self) -> list[Figure]:
        """Those of the measurement and those of the speed."""
        return [*self.figures, *self.timings.figures]

    @property
    def domains(self) -> list[str]:
        """The domains of the held-out text, in their order."""
        text = (f for f in self.figures if f.unit in {"document", "window"} and CATALOGUE[f.name].teacher_forced)
        found = (f.domain for f in text if f.domain is not None)
        return list(dict.fromkeys(found))

    def contradictions(self) -> list[str]:
        """What cannot be true of any measurement, one sentence each; empty for a report that qexport wrote."""
        return [
            *impossible_figures(self.all_figures),
            *(problem for each in self.served for problem in impossible_figures(each.figures)),
            *impossible_drift(self.kl_histogram, self.flips_by_margin, self.block_drift),
            *impossible_answers("formats", self.formats),
            *impossible_answers("refusals", self.refusals),
            *impossible_answers("needles", self.needles),
            *impossible_layers(self.layers),
            *([] if self.weights is None else impossible_weights(self.weights)),
            *([] if self.document_sums is None else impossible_sums(self.document_sums, self.figures)),
            *([] if self.baseline is None else impossible_baseline(self.baseline)),
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
            InputError: it is missing, not JSON, of another schema version, a field is wrong, or it contradicts
                itself.
        """
        place = report_path(path)
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
            own = found.qexport_version == package_version("qexport")
            other = f"qexport {found.qexport_version} wrote it: read it with that version, or verify the artifact again"
            raise InputError(
                f"the report contradicts itself: {listed(wrong)}",
                where=str(place),
                mend="verify the artifact again" if own else other,
            )
        return found


def report_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json`."""
    return Report.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def report_path(path: Path) -> Path:
    """The path of report.json, from its own, an artifact's folder or its report's folder."""
    with suppress(OSError):  # reading such a path fails too, with an error
        return next((at for at in (path / REPORT_FOLDER / REPORT_NAME, path / REPORT_NAME) if at.is_file()), path)
    return path


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _read_object(place: Path) -> Mapping[str, Any]:
    try:
        text = read_bounded(place, _LARGEST).decode("utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except (OSError, UnicodeDecodeError) as error:
        mend = "name a report.json, or a folder that was verified"
        raise InputError("the report cannot be read", where=str(place), mend=mend) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the report is not JSON: {error}", where=str(place)) from error
    if not isinstance(content, dict):
        raise InputError("the report is not a JSON object", where=str(place))
    return content
