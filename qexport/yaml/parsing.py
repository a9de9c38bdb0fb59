"""YAML 1.2 text and files as a tree with line numbers; features of YAML that settings do not need are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.reader import ReaderError

from qexport.errors import RecipeError
from qexport.yaml.problems import Problem, Scalar, YamlEntry, YamlNode, YamlOrigin, dotted

MAX_DEPTH = 50
MAX_BYTES = 1 << 18
"""The largest file that is read."""

MAX_VALUES = 10_000
"""Keys and values of a file."""

_LISTED = 20
"""Problems that an error shows."""

# The core schema of YAML 1.2.2, section 10.3.2: `no` is text, `1e-3` a number, a date text.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,1000}")
_BASED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_OR_NAN = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class SyntaxProblem(Exception):
    """The text is not a YAML document, so its values cannot be checked."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def parse(text: str, origin: YamlOrigin, *, numbered: bool = True) -> tuple[YamlNode | None, list[Problem]]:
    """Reads one document.

    Args:
        text: the YAML text.
        origin: where it was written.
        numbered: whether problems have line numbers (not on the command line).

    Returns:
        The root (None if the text is empty) and what was wrong: tags, duplicate keys, keys that are not scalars.

    Raises:
        SyntaxProblem: it is not YAML, holds several documents or more than `MAX_VALUES` keys and values, or nests
            deeper than `MAX_DEPTH`.
    """
    try:
        builder = _Builder(YAML(typ="safe", pure=True).parse(text), origin, numbered)
        return builder.document(), builder.problems
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if numbered else None
        message = f"the character U+{ord(text[error.position]):04X} is not allowed"
        raise SyntaxProblem(Problem(origin, line, "", message)) from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if numbered and error.problem_mark else None
        message = "not valid YAML: " + ", ".join(part for part in (error.context, error.problem) if part)
        raise SyntaxProblem(Problem(origin, line, "", message)) from error


class _Builder:
    """Builds the tree from the parser's events.

    Composing it here, not in ruamel.yaml, keeps the lines, sees every tag, and registers each anchor only after its
    value is complete, so that no alias can be inside its own value.
    """

    def __init__(self, events: Iterator[Any], origin: YamlOrigin, numbered: bool) -> None:
        self.events = events
        self.origin = origin
        self.numbered = numbered
        self.problems: list[Problem] = []
        self.anchors: dict[str, YamlNode] = {}
        self.values = 0

    def document(self) -> YamlNode | None:
        event = next(self.events)
        while not isinstance(event, DocumentStartEvent | StreamEndEvent):
            event = next(self.events)
        if isinstance(event, StreamEndEvent):
            return None
        root = self.node(next(self.events), ())
        next(self.events)
        after = next(self.events)
        if not isinstance(after, StreamEndEvent):
            raise self.fatal(after, "only one document is allowed: remove what follows `---`")
        return root

    def node(self, event: Event, keys: tuple[str, ...]) -> YamlNode:
        if isinstance(event, AliasEvent):
            return self.alias(event)
        if len(keys) > MAX_DEPTH:
            raise self.fatal(event, f"nested deeper than {MAX_DEPTH} levels")
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.fatal(event, f"more than {MAX_VALUES} keys and values")
        assert isinstance(event, NodeEvent)
        self.check_tag(event, keys)
        line = self.line(event)
        value: Any
        if isinstance(event, MappingStartEvent):
            value = self.mapping(keys)
        elif isinstance(event, SequenceStartEvent):
            value = self.sequence(keys)
        else:
            assert isinstance(event, ScalarEvent)
            value = event.value if event.style else scalar(event.value)
        node = YamlNode(value, self.origin, line)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def mapping(self, keys: tuple[str, ...]) -> dict[str, YamlEntry]:
        entries: dict[str, YamlEntry] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self.node(event, keys)
            line = self.line(event)
            name = self.key_name(event, key, keys)
            value = self.node(next(self.events), (*keys, name))
            if name in entries:
                first = f"; it is on line {entries[name].line} too" if self.numbered else ""
                self.problem(line, (*keys, name), f"duplicate key{first}")
            else:
                entries[name] = YamlEntry(value, line)
        return entries

    def sequence(self, keys: tuple[str, ...]) -> tuple[YamlNode, ...]:
        items: list[YamlNode] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            items.append(self.node(event, (*keys, str(len(items)))))
        return tuple(items)

    def alias(self, event: AliasEvent) -> YamlNode:
        if event.anchor not in self.anchors:
            raise self.fatal(event, f"*{event.anchor} names no complete value above it; quote it if it is text")
        return self.anchors[event.anchor]

    def key_name(self, event: Event, key: YamlNode, keys: tuple[str, ...]) -> str:
        if isinstance(event, ScalarEvent):
            return str(event.value)
        if isinstance(key.value, str):
            return key.value
        self.problem(self.line(event), keys, "a key must be one word")
        return ""

    def check_tag(self, event: NodeEvent, keys: tuple[str, ...]) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.problem(self.line(event), keys, f"the tag {tag} is not allowed: remove it")

    def line(self, event: Event) -> int | None:
        return event.start_mark.line + 1 if self.numbered else None

    def problem(self, line: int | None, keys: tuple[str, ...], message: str) -> None:
        self.problems.append(Problem(self.origin, line, dotted(keys), message))

    def fatal(self, event: Event, message: str) -> SyntaxProblem:
        return SyntaxProblem(Problem(self.origin, self.line(event), "", message))


def scalar(text: str) -> Scalar:
    """The value of an unquoted scalar by the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, base=0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_OR_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


@dataclass(frozen=True)
class FileKind:
    """How the errors of one kind of file name it.

    Attributes:
        name: for example `recipe`.
        needs: what such a file must hold at least.
        reference: where its fields are described.
    """

    name: str
    needs: str
    reference: str

    def read(self, path: Path, *, folder: Path | None = None) -> tuple[YamlNode, list[Problem]]:
        """The root, a mapping, and what was wrong with the YAML.

        Args:
            path: the file.
            folder: where relative paths in it start; the file's own folder if None.

        Raises:
            RecipeError: the file does not exist, is larger than `MAX_BYTES`, is not UTF-8, not YAML or not a mapping.
        """
        text = self._text(path)
        origin = YamlOrigin(str(path), (folder or path.parent).absolute())
        try:
            root, problems = parse(text, origin)
        except SyntaxProblem as error:
            raise self.error(path, [error.problem]) from error
        if root is None or not isinstance(root.value, Mapping):
            what = "is empty" if root is None or root.value is None else "is not a mapping of keys to values"
            raise RecipeError(f"the {self.name} {what}", where=str(path), mend=self.needs)
        return root, problems

    def error(self, path: Path, problems: Sequence[Problem]) -> RecipeError:
        """The problems in one error, sorted by line."""
        problems = sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  {problem}" for problem in problems[:_LISTED]]
        if len(problems) > _LISTED:
            lines.append(f"  and {len(problems) - _LISTED} more")
        return RecipeError("\n".join([f"the {self.name} has {count}:", *lines]), where=str(path), mend=self.reference)

    def _text(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                what = f"the {self.name} is larger than {MAX_BYTES} bytes"
                raise RecipeError(what, where=str(path), mend="give a shorter YAML file")
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"the {self.name} is not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}",
                where=str(path),
                mend="save it as UTF-8",
            ) from error
        except OSError as error:
            raise RecipeError(
                f"the {self.name} cannot be read: {error.strerror}",
                where=str(path),
                mend="give the path of a YAML file",
            ) from error
