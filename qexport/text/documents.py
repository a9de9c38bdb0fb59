"""Documents: the texts and conversations that a recipe names, from files and from datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

from qexport.artifact.digests import sha256_json
from qexport.errors import InputError
from qexport.references import DATASET_PREFIX
from qexport.tensors.strict_files import parse_json

_LINE_BYTES: Final = 1 << 26


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each object with its place, `file:line`, for error messages. Blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or a line is too long, not UTF-8, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), start=1):
                if len(line) > _LINE_BYTES:
                    what = f"the line is longer than {_LINE_BYTES} bytes"
                    raise InputError(what, where=f"{path}:{number}", mend="write one JSON object per line")
                if line.strip():
                    yield f"{path}:{number}", _parse_object(line, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    value = parse_json(line.removeprefix(b"\xef\xbb\xbf"), where=where)
    if not isinstance(value, dict):
        raise InputError(f"each line must hold a JSON object, not {type(value).__name__}", where=where)
    return value


def read_hub_dataset(source: str, *, split: str, revision: str | None) -> Iterable[Mapping[str, Any]]:
    """The rows of `hub:org/dataset`. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean to `datasets`.

    Raises:
        InputError: `datasets` is not installed, or it cannot read the dataset (its message is included).
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hub datasets need the package datasets",
            where=source,
            mend="pip install qexport[datasets], or name a .jsonl or .txt file",
        ) from error
    try:
        rows = datasets.load_dataset(source.removeprefix(DATASET_PREFIX), split=split, revision=revision)
    except Exception as error:  # the package, the hub client and the file readers raise exceptions of any type
        raise InputError(
            f"datasets cannot read it: {error}",
            where=f"{source}, split {split}",
            mend="check the id, split and revision; offline, only data in the cache can be read",
        ) from error
    return cast(Iterable[Mapping[str, Any]], rows)


Message = dict[str, str]
"""`role` and `content`."""

Document = str | tuple[Message, ...]
"""A text, or a conversation."""

_MESSAGES: Final = "messages"
_DOMAIN: Final = "domain"


