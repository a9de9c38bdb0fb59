"""The manifest: what an artifact consists of, what it was made from, and how it compares with its reference.

No time of day, host name, user name or path of the machine enters it, so that two machines write the same bytes. Only
the listing (`qexport.artifact.integrity`) is written after it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError, model_validator

from qexport.artifact import Environment, Identity, Protocol
from qexport.artifact.digests import sha256_json
from qexport.artifact.figures import Figure, GateResult, Verdict, find_figure
from qexport.errors import InputError
from qexport.records import LayerRecord, Record, added
from qexport.tensors.strict_files import read_bounded

MANIFEST_NAME = "qexport-manifest.json"
LISTING_NAME: Final = "SHA256SUMS"
CARD_NAME: Final = "README.md"
LICENSES_FOLDER: Final = "licenses"
SIGNATURE_NAME: Final = "model.sig"
REPORT_FOLDER = "report"
SCHEMA_VERSION = 2
_LARGEST: Final = 1 << 27


class FileRecord(Record):
    """A file of the artifact."""

    size: int
    """Bytes."""

    sha256: str


class TermsRecord(Record):
    """On which terms a base or an adapter may be used, as its own card and files say."""

    license: str | None
    """By the hub's name, for example `apache-2.0`; null if the card names none."""

    license_name: str | None
    """What the card calls a license that has no name on the hub."""

    license_link: str | None
    languages: list[str]

    files: list[str]
    """Its licenses and notices, by their paths inside the artifact."""


class SourceRecord(Record):
    """Where a base model or an adapter came from."""

    kind: Literal["folder", "file", "hub", "package", "combination"]

    name: str
    """The folder's or the file's last component, the hub id, or `package/file`; of a combination, its adapters."""

    revision: str | None
    """The commit that a hub id resolved to, or the package's version."""

    sha256: dict[str, str]
    """The digest of each file read, by its name."""

    terms: TermsRecord | None = added()
    """Null if its card names no license and no language, and no license or notice lies beside it."""

    read_as: str | None = added()
    """What the weights were turned into when they were read, for people: what a quantized base dequantizes to, or what
    a 16-bit base was in training. Null if they were used as they are stored."""

    weight: float | None = added()
    """Its share, if it is one of several adapters."""

    parts: list[SourceRecord] = added([])
    """The adapters that a combination was made of."""

    @property
    def each(self) -> list[SourceRecord]:
        """The adapters of a combination; else itself."""
        return self.parts or [self]


class CalibrationRecord(Record):
    """The calibration set. Its text is never stored."""

    sha256: str
    """The digest of the text that the tokens were made from."""

    origin: str
    samples: int
    sequence_length: int


class Sizes(Record):
    """How large the model is."""

    parameters: int
    """Parameters of the merged model; a tied head counts once."""

    total_bytes: int
    """Bytes of all tensors in the artifact."""

    bits_per_weight: float
    """8 * total_bytes / parameters: with scales, zero points and unquantized layers."""


class GraphRecord(Record):
    """The graph of the layout onnx."""

    ir_version: int

    opsets: dict[str, int]
    """The version of each domain's operators; an empty name stands for ONNX's own."""

    minimum_onnxruntime: str
    """The oldest ONNX Runtime that runs such graphs. The providers that were measured are in `verification.readers`."""

    activations: Literal["float32", "float16"]
    attention: Literal["plain", "fused"]

    accuracy_level: int
    """Of MatMulNBits; 4 lets ONNX Runtime round activations to 8 bits."""


class CardText(Record):
    """What the model card says of a layout, besides where it came from and how it was verified."""

    tag: str
    """For the hub's search by tags."""

    title: str
    """A few words for the heading."""

    text: str
    """Describes the weights; follows `Made with qexport from ...:`."""

    loading: str = ""
    """The section on libraries that load the folder; empty for a server's layout."""

    serving: list[str] = []
    """What users of a server should know."""


class Verification(Record):
    """The artifact, read back from disk, compared with the merged reference: the report's main points."""

    verdict: Verdict

    figures: list[Figure]
    """Over all text; the report has each domain's too."""

    gates: list[GateResult]
    identity: Identity
    protocol: Protocol

    readers: list[str]
    """The readers that confirmed these figures, with their versions."""

    unconfirmed: list[str]
    """What no reader confirmed."""

    report_sha256: str
    """The digest of the report without its timings, which differ from run to run."""

    def value(self, name: str) -> float:
        """The value of a figure.

        Raises:
            KeyError: it was not measured.
        """
        found = find_figure(self.figures, name)
        if found is None:
            raise KeyError(name)
        return found.value


