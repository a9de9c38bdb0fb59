"""Prompts whose answers must have a form: JSON under a schema, a call of one of some tools, code that parses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from qexport.artifact.digests import sha256_json
from qexport.errors import InputError
from qexport.text.extraction import first_json, python_problem
from qexport.text.prompts import PromptSet, prompt_rows

if TYPE_CHECKING:
    from qexport.text.json_schema import JsonSchema

Tool = Mapping[str, Any]
"""A function that a model may call, as chat templates take it: `{"type": "function", "function": {...}}`."""


class Format(Protocol):
    """The form that an answer must have."""

    @property
    def kind(self) -> str:
        """`json`, `tools` or `code`."""
        ...

    def problem(self, text: str) -> str | None:
        """Why a text does not have the form; None if it has."""
        ...


class ToolCall:
    """A call of one of some tools, as JSON: an object, or a list of them, with the tool's `name` and its `arguments`
    (or `parameters`), which the tool's own schema accepts. That is how most chat templates have models write it.

    Args:
        tools: at least one, as chat templates take them.
        where: for errors.

    Raises:
        InputError: a tool has no name, a name is used twice, or its parameters are no JSON Schema.
    """

    kind: Final = "tools"

    def __init__(self, tools: Any, where: str) -> None:
        if not isinstance(tools, list) or not tools:
            raise InputError("format.tools must be a list of tools", where=where)
        from qexport.text.json_schema import JsonSchema  # takes a second

        self.tools: Sequence[Tool] = tools
        self._schemas: dict[str, JsonSchema] = {}
        for tool in tools:
            name, schema = _function(tool, where)
            if name in self._schemas:
                raise InputError(f"the tool {name!r} is listed twice", where=where)
            self._schemas[name] = JsonSchema(schema, where)

    def problem(self, text: str) -> str | None:
        """See `Format`."""
        try:
            value = first_json(text)
        except ValueError as error:
            return str(error)
        calls = value if isinstance(value, list) else [value]
        problems = [self._call_problem(call) for call in calls] or ["the list of calls is empty"]
        return next((problem for problem in problems if problem is not None), None)

    def _call_problem(self, call: Any) -> str | None:
        if not isinstance(call, dict):
            return "a call must be a JSON object"
        call = call.get("function", call) if isinstance(call.get("function"), dict) else call
        name = call.get("name")
        if not isinstance(name, str) or name not in self._schemas:
            return f"there is no tool of the name {name!r}"
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # as the API of OpenAI has it
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return "the arguments are no JSON"
        return self._schemas[name].value_problem(arguments)


class PythonCode:
    """Python code that parses with the Python that runs qexport. It is never run."""

    kind: Final = "code"

    def problem(self, text: str) -> str | None:
        """See `Format`."""
        return python_problem(text)


@dataclass(frozen=True)
class FormatPrompts:
    """Prompts and the form that each answer must have.

    Attributes:
        prompt_set: each prompt's domain is the kind of its format.
        formats: by the prompt's id.
        stated: the same as the file has them.
    """

    prompt_set: PromptSet
    formats: Mapping[str, Format]
    stated: Mapping[str, Any]

    @cached_property
    def sha256(self) -> str:
        """Hex digest of prompts and formats."""
        return sha256_json([self.prompt_set.sha256, dict(self.stated)])

    @property
    def tools(self) -> dict[str, Sequence[Tool]]:
        """The tools of each prompt that has some, by its id."""
        return {name: each.tools for name, each in self.formats.items() if isinstance(each, ToolCall)}


def read_format_prompts(path: Path) -> FormatPrompts:
    """The prompts of a JSONL file.

    Each line has `id`, either `prompt` or `messages`, and `format`: `{"json_schema": {...}}`, `{"tools": [...]}` or
    `{"code": "python"}`.

    Raises:
        InputError: as `read_prompts`, or a format is malformed; with file and line.
    """
    prompts, formats, stated = [], dict[str, Format](), dict[str, Any]()
    for where, row, prompt in prompt_rows(path):
        formats[prompt.id], stated[prompt.id] = _format(row.get("format"), where), row.get("format")
        prompts.append(replace(prompt, domain=formats[prompt.id].kind, style="clean", pair=None))
    return FormatPrompts(PromptSet(tuple(prompts), path.name), formats, stated)


def _format(value: Any, where: str) -> Format:
    mend = 'write one of {"json_schema": {...}}, {"tools": [...]} and {"code": "python"}'
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError("the field 'format' must be an object with one key", where=where, mend=mend)
    match value:
        case {"json_schema": dict() | bool() as schema}:
            from qexport.text.json_schema import JsonSchema  # takes a second

            return JsonSchema(schema, where)
        case {"tools": tools}:
            return ToolCall(tools, where)
        case {"code": "python"}:
            return PythonCode()
    raise InputError(f"unknown format {json.dumps(value)[:80]}", where=where, mend=mend)


def _function(tool: Any, where: str) -> tuple[str, Any]:
    """A tool's name, and the schema of its arguments."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise InputError(
            "a tool has no name",
            where=where,
            mend='write {"type": "function", "function": {"name": ..., "parameters": {...}}}',
        )
    return name, function.get("parameters", True)