@dataclass(frozen=True)
class Documents:
    """The documents that were read, in their order, without blank ones.

    Attributes:
        items: texts, and conversations.
        origin: the files' names or the dataset's id, without any path of this machine.
        domains: the kind of text of each item, None if its line has no `domain`; empty if no line has one.
    """

    items: tuple[Document, ...]
    origin: str
    domains: tuple[str | None, ...] = ()

    def by_domain(self) -> dict[str | None, Documents]:
        """The documents of each domain; domains are in the order of their first document."""
        if not self.domains:
            return {None: self}
        found: dict[str | None, list[Document]] = {}
        for item, domain in zip(self.items, self.domains, strict=True):
            found.setdefault(domain, []).append(item)
        return {domain: Documents(tuple(items), self.origin) for domain, items in found.items()}

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the documents in their order: `sha256_json` of the list of the `sha256_json` of each.

        It depends on the text alone, not on file names, formats, or other fields of a JSON line.
        """
        return sha256_json([sha256_json(item) for item in self.items])

    @cached_property
    def document_digests(self) -> frozenset[str]:
        """Digests that are equal for equal documents, regardless of white space."""
        return frozenset(sha256_json(_without_white_space(item)) for item in self.items)


def read_documents(
    sources: Sequence[str], *, field: str = "text", split: str = "train", revision: str | None = None
) -> Documents:
    """Reads files and hub datasets.

    A `.txt` file is one document. In a `.jsonl` file, as in a dataset, each line is one: its `field` (a text, or a
    list of messages), or its `messages` if it has no such field. Its `domain` names the kind of text.

    Args:
        sources: paths that end in `.jsonl` or `.txt`, and `hub:org/dataset`.
        field: the field that holds the text.
        split: the split of a hub dataset; slices such as `train[:1000]` are read as `datasets` reads them.
        revision: branch, tag or commit of a hub dataset.

    Raises:
        InputError: a source cannot be read, or a line has neither text nor messages; with file and line.
    """
    found: list[tuple[Document, str | None]] = []
    for source in sources:
        read = [(item, domain) for item, domain in _read(source, field, split, revision) if _without_white_space(item)]
        if not read:
            raise InputError("it contains no text", where=source)
        found += read
    items, domains = zip(*found, strict=True)
    origin = ", ".join(_origin(source, split, revision) for source in sources)
    return Documents(items, origin, domains if any(domains) else ())


def refuse_shared(calibration: Documents, held_out: Documents) -> None:
    """Checks that the held-out text and the calibration text share no documents, whichever files they are in.

    Raises:
        InputError: they share documents (apart from white space).
    """
    shared = len(calibration.document_digests & held_out.document_digests)
    if shared:
        raise InputError(
            f"{shared} of the {len(held_out.document_digests)} held-out documents are calibration documents too",
            where=f"held-out text {held_out.origin}, calibration text {calibration.origin}",
            mend="verify on text that the method has not seen; otherwise the figures look better than they are",
        )


def _read(source: str, field: str, split: str, revision: str | None) -> Iterator[tuple[Document, str | None]]:
    if source.startswith(DATASET_PREFIX):
        rows = read_hub_dataset(source, split=split, revision=revision)
        return (_row(row, field, f"{source}, row {number}") for number, row in enumerate(rows))
    path = Path(source)
    if path.suffix == ".jsonl":
        return (_row(row, field, where) for where, row in read_json_lines(path))
    if path.suffix == ".txt":
        return iter([(_read_text(path), None)])
    raise InputError(
        f"text is read from .jsonl and .txt files, not from {path.suffix or 'files without an ending'}",
        where=source,
        mend="for .jsonl write one JSON object per line, with a field text",
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"not UTF-8: {error.reason}", where=f"{path}:{line}", mend="convert the file to UTF-8"
        ) from error


def _row(row: Mapping[str, Any], field: str, where: str) -> tuple[Document, str | None]:
    domain = row.get(_DOMAIN)
    if domain is not None and not isinstance(domain, str):
        raise InputError(f"domain must be a text, not {type(domain).__name__}", where=where)
    return as_document(row, field, where), domain or None


def as_document(row: Mapping[str, Any], field: str, where: str) -> Document:
    """The text or the conversation in a row: its `field`, or its `messages` if it has no such field.

    Raises:
        InputError: both are missing, the type is wrong, or the text holds a lone surrogate; with `where`.
    """
    name = field if field in row else _MESSAGES
    if name not in row:
        close = get_close_matches(field, row, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"set field to one of: {', '.join(row) or '(none)'}"
        raise InputError(f"there is neither a field {field!r} nor messages", where=where, mend=hint)
    value = row[name]
    if isinstance(value, str):
        return encodable(value, where)
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return tuple(_message(message, where) for message in value)
    raise InputError(f"{name} must be a text or a list of messages, not {type(value).__name__}", where=where)


def _message(message: Mapping[str, Any], where: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError("a message needs role and content, both texts", where=where)
    return {"role": encodable(role, where), "content": encodable(content, where)}


def encodable(text: str, where: str) -> str:
    """The text itself, checked to be encodable in UTF-8.

    Raises:
        InputError: it holds a lone surrogate, half a character; with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"half a character (a lone surrogate) at position {error.start}", where=where) from error
    return text


def _without_white_space(document: Document) -> str | list[list[str]]:
    if isinstance(document, str):
        return " ".join(document.split())
    return [[message["role"], " ".join(message["content"].split())] for message in document]


def _origin(source: str, split: str, revision: str | None) -> str:
    if not source.startswith(DATASET_PREFIX):
        return Path(source).name
    return f"{source}@{revision} [{split}]" if revision else f"{source} [{split}]"