class Manifest(Record):
    """The content of `qexport-manifest.json`."""

    schema_version: Literal[2]
    qexport_version: str
    environment: Environment

    layout: str
    """The layout's name in the recipe's `export`."""

    recipe: dict[str, Any]
    """The recipe with every default filled in and no path of the machine."""

    recipe_sha256: str
    """`sha256_json` of the recipe."""

    base: SourceRecord
    adapter: SourceRecord | None

    notes: list[str]
    """What a user should know, for example a base of another name, or a layer that fell back to round-to-nearest."""

    calibration: CalibrationRecord | None

    tokenizer: dict[str, str]
    """The digest of each tokenizer file, by its name."""

    quantization: dict[str, Any] | None
    """The artifact's `quantization_config`; None if it holds 16-bit weights."""

    graph: GraphRecord | None = None
    """The graph of the layout onnx; None for other layouts."""

    layers: list[LayerRecord]
    sizes: Sizes

    files: dict[str, FileRecord]
    """Every file of the artifact except manifest, listing and report, by its path inside the folder."""

    listing: Literal["SHA256SUMS"] | None = None
    """The file with the digests of all others, this manifest and the report among them; None if qexport 0.2 or older
    made the artifact, which wrote none.
    """

    verification: Verification | None

    card: CardText | None = added()
    """What README.md is rendered from, with the report; None if qexport 0.2 or older made the artifact."""

    launch: dict[str, Any] | None = added()
    """What the files in `launch/` are rendered from; None for the layout safetensors."""

    packages: dict[str, str] = added({})
    """The version of each installed package that qexport needs, when it made the artifact."""

    @property
    def sources(self) -> list[SourceRecord]:
        """Base and adapters."""
        return [source for _, source in self.roles]

    @property
    def roles(self) -> list[tuple[str, SourceRecord]]:
        """Base and adapters with what each is called; those of a combination are numbered."""
        found = [("base", self.base)]
        if self.adapter is not None and self.adapter.parts:
            found += [(f"adapter-{index}", each) for index, each in enumerate(self.adapter.parts, 1)]
        elif self.adapter is not None:
            found.append(("adapter", self.adapter))
        return found

    @model_validator(mode="after")
    def _recipe_fits_its_digest(self) -> Manifest:
        if sha256_json(self.recipe) != self.recipe_sha256:
            raise ValueError("recipe_sha256 is not the digest of recipe")
        return self

    def to_json(self) -> str:
        """The canonical text: sorted keys, two spaces, ASCII, a newline at the end."""
        return _canonical(self.model_dump(mode="json"))

    def write(self, folder: Path) -> Path:
        """Writes the manifest into an artifact's folder, under its fixed name."""
        path = folder / MANIFEST_NAME
        path.write_text(self.to_json(), encoding="ascii")
        return path

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest.

        Args:
            path: the file, or the artifact's folder.

        Raises:
            InputError: it is missing, not JSON, of another schema version, a field is wrong, or its text is not the
                canonical one, so that it was changed after it was written.
        """
        path = path / MANIFEST_NAME if path.is_dir() else path
        text = _read_text(path)
        content = _parsed(text, path)
        _check_schema_version(content, path)
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise InputError(f"the manifest is malformed: {problems}", where=str(path)) from error
        if text != _canonical(content):
            raise InputError(
                "the manifest has changed since it was written: its text is not in canonical form",
                where=str(path),
                mend="fetch the artifact again",
            )
        return found


def _canonical(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _read_text(path: Path) -> str:
    try:
        return read_bounded(path, _LARGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the manifest cannot be read", where=str(path), mend="give a folder that qexport has published"
        ) from error


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the manifest is not JSON: {error}", where=str(path)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _check_schema_version(content: Any, path: Path) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise InputError(f"schema_version must be {SCHEMA_VERSION}, not {version!r}", where=str(path))
    if version < SCHEMA_VERSION:
        raise InputError(
            f"the manifest has schema_version {version}; this qexport reads {SCHEMA_VERSION}",
            where=str(path),
            mend="make the artifact again, or read it with the qexport that made it",
        )
    if version > SCHEMA_VERSION:
        raise InputError(
            f"the manifest has schema_version {version}; this qexport reads up to {SCHEMA_VERSION}",
            where=str(path),
            mend="read it with the qexport that wrote it, or a newer one",
        )
