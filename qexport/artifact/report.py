"""The report: everything that verification found, as `report.json` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from qexport.artifact.consistency import contradictions
from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import Figure, GateResult, Verdict
from qexport.artifact.manifest import REPORT_FOLDER, LayerRecord, Sizes, SourceRecord
from qexport.artifact.record import Environment, Identity, Protocol, Record
from qexport.errors import InputError, listed

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


class Reference(Record):
    """What the artifact was held against."""

    base: SourceRecord
    adapter: SourceRecord | None
    dtype: str
    """What the blocks computed in."""


class Check(Record):
    """A check without statistics."""

    gate: str
    """The gate that it belongs to: `config`, `tokenizer` or `graph`."""

    name: str

    passed: bool | None
    """None where there was nothing to check."""

    detail: str
    """What was found."""


class Histogram(Record):
    """How many tokens have a KL divergence in which range."""

    edges: list[float]
    """Nats, rising; one more than bins. Values below the first edge and above the last are in the outer bins."""

    counts: list[int]


class MarginBin(Record):
    """Tokens by the reference's margin: the difference of its two likeliest tokens' log-probabilities, in nats."""

    low: float
    high: float | None
    """None: no upper end."""

    tokens: int

    flips: int
    """Those where the artifact holds another token for the likeliest."""


class BlockDrift(Record):
    """How far the hidden states behind a block are from the reference's."""

    name: str

    relative_error: float
    """Norm of the difference / norm of the reference's, over the measured windows of the first round."""


class WorstToken(Record):
    """A token where the artifact is far from the reference."""

    domain: str | None
    window: int
    position: int

    before: str
    """The text before it, cut to its last characters."""

    token: str
    kl: float
    reference_top: str
    reference_probability: float
    """Of the token that stands in the text; so are the artifact's."""

    artifact_top: str
    artifact_probability: float


class Comparison(Record):
    """The greedy continuations of one prompt. Tokens are counted up to and with an end."""

    id: str
    domain: str | None
    style: str | None
    pair: str | None

    prompt: str
    """As a reader would write it; messages one a line."""

    reference: str
    artifact: str
    reference_tokens: int
    artifact_tokens: int

    first_difference: int | None
    """Index of the first new token that differs; None where all are equal."""

    margin: float | None
    """The reference's margin there, in nats."""

    flips: int
    """Decisive flips along the reference's own tokens."""

    edit_distance: float
    chrf: float
    rouge_l: float
    reference_repetition: float
    artifact_repetition: float
    reference_hit_limit: bool
    artifact_hit_limit: bool


class SampledComparison(Record):
    """Continuations sampled by both models with the same seed."""

    id: str

    sample: int
    """Which of the prompt's samples, from 0."""

    seed: int
    reference: str
    artifact: str
    chrf: float


class Generations(Record):
    """Continuations of the prompts."""

    prompts: int
    identical: int
    max_new_tokens: int
    comparisons: list[Comparison]
    samples: list[SampledComparison]
    skipped: dict[str, str]
    """Prompts that were not continued, by their id, and why."""


class TaskRecord(Record):
    """A task of lm-evaluation-harness, paired by item."""

    task: str
    metric: str

    num_fewshot: int
    """Solved examples before each item."""

    sha256: str
    """Of the items: accuracies are comparable only where it is equal."""

    items: int
    reference_accuracy: float
    artifact_accuracy: float
    only_reference: int
    """Items that only the reference got right."""

    only_artifact: int
    p_value: float
    """Exact two-sided McNemar test."""


class Speed(Record):
    """Both models as a user runs them, in turn. Lists have one value a repeat."""

    prompt_tokens: int
    new_tokens: int
    reference_tokens_per_second: list[float]
    artifact_tokens_per_second: list[float]
    reference_first_token_seconds: list[float]
    artifact_first_token_seconds: list[float]
    reference_bytes: int
    """Parameters and buffers in memory."""

    artifact_bytes: int


class Timings(Record):
    """What differs from run to run."""

    seconds: float
    """How long verification took."""

    peak_memory_bytes: int | None
    """The process's peak resident main memory since its start: in a run the work before verification counts too."""

    speed: Speed | None
    speed_unmeasured: str | None
    """Why there is none."""

    figures: list[Figure]


class Report(Record):
    """The content of `report.json`."""

    schema_version: Literal[1]
    qexport_version: str
    verdict: Verdict
    subject: Subject
    reference: Reference
    identity: Identity
    protocol: Protocol
    figures: list[Figure]
    gates: list[GateResult]
    checks: list[Check]
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
        if wrong := contradictions(found):
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
